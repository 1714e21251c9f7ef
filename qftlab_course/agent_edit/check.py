"""`qftlab check`: homework files judged at two levels, with the official points.

The level `course` gives the verdicts of the course's own checker, also where they are lenient: it takes a call that
does not parse, has no arguments, or stands before the token, and says EDIT where both tokens stand. The level `strict`
is `outputs.judge`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qftlab.rows.sources import DataError, read_file
from qftlab.settings import check_fields
from qftlab_course.agent_edit.outputs import expected_mode, judge

TOOLS = {"EDIT": "editor", "AGENT": "python"}  # in the order in which the checker looks for their tokens
NAMED = re.compile(r'\{\s*"name"\s*:\s*"([^"]+)"')
MOST_POINTS = {"hw3_1": 2, "hw3_2": 8}
Level = Literal["course", "strict"]


@dataclass(frozen=True)
class CourseVerdict:
    """What the course's checker sees in one output.

    Args:
        has_think: whether any think block has a text.
        mode: "EDIT" where its token stands anywhere outside of them, or else "AGENT", or None.
        names: of the objects outside of them that begin with a name.
    """

    has_think: bool
    mode: str | None
    names: tuple[str, ...]

    @property
    def calls_right(self) -> bool:
        """Whether the mode's tool is among the names; False without a mode."""
        return self.mode is not None and TOOLS[self.mode] in self.names

    @property
    def passed(self) -> bool:
        """The checker's verdict."""
        return self.has_think and self.calls_right

    @property
    def issues(self) -> list[str]:
        """What is wrong, in the words of the checker's report."""
        found = [] if self.has_think else ["missing think"]
        if self.mode is None:
            found.append("missing marker")
        elif not self.calls_right:
            found.append(f"wrong call: {self.mode} needs {TOOLS[self.mode]}, got {list(self.names)!r:.80}")
        return found


def course_verdict(output: str) -> CourseVerdict:
    """Judges one output as the course's checker does: think blocks are cut out, and the rest is searched."""
    thoughts, rest, at = [], [], 0
    while (start := output.find("<think>", at)) >= 0 and (end := output.find("</think>", start + 7)) >= 0:
        thoughts.append(output[start + 7 : end])
        rest.append(output[at:start])
        at = end + 8
    shown = "".join([*rest, output[at:]])
    mode = next((mode for mode in TOOLS if f"<|{mode}|>" in shown), None)
    return CourseVerdict(any(map(str.strip, thoughts)), mode, tuple(NAMED.findall(shown)))


@dataclass(frozen=True)
class CheckConfig:
    """Judges a homework file, says what is wrong with each item, and counts the official points.

    Args:
        data: hw3_2.json (a list of Query and Output) or hw3_1.json (special_tokens and tasks).
        level: `course` is the verdict of the course's own checker; `strict` wants exactly one token right behind the
            thinking, one call at the end that parses and has exactly its arguments, and the mode that the query asks
            for: EDIT where it names an error, AGENT where it does not.

    Raises:
        ValueError: for another level, or without data.
    """

    data: str = "outputs/tasks/hw3_2.json"
    level: Level = "course"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.data:
            raise ValueError("data must name a file, got none: --data outputs/tasks/hw3_2.json")


@dataclass(frozen=True)
class CheckReport:
    """A file's verdicts.

    Args:
        kind: "hw3_1" or "hw3_2".
        level: "course" or "strict".
        issues: of each item, what is wrong; an item without any has passed.
        points: by the official rule, whatever the level.
        details: of each item, what it was taken for.
    """

    kind: str
    level: Level
    issues: list[list[str]]
    points: int
    details: list[str]

    @property
    def passed(self) -> int:
        """Items without an issue."""
        return sum(not found for found in self.issues)

    @property
    def is_right(self) -> bool:
        """Whether there are items, and all passed."""
        return 0 < self.passed == len(self.issues)

    def to_text(self) -> str:
        """Lines for a terminal: the counts, what went wrong how often, the official points, an item a line."""
        total = len(self.issues)
        points = f"official points for {self.kind}: {self.points} of {MOST_POINTS[self.kind]}"
        if not total:
            return f"0 items: there is nothing to check\n{points}"
        kinds = [issue.partition(":")[0] for found in self.issues for issue in found]
        names = ["missing think", "missing marker", "wrong call"] if self.level == "course" else []
        names += sorted({*kinds} - {*names})
        lines = [f"level {self.level}: total {total}, passed {self.passed}, failed {total - self.passed}, "
                 f"pass rate {self.passed / total:.1%}"]  # fmt: skip
        lines += [", ".join(f"{name} {kinds.count(name)}" for name in names)] if names else []
        lines.append(points)
        lines += [f"item {n}: {', '.join(found) or 'passed'}" for n, found in enumerate(self.issues, 1)]
        return "\n".join(lines)


def check_file(path: str | Path, level: Level = "course") -> CheckReport:
    """Judges a homework file; which one it is, its form says.

    Raises:
        DataError: for a file that is neither.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    content = _object(path)
    if content is not None and {"special_tokens", "tasks"} & content.keys():
        return _check_tokens(content, level)
    rows = [row for _, row in read_file(path)]
    if broken := next((row for row in rows if isinstance(row, DataError)), None):
        raise broken
    if rows and not any(isinstance(row, dict) and "Output" in row for row in rows):
        raise DataError(f"{path} must have rows with Output, as hw3_2.json has, got none (rows with instruction and "
                        "output: qftlab validate)")  # fmt: skip
    outputs = [row.get("Output") if isinstance(row, dict) else None for row in rows]
    verdicts = [course_verdict(output) if isinstance(output, str) else None for output in outputs]
    points = min(sum(verdict is not None and verdict.passed for verdict in verdicts), MOST_POINTS["hw3_2"])
    details = [f"mode {v.mode}, names of calls: {list(v.names)!r:.80}" if v else "no text" for v in verdicts]
    if level == "course":
        issues = [verdict.issues if verdict else ["no Output that is a text"] for verdict in verdicts]
    else:
        issues = [_strict_issues(row, output) for row, output in zip(rows, outputs, strict=True)]
    return CheckReport("hw3_2", level, issues, points, details)


def _strict_issues(row: object, output: object) -> list[str]:
    query = row.get("Query") if isinstance(row, dict) else None
    verdict = judge(output, mode=expected_mode(query) if isinstance(query, str) else None)
    return [] if verdict.ok else [f"{verdict.reason}: {verdict.detail}"]


def _object(path: Path) -> dict | None:
    """The JSON object that a file holds, if it is one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the rows says why
    return content if isinstance(content, dict) else None


def _check_tokens(content: dict, level: Level) -> CheckReport:
    """hw3_1: both lists are there, and every task has the id of a special token among its own."""
    tokens, tasks = (found if isinstance(found := content.get(name), list) else []
                     for name in ("special_tokens", "tasks"))  # fmt: skip
    special = {token["id"] for token in tokens if isinstance(token, dict) and isinstance(token.get("id"), int)}
    issues, details = [], []
    for task in tasks:
        ids = task.get("token_ids") if isinstance(task, dict) else None
        ids = [one for one in ids if isinstance(one, int)] if isinstance(ids, list) else []
        found = sorted(special.intersection(ids))
        issues.append([] if found else ["no special token: none of its token_ids is the id of one"])
        details.append(f"{len(ids)} ids, special ones: {', '.join(map(str, found)) or 'none'}")
    is_right = bool(tasks) and not any(issues)
    return CheckReport("hw3_1", level, issues, MOST_POINTS["hw3_1"] * is_right, details)
