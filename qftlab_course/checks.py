"""Exercises that check themselves: `checks.check("04.2", my_top_p)` as the last line of a cell shows what came of it.

An exercise that is not attempted says so and the notebook runs on. An answer is tried on fresh inputs, small ones
first, under a time limit, and may not call what it should rebuild. Nothing is raised at a student, nothing is printed.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import logging
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from qftlab_course.check_compare import bulk, difference, general_suspect, in_form_of, show
from qftlab_course.check_guard import Forbidden, resolve, unwrap
from qftlab_course.check_trial import Run, Trial, copied, run_trials
from qftlab_course.exercises import Exercise, get_exercise, of_notebook

logger = logging.getLogger(__name__)
_WORDS = {"passed": "passed", "failed": "not yet", "refused": "refused", "unattempted": "not attempted yet"}
_MARKS = {"passed": "✓ ", "failed": "✗ ", "refused": "✗ "}


@dataclass(frozen=True)
class CheckResult:
    """What a check found. `status` is "passed", "failed", "refused" (delegation) or "unattempted"; true if passed.

    Shown as the last value of a cell; `headline` is one line, `details` the lines below it. Of a pass or an unattempted
    exercise both are the same on every run.
    """

    id: str
    status: str
    headline: str
    details: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.status == "passed"

    def __repr__(self) -> str:
        return "\n".join([self.headline.replace("`", ""), *(f"  {line}" for line in self.details)])

    def _repr_markdown_(self) -> str:
        block = "\n\n```text\n" + "\n".join(self.details) + "\n```" if self.details else ""
        return self.headline.replace(self.id, f"**{self.id}**", 1) + block


def check(exercise_id: str, answer: Any, *, seed: int | None = None, seconds: float | None = None) -> CheckResult:
    """Tries a student's function on fresh inputs and says what came of it.

    Args:
        exercise_id: notebook and number, "04.2".
        answer: the student's function; a stub, `...` or None counts as not attempted.
        seed: of the inputs; by default new in every call. A failure names the seed that repeats it.
        seconds: limit on all calls of `answer` together; by default the exercise's own.

    Returns:
        A CheckResult to be shown as the last value of the cell. Progress is remembered until the kernel stops.

    Raises:
        ValueError: if there is no such exercise, naming those there are.
    """
    exercise = get_exercise(exercise_id)
    seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed
    result = _examine(exercise, answer, seed, exercise.seconds if seconds is None else seconds)
    _memory()[exercise.id] = result.status
    return result


def or_library(exercise_id: str, answer: Any, *, seed: int | None = None) -> Callable:
    """The student's function if it passes its check, the library's otherwise; shows one line that says which.

    Args:
        exercise_id, answer, seed: as in `check`.

    Returns:
        A function of the exercise's signature, for the cells that follow. The student's own is called with what the
        check called it with, tensors on the CPU and (unless the exercise is trained through) cut from their graph, and
        its answer is brought into the form of the library's: a list, a tuple or a NumPy array pass the check as well.
    """
    result, exercise = check(exercise_id, answer, seed=seed), get_exercise(exercise_id)
    mark = _MARKS.get(result.status, "")
    if result:
        _say(exercise, f"{mark}{exercise_id}: the next cells run on your `{name_of(answer)}`.")
        return _fitted(exercise, answer)
    _say(exercise, f"{mark}{exercise_id} {_WORDS[result.status]}: the next cells run on the library's version.")
    return reference_of(exercise)


def _fitted(exercise: Exercise, answer: Callable) -> Callable:
    """An answer that passed, with inputs as the check draws them and its value in the form of the library's."""
    example = reference_of(exercise)(*exercise.draw(random.Random(0), exercise.sizes))

    @functools.wraps(answer)
    def fitted(*args, **kwargs):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        given = tuple(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args)
        value = in_form_of(answer(*(given if exercise.is_trained else copied(given)), **kwargs), example)
        if not isinstance(value, Tensor) or not tensors:
            return value
        value = value if exercise.is_trained else value.detach()
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), value.dtype)
        return value.to(tensors[0].device, dtype if value.is_floating_point() else value.dtype)

    return fitted


