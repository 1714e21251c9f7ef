"""The command line: `python -m qftlab COMMAND`. Options and YAML build the dataclasses that notebooks build in Python.

Only what a command needs is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qftlab import __version__
from qftlab.core.options import parse_config

PROGRAM = "python -m qftlab"
log = logging.getLogger(__name__)


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
    from qftlab.model.export import Card, export_model

    model, tokenizer = load_named(config.model, dtype_of_run(config), config.device)
    report = export_model(model, tokenizer, config.output, card=Card(base=config.base, data=config.data), in_place=True)
    print(f"{report.path}: {report.positions} greedy tokens as before, largest difference of a logit "
          f"{report.largest_difference:.1e} of the largest one (allowed {report.tolerance:.0e})")  # fmt: skip


def dtype_of_run(config) -> str:
    """The dtype asked for; for `auto` that in which the run trained: adapters in fp32 may stand on weights in bf16."""
    from qftlab.train.runs import METRICS, own_settings, resolve_model

    # model/, checkpoints/initial and checkpoints/final are one or two folders below the run.
    above = Path(resolve_model(config.model)).resolve().parents[:2]
    run = next((folder for folder in above if (folder / METRICS).is_file()), None)
    if config.dtype != "auto" or run is None:
        return config.dtype
    asked = own_settings(run).get("dtype", "auto")
    return "float32" if asked == "float16" else asked  # training never computes in fp16


def run_generate(config) -> None:
    """Prints the answers."""
    from qftlab.generate.engine import generate

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
    from qftlab.generate.engine import generate

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


def read_turn(source: TextIO, is_terminal: bool) -> str | None:
    """The next line, without the white space around it; None at the end."""
    if is_terminal:
        print("You:   ", end="", flush=True)
    line = source.readline()
    return line.strip() if line else None


def fit_context(model, tokenizer, messages: list[dict], kept: int, max_new_tokens: int) -> list[dict]:
    """The conversation without its oldest turns, where it has outgrown the model's context; the first `kept` stay."""
    from qftlab.text.chat import render_prompt
    from qftlab.train.sft import context_length

    limit = context_length(model)
    while limit and len(messages) > kept + 1 and len(render_prompt(tokenizer, messages)) + max_new_tokens > limit:
        log.warning("the conversation has outgrown %d tokens: its oldest turn is forgotten", limit)
        messages = messages[:kept] + messages[kept + 2 :]
    return messages


def run_evaluate(config) -> None:
    """Prints the table, and writes the page if asked."""
    from qftlab.core.files import bundled
    from qftlab.data.sources import load_rows
    from qftlab.evaluate.report import Section, format_cell, write_report
    from qftlab.evaluate.skills import evaluate_rows

    files = list(config.data) or [str(bundled("instructions", "heldout.jsonl"))]
    rows = load_rows(files)[: config.limit]
    for number, row in enumerate(rows, 1):
        if "output" not in row:
            raise ValueError(f"row {number} of {files} must have instruction and output, got {', '.join(row)}")
    model, tokenizer = load_named(config.model, config.dtype, config.device)
    result = evaluate_rows(model, tokenizer, rows, few_shot=config.few_shot, max_new_tokens=config.max_new_tokens,
                           seed=config.seed, batch_size=config.batch_size)  # fmt: skip
    table = result.to_frame()
    print(table.map(format_cell).to_string())
    if config.output:
        sections = [Section("By skill", f"{len(rows)} rows of {', '.join(files)}.", table)]
        print(f"page: {write_report(config.output, f'Evaluation of {config.model}', sections)}")


def load_named(name: str, dtype: str, device: str) -> tuple:
    """Model and tokenizer by the name a user gives."""
    from qftlab.model.loading import load_model
    from qftlab.text.tokenizer import load_tokenizer
    from qftlab.train.runs import resolve_model
    from qftlab.train.sft import best_device

    hide_loading_bars()
    folder = resolve_model(name)
    return load_model(folder, dtype=dtype, device=best_device(device)), load_tokenizer(folder)


