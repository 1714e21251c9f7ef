"""The exact search that Countdown's generator and rewards are held against."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

from qftlab.maths.verify import combine
from qftlab.rows.countdown import OPERATORS


def solve(numbers: list[int], target: int) -> str | None:
    """An expression that uses each number once and equals `target`, or None if there is none; exact search."""
    seen = set()
    stack = [tuple((Fraction(n), str(n), 3) for n in numbers)]
    while stack:
        nodes = stack.pop()
        if len(nodes) == 1:
            if nodes[0][0] == target:
                return nodes[0][1]
            continue
        key = tuple(sorted(n[0] for n in nodes))
        if key in seen:
            continue
        seen.add(key)
        for i, j in permutations(range(len(nodes)), 2):
            rest = tuple(n for k, n in enumerate(nodes) if k not in (i, j))
            for operator in OPERATORS:
                value = combine(nodes[i][0], operator, nodes[j][0])
                if value is not None:
                    stack.append((*rest, (value, f"({nodes[i][1]} {operator} {nodes[j][1]})", 3)))
    return None
