"""Numbers about answers: matches, pass@k, rates with intervals, and paired tests."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two strings are the same, character for character."""
    return prediction == answer


def normalise(text: str) -> str:
    """Unicode NFKC, lower case, single blanks, no quotes around and no full stop or comma behind."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`“”‘’ ").rstrip(".,;:!? \"'`”’")


def normalised_match(prediction: str, answer: str) -> bool:
    """Whether the two strings agree after `normalise`; two empty ones do not."""
    return bool(normalise(answer)) and normalise(prediction) == normalise(answer)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which c were: 1 − C(n−c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true rate in about 95 % of experiments (z = 1.96); (0, 1) where nothing was tried.

    Source: Wilson 1927; Agresti and Coull 1998, eq. 2. Unlike p ± z·√(p(1−p)/n) it stays inside [0, 1] and has
    width at 0 and n.

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n an end is p itself; rounding may put it on the wrong side.
    return max(0.0, min(p, (centre - reach) / scale)), min(1.0, max(p, (centre + reach) / scale))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of "a and b are equally often right", asked on the same rows.

    Only rows where they disagree count; under the hypothesis each is a fair coin: p = 2·Σ_{i <= min} C(m, i) / 2^m, at
    most 1. Source: McNemar 1947, in its exact binomial form.

    Args:
        a: whether the first model was right on each row.
        b: the same for the second model, rows in the same order.

    Raises:
        ValueError: if they are not equally long.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same rows on both sides, got {len(a)} and {len(b)}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    m = only_a + only_b
    tail = sum(math.comb(m, i) for i in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**m))


@dataclass(frozen=True)
class Rate:
    """`correct` of `n`, with the 95 % Wilson interval of the accuracy."""

    name: str
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """correct / n in [0, 1]; nan where n is 0."""
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) in [0, 1]."""
        return wilson_interval(self.correct, self.n)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: both instruction accuracies, and p of "no difference" (exact McNemar)."""

    before: Rate
    after: Rate
    gained: int
    lost: int
    p_value: float


def compare_marks(before: Sequence[bool | None], after: Sequence[bool | None], name: str = "right") -> Comparison:
    """Compares two lists of marks, row by row; rows that either has as None do not count.

    Raises:
        ValueError: if they are not equally long.
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must be equally long, got {len(before)} and {len(after)}")
    marked = [(bool(a), bool(b)) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    first, second = [a for a, _ in marked], [b for _, b in marked]
    gained, lost = sum(b and not a for a, b in marked), sum(a and not b for a, b in marked)
    rates = (Rate(name, sum(marks), len(marks)) for marks in (first, second))
    return Comparison(*rates, gained, lost, mcnemar(first, second))
