"""One answer on one input: call it under guard, compare, and look for smaller inputs that fail."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qftlab_course.check_compare import difference
from qftlab_course.check_guard import Forbidden, TimeLimitReached, guarded
from qftlab_course.exercises import Exercise

NO_GRADIENT = "no gradient comes through: stay in torch, without item(), tolist(), detach() or NumPy"
_SHRINK_TRIES = 40  # further inputs drawn after a failure, in search of a smaller one


@dataclass(frozen=True)
class Trial:
    """One input tried: `kind` is ok, blank, wrong, error, late, refused or mutated; `problem` says it in words.

    `got` is what the answer returned, or the exception it raised.
    """

    args: tuple
    kind: str
    got: Any = None
    wanted: Any = None
    problem: str = ""
    printed: str = ""


@dataclass
class Run:
    """An answer under examination; `left` is what remains of its seconds, `names` are the reference's parameters."""

    exercise: Exercise
    answer: Callable
    reference: Callable
    forbidden: Forbidden
    left: float
    names: list[str]


def run_trials(run: Run, rng: random.Random) -> list[Trial]:
    """Trials on inputs of growing size, up to the first failure; then some more, in search of a smaller one."""
    trials: list[Trial] = []
    for size in sorted(list(range(1, run.exercise.sizes + 1)) * run.exercise.repeats):
        trials.append(attempt(run, run.exercise.draw(rng, size)))
        if trials[-1].kind in ("late", "refused"):
            break
        if trials[-1].kind not in ("ok", "blank"):
            return trials + _more_failures(run, rng, size)
    return trials


def attempt(run: Run, args: tuple) -> Trial:
    """Calls the answer on a copy of one input and says what came of it."""
    wanted = run.reference(*copied(args))
    mine = _tracked(copied(args)) if run.exercise.is_trained else copied(args)
    started = time.monotonic()
    outcome = guarded(run.answer, mine, run.left, run.forbidden)
    run.left = max(run.left - (time.monotonic() - started), 0.0)
    trial = Trial(args, "ok", outcome.value, wanted, printed=outcome.printed)
    if outcome.calls:
        return replace(trial, kind="refused", problem=outcome.calls[0])
    if outcome.timed_out:
        return replace(trial, kind="late", got=TimeLimitReached())
    if outcome.error is not None:
        is_blank = isinstance(outcome.error, NotImplementedError) or "ellipsis" in str(outcome.error)
        return replace(trial, kind="blank" if is_blank else "error", got=outcome.error)
    changed = [i for i, (a, b) in enumerate(zip(mine, args, strict=True)) if not same(a, b)]
    if changed:
        name = (run.names + ["?"] * len(args))[changed[0]]
        return replace(trial, kind="mutated", problem=f"{name} was changed in place; work on a copy and return that")
    if outcome.value is None or outcome.value is ...:
        return replace(trial, kind="blank", problem="got None here: is a return missing?")
    compare = run.exercise.compare or (lambda g, w: difference(g, w, run.exercise.atol, run.exercise.rtol))
    problem = compare(outcome.value, wanted)
    if run.exercise.is_trained and not problem:
        problem = _gradient_problem(run, outcome.value, mine)
    return replace(trial, kind="wrong", problem=problem) if problem else trial


def _tracked(args: tuple) -> tuple:
    """The arguments, with a gradient asked of every tensor of floating-point numbers; changed in place."""
    return tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _gradient_problem(run: Run, value: Any, args: tuple) -> str | None:
    """What is wrong with the gradients of an answer's sum with respect to its inputs."""
    if not (isinstance(value, Tensor) and value.requires_grad):
        return f"{NO_GRADIENT}, as a later cell trains through this"
    theirs = _tracked(copied(args))
    pairs = ((value, args), (run.reference(*theirs), theirs))
    got, wanted = (torch.autograd.grad(total.sum(), [a for a in given if isinstance(a, Tensor)], allow_unused=True,
                                       materialize_grads=True) for total, given in pairs)  # fmt: skip
    found = difference(got, wanted, run.exercise.atol, run.exercise.rtol)
    return found and f"the gradient {found}"


def _more_failures(run: Run, rng: random.Random, size: int) -> list[Trial]:
    found = []
    for i in range(_SHRINK_TRIES):
        if run.left > 0.2:
            trial = attempt(run, run.exercise.draw(rng, 1 + i * size // _SHRINK_TRIES))
            if trial.kind in ("wrong", "error", "mutated"):
                found.append(trial)
    return found


def copied(args: tuple) -> tuple:
    """A deep copy of an input, tensors cut from their graph."""
    return tuple(arg.detach().clone() if isinstance(arg, Tensor) else copy.deepcopy(arg) for arg in args)


def same(a: Any, b: Any) -> bool:
    """Whether an argument is as it was: exact for data; other objects are not looked into."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b if isinstance(a, str | bytes | int | float | bool) else True
