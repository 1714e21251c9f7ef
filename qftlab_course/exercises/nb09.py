"""Exercises of notebook 09, is it real: intervals by prompt, an exact paired test, pass@k, a judge in two orders."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from qftlab_course.exercises import Exercise, Suspect

VERDICTS = ("first", "second", "tie")


def prompt_interval(values: list[float], prompts: list[int]) -> tuple[float, float, float]:
    """Mean of the prompts' means, and the 95 % interval by Student's t over them."""
    from scipy.stats import t

    means = [np.mean([v for v, p in zip(values, prompts, strict=True) if p == prompt]) for prompt in sorted({*prompts})]
    mean, error = float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means))
    reach = float(t.ppf(0.975, len(means) - 1)) * error
    return mean, mean - reach, mean + reach


def _draw_answers(rng: random.Random, size: int) -> tuple:
    values, prompts = [], []
    for prompt in range(size + 2):
        rate = rng.random()
        for _ in range(2 + (prompt * size) % 4):  # prompts have different numbers of answers
            values.append(float(rng.random() < rate))
            prompts.append(prompt * 7)
    values[0], values[-1] = 1.0, 0.0  # something varies
    order = rng.sample(range(len(values)), len(values)) if size % 2 == 0 else range(len(values))
    return [values[i] for i in order], [prompts[i] for i in order]


def _interval(by_answer: bool = False, pooled: bool = False, ddof: int = 1, z: bool = False, root: bool = True,
              degrees: int = 1) -> Callable:  # fmt: skip
    """The interval with one mistake."""

    def interval(values, prompts):
        from scipy.stats import norm, t

        groups: dict = {}
        for value, prompt in zip(values, prompts, strict=True):
            groups.setdefault(prompt, []).append(value)
        means = list(values) if by_answer else [sum(g) / len(g) for g in groups.values()]
        n = len(means)
        mean = sum(values) / len(values) if pooled else sum(means) / n
        centre = sum(means) / n
        spread = math.sqrt(sum((m - centre) ** 2 for m in means) / (n - ddof))
        reach = (norm.ppf(0.975) if z else t.ppf(0.975, n - degrees)) * spread / (math.sqrt(n) if root else 1)
        return mean, mean - reach, mean + reach

    return interval


def _draw_marks(rng: random.Random, size: int) -> tuple:
    n = 3 * size + 2
    a = [rng.random() < 0.5 for _ in range(n)]
    b = [x if rng.random() < 0.5 else rng.random() < 0.7 for x in a]
    if size in (3, 6):  # as many gained as lost
        b = [*a[:-2], not a[-2], not a[-1]]
        a[-2], a[-1], b[-2], b[-1] = True, False, False, True
    if size == 5:
        b = list(a)  # nothing differs
    return a, b


def _mcnemar(sides: int = 2, capped: bool = True, all_rows: bool = False, upper: bool = False) -> Callable:
    """The exact test with one mistake."""

    def p_value(a, b):
        gained = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
        lost = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
        m = len(a) if all_rows else gained + lost
        reach = max(gained, lost) if upper else min(gained, lost)
        p = sides * sum(math.comb(m, i) for i in range(reach + 1)) / 2**m
        return min(1.0, p) if capped else p

    return p_value


def _unpaired(a, b):
    """A z-test of two rates, as if the prompts were not the same."""
    n, p, q = len(a), sum(a) / len(a), sum(b) / len(b)
    pooled = (p + q) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / n)
    return math.erfc(abs(p - q) / error / math.sqrt(2)) if error else 1.0


def _draw_counts(rng: random.Random, size: int) -> tuple:
    n = (1, 2, 4, 8, 16, 16, 64, 200)[size - 1]
    k = rng.randint(1, n)
    return n, (0, n, 1, rng.randint(1, n), n - 1, rng.randint(1, n), rng.randint(1, 9), 3)[size - 1], k


def win_rate(shown_first: list[str], shown_second: list[str]) -> tuple[float, float]:
    """Win rate of A over both orders, and the share of pairs on which the order decided.

    A verdict counts 1 for A, ½ for a tie, 0 for B; a pair is the mean of its two. The order decided where both verdicts
    name the same place.
    """
    worth = {"first": 1.0, "tie": 0.5, "second": 0.0}
    pairs = [(worth[x] + 1 - worth[y]) / 2 for x, y in zip(shown_first, shown_second, strict=True)]
    flips = sum(x == y != "tie" for x, y in zip(shown_first, shown_second, strict=True))
    return sum(pairs) / len(pairs), flips / len(pairs)


def _draw_verdicts(rng: random.Random, size: int) -> tuple:
    n = size + 1
    pairs = [(rng.choice(VERDICTS), rng.choice(VERDICTS)) for _ in range(n)]
    fixed = [("first", "first"), ("first", "second"), ("tie", "tie"), ("tie", "first"), ("second", "second")]
    for i, pair in enumerate(fixed[: max(0, size - 1)]):
        pairs[i] = pair
    return [x for x, _ in pairs], [y for _, y in pairs]


def _won(
    swapped: bool = True, tie: float = 0.5, dropped: bool = False, one: bool = False, same: bool = True
) -> Callable:
    """The win rate with one mistake."""

    def rate(shown_first, shown_second):
        worth = {"first": 1.0, "tie": tie, "second": 0.0}
        back = {"first": 0.0 if swapped else 1.0, "tie": tie, "second": 1.0 if swapped else 0.0}
        pairs = list(zip(shown_first, shown_second, strict=True))
        decided = [x == y if same else x != y for x, y in pairs]
        flips = [d and "tie" not in pair if same else d for d, pair in zip(decided, pairs, strict=True)]
        kept = [pair for pair, flip in zip(pairs, flips, strict=True) if not (dropped and flip)]
        points = [worth[x] if one else (worth[x] + back[y]) / 2 for x, y in kept]
        return (sum(points) / len(points) if points else 0.5), sum(flips) / len(pairs)

    return rate


def _ties_decide(shown_first, shown_second):
    """Counts two ties as a pair that the order decided."""
    same = [x == y for x, y in zip(shown_first, shown_second, strict=True)]
    return _won()(shown_first, shown_second)[0], sum(same) / len(same)


EXERCISES = (
    Exercise(
        id="09.1",
        title="An interval that counts prompts",
        dots=2,
        minutes=10,
        reference=prompt_interval,
        draw=_draw_answers,
        instead="take the mean of each prompt, then their mean and their spread; scipy.stats.t.ppf gives t",
        forbidden=("qftlab.evaluate.statistics.clustered_interval",),
        suspects=(
            Suspect(
                "the answers were counted one by one; those to one prompt are alike, so count prompts",
                like=_interval(by_answer=True),
            ),
            Suspect(
                "the mean is over all answers here, so prompts with many answers count more; take the mean of the "
                "prompts' means",
                like=_interval(pooled=True),
            ),
            Suspect("the spread of a sample divides by P − 1, not by P (ddof=1)", like=_interval(ddof=0)),
            Suspect("1.96 is for very many prompts; with few, t(0.975, P − 1) is larger", like=_interval(z=True)),
            Suspect("the mean of P prompts varies less than one of them: divide by √P", like=_interval(root=False)),
            Suspect("t has P − 1 degrees of freedom", like=_interval(degrees=0)),
        ),
    ),
    Exercise(
        id="09.2",
        title="Two models on the same prompts",
        dots=2,
        minutes=10,
        reference="qftlab.evaluate.answers.mcnemar",
        draw=_draw_marks,
        instead="count the prompts gained and lost, and add up math.comb(m, i) / 2**m",
        forbidden=("scipy.stats.binomtest",),
        suspects=(
            Suspect("both directions count: twice the tail", like=_mcnemar(sides=1)),
            Suspect("with as many gained as lost twice the tail passes 1: at most 1", like=_mcnemar(capped=False)),
            Suspect("prompts on which both agree say nothing: m = gained + lost", like=_mcnemar(all_rows=True)),
            Suspect("the tail runs up to the smaller of the two counts", like=_mcnemar(upper=True)),
            Suspect("that compares two rates as if the prompts differed; pair them", like=_unpaired),
        ),
    ),
    Exercise(
        id="09.3",
        title="pass@k",
        dots=1,
        minutes=6,
        reference="qftlab.evaluate.answers.pass_at_k",
        draw=_draw_counts,
        instead="1 − C(n − c, k) / C(n, k) with math.comb",
        suspects=(
            Suspect(
                "1 − (1 − c/n)^k draws with replacement; the k answers are different ones",
                like=lambda n, c, k: 1 - (1 - c / n) ** k,
            ),
            Suspect("k chances do not add up: two can be right at once", like=lambda n, c, k: min(1.0, k * c / n)),
            Suspect("that is pass@1, whatever k is", like=lambda n, c, k: c / n),
            Suspect(
                "that is the chance that all k are wrong", like=lambda n, c, k: math.comb(n - c, k) / math.comb(n, k)
            ),
            Suspect("that is pass@n: one of all n", like=lambda n, c, k: float(c > 0)),
        ),
    ),
    Exercise(
        id="09.4",
        title="A judge, asked in both orders",
        dots=2,
        minutes=8,
        reference=win_rate,
        draw=_draw_verdicts,
        instead="give each verdict its worth for A, and take the mean of both orders",
        suspects=(
            Suspect('where A was shown second, "second" is a win for A', like=_won(swapped=False)),
            Suspect("a tie is half a win, not a loss", like=_won(tie=0.0)),
            Suspect("a tie is half a win, not a whole one", like=_won(tie=1.0)),
            Suspect("pairs on which the order decided count as well: half a win", like=_won(dropped=True)),
            Suspect("only one order was counted", like=_won(one=True)),
            Suspect("the order decided where both verdicts name the same place", like=_won(same=False)),
            Suspect("two ties agree: there the order decided nothing", like=_ties_decide),
        ),
    ),
)
