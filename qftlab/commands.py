"""The library's commands: what each does with its configuration, and the table of them.

Another package adds its own through the entry-point group `qftlab.commands`: a dict of names and `Command`s. Only what
a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from qftlab.settings import ENABLE_THINKING

PROGRAM = "python -m qftlab"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A command: what it does, an example, where its configuration is ("module:class"), and what runs it.

    One that `speaks` says itself what the log would say, so only warnings are logged.
    """

    summary: str
    example: str
    config: str
    run: Callable[[typing.Any], None]
    speaks: bool = False


def trains(function: str, chats: bool = True) -> Callable[[typing.Any], None]:
    """A command that trains by a library function ("module:function") and says where the model is."""

    def run(config) -> None:
        module, _, name = function.partition(":")
        hide_loading_bars()
        folder = getattr(importlib.import_module(module), name)(config, progress=sys.stderr.isatty())
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"model, metrics and curves: {folder}")
            if chats:
                print(f'try it: {PROGRAM} chat --model "{folder}"')

    return run


def run_export(config) -> None:
    """Merges, checks and writes, and says what was checked."""
    from qftlab.model.lora import adapter_base
    from qftlab.serve.handover import dtype_of_run, hand_over
    from qftlab.train.run import resolve_model

    base = config.base if adapter_base(resolve_model(config.model)) else ""
    model, tokenizer = load_named(config.model, dtype_of_run(config), config.device, base)
    print(hand_over(model, tokenizer, config, progress=sys.stderr.isatty()))


