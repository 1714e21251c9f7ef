"""The public names as a type checker sees them: right uses pass, wrong ones do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qftlab
from qftlab import DPOConfig, LoRAConfig, RLOOConfig, RewardConfig, SamplingParams, SFTConfig, TrainConfig

model: PreTrainedModel = qftlab.load_model("tiny")
tokenizer: PreTrainedTokenizerBase = qftlab.load_tokenizer("tiny")
qftlab.extend_model(model, tokenizer, qftlab.extend_tokenizer(tokenizer, ["<|AGENT|>"]))
chat = [{"role": "user", "content": "What is 2 + 3?"}]
ids: list[int] = qftlab.render_prompt(tokenizer, chat)
masks: list[list[bool]] = [one.loss_mask for one in qftlab.render_chat(tokenizer, chat)]
params = SamplingParams(temperature=1.0, top_p=0.9)
texts: list[str] = [c.text for c in qftlab.generate(model, tokenizer, [chat, ids, "2 + 3 ="], params=params)]
pieces: list[str] = list(qftlab.stream(model, tokenizer, chat, max_new_tokens=8))
best: str = qftlab.beam_search(model, tokenizer, [chat], num_beams=2)[0].text
rows: list[dict] = qftlab.load_rows("rows.jsonl")
train = TrainConfig(lr=1e-3, schedule="linear", max_steps=3)
losses: list[float] = qftlab.fit_rows(model, tokenizer, rows, train).losses
for run in (qftlab.sft(SFTConfig(data="rows.jsonl", train=train, lora=LoRAConfig(rank=8))), qftlab.dpo(DPOConfig()),
            qftlab.rloo(RLOOConfig()), qftlab.reward(RewardConfig())):
    folder: Path = run
loss: torch.Tensor = qftlab.masked_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
low, high = qftlab.wilson_interval(3, 10)
"""
WRONG = {
    'qftlab.generate(model, tokenizer, ["2"], max_new_tokens="3")': 'expected "int | Sequence[int]"',
    'qftlab.generate(model, tokenizer, ["2"], temperature=1.0)': 'Unexpected keyword argument "temperature"',
    'TrainConfig(schedule="none")': "expected \"Literal['cosine', 'linear', 'constant']\"",
    'qftlab.sft(SFTConfig(data="rows.jsonl")).losses': '"Path" has no attribute "losses"',
    "qftlab.load_models": 'has no attribute "load_models"',
}


@pytest.mark.slow
def test_the_public_names_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: pip install -c constraints.txt -e '.[types]'")
    file, lines = tmp_path / "use.py", RIGHT.splitlines()
    file.write_text("\n".join([*lines, *WRONG]), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent).stdout
    errors = {int(line.split(":")[1]): line for line in said.splitlines() if ": error:" in line}
    assert list(errors) == [len(lines) + i + 1 for i in range(len(WRONG))], said
    for error, words in zip(errors.values(), WRONG.values(), strict=True):
        assert words in error
