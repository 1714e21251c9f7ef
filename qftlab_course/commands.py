"""The course's commands, which `qftlab` shows among its own; torch is not imported, so `--help` is fast."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.commands import Command, hide_loading_bars, load_for
from qftlab.settings import AnswerConfig, Names, check_at_least
from qftlab_course.agent_edit.commands import COMMANDS as AGENT_EDIT


@dataclass(frozen=True)
class EvaluateConfig(AnswerConfig):
    """Asks a model every row of a file and prints what is right, with 95 % intervals.

    Rows with a skill of the course are scored by its rule. Of any other row three things are measured: `exact` (the
    answer is the reference, but for case, blanks and punctuation), `contained` (the reference stands in the answer, in
    whole words) and the loss of the references. What a model thinks counts for neither of the first two.

    Args:
        data: rows with an answer, of any layout that `sft` reads, one source or [several]; of a conversation the last
            answer is asked for. By default the bundled held-out rows.
        columns: the rows' own names of fields, as in '{prompt: q, output: a}'.
        split: of folders and hub names.
        limit: ask only so many rows.
        few_shot: 0 asks in the chat format; k shows k solved examples as plain text: the fair way to ask a base model.
        max_new_tokens: the most tokens an answer may have; by default half as many again as the longest reference.
            Give more to a model that thinks.
        output: also write a page with the table, .html or .md.
        seed: of the sampling and of the choice of examples.
        batch_size: rows asked at once.

    Raises:
        ValueError: for a value out of range.
    """

    data: Names = ()
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    limit: int | None = None
    few_shot: int = 0
    max_new_tokens: int | None = None
    output: str = ""
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, few_shot=self.few_shot)
        check_at_least(1, limit=self.limit, batch_size=self.batch_size)
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
    from qftlab.evaluate.answers import answered_row
    from qftlab.files import bundled
    from qftlab.rows.examples import load_wanted, place_of
    from qftlab_course.measure import evaluate_rows, reference_loss
    from qftlab_course.report import Section, format_cell, write_report
    from qftlab_course.scores import skill_of

    files = config.data or [str(bundled("instructions", "heldout.jsonl"))]
    rows, sources = load_wanted(files, "sft", config.columns, split=config.split, limit=config.limit)
    rows = [answered_row(row, place_of(number, sources)) for number, row in enumerate(rows, 1)]
    model, tokenizer, options = load_for(config)
    options = {"few_shot": config.few_shot, "batch_size": config.batch_size, "sources": sources} | options
    result = evaluate_rows(model, tokenizer, rows, **options)
    table, said = result.to_frame(), f"{len(rows)} rows of {', '.join(files)}."
    print(table.map(format_cell).to_string())
    if not (config.few_shot or all(map(skill_of, rows))):
        loss, low, high, count = reference_loss(model, tokenizer, rows, sources=sources, batch_size=config.batch_size)
        line = f"loss: {loss:.3f} nats a token of {count} references, 95 % interval {low:.3f} to {high:.3f}"
        said = f"{said} {line}"
        print(line)
    if config.output:
        sections = [Section("By skill", said, table)]
        print(f"page: {write_report(config.output, f'Evaluation of {config.model}', sections)}")


def run_compare(config) -> None:
    """Writes the page and says where it is."""
    from qftlab_course.compare_page import compare

    print(f"page: {compare(config)}")


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
    "compare": Command("a page over evaluations of the same rows: what each stage gave and cost",
                       "compare --evaluations [outputs/initial,outputs/sft,outputs/dpo,outputs/rloo]",
                       "qftlab_course.compare:CompareConfig", run_compare),
    "stages": Command("train the course models of data/stages anew",
                      "stages --output runs/anew/stages", "qftlab_course.commands:StagesConfig", run_stages),
    "pretrain": Command("rebuild the bundled model `tiny` from nothing (about an hour of one core)",
                        "pretrain --output data/tiny", "qftlab_course.world.pretrain:PretrainConfig", run_pretrain),
    **AGENT_EDIT,
}  # fmt: skip
