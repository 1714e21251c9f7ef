"""The exercises of the notebooks, as data: one module `nbNN.py` per notebook, each with a tuple `EXERCISES`.

To add one: write an `Exercise` in its notebook's module, and in tests/course/exercise_answers.py a stub and two right
answers. The tests run over all of them, and over each suspect's own mistake, which must get that suspect's message.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Suspect:
    """A known mistake and what to say about it.

    Args:
        message: one sentence to the student, naming the likely cause.
        like: a wrong implementation that does not call the reference; suspected if the answer agrees with it on every
            input tried.
        when: or a predicate `(args, got, wanted) -> bool` on the smallest failing input.
    """

    message: str
    like: Callable | None = None
    when: Callable[[tuple, Any, Any], bool] | None = None

    def __post_init__(self) -> None:
        if (self.like is None) == (self.when is None):
            raise ValueError(f"a Suspect has either like or when, got both or none: {self.message!r}")


@dataclass(frozen=True)
class Exercise:
    """One self-checking exercise.

    Args:
        id: notebook and number, "04.2".
        title: what is built, a few words.
        dots: difficulty, 1 to 3.
        minutes: how long it takes a student.
        reference: the function to agree with: an oracle of the same signature, or the dotted name of the library's.
        draw: `(rng, size) -> args`; inputs of growing size (1, 2, …), all randomness from `rng`. Every tricky case
            should come up at a fixed size, not by luck.
        instead: what to do where a delegation is refused ("use log_softmax and gather").
        forbidden: dotted names of callables that the answer may not use; the reference always belongs to them.
        suspects: known mistakes, the most telling first.
        compare: `(got, wanted) -> str | None`, None if equal; by default shapes, values and nesting are compared.
        atol, rtol: absolute and relative tolerance of floating-point numbers; no wider than the lesson's own asserts.
        is_trained: whether later cells train through the answer; it must then pass on the reference's gradients.
        sizes: sizes drawn: 1 to `sizes`, `repeats` times each.
        seconds: time limit on all calls of the answer together.
    """

    id: str
    title: str
    dots: int
    minutes: int
    reference: Callable | str
    draw: Callable[[random.Random, int], tuple]
    instead: str
    forbidden: tuple[str, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    compare: Callable[[Any, Any], str | None] | None = None
    atol: float = 1e-6
    rtol: float = 1e-5
    is_trained: bool = False
    sizes: int = 8
    repeats: int = 5
    seconds: float = 5.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d\d\.\d", self.id):
            raise ValueError(f"id must look like '04.2' (notebook.number), got {self.id!r}")
        if self.dots not in (1, 2, 3):
            raise ValueError(f"dots must be 1, 2 or 3, got {self.dots}")
        for name in ("minutes", "sizes", "repeats", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@cache
def of_notebook(notebook: str) -> dict[str, Exercise]:
    """Exercises of a notebook ("04") by id, in order.

    Raises:
        ValueError: if that notebook has no exercises, naming those that have.
    """
    if not re.fullmatch(r"\d\d", notebook) or not importlib.util.find_spec(f"{__name__}.nb{notebook}"):
        raise ValueError(f"notebook must be one with exercises ({', '.join(notebooks())}), got {notebook!r}")
    module = importlib.import_module(f"{__name__}.nb{notebook}")
    return {exercise.id: exercise for exercise in module.EXERCISES}


def notebooks() -> list[str]:
    """Numbers of the notebooks that have exercises: ["01", "02", …]."""
    return [f"{i:02}" for i in range(100) if importlib.util.find_spec(f"{__name__}.nb{i:02}")]


def get_exercise(exercise_id: str) -> Exercise:
    """The exercise of an id such as "04.2".

    Raises:
        ValueError: if there is none, naming the ids of that notebook.
    """
    known = of_notebook(str(exercise_id)[:2])
    if exercise_id not in known:
        raise ValueError(f"exercise id must be one of {', '.join(known)}, got {exercise_id!r}")
    return known[exercise_id]


def tensor(rng: random.Random, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal fp32 numbers times `scale`, rounded to two decimals so that a student can read them."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return (torch.randn(shape, generator=generator) * scale * 100).round() / 100


def integers(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    """`count` whole numbers, `low` and `high` included."""
    return [rng.randint(low, high) for _ in range(count)]
