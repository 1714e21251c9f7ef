"""Training rows by a teacher: problems, a plan of what is asked of whom, and tries until a row is valid.

What a teacher is asked, and what makes a row of its answers, is a recipe, which the caller brings; this module asks in
many threads, and the client's journal keeps what was answered.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from qftlab.remote.client import read_chat


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


@dataclass(frozen=True)
class Task:
    """One row to be made.

    Args:
        number: its place in the plan.
        problem: what it is about.
        mode: what it is to show.
        seed: of the plan.
        sample: how many rows of the same problem and mode stand before it.
    """

    number: int
    problem: Problem
    mode: str
    seed: int
    sample: int = 0

    def choice(self, wordings: Sequence[str]) -> str:
        """One of several wordings: drawn for a problem, and another one for each further row of it, while there are."""
        start = random.Random(f"{self.seed}/{self.mode}/{self.problem.id}").randrange(len(wordings))
        return wordings[(start + self.sample) % len(wordings)]


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
    tasks, seen = [], Counter()
    for i, mode in enumerate(wanted):
        problem = _next(queues[mode], mode)
        tasks.append(Task(i, problem, mode, seed, seen[problem.id, mode]))
        seen[problem.id, mode] += 1
    return tasks


def _next(queue: Iterator[Problem], mode: str) -> Problem:
    problem = next(queue, None)
    if problem is None:
        raise ValueError(f"problems must have one that can show {mode}, got none")
    return problem


Asked = Callable[..., str]  # (messages, tools=None) -> text
Recipe = Callable[[Asked, Task], dict]  # -> a row with `issues`, reasons why it is not valid


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
        problem, mode = task.problem, task.mode.strip("<|>")
        named = {"item_id": task.number, "question_id": problem.id, "question_title": problem.title}
        return {**named, **row, "expected_type": mode, "tries": attempt + 1, "valid": not row["issues"]}

    for _, row in client.map(make, tasks, progress=progress):
        yield row
