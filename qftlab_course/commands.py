"""The course's commands, which `qftlab` shows among its own; torch is not imported, so `--help` is fast."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qftlab.commands import Command, hide_loading_bars, load_named
from qftlab.settings import check_at_least


@dataclass(frozen=True)
class EvaluateConfig:
    """Asks a model every row of a file and prints the accuracy of each skill, with 95 % intervals.

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        base: of a model that is a folder of adapters: where their base is now, if it has moved.
        data: rows with instruction, input and output, one file or [several]; the bundled held-out rows by default.
        few_shot: 0 asks in the chat format; k shows k solved examples as plain text: the fair way to ask a base model.
        limit: ask only so many rows.
        max_new_tokens: the most tokens an answer may have; by default half as many again as the longest reference.
        output: also write a page with the table, .html or .md.
        seed: of the choice of examples.
        batch_size: rows asked at once.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    base: str = ""
    data: tuple[str, ...] | str = ()
    few_shot: int = 0
    limit: int | None = None
    max_new_tokens: int | None = None
    output: str = ""
    seed: int = 0
    batch_size: int = 64
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(0, few_shot=self.few_shot)
        check_at_least(1, limit=self.limit, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(self.data))
        if self.output and not self.output.endswith((".html", ".md")):
            raise ValueError(f"output must end in .html or .md, got {self.output!r}")


@dataclass(frozen=True)
class StagesConfig:
    """Where the course models go that are trained anew.

    Args:
        output: a folder; by default data/stages itself, whose models ship with the lab.
    """

    output: str = ""


def run_tour(config) -> None:
    """Runs the tour; exit code 1 if a stage missed its bar."""
    from qftlab_course import tour

    hide_loading_bars()
    try:
        tour.main(config)
    except tour.MissedError as error:
        print(f"qftlab tour: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def run_evaluate(config) -> None:
    """Prints the table, and writes the page if asked."""
    from qftlab.files import bundled
    from qftlab.rows.sources import load_rows
    from qftlab_course.measure import evaluate_rows
    from qftlab_course.report import Section, format_cell, write_report

    files = list(config.data) or [str(bundled("instructions", "heldout.jsonl"))]
    rows = load_rows(files)[: config.limit]
    for number, row in enumerate(rows, 1):
        if "output" not in row:
            raise ValueError(f"row {number} of {files} must have instruction and output, got {', '.join(row)}")
    model, tokenizer = load_named(config.model, config.dtype, config.device, config.base)
    result = evaluate_rows(model, tokenizer, rows, few_shot=config.few_shot, max_new_tokens=config.max_new_tokens,
                           seed=config.seed, batch_size=config.batch_size)  # fmt: skip
    table = result.to_frame()
    print(table.map(format_cell).to_string())
    if config.output:
        sections = [Section("By skill", f"{len(rows)} rows of {', '.join(files)}.", table)]
        print(f"page: {write_report(config.output, f'Evaluation of {config.model}', sections)}")


def run_pretrain(config) -> None:
    """Pretrains `tiny`."""
    from qftlab_course.world.pretrain import pretrain

    print(f"model: {pretrain(config)}")


def run_stages(config) -> None:
    """Trains the course models anew."""
    from qftlab.files import bundled
    from qftlab_course.stages import rebuild

    rebuild(Path(config.output) if config.output else bundled("stages"))


COMMANDS = {
    "tour": Command("the whole way in minutes: two new tokens, SFT, DPO, RLOO, a page of results",
                    "tour", "qftlab_course.tour:TourConfig", run_tour, speaks=True),
    "evaluate": Command("accuracy by skill on held-out rows, with intervals",
                        "evaluate --model runs/sft/latest --data data/bugfix/heldout.jsonl",
                        "qftlab_course.commands:EvaluateConfig", run_evaluate),
    "stages": Command("train the course models of data/stages anew",
                      "stages --output runs/anew/stages", "qftlab_course.commands:StagesConfig", run_stages),
    "pretrain": Command("rebuild the bundled model `tiny` from nothing (about an hour of one core)",
                        "pretrain --output data/tiny", "qftlab_course.world.pretrain:PretrainConfig", run_pretrain),
}  # fmt: skip
