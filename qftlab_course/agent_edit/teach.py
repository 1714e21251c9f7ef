"""`qftlab teach-data`: AGENT/EDIT rows by a teacher behind any endpoint of OpenAI's protocol."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qftlab.files import aside
from qftlab.remote.client import Budget
from qftlab.settings import AGENT, EDIT, Names, ServerConfig, check_at_least, check_fields

log = logging.getLogger(__name__)
MOST = 20_000  # different programs of the bug set
OUTPUT = "outputs/training_data/training_data_from_parquet.json"  # the original's default


@dataclass(frozen=True)
class TeachConfig:
    """Makes training rows with both modes by asking a teacher; what was answered is kept and never asked again.

    The key is read from the environment variable named by `key`, and written nowhere. A run that was killed, or that
    ended because of its server or its budget, goes on when the same command is given again.

    Args:
        data: problems, one source or [several]: LiveCodeBench, LiveBench coding, HumanEvalFix, files or hub names.
        problems: so many programs of the bundled bug set, in place of data.
        samples: rows to make; more than there are problems is possible.
        threads: requests at a time; fewer while the server says it is busy.
        output: the raw list; beside it come `_alpaca.json` and `_invalid.json`, a journal, and a report (in
            outputs/reports, if the list is in a folder training_data).
        model: the teacher, as its server names it.
        url: of the server, such as http://localhost:8000/v1; by default the environment's OPENAI_BASE_URL.
        key: the environment variable with the server's key.
        recipe: `whole` lets the teacher write everything, as the original did; `reasoned` takes its reasons only and
            writes the call itself, from a mended program that passes the problem's tests.
        language: of the questions.
        tries: of a row, until it is valid.
        balance: leaves the surplus of one mode out of `_alpaca.json`.
        retries: of a request that failed.
        timeout: seconds a request may take.
        temperature: of the teacher.
        max_tokens: of an answer.
        sandbox: where programs run, for their own errors and to test fixes: `auto` takes `monty` or `bwrap`; `process`
            is no boundary, only limits, and has to be named.
        budget: caps on requests, tokens and money.
        seed: of the plan and of the wording.

    Raises:
        ValueError: for a value out of range, and without data, problems or a server.
    """

    data: Names = ()
    problems: int = 0
    samples: int = 100
    threads: int = 32
    output: str = OUTPUT
    model: str = "gpt-4.1"
    url: str = ""
    key: str = "OPENAI_API_KEY"
    recipe: Literal["whole", "reasoned"] = "whole"
    language: Literal["en", "zh"] = "en"
    tries: int = 3
    balance: bool = False
    retries: int = 8
    timeout: float = 120.0
    temperature: float = 0.7
    max_tokens: int = 2048
    sandbox: Literal["auto", "monty", "bwrap", "process"] = "auto"
    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(1, samples=self.samples, tries=self.tries, max_tokens=self.max_tokens)
        check_at_least(0, problems=self.problems, temperature=self.temperature)
        if self.problems > MOST:
            raise ValueError(f"problems must be at most {MOST}, got {self.problems}: the bug set has few more")
        if bool(self.data) == bool(self.problems):
            raise ValueError("data or problems must be given, one of them: --data problems.jsonl, or --problems 128 "
                             "for the bundled bug set")  # fmt: skip
        if not self.output.endswith(".json"):
            raise ValueError(f"output must end in .json, got {self.output!r}")

    def server(self) -> ServerConfig:
        """The server, as the client takes it.

        Raises:
            ValueError: without an address, and for one that is none.
        """
        if not (url := self.url or os.environ.get("OPENAI_BASE_URL", "")):
            raise ValueError("url must be given, got none: --url http://localhost:8000/v1, or OPENAI_BASE_URL in the "
                             "environment")  # fmt: skip
        return ServerConfig(url=url, model=self.model, key=self.key, threads=self.threads, retries=self.retries,
                            timeout=self.timeout)  # fmt: skip


def make_set(config: TeachConfig, *, progress: bool = False) -> list[Path]:
    """Makes the rows and writes them; what was made before an error is written as well.

    Returns:
        The raw list, the valid rows, the invalid ones, the report.

    Raises:
        ServerError, BudgetError, KeyboardInterrupt: as the client says.
        SandboxError: if programs cannot be run here; nothing was asked then.
    """
    from qftlab.remote.client import Client
    from qftlab_course.agent_edit.problems import bug_problems, read_problems
    from qftlab_course.agent_edit.recipes import RECIPES, can_show, check_sandbox
    from qftlab_course.agent_edit.teacher import plan, teach

    server, rows, paths = config.server(), [], []
    problems = bug_problems(config.problems, config.seed) if config.problems else read_problems(config.data)
    check_sandbox(problems, config.sandbox)
    tasks = plan(problems, config.samples, (AGENT, EDIT), seed=config.seed, fits=can_show(config.sandbox))
    recipe = RECIPES[config.recipe](config.language, config.sandbox)
    settings = {"model": config.model, "temperature": config.temperature, "max_tokens": config.max_tokens}
    with Client(server, Path(config.output).with_suffix(".journal.jsonl"), config.budget) as client:
        try:
            for row in teach(client, tasks, recipe, settings, tries=config.tries, progress=progress):
                rows.append(row)
        finally:
            if rows and len(rows) < len(tasks):
                log.warning("%d of %d rows are made and written; the same command goes on", len(rows), len(tasks))
            paths = write_set(rows, config.output, config.samples, client.totals, config.balance) if rows else []
    return paths


def write_set(
    rows: Iterable[dict], output: str | Path, planned: int, totals: object = "", balance: bool = False
) -> list[Path]:
    """Writes a set as `data_constructor.py` names its files, in the plan's order.

    Rows that are valid by themselves are judged once more against each other: a later one that repeats an earlier one
    is not valid.

    Args:
        rows: of `teach`, in any order.
        output: of the raw list, `.json`; beside it come `_alpaca` (valid rows) and `_invalid`, and a report, which
            stands in `reports` where the list is in a folder `training_data`.
        planned: rows that were asked for.
        totals: of the client, for the report.
        balance: leaves so many of the more frequent mode's valid rows out of `_alpaca`, the last ones, that all modes
            are there equally often; in the raw list they have a field `surplus`.

    Returns:
        The four paths, the report's last.
    """
    from qftlab_course.agent_edit.outputs import read_cases, validate_cases
    from qftlab_course.report import write_json

    output, rows = Path(output), sorted(rows, key=lambda row: row["item_id"])
    found = validate_cases(read_cases(rows, str(output)))
    for row, verdict in zip(rows, found.verdicts, strict=True):
        if row["valid"] and not verdict.ok:
            row["valid"], row["issues"] = False, [verdict.reason]
    modes = Counter(row["expected_type"] for row in rows if row["valid"])
    left = dict.fromkeys(modes, min(modes.values(), default=0) if balance else len(rows))
    for row in rows:
        if row["valid"]:
            left[row["expected_type"]] -= 1
            row |= {"surplus": True} if left[row["expected_type"]] < 0 else {}
    folder = output.parent.parent / "reports" if output.parent.name == "training_data" else output.parent
    alpaca = [{"instruction": row["instruction"], "input": "", "output": row["output"]}
              for row in rows if row["valid"] and not row.get("surplus")]  # fmt: skip
    invalid = [row for row in rows if not row["valid"]]
    paths = [write_json(output.with_name(f"{output.stem}{tail}.json"), found)
             for tail, found in (("", rows), ("_alpaca", alpaca), ("_invalid", invalid))]  # fmt: skip
    told = folder / f"{output.stem}_analysis.txt"
    with aside(told) as part:
        part.write_text(f"{report(rows, planned, totals)}\n", encoding="utf-8", errors="backslashreplace")
    return [*paths, told]


def report(rows: Sequence[Mapping], planned: int, totals: object = "") -> str:
    """What a set holds, for reading: shares, modes, reasons, kinds of problem, titles, tries."""
    valid = [row for row in rows if row["valid"]]
    lines = [f"{len(rows)} of {planned} rows made, {len(valid)} valid"]
    for name, values in {
        "mode, of the valid": (row["expected_type"] for row in valid),
        "reason why not": (reason for row in rows for reason in row["issues"][:1]),
        "kind of problem, guessed by its words": (row["kind"] for row in rows),
        "title (ten at most)": (row["question_title"] or row["question_id"] or "none" for row in rows),
        "tries": (row["tries"] for row in rows),
    }.items():
        lines += ["", f"by {name}:", *(f"{n:>6}  {value}" for value, n in Counter(values).most_common(10))]
    modes = Counter(row["expected_type"] for row in valid)
    if modes and max(modes.values()) > 0.55 * len(valid):
        lines += ["", "the modes are not balanced (45 to 55 % each): more tries, or balance, which leaves some out"]
    return "\n".join([*lines, "", str(totals)])


def said(paths: Sequence[Path]) -> str:
    """What the command prints: the report, and where things are."""
    return "\n".join([paths[-1].read_text(encoding="utf-8").strip(), "", *map(str, paths)])