def progress(notebook: str) -> Progress:
    """How many exercises of a notebook ("04") passed since the kernel started, as a table to show at its end."""
    exercises = of_notebook(notebook)
    statuses = tuple(_memory().get(name, "not run") for name in exercises)
    return Progress(notebook, tuple(exercises.values()), statuses)


@dataclass(frozen=True)
class Progress:
    """The exercises of a notebook and how they stand; `passed` of `total`. Shows as a table, or as text."""

    notebook: str
    exercises: tuple[Exercise, ...]
    statuses: tuple[str, ...]

    @property
    def passed(self) -> int:
        """Number of exercises that passed."""
        return self.statuses.count("passed")

    @property
    def total(self) -> int:
        """Number of exercises of the notebook."""
        return len(self.exercises)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        pairs = zip(self.exercises, self.statuses, strict=True)
        return [(e.id, dots_of(e), e.title, _MARKS.get(s, "") + _WORDS.get(s, s)) for e, s in pairs]

    def __repr__(self) -> str:
        rows = self._rows()
        wide = max(len(row[2]) for row in rows)
        lines = [f"{number}  {dots}  {title:<{wide}}  {word}" for number, dots, title, word in rows]
        return "\n".join([f"Notebook {self.notebook}: {self.passed} of {self.total} exercises passed", *lines])

    def _repr_html_(self) -> str:
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows())
        head = "".join(f"<th>{name}</th>" for name in ("exercise", "difficulty", "title", "state"))
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        title = f"<caption>Notebook {self.notebook}: {self.passed} of {self.total} exercises passed</caption>"
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@functools.cache
def _memory() -> dict[str, str]:
    """Status by exercise id; built on first use, in memory only."""
    return {}


def forget() -> None:
    """Forgets the progress of all notebooks."""
    _memory().clear()


def dots_of(exercise: Exercise) -> str:
    """Difficulty as three dots, the filled ones count: ●●○."""
    return "●" * exercise.dots + "○" * (3 - exercise.dots)


def name_of(answer: Any) -> str:
    """The name a student gave a function, without address."""
    name = getattr(unwrap(answer), "__name__", None) or type(answer).__name__
    return "your lambda" if name == "<lambda>" else name


def reference_of(exercise: Exercise) -> Callable:
    """The library's function for an exercise, or the course's own where the library has none of that signature."""
    return resolve(exercise.reference) if isinstance(exercise.reference, str) else exercise.reference


def _say(exercise: Exercise, text: str) -> None:
    """One line under the cell in a notebook, or a log line elsewhere."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        ipython.display.display(CheckResult(exercise.id, "said", text))
    else:
        logger.info(text.replace("`", ""))


def forbidden_of(exercise: Exercise) -> Forbidden:
    """What an answer may not use: the exercise's list and its reference."""
    named = {name: resolve(name) for name in exercise.forbidden}
    own = exercise.reference if isinstance(exercise.reference, str) else "the course's own solution"
    return Forbidden({**named, own: reference_of(exercise)})


def _examine(exercise: Exercise, answer: Any, seed: int, seconds: float) -> CheckResult:
    if answer is None or answer is ...:
        return _unattempted(exercise, "your function")
    if not callable(answer):
        line = f"pass the function itself, without calling it; got {type(answer).__name__}"
        return _result(exercise, "failed", f": {line}.")
    reference, forbidden = reference_of(exercise), forbidden_of(exercise)
    names = list(inspect.signature(reference).parameters)
    run = Run(exercise, answer, reference, forbidden, seconds, names)
    trials = run_trials(run, random.Random(seed))
    kinds = {trial.kind for trial in trials}
    if kinds == {"ok"}:
        return _result(exercise, "passed", f" · {exercise.title} ({len(trials)} fresh inputs)")
    if kinds == {"blank"}:
        return _unattempted(exercise, name_of(answer))
    failures = [trial for trial in trials if trial.kind != "ok"]
    if failures[-1].kind == "refused":
        return _refused(exercise, answer, failures[-1].problem)
    return _failed(run, min(failures, key=lambda trial: bulk(trial.args)), trials, seed)


