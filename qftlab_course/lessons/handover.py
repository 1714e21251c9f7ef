"""A model handed over: what a process says that has only the exported folder and plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, messages, most = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=most, do_sample=False)
print(json.dumps(answer[0, prompt["input_ids"].shape[1]:].tolist()))
"""


def answer_in_a_fresh_process(folder: str | Path, messages: list[dict], max_new_tokens: int) -> list[int]:
    """The greedy token ids of plain transformers on an exported folder, in a process that knows nothing of qftlab.

    Args:
        folder: what `export_model` wrote.
        messages: the conversation so far.
        max_new_tokens: the most tokens of the answer.

    Raises:
        RuntimeError: with the end of its words, if the process fails.
    """
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(messages), str(max_new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"the fresh process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
