"""Rates of several answers to each prompt: intervals and tests that count prompts, and the differences they can see.

Answers to one prompt are alike, so 50 prompts with 16 answers each tell far less than 800 prompts would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qftlab.evaluate.answers import mcnemar, wilson_interval
from qftlab.settings import check_at_least, check_choice

Numbers = Sequence[float]


def clustered_interval(
    values: Numbers, prompts: Sequence, level: float = 0.95, *, method: str = "", weights: Numbers = (), seed: int = 0
) -> tuple[float, float, float]:
    """The mean of the prompts' means, with the interval (low, high) of what other prompts like these would give.

    Its ends are nan for one prompt. Where all prompts have the same mean, no spread is seen: "wilson" then counts each
    prompt once, and the others give no width.

    Args:
        values: marks (0 or 1) or other finite numbers, one an answer.
        prompts: which prompt each answers. Prompts count alike, however many answers they have.
        level: how often such intervals hold the true mean.
        method: "t", mean ± t·se by the spread of the P prompt means with P − 1 degrees of freedom; "wilson", for values
            in [0, 1], `wilson_interval` with that t and as many independent answers as have that se: mean(1 − mean)
            ÷ se²; "bootstrap", percentiles of 9,999 draws of P prompts. Empty: "wilson" for marks, else "t". Near 0
            and 1 the spread is seen too small too often: at 0.1 with 50 prompts, t misses 6 to 8 times in 100.
        weights: one an answer, such as its tokens: Σ weight·value ÷ Σ weight instead of the mean of prompt means. Empty
            for that mean.
        seed: of the draws.

    Raises:
        ValueError: if something is empty, not finite, of another length or out of range.

    Source: the ratio estimator and its variance by linearisation, Cochran 1977, eq. 6.13, without its correction for
    small populations; without weights it is that of prompt means. Effective numbers: Korn and Graubard 1998.
    """
    from scipy import stats

    totals, sizes = _by_prompt(values, prompts, weights if len(weights) else [1] * len(prompts))
    if not len(weights):
        totals, sizes = totals / sizes, np.ones(len(sizes))
    method = method or ("t" if set(values) - {0, 1} else "wilson")
    check_choice(("t", "bootstrap", *["wilson"] * (0 <= min(values) <= max(values) <= 1)), method=method)
    (mean, error), n, t = _mean_and_error(totals, sizes), len(totals), _t(level, len(totals))
    if method == "wilson" and n > 1:
        effective = mean * (1 - mean) / error**2 if error > 1e-9 else n  # below is rounding
        return mean, *wilson_interval(mean * effective, effective, t)
    if method == "bootstrap" and n > 1:
        options = {"confidence_level": level, "paired": True, "method": "percentile", "rng": seed}
        return mean, *map(float, stats.bootstrap((totals, sizes), _ratio, **options).confidence_interval)
    return mean, mean - t * error, mean + t * error


@dataclass(frozen=True)
class PairedTest:
    """`difference` = b − a on the same prompts, its interval, p of "no difference", and the `method` that gave p."""

    difference: float
    low: float
    high: float
    p_value: float
    method: str


def paired_test(
    a: Numbers, b: Numbers, prompts: Sequence, level: float = 0.95, *, method: str = "", seed: int = 0
) -> PairedTest:
    """Tests whether two systems have the same mean, by the difference of their means on each prompt.

    The interval is t over these differences: nan for one prompt, without width where all are equal. Then p by t is nan
    for one prompt, else 1 if the differences are 0, and 0 if they are not.

    Args:
        a: marks (0 or 1) or other finite numbers of the first system, one an answer.
        b: those of the second.
        prompts: which prompt each answers, in a and in b.
        level: how often such intervals hold the true difference.
        method: what gives p: "t"; "permutation", which flips the signs of whole prompts (in every way, or 9,999 at
            random); or "mcnemar", exact, for one answer of 0 or 1 a prompt. Empty: "mcnemar" where it can, else "t".
        seed: of the random flips.

    Raises:
        ValueError: if something is empty, not finite, of another length or out of range.
    """
    from scipy import stats

    (before, sizes), (after, _) = (_by_prompt(values, prompts, [1] * len(prompts)) for values in (a, b))
    marks = len(sizes) == len(prompts) and not {*a, *b} - {0, 1}
    method = method or ("mcnemar" if marks else "t")
    check_choice(("t", "permutation", "mcnemar") if marks else ("t", "permutation"), method=method)
    changes = (after - before) / sizes
    difference, error = _mean_and_error(changes, np.ones(len(changes)))
    reach = _t(level, len(changes)) * error
    if method == "mcnemar":
        p = mcnemar(a, b)
    elif method == "permutation":
        p = stats.permutation_test((changes,), np.mean, permutation_type="samples", rng=seed).pvalue
    else:
        p = 2 * stats.t.sf(abs(difference) / error, len(changes) - 1) if error else difference == 0
    return PairedTest(difference, difference - reach, difference + reach, float(p), method)


def power(
    prompts: int, difference: float, *, rate: float, correlation: float = 0, within: float = 0, answers: int = 1
) -> float:
    """How often a `paired_test` at p < 0.05 finds that a second rate is rate + difference: Φ(|difference| ÷ se − t).

    With p and q the two rates, v = p(1 − p), w = q(1 − q) and m answers of each system to each prompt, se² is
    ((v + w)·(1 + (m − 1)·within) ÷ m − 2c) ÷ prompts. There c = correlation·√(v·w), or min(p, q) − pq where that is
    less, because no more can be shared. t is the test's 97.5 % quantile. The normal law stands in for the noncentral t,
    and exact McNemar finds some points less.

    Args:
        prompts: how many both systems answer, two at least.
        difference: second rate − first rate.
        rate: of the first system, in [0, 1].
        correlation: of an answer of one system with one of the other to the same prompt, in [0, 1].
        within: correlation of two answers of one system to one prompt, in [0, 1]; counts as `correlation` where it is
            less, because no lower one can give that.
        answers: m.

    Raises:
        ValueError: naming what is out of range.

    Source: Miller 2024, "Adding Error Bars to Evals" (arXiv 2411.00640), power analysis, with t for the first z.
    """
    from scipy import stats

    check_at_least(2, prompts=prompts)
    check_at_least(1, answers=answers)
    q = rate + difference
    if not 0 <= min(shares := (correlation, within, rate, q)) <= max(shares) <= 1:
        raise ValueError(f"correlation, within, rate and rate + difference must be in [0, 1], got {shares}")
    v, w = rate * (1 - rate), q * (1 - q)
    shared = min(correlation * math.sqrt(v * w), min(rate, q) - rate * q)
    spread = max(0.0, (v + w) * (1 + (answers - 1) * max(within, correlation)) / answers - 2 * shared)
    away = abs(difference) * math.sqrt(prompts / spread) if spread else math.inf if difference else 0.0
    return float(stats.norm.cdf(np.array([away, -away]) - _t(0.95, prompts)).sum())


def detectable_difference(prompts: int, *, rate: float, wanted: float = 0.8, **options) -> float:
    """The gain over `rate` that is found with the `wanted` power; nan where even 1 − rate is not.

    Args:
        prompts: how many both systems answer.
        rate: of the first system.
        wanted: power, above 0.05 and below 1.
        options: those of `power`.

    Raises:
        ValueError: naming what is out of range.
    """
    from scipy.optimize import brentq

    if not 0.05 < wanted < 1:
        raise ValueError(f"wanted must be above 0.05 and below 1, got {wanted}")
    if power(prompts, 1 - rate, rate=rate, **options) < wanted:
        return math.nan
    return float(brentq(lambda gain: power(prompts, gain, rate=rate, **options) - wanted, 0, 1 - rate))


def smallest_difference(marks: Numbers, prompts: Sequence, wanted: float = 0.8, correlation: float = 0) -> float:
    """How far a second model must be from one with these marks to be told apart from it by the same prompts.

    It is the `detectable_difference` away from 0 or 1, whichever end is nearer, for as many prompts and answers as
    there are. What answers to one prompt have in common is read off the spread of the prompts' means; where all are
    right, or all wrong, there is none to read, and each prompt counts once.

    Args:
        marks: 0 or 1, one an answer.
        prompts: which prompt each answers, at least two.
        wanted: power.
        correlation: as in `power`; 0, the default, promises least.

    Raises:
        ValueError: naming what is out of range.
    """
    totals, sizes = _by_prompt(marks, prompts, [1] * len(prompts))
    means, answers = totals / sizes, sizes.mean()
    rate, within = means.mean(), 1.0
    if answers > 1 and 0 < rate < 1:
        within = min(1.0, max(0.0, (answers * means.var(ddof=1) / (rate * (1 - rate)) - 1) / (answers - 1)))
    options = {"wanted": wanted, "correlation": correlation, "within": within, "answers": answers}
    return detectable_difference(len(means), rate=min(rate, 1 - rate), **options)


def _by_prompt(values: Numbers, prompts: Sequence, weights: Numbers) -> np.ndarray:
    """Σ weight·value and Σ weight of each prompt, in order of appearance.  # (2, P)"""
    if not 0 < len(values) == len(prompts) == len(weights):
        sizes = f"{len(values)}, {len(prompts)} and {len(weights)}"
        raise ValueError(f"values, prompts and weights must be equally long and not empty, got {sizes}")
    values, weights = np.asarray([values, weights], dtype=float)
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise ValueError("values and weights must be finite numbers, got nan, None or infinity: leave such answers out")
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    places = [place[prompt] for prompt in prompts]
    return np.array([np.bincount(places, weights * values), np.bincount(places, weights)])


def _mean_and_error(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Σ totals ÷ Σ sizes and its standard error; nan for one prompt."""
    mean, n = float(_ratio(totals, sizes)), len(totals)
    error = math.sqrt(n / (n - 1) * ((totals - mean * sizes) ** 2).sum()) / sizes.sum() if n > 1 else math.nan
    return mean, float(error)


def _ratio(totals: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
    return totals.sum(axis) / sizes.sum(axis)


def _t(level: float, n: int) -> float:
    """The quantile that a two-sided interval over n prompts reaches to; nan for one prompt."""
    from scipy import stats

    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got {level}")
    return float(stats.t.ppf((1 + level) / 2, n - 1))