def hide_loading_bars() -> None:
    """Turns off transformers' bars, which are longer than the loading of a small model takes."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def load_for(config) -> tuple:
    """Model, tokenizer and the options of `generate`."""
    from qftlab.core.sampling import SamplingParams

    params = SamplingParams(**dataclasses.asdict(config.sampling))
    model, tokenizer = load_named(config.model, config.dtype, config.device)
    return model, tokenizer, {"max_new_tokens": config.max_new_tokens, "params": params, "seed": config.seed}


def run_tour(config) -> None:
    """Runs the tour; exit code 1 if a stage missed its bar."""
    from qftlab.teach import tour

    hide_loading_bars()
    try:
        tour.main(config)
    except tour.MissedError as error:
        raise SystemExit(complain(f"tour: {error}", 1)) from None


def run_pretrain(config) -> None:
    """Pretrains `tiny`."""
    from qftlab.train.pretrain import pretrain

    print(f"model: {pretrain(config)}")


def text_of(function: str) -> Callable[[typing.Any], None]:
    """A command that prints the text a library function ("module:function") makes of its configuration."""

    def run(config) -> None:
        module, _, name = function.partition(":")
        print(getattr(importlib.import_module(module), name)(config))

    return run


@dataclass(frozen=True)
class Command:
    """A command: what it does, an example, where its configuration is ("module:class"), and what runs it."""

    summary: str
    example: str
    config: str
    run: Callable[[typing.Any], None]


COMMANDS = {
    "tour": Command("the whole way in minutes: two new tokens, SFT, DPO, RLOO, a page of results",
                    "tour", "qftlab.teach.tour:TourConfig", run_tour),
    "sft": Command("supervised fine-tuning on files of rows",
                   "sft --data data/instructions/train.jsonl --train.epochs 1 --output runs/sft",
                   "qftlab.train.config:SFTConfig", trains("qftlab.train.sft:sft")),
    "dpo": Command("direct preference optimisation on files of pairs",
                   "dpo --model runs/sft/latest --data pairs.jsonl --loss.beta 0.5 --loss.nll_weight 1",
                   "qftlab.train.preference_config:DPOConfig", trains("qftlab.train.dpo:dpo")),
    "rloo": Command("policy gradient on rollouts that functions or a model reward",
                    "rloo --model runs/sft/latest --problems 2000 --rewards [countdown] --policy.num_generations 8",
                    "qftlab.train.policy_config:RLOOConfig", trains("qftlab.train.rloo:rloo")),
    "reward": Command("a reward model from files of pairs, which `rloo --reward_model` takes",
                      "reward --model runs/sft/latest --data pairs.jsonl --output runs/reward",
                      "qftlab.train.policy_config:RewardConfig", trains("qftlab.train.reward:reward", chats=False)),
    "generate": Command("answers to prompts, from an option or standard input",
                        'generate --prompt "What is 47 + 38?" --model runs/sft/latest',
                        "qftlab.generate.config:GenerateConfig", run_generate),
    "chat": Command("a conversation in the terminal",
                    "chat --model runs/sft/latest --sampling.temperature 0.7",
                    "qftlab.generate.config:ChatConfig", run_chat),
    "evaluate": Command("accuracy by skill on held-out rows, with intervals",
                        "evaluate --model runs/sft/latest --data data/bugfix/heldout.jsonl",
                        "qftlab.evaluate.config:EvaluateConfig", run_evaluate),
    "export": Command("adapters merged and checked, in a folder that transformers and vLLM load",
                      "export --model runs/sft/latest --output exported", "qftlab.model.config:ExportConfig",
                      run_export),
    "data": Command("reads files, folders and hub names of rows, and says what is in them and what is wrong",
                    "data --data [rows.jsonl,more.csv] --bad report", "qftlab.data.commands:DataConfig",
                    text_of("qftlab.data.commands:describe")),
    "lengths": Command("how long rows are in tokens, and which are longer than a limit",
                       "lengths --data data/instructions/train.jsonl --max_length 64",
                       "qftlab.data.commands:LengthsConfig", text_of("qftlab.data.commands:measure")),
    "split": Command("a seeded split without a prompt on both sides, or (--against) what two sets share",
                     "split --data rows.jsonl --output runs/split", "qftlab.data.commands:SplitConfig",
                     text_of("qftlab.data.commands:divide")),
    "pretrain": Command("rebuild the bundled model `tiny` from nothing (about an hour of one core)",
                        "pretrain --output data/tiny", "qftlab.train.pretrain:PretrainConfig", run_pretrain),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: what stands after the program's name, by default on the command line.

    Returns:
        The exit code: 0, 2 for a mistake of the user's (one message, no traceback), 130 after Ctrl-C.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"qftlab {__version__}")
        return 0
    if name not in COMMANDS:
        return complain(f"{name!r} is no command; there are {', '.join(COMMANDS)}: {PROGRAM} --help")
    is_verbose = "--verbose" in rest
    # The tour says itself what the log would say.
    level = logging.DEBUG if is_verbose else logging.WARNING if name == "tour" else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in () if is_verbose else ("httpx", "matplotlib", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        COMMANDS[name].run(parse(name, [a for a in rest if a != "--verbose"]))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What reads our output has had enough; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        log.debug("traceback:", exc_info=True)
        return complain(f"{name}: {error}")
    return 0


def complain(message: str, code: int = 2) -> int:
    """One message to standard error; returns the exit code."""
    print(f"qftlab {message}" if ": " in message else message, file=sys.stderr)
    return code


def overview() -> str:
    """The help of the whole program."""
    lines = [f"usage: {PROGRAM} COMMAND [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:9} {command.summary}", f"            {PROGRAM} {command.example}", ""]
    lines += [
        f"Options of a command:        {PROGRAM} sft --help",
        f"Its settings as YAML:        {PROGRAM} sft --data rows.jsonl --print_config > sft.yaml",
        f"Run them, with one changed:  {PROGRAM} sft --config sft.yaml --train.lr 5e-4",
        "A trained model stays in its run folder; runs/sft/latest is the last one.",
        "--verbose logs more, and shows where an error came from.",
    ]
    return "\n".join(lines)


def parse(name: str, arguments: Sequence[str]) -> object:
    """The configuration of a command, from flags and YAML.

    Raises:
        ValueError: for an unknown option or an unfit value.
        SystemExit: after `--help` and `--print_config`.
    """
    command = COMMANDS[name]
    module, _, kind = command.config.partition(":")
    about = f"{command.summary[0].upper()}{command.summary[1:]}. Example: {PROGRAM} {command.example}"
    config_class = getattr(importlib.import_module(module), kind)
    return parse_config(config_class, with_own_settings(config_class, arguments), f"{PROGRAM} {name}", about)


def with_own_settings(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a run to resume, behind the settings it began with: what is given besides must equal them."""
    resume, arguments = option(arguments, "resume"), list(arguments)
    if not resume or resume == "null" or option(arguments, "config") or not hasattr(config_class, "resume"):
        return arguments
    from qftlab.train.runs import find_run, own_settings

    run = find_run(resume, Path(option(arguments, "output") or config_class.output))
    return ["--config", json.dumps(own_settings(run)), *arguments]


def option(arguments: Sequence[str], name: str) -> str:
    """The value of `--name value` or `--name=value`, the last one; empty if there is none."""
    found = [after for one, after in zip(arguments, arguments[1:], strict=False) if one == f"--{name}"]
    found += [one.partition("=")[2] for one in arguments if one.startswith(f"--{name}=")]
    return found[-1] if found else ""
