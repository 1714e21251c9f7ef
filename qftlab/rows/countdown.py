"""Countdown problems without end, and the one rule for what is never trained on."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from fractions import Fraction

from qftlab.maths.verify import OPERATORS, combine


def is_held_out(key: str, *, one_in: int = 10) -> bool:
    """True for one key in `one_in`, decided by SHA-256 of the key, so that it never depends on order or seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % one_in == 0


@dataclass(frozen=True)
class CountdownProblem:
    """A problem and one solution; `numbers` in the order shown to the model."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> str:
        """The problem without its order: two problems with one key are the same problem."""
        return f"countdown {sorted(self.numbers)} {self.target}"


def _join(left: tuple, operator: str, right: tuple) -> tuple | None:
    """Two (value, text, rank) nodes under one operator; rank 1 is a sum, 2 a product, 3 a number."""
    value = combine(left[0], operator, right[0])
    if value is None or value.denominator != 1 or value < 0:
        return None
    rank = 1 if operator in "+-" else 2
    a = left[1] if left[2] >= rank else f"({left[1]})"
    strict = operator in "-/"
    b = right[1] if right[2] > rank or (right[2] == rank and not strict) else f"({right[1]})"
    return value, f"{a} {operator} {b}", rank


def random_problem(rng: random.Random, *, num_numbers: int = 3, held_out: bool = False) -> CountdownProblem:
    """Draws a solvable problem from the training side, or from the held-out side.

    Numbers are drawn from 1 to 20, targets lie in 1 to 99, and values in between are non-negative integers.

    Args:
        rng: source of randomness.
        num_numbers: how many numbers, at least 2.
        held_out: which side of the split (one problem in ten is held out, by a hash of its key).

    Raises:
        ValueError: if fewer than two numbers are asked for.
    """
    if num_numbers < 2:
        raise ValueError(f"num_numbers must be at least 2, got {num_numbers}")
    while True:
        numbers = [rng.randint(1, 20) for _ in range(num_numbers)]
        nodes = [(Fraction(n), str(n), 3) for n in numbers]
        while len(nodes) > 1:
            i, j = rng.sample(range(len(nodes)), 2)
            node = _join(nodes[i], rng.choice(tuple(OPERATORS)), nodes[j])
            if node is None:
                break
            nodes = [n for k, n in enumerate(nodes) if k not in (i, j)] + [node]
        if len(nodes) > 1 or not 1 <= nodes[0][0] <= 99:
            continue
        problem = CountdownProblem(tuple(numbers), int(nodes[0][0]), nodes[0][1])
        if is_held_out(problem.key) == held_out:
            return problem


def countdown_row(problem: CountdownProblem) -> dict:
    """The row (instruction, output, numbers, target) that SFT trains on and RLOO scores."""
    numbers = ", ".join(map(str, problem.numbers))
    return {
        "instruction": f"Use the numbers {numbers} once each to make {problem.target}.",
        "input": "",
        "output": f"<answer>{problem.solution}</answer>",
        "skill": "countdown",
        "numbers": list(problem.numbers),
        "target": problem.target,
    }


def fresh_problems(count: int, seed: int) -> list[dict]:
    """Rows of Countdown problems from the training side, drawn anew from a seed; held-out ones are never among them."""
    chance = random.Random(f"problems {seed}")
    return [countdown_row(random_problem(chance)) for _ in range(count)]
