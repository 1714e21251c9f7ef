"""Training rows by a teacher: problems, a plan of what is asked of whom, tries until a row is valid, and the files.

What a teacher is asked, and what makes a row of its answers, is a recipe, which the caller brings; this module asks in
many threads, keeps what was answered (the client's journal) and writes rows in the plan's order, whenever they came.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from qftlab.evaluate.validate import read_cases, validate
from qftlab.files import aside
from qftlab.rows.chat import DataError
from qftlab.rows.sources import read_file, read_hub

# Words that tell a problem's kind, the first that is met; by its text alone, so it is a guess and called one.
KINDS = {
    "data structures": "tree|graph|linked list|stack|queue|heap|hash|dictionary|matrix|grid",
    "strings": "string|character|palindrome|substring|letter|word",
    "mathematics": "prime|divis|gcd|modulo|factorial|digit|sum of|product|integer",
    "algorithms": "sort|search|path|shortest|dynamic|greedy|permutation|subsequence|interval|array|list",
}


@dataclass(frozen=True)
class Problem:
    """A task for programs, with a buggy one where the source has it.

    Args:
        id: of the source.
        title: of the source.
        text: what a program has to do.
        tests: what a right program passes, as `sandbox.run_tests` takes it: Python text with asserts, or a list of
            inputs and outputs.
        program: a buggy program; empty where the teacher has to plant a bug.
        fixed: the same without the bug.
        report: what a user says of it; empty where the recipe words it.
        mode: the mode that the report calls for; empty where both can be asked.
        starter: code that a program begins with.
        func_name: of the method that tests call.
    """

    id: str
    title: str
    text: str
    tests: str | tuple[Mapping, ...] = ()
    program: str = ""
    fixed: str = ""
    report: str = ""
    mode: str = ""
    starter: str = ""
    func_name: str = ""

    @property
    def kind(self) -> str:
        """What the problem is about, guessed by its words."""
        words = self.text.lower()
        return next((kind for kind, known in KINDS.items() if re.search(known, words)), "other")


def read_problems(sources: Iterable[str | Path]) -> list[Problem]:
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
    """The question stands between a line `### Question:` and the next heading of the prompt."""
    text = row["turns"][0]
    question = re.search(r"### Question:[^\n]*\n(.*?)(?=\n###|\Z)", text, re.DOTALL)
    problem = _livecodebench({**row, "question_content": (question[1] if question else text).strip()})
    return dataclasses.replace(problem, starter=_between(text, "```python\n", "```"))


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


@dataclass(frozen=True)
class Task:
    """One row to be made: its place in the plan, the problem, the mode it is to show, and the seed of its draws."""

    number: int
    problem: Problem
    mode: str
    seed: int

    def rng(self) -> random.Random:
        """A generator of this task's own, the same in every run."""
        return random.Random(f"{self.seed}/{self.number}")


def plan(
    problems: Sequence[Problem], samples: int, modes: Sequence[str], *, seed: int = 0,
    fits: Callable[[Problem, str], bool] = lambda problem, mode: problem.mode in ("", mode),
) -> list[Task]:  # fmt: skip
    """Tasks with equal shares of the modes, in an order drawn from the seed.

    Args:
        problems: each is taken once before one is taken again, where there are more samples than problems.
        samples: rows to make.
        modes: what rows are to show.
        seed: of order and draws.
        fits: whether a problem can show a mode.

    Raises:
        ValueError: if no problem fits a mode.
    """
    rng = random.Random(f"plan {seed}")
    wanted = [modes[i % len(modes)] for i in range(samples)]
    rng.shuffle(wanted)
    shuffled = rng.sample(problems, len(problems))
    if all(fits(problem, mode) for problem in problems for mode in modes):
        queues = dict.fromkeys(modes, cycle(shuffled))
    else:  # those first that fit nothing else
        shuffled.sort(key=lambda problem: sum(fits(problem, mode) for mode in modes))
        queues = {mode: cycle([p for p in shuffled if fits(p, mode)]) for mode in modes}
    return [Task(i, _next(queues[mode], mode), mode, seed) for i, mode in enumerate(wanted)]


def _next(queue: Iterator[Problem], mode: str) -> Problem:
    problem = next(queue, None)
    if problem is None:
        raise ValueError(f"problems must have one that can show {mode}, got none")
    return problem


Asked = Callable[..., str]  # (messages, tools=None) -> text
Recipe = Callable[[Asked, Task], dict]  # -> a row with `issues`, reasons why it is not valid


def read_chat(answer: Mapping) -> str:
    """The text of a chat answer, with the thinking and the calls that a server has taken out of it put back.

    Raises:
        ValueError: if it has no message of texts; the client asks again.
    """
    try:
        message = answer["choices"][0]["message"]
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        text = text if not thinking or "<think>" in text else f"<think>{thinking.strip()}</think>\n{text.lstrip()}"
        return text + "".join(f'{{"name": {json.dumps(name)}, "arguments": {given}}}' for name, given in calls)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer must have choices with a message of text, got {answer!r:.120}") from error


def teach(
    client, tasks: Sequence[Task], recipe: Recipe, settings: Mapping, *, tries: int = 3, progress: bool = False
) -> Iterator[dict]:
    """Rows as they are made, each with its place in the plan as `item_id`.

    Args:
        client: asks, in its threads, and remembers (its journal).
        tasks: the plan.
        recipe: makes a row of a task.
        settings: of every request: model, temperature, max_tokens.
        tries: of a row, until it is valid; the last one is kept with its `issues`.
        progress: shows a bar.

    Raises:
        ServerError, BudgetError, KeyboardInterrupt: as the client says; rows that were made have been given.
    """

    def make(task: Task) -> dict:
        for attempt in range(tries):

            def ask(messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, attempt=attempt) -> str:
                draw = hashlib.sha256(f"{task.seed}/{task.number}/{attempt}".encode()).digest()
                body = {**settings, "messages": list(messages), "seed": int.from_bytes(draw[:4], "big") >> 1}
                return client.ask("chat/completions", body | ({"tools": tools} if tools else {}), read_chat)

            row = recipe(ask, task)
            if not row["issues"]:
                break
        problem = task.problem
        named = {"item_id": task.number, "question_id": problem.id, "question_title": problem.title}
        return {**named, **row, "expected_type": task.mode.strip("<|>"), "kind": problem.kind,
                "tries": attempt + 1, "valid": not row["issues"]}  # fmt: skip

    for _, row in client.map(make, tasks, progress=progress):
        yield row


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
    output, rows = Path(output), sorted(rows, key=lambda row: row["item_id"])
    found = validate(read_cases(rows, str(output)))
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
    texts = {
        output: rows,
        output.with_name(f"{output.stem}_alpaca.json"): alpaca,
        output.with_name(f"{output.stem}_invalid.json"): [row for row in rows if not row["valid"]],
        folder / f"{output.stem}_analysis.txt": report(rows, planned, totals),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=2)
        with aside(path) as part:
            part.write_text(f"{text}\n", encoding="utf-8")
    return list(texts)


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
