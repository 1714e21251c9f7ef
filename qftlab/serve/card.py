"""The card of an exported model: how it was made, as its runs recorded it, what it scored, and what was checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from qftlab.files import read_json, resolve
from qftlab.model.export import ExportReport
from qftlab.model.loading import END_OF_TURN
from qftlab.model.lora import adapter_base
from qftlab.serve import ExportConfig
from qftlab.train.run import METRICS, resolve_model

GGUF = "model.gguf"
RESULTS = "evaluation_results.json"  # of `evaluate`
# The settings that a card tells: none is a path, an address or the name of a key.
TOLD = """
    train.lr train.epochs train.max_steps train.batch_size train.schedule train.seed lora.rank lora.alpha dtype quant
    max_length train_on new_tokens loss.loss_type loss.beta loss.nll_weight problems rewards policy.num_generations
    policy.temperature policy.beta
""".split()
TALK = [{"role": role, "content": f"{role}?"} for role in ("system", "user", "assistant", "user")]
CHATML = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Card:
    """What a card says besides what was checked.

    Args:
        base: the name of the model it was made from.
        licence: the base's, as the hub names it, and in a sentence; see `licence_of`.
        stages: what each run did, first stage first: {"stage": "sft", "data": …, "settings": …, "held out": …}.
        data: what it was trained on, in words, besides.
        scores: of an evaluation: {scorer: {"mean", "low", "high", "rows"}}.
    """

    base: str = ""
    licence: tuple[str, str] = ("", "")
    stages: Sequence[Mapping[str, str]] = ()
    data: Sequence[str] = ()
    scores: Mapping[str, Mapping] = field(default_factory=dict)


def run_of(name: str | Path) -> Path | None:
    """The folder of the run that a model is of, which holds model/, checkpoints/initial and checkpoints/final."""
    folder = Path(resolve_model(name))
    above = folder.resolve().parents[:2] if folder.exists() else ()
    return next((folder for folder in above if (folder / METRICS).is_file()), None)


def card_of(config: ExportConfig) -> Card:
    """The facts of a model's run and, because each names the model it began with, of the runs before it.

    Args:
        config: of the export; its `base` and `data` are taken as given, its `evaluation` before the run's own.

    Raises:
        FileNotFoundError: if `evaluation` is no evaluation.
        ValueError: if a file of a run is damaged.
    """
    stages, model, run = [], config.model, run_of(config.model)
    results = (Path(config.evaluation) if config.evaluation else run or Path()) / RESULTS
    scores = read_json(results)["scores"] if config.evaluation or (run and results.is_file()) else {}
    while run:
        record = read_json(run / "config.json")
        stages.insert(0, _stage(run, record))
        model = str(record.get("start") or record["config"]["model"])
        run = run_of(model) if "start" in record else None  # without it, `latest` may lead elsewhere by now
    base = config.base or adapter_base(model) or model
    return Card(named(base), licence_of(base), stages, config.data, scores)


def named(source: str) -> str:
    """A folder's or file's own name, or a name on the hub: no path of this machine."""
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def _stage(run: Path, record: Mapping) -> dict[str, str]:
    """What one run did, in words."""
    settings, usage = record["config"], [*run.glob("*_usage.json")]
    rows = read_json(usage[0])["sources"] if usage else {}
    data = [f"{named(name)}" + (f" ({rows[name]} rows)" if name in rows else "") for name in settings["data"]]
    found = {}
    for name in TOLD:
        first, _, second = name.partition(".")
        value = settings.get(first, {}).get(second) if second else settings.get(first)
        if value not in (None, 0, "", "none", []) and not (first == "lora" and not settings["lora"]["rank"]):
            found[second or first] = ", ".join(value) if isinstance(value, list) else value
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    held = [json.loads(line) for line in lines if "held_out_" in line and line.endswith("}")]
    first, last = (held[0], held[-1]) if held else ({}, {})
    told = [f"{key[9:]} {first[key]:.4g} → {value:.4g}" for key, value in last.items() if key != "step"]
    where = ", ".join(map(named, settings["held_out"]))
    return {
        "stage": str(record.get("stage", "trained")),
        "data": ", ".join(data) or f"{settings.get('problems')} fresh Countdown problems",
        "settings": ", ".join(f"{key} {value}" for key, value in found.items()),
        "held out": f"{where}: {', '.join(told)} in {last['step']} steps" if held else "",
    }


def licence_of(base: str) -> tuple[str, str]:
    """The licence's name on the hub, where the base's own card gives it, and what is known of it: never a guess."""
    texts = []
    for name in ("README.md", "LICENSE", "LICENSE.txt"):
        try:
            file = cached_file(resolve(base), name, _raise_exceptions_for_missing_entries=False)
            texts.append(Path(file).read_text(encoding="utf-8") if file else "")
        except (OSError, ValueError):
            texts.append("")
    if found := re.match(r"---\n(?:(?!---).*\n)*?license: *[\"']?([\w.+-]+)", texts[0]):
        return found[1], f"{found[1]}, says the card of {named(base)}."
    if first := next((line.strip() for text in texts[1:] for line in text.splitlines() if line.strip()), ""):
        return "", f'The LICENSE of {named(base)} begins "{first}".'
    return "", f"unknown: {named(base)} has no LICENSE, and no card that names one. Look before you publish."


def card_text(name: str, card: Card, report: ExportReport, tokenizer: PreTrainedTokenizerBase, gguf: str = "") -> str:
    """The README of an exported model, in the hub's form: facts as given, checks as measured, commands as they are.

    Args:
        name: of the model.
        card: how it was made.
        report: what was checked.
        tokenizer: with the chat template that Ollama shall follow.
        gguf: the name of the GGUF file in the folder, if there is one.
    """
    text = (Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}
    facts = {"tokens": len(tokenizer), "end_of_turn": END_OF_TURN, "end": tokenizer.get_vocab().get(END_OF_TURN)}
    facts |= {"has_template": bool(tokenizer.chat_template), "is_chatml": _is_chatml(tokenizer), "gguf": gguf}
    return Environment(**options).from_string(text).render(name=name, card=card, report=report, **facts)


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation is worded as plain ChatML, which Ollama is told by a template of its own."""
    try:
        return tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == CHATML
    except (ValueError, TemplateError):  # it has no template, or one that wants other roles
        return False