def run_generate(config) -> None:
    """Prints the answers."""
    from qftlab.decoding.engine import generate

    prompts = [config.prompt] if config.prompt else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if config.num_generations > 1 and not config.sampling.temperature:
        log.warning("%d answers to a prompt are all the same at temperature 0: --sampling.temperature 1 samples them",
                    config.num_generations)  # fmt: skip
    if not prompts:
        raise ValueError('prompt must be given, got none: --prompt "..." or lines on standard input')
    model, tokenizer, options = load_for(config)
    asked = prompts if config.raw else [[{"role": "user", "content": p}] for p in prompts]
    answers = generate(model, tokenizer, asked, num_generations=config.num_generations, stop=config.stop,
                       batch_size=config.batch_size, **options)  # fmt: skip
    for i, answer in enumerate(answers):
        prompt = prompts[i // config.num_generations]
        record = {"prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason}
        print(json.dumps(record, ensure_ascii=False) if config.format == "jsonl" else answer.text, flush=True)


def run_chat(config, source: TextIO | None = None) -> None:
    """Reads turns from a terminal or a pipe and answers each."""
    from qftlab.decoding.engine import generate

    model, tokenizer, options = load_for(config)
    source = sys.stdin if source is None else source
    is_terminal = source.isatty()
    if is_terminal:
        print("Ask something. /new starts a new conversation, /quit ends.")
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(start)
    while (line := read_turn(source, is_terminal)) is not None:
        if line == "/quit":
            break
        if line == "/new":
            messages = list(start)
        if not line or line == "/new":
            continue
        messages = fit_context(model, tokenizer, [*messages, {"role": "user", "content": line}], len(start),
                               config.max_new_tokens)  # fmt: skip
        text = generate(model, tokenizer, [messages], **options)[0].text
        messages.append({"role": "assistant", "content": text})
        print(f"Model: {text}" if is_terminal else text, flush=True)


def run_serve(config) -> None:
    """Answers clients until it is told to stop."""
    from qftlab.serve.app import serve

    serve(*load_named(config.model, config.dtype, config.device, config.base), config)


def read_turn(source: TextIO, is_terminal: bool) -> str | None:
    """The next line, without the white space around it; None at the end."""
    if is_terminal:
        print("You:   ", end="", flush=True)
    line = source.readline()
    return line.strip() if line else None


def fit_context(model, tokenizer, messages: list[dict], kept: int, max_new_tokens: int) -> list[dict]:
    """The conversation without its oldest turns, where it has outgrown the model's context; the first `kept` stay."""
    from qftlab.model.head import context_length
    from qftlab.rows.chat import render_prompt

    limit = context_length(model)
    while limit and len(messages) > kept + 1 and len(render_prompt(tokenizer, messages)) + max_new_tokens > limit:
        log.warning("the conversation has outgrown %d tokens: its oldest turn is forgotten", limit)
        messages = messages[:kept] + messages[kept + 2 :]
    return messages


def load_named(name: str, dtype: str, device: str, base: str = "") -> tuple:
    """Model and tokenizer by the name a user gives; `base` is that of a folder of adapters, where it has moved."""
    from qftlab.model.loading import load_model
    from qftlab.rows.tokenizer import load_tokenizer
    from qftlab.train.run import best_device, resolve_model

    hide_loading_bars()
    folder = resolve_model(name)
    source, lora = (resolve_model(base), folder) if base else (folder, None)
    return load_model(source, lora=lora, dtype=dtype, device=best_device(device)), load_tokenizer(folder)


def hide_loading_bars() -> None:
    """Turns off transformers' bars, which are longer than the loading of a small model takes."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def load_for(config) -> tuple:
    """Model, tokenizer and the options of `generate`."""
    from qftlab.maths.sampling import SamplingParams
    from qftlab.rows.tokenizer import set_thinking_

    params = SamplingParams(**dataclasses.asdict(config.sampling))
    model, tokenizer = load_named(config.model, config.dtype, config.device, config.base)
    set_thinking_(tokenizer, ENABLE_THINKING[config.thinking])
    return model, tokenizer, {"max_new_tokens": config.max_new_tokens, "params": params, "seed": config.seed}


def text_of(function: str) -> Callable[[typing.Any], None]:
    """A command that prints the text a library function ("module:function") makes of its configuration."""

    def run(config) -> None:
        module, _, name = function.partition(":")
        print(getattr(importlib.import_module(module), name)(config))

    return run


COMMANDS = {
    "sft": Command("supervised fine-tuning on files of rows",
                   "sft --data data/instructions/train.jsonl --train.epochs 1 --output runs/sft",
                   "qftlab.settings:SFTConfig", trains("qftlab.train.sft:sft")),
    "dpo": Command("direct preference optimisation on files of pairs",
                   "dpo --model runs/sft/latest --data pairs.jsonl --loss.beta 0.5 --loss.nll_weight 1",
                   "qftlab.settings:DPOConfig", trains("qftlab.train.dpo:dpo")),
    "rloo": Command("policy gradient on rollouts that functions or a model reward",
                    "rloo --model runs/sft/latest --problems 2000 --rewards [countdown] --policy.num_generations 8",
                    "qftlab.settings:RLOOConfig", trains("qftlab.train.rloo:rloo")),
    "reward": Command("a reward model from files of pairs, which `rloo --reward_model` takes",
                      "reward --model runs/sft/latest --data pairs.jsonl --output runs/reward",
                      "qftlab.settings:RewardConfig", trains("qftlab.train.reward:reward", chats=False)),
    "generate": Command("answers to prompts, from an option or standard input",
                        'generate --prompt "What is 47 + 38?" --model runs/sft/latest',
                        "qftlab.settings:GenerateConfig", run_generate),
    "chat": Command("a conversation in the terminal",
                    "chat --model runs/sft/latest --sampling.temperature 0.7",
                    "qftlab.settings:ChatConfig", run_chat),
    "export": Command("adapters merged and checked, in a folder that transformers and vLLM load",
                      "export --model runs/sft/latest --output exported --gguf q8_0", "qftlab.serve:ExportConfig",
                      run_export),
    "serve": Command("answers clients of the OpenAI protocol, with a chat page", "serve --model runs/sft/latest",
                     "qftlab.serve:ServeConfig", run_serve),
    "data": Command("reads files, folders and hub names of rows, and says what is in them and what is wrong",
                    "data --data [rows.jsonl,more.csv] --bad report", "qftlab.evaluate.data:DataConfig",
                    text_of("qftlab.evaluate.data:describe")),
    "lengths": Command("how long rows are in tokens, and which are longer than a limit",
                       "lengths --data data/instructions/train.jsonl --max_length 64",
                       "qftlab.evaluate.lengths:LengthsConfig", text_of("qftlab.evaluate.lengths:measure")),
    "split": Command("a seeded split without a prompt on both sides, or (--against) what two sets share",
                     "split --data rows.jsonl --output runs/split", "qftlab.evaluate.split:SplitConfig",
                     text_of("qftlab.evaluate.split:divide")),
}  # fmt: skip
