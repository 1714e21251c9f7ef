"""Programs to be mended and tasks for new ones: LiveCodeBench, LiveBench, HumanEvalFix, and the bug set."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qftlab.rows.sources import DataError, read_file, read_hub
from qftlab_course.agent_edit.teacher import Problem
from qftlab_course.world.bugfix import random_bug

# Words that tell a problem's kind, the first that is met; by its text alone, so it is a guess and called one.
KINDS = {
    "data structures": "tree|graph|linked list|stack|queue|heap|hash|dictionary|matrix|grid",
    "strings": "string|character|palindrome|substring|letter|word",
    "mathematics": "prime|divis|gcd|modulo|factorial|digit|sum of|product|integer",
    "algorithms": "sort|search|path|shortest|dynamic|greedy|permutation|subsequence|interval|array|list",
}


def kind_of(text: str) -> str:
    """What a problem is about, guessed by its words."""
    return next((kind for kind, known in KINDS.items() if re.search(known, text.lower())), "other")


def read_problems(sources: Sequence[str | Path]) -> list[Problem]:
    """The problems of files and hub names: LiveCodeBench, LiveBench coding, HumanEvalFix and our bug set's layout.

    Raises:
        DataError: for a row of another layout, naming file and row.
        FileNotFoundError: for a file that is not there.
    """
    found = []
    for source in map(str, sources):
        is_file = Path(source).suffix in (".json", ".jsonl", ".csv", ".parquet") or Path(source).is_file()
        for place, row in read_file(Path(source)) if is_file else read_hub(source):
            if isinstance(row, DataError):
                raise row
            found.append(_problem(row, f"{source}, {place}"))
    if not found:
        raise DataError(f"{', '.join(map(str, sources))} must have at least one problem, got none")
    return found


def _problem(row: object, where: str) -> Problem:
    kinds = {"turns": _livebench, "question_content": _livecodebench, "buggy_solution": _humanevalfix, "program": _own}
    make = next((make for name, make in kinds.items() if isinstance(row, Mapping) and row.get(name)), None)
    if make is None:
        raise DataError(f"{where} must be of LiveCodeBench (question_content), LiveBench (turns), HumanEvalFix "
                        f"(buggy_solution) or have a program, got {row!r:.80}")  # fmt: skip
    try:
        return make(row)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where} must hold a whole problem, got {type(error).__name__}: {error!s:.80}") from None


def _loaded(value: object) -> object:
    return json.loads(value) if isinstance(value, str) and value else value


def _livecodebench(row: Mapping) -> Problem:
    tests, about = _loaded(row.get("public_test_cases")) or (), _loaded(row.get("metadata")) or {}
    return Problem(str(row["question_id"]), row.get("question_title") or "", row["question_content"], tuple(tests),
                   starter=row.get("starter_code") or "", func_name=about.get("func_name") or "")  # fmt: skip


def _livebench(row: Mapping) -> Problem:
    """As LiveCodeBench's, from `original_json` where it is there, or cut out of the prompt.

    There the question stands between a line `### Question:` and the next heading, and the starter in a code block.
    """
    text, known = row["turns"][0], _loaded(row.get("original_json")) or {}
    question = re.search(r"### Question:[^\n]*\n(.*?)(?=\n###|\Z)", text, re.DOTALL)
    cut = {"question_content": (question[1] if question else text).strip(),
           "starter_code": _between(text, "```python\n", "```")}  # fmt: skip
    return _livecodebench({**cut, **known, **row})


def _between(text: str, start: str, end: str) -> str:
    after = text.partition(start)[2]
    return after.partition(end)[0].strip() if end in after else ""


def _humanevalfix(row: Mapping) -> Problem:
    head = row["declaration"]
    return Problem(row["task_id"], row["entry_point"], row["docstring"], row["test"], head + row["buggy_solution"],
                   head + row["canonical_solution"], func_name=row["entry_point"])  # fmt: skip


def _own(row: Mapping) -> Problem:
    names = {field.name for field in dataclasses.fields(Problem)}
    return Problem(**({"id": "", "title": "", "text": ""} | {k: v for k, v in row.items() if k in names}))


def bug_problems(count: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """Different programs of the bug set as problems, with the reports that their modes call for; modes take turns."""
    rng, found = random.Random(f"problems {seed}"), {}
    while len(found) < count:
        bug = random_bug(rng, held_out=held_out)
        if bug.mode == ("AGENT", "EDIT")[len(found) % 2]:
            found.setdefault(f"{bug.program}\n{bug.report}", bug)
    return [
        Problem(f"bug-{i}", bug.kind, bug.program, bug.test, bug.program, bug.fixed, bug.report, f"<|{bug.mode}|>")
        for i, bug in enumerate(found.values())
    ]