def _result(exercise: Exercise, status: str, tail: str, details: tuple[str, ...] = ()) -> CheckResult:
    headline = f"{_MARKS.get(status, '')}{exercise.id} {_WORDS[status]}{tail}"
    return CheckResult(exercise.id, status, headline, details)


def _unattempted(exercise: Exercise, name: str) -> CheckResult:
    tail = f" · {exercise.title} ({dots_of(exercise)}, {exercise.minutes} min): replace the `...` in `{name}`, "
    return _result(exercise, "unattempted", tail + "then run its cell and this one again.")


def _refused(exercise: Exercise, answer: Any, culprit: str) -> CheckResult:
    tail = f": `{name_of(answer)}` uses `{culprit}`, which does the work for you. Instead, {exercise.instead}."
    return _result(exercise, "refused", tail)


def _failed(run: Run, trial: Trial, trials: list[Trial], seed: int) -> CheckResult:
    lines = ["smallest failing input found:"]
    lines += [f"    {name} = {show(arg)}" for name, arg in zip(run.names, trial.args, strict=False)]
    if trial.kind == "late":
        lines.append("got:     no answer within the time limit: does a loop never end?")
    elif isinstance(trial.got, BaseException):
        lines += _error_lines(run, trial.got)
    else:
        lines.append(f"got:     {show(trial.got)}")
    lines.append(f"wanted:  {show(trial.wanted)}")
    if trial.problem:
        label = "differs:" if trial.kind == "wrong" else "note:   "
        lines.append(f"{label} {trial.problem}".replace("`", ""))
    if suspect := _suspect(run, trial, trials):
        lines.append(f"suspect: {suspect}")
    if trial.printed.strip():
        lines.append(f"printed: {show(trial.printed.strip()[-300:])}")
    lines.append(f"again:   checks.check({run.exercise.id!r}, {name_of(run.answer)}, seed={seed}) repeats these inputs")
    return _result(run.exercise, "failed", f" · {run.exercise.title}", tuple(lines))


def _error_lines(run: Run, error: BaseException) -> list[str]:
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", str(error)).strip().split("\n")[0]
    lines = [f"got:     {type(error).__name__}: {text}"]
    home = getattr(unwrap(run.answer), "__globals__", None) or getattr(type(run.answer).__call__, "__globals__", None)
    frames, step = [], error.__traceback__
    while step is not None:
        if home is not None and step.tb_frame.f_globals is home:
            frames.append((step.tb_frame.f_code, step.tb_lineno))
        step = step.tb_next
    if frames:
        code, number = frames[-1]
        source = linecache.getline(code.co_filename, number).strip() or "(source not found)"
        return lines + [f"in:      line {number - code.co_firstlineno + 1} of {code.co_name}:  {source}"]
    call = f"{name_of(run.answer)}({', '.join(run.names)})"
    return lines + [f"in:      the call {call}: does your function take these arguments?"]


def _suspect(run: Run, trial: Trial, trials: list[Trial]) -> str | None:
    """The first known mistake that fits: it gives what the answer gave, or is true of the smallest failure."""
    known = sorted((t for t in trials if t.kind in ("ok", "wrong")), key=lambda t: (t.kind == "ok", bulk(t.args)))
    if trial.kind not in ("wrong", "error", "blank", "late"):
        return None
    for suspect in run.exercise.suspects:
        try:
            if suspect.when is not None and suspect.when(trial.args, trial.got, trial.wanted):
                return suspect.message
            is_alike = suspect.like is not None and trial.kind == "wrong"
            if is_alike and not any(_apart(run, suspect.like, t) for t in known):
                return suspect.message
        except Exception:  # a suspect that cannot be tried on these inputs does not fit
            logger.debug("suspect %r could not be tried", suspect.message, exc_info=True)
    return general_suspect(trial.got, trial.wanted) if trial.kind == "wrong" else None


def _apart(run: Run, like: Callable, trial: Trial) -> str | None:
    return difference(trial.got, like(*copied(trial.args)), run.exercise.atol, run.exercise.rtol)
