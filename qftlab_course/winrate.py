"""Win rates: two systems' answers to the same prompts, shown to a judge in both orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qftlab_course.responses import interval_of

# Says 1 where the first answer to a prompt is better, 0 where the second is, 0.5 for a tie, None if that is unreadable.
Judge = Callable[[object, str, str], float | None]


@dataclass(frozen=True)
class WinRate:
    """How often the second system won, with the 95 % interval that counts prompts.

    Args:
        rate, low, high: of the second system's wins; a tie is half a win, or none by the strict rule.
        wins, ties, losses: answers, of the second system; a verdict for each order that cancel out are a tie.
        by_order: share of answers where the judge named the same place in both orders, so that the order decided.
        first: mean verdict for what stood first; 0.5 without a bias for a place.
        unread: verdicts, of two for each answer, that could not be read; they count as ties.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    by_order: float
    first: float
    unread: int


def win_rate(
    prompts: Sequence,
    a: Sequence[str],
    b: Sequence[str],
    judge: Judge,
    *,
    keys: Sequence = (),
    strict: bool = False,
    run: Callable[[Callable, Sequence], Iterable] = map,
) -> WinRate:
    """Asks a judge which of two answers is better, in both orders, and counts how often the second system's is.

    Args:
        prompts: what was asked, one for each pair of answers.
        a: answers of the first system.
        b: answers of the second.
        judge: called as judge(prompt, first, second).
        keys: what each prompt is known by: pairs of one key are one draw. Empty: the prompts themselves.
        strict: the rule of the 2025 CS224R project: a tie is lost.
        run: calls a function on each of many items and gives the results in order, such as a pool's `map`.

    Raises:
        ValueError: for nothing to compare, other lengths, or a verdict that is none.
    """
    if not 0 < len(prompts) == len(a) == len(b) == len(keys or prompts):
        sizes = f"{len(prompts)}, {len(a)}, {len(b)} and {len(keys)}"
        raise ValueError(f"prompts, a, b and keys must be equally long and not empty, got {sizes}")
    pairs = [
        (prompt, *said) for prompt, one, two in zip(prompts, a, b, strict=True) for said in ((one, two), (two, one))
    ]
    verdicts = list(run(lambda pair: judge(*pair), pairs))
    if wrong := [verdict for verdict in verdicts if verdict not in (0, 0.5, 1, None)]:
        raise ValueError(f"judge must give 1, 0.5, 0 or None, got {wrong[0]!r}")
    read = [0.5 if verdict is None else verdict for verdict in verdicts]
    marks = [(1 - x + y) / 2 for x, y in zip(read[::2], read[1::2], strict=True)]  # of b; a stands first in x
    wins, losses = (sum(test) for test in ([mark > 0.5 for mark in marks], [mark < 0.5 for mark in marks]))
    values = [float(mark > 0.5) for mark in marks] if strict else marks
    known = keys or [str(prompt) for prompt in prompts]
    ends = interval_of(values, known)
    orders = sum(x == y != 0.5 for x, y in zip(read[::2], read[1::2], strict=True)) / len(marks)
    counts = wins, len(marks) - wins - losses, losses
    return WinRate(*ends, *counts, orders, sum(read) / len(read), verdicts.count(None))


def by_score(score: Callable[[object, str], float | None]) -> Judge:
    """A judge that calls better what scores more: a reward model, say; the order means nothing to it.

    Args:
        score: from prompt and answer to a finite number, or None if it could not be read.

    Raises:
        ValueError: from the judge, for a score that is none.
    """

    def judge(prompt: object, first: str, second: str) -> float | None:
        x, y = score(prompt, first), score(prompt, second)
        if x is None or y is None:
            return None
        if not (abs(x) < float("inf") and abs(y) < float("inf")):
            raise ValueError(f"scores must be finite numbers, got {x} and {y}")
        return 0.5 if x == y else float(x > y)

    return judge
