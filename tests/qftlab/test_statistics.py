"""Intervals and tests over prompts: by hand, equal to scipy's on real tables, and true where answers are simulated."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qftlab.evaluate.answers import mcnemar, wilson_interval
from qftlab.evaluate.statistics import (
    clustered_interval,
    detectable_difference,
    paired_test,
    power,
)

Marks = np.ndarray  # (P, G), 0 or 1


def beta_binomial(rng: np.random.Generator, prompts: int, answers: int, rate: float, correlation: float) -> Marks:
    """Answers of which two to one prompt have this correlation: each prompt has a rate of its own, from a beta law."""
    scale = 1 / correlation - 1
    own = rng.beta(rate * scale, (1 - rate) * scale, prompts)
    return rng.random((prompts, answers)) < own[:, None]


def flat(marks: Marks) -> tuple[list[bool], list[int]]:
    return marks.ravel().tolist(), np.repeat(np.arange(len(marks)), marks.shape[1]).tolist()


# --- the interval ---


def test_clustered_interval_by_hand() -> None:
    """Prompt means 1/2, 1 and 0: mean 1/2 (of all six answers it would be 4/6). Their variance is (1/4 + 1/4)/2, se is
    √(0.25/3) = 0.288675, and t with 2 degrees of freedom is 4.302653: ± 1.242068."""
    values, prompts = [1, 1, 1, 0, 1, 0], ["b", "b", "b", "a", "a", "c"]
    expected = (0.5, 0.5 - 1.242068, 0.5 + 1.242068)
    assert clustered_interval(values, prompts, method="t") == pytest.approx(expected, abs=1e-6)
    # t at 80 % is 1.885618: ± 0.544331.
    assert clustered_interval(values, prompts, 0.8, method="t")[1] == pytest.approx(0.5 - 0.544331, abs=1e-6)
    # 0.25 / 0.25·3 = 3 independent answers have that se. Wilson's ends are 1/2 ± ½·√(t²/(3 + t²)) at a mean of 1/2.
    reach = 0.5 * math.sqrt(4.302653**2 / (3 + 4.302653**2))
    assert clustered_interval(values, prompts) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-6)


def test_a_weighted_mean_by_hand() -> None:
    """Two answers of 1 and 3 tokens, 2 and 3 nats: 5/4. Residuals 2 − 1.25 = 0.75 and 3 − 3.75 = −0.75: their squares
    add up to 1.125, × 2/1 = 2.25, root 1.5, ÷ 4 tokens = 0.375; t with 1 degree of freedom is 12.706205: ± 4.764827."""
    found = clustered_interval([2, 1], [0, 1], weights=[1, 3])
    assert found == pytest.approx((1.25, 1.25 - 4.764827, 1.25 + 4.764827), abs=1e-6)
    # The same in three answers, of which two belong to one prompt: Σ weight·value and Σ weight are what counts.
    split = clustered_interval([2, 2, 0.5], [0, 1, 1], weights=[1, 1, 2])
    assert split == pytest.approx(found, abs=1e-12)


def test_where_no_spread_is_seen() -> None:
    mean, low, high = clustered_interval([1, 0, 1], ["one"] * 3)
    assert mean == pytest.approx(2 / 3) and math.isnan(low) and math.isnan(high)
    for method in ("t", "wilson", "bootstrap"):
        assert all(map(math.isnan, clustered_interval([1, 1], [0, 0], method=method)[1:]))
    # Of 50 prompts, all right: 50/(50 + t²) with t(49) = 2.009575, and not [1, 1].
    prompts = [i // 4 for i in range(200)]
    assert clustered_interval([1] * 200, prompts) == pytest.approx((1, 50 / (50 + 2.009575**2), 1), abs=1e-6)
    assert clustered_interval([0] * 200, prompts) == pytest.approx((0, 0, 1 - 50 / (50 + 2.009575**2)), abs=1e-6)
    assert clustered_interval([0.3] * 8, [0, 1] * 4) == pytest.approx((0.3, 0.3, 0.3))
    assert clustered_interval([0.3] * 8, [0, 1] * 4, method="bootstrap") == pytest.approx((0.3, 0.3, 0.3))
    # Half of each prompt's answers are right, or a third: less spread than by chance, so each prompt counts once.
    t = stats.t.ppf(0.975, 3)
    assert clustered_interval([1, 0] * 4, [0, 0, 1, 1, 2, 2, 3, 3])[1:] == pytest.approx(wilson_interval(2, 4, t))
    third = clustered_interval([0, 1, 0] * 10, [i // 3 for i in range(30)])  # ten times 1/3, which rounding spreads
    assert third[1:] == pytest.approx(wilson_interval(10 / 3, 10, stats.t.ppf(0.975, 9)))


def test_the_interval_does_not_see_names_or_order() -> None:
    rng = np.random.default_rng(0)
    values, prompts = flat(beta_binomial(rng, 20, 4, 0.4, 0.3))
    order = rng.permutation(80)
    for method in ("t", "wilson"):
        expected = clustered_interval(values, prompts, method=method)
        shuffled = clustered_interval([values[i] for i in order], [f"p{prompts[i]}" for i in order], method=method)
        assert shuffled == pytest.approx(expected, abs=1e-12)
        # Every answer twice tells nothing new.
        assert clustered_interval(values * 2, prompts * 2, method=method) == pytest.approx(expected, abs=1e-12)
        # What is counted as wrong instead turns the interval round.
        mean, low, high = clustered_interval([1 - value for value in values], prompts, method=method)
        assert (1 - mean, 1 - high, 1 - low) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_is_seeded_and_agrees() -> None:
    values, prompts = flat(beta_binomial(np.random.default_rng(3), 60, 4, 0.5, 0.4))
    first, again, other = (clustered_interval(values, prompts, method="bootstrap", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    # Drawing knows no 1/(P − 1) and no t: 0.983 of the width. Its ends are known to about 0.002 from 9,999 draws.
    mean, low, high = clustered_interval(values, prompts, method="t")
    assert first[0] == mean
    assert first[1:] == pytest.approx((mean - 0.98 * (mean - low), mean + 0.98 * (high - mean)), abs=0.012)


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda: clustered_interval([], []), "equally long and not empty, got 0, 0 and 0"),
    (lambda: clustered_interval([1, 0], [0]), "equally long and not empty, got 2, 1 and 1"),
    (lambda: clustered_interval([1, 0], [0, 1], weights=[1]), "equally long and not empty, got 2, 2 and 1"),
    (lambda: clustered_interval([1, None], [0, 1]), "finite numbers, got nan, None or infinity"),
    (lambda: clustered_interval([1, 0], [0, 1], weights=[1, math.inf]), "finite numbers"),
    (lambda: clustered_interval([1, 0], [0, 1], 95), "level must be above 0 and below 1, got 95"),
    (lambda: clustered_interval([1, 0], [0, 1], method="wald"), "one of t, bootstrap, wilson, got 'wald'"),
    (lambda: clustered_interval([1, 2], [0, 1], method="wilson"), "method must be one of t, bootstrap, got 'wilson'"),
    (lambda: paired_test([1, 0], [1], [0, 1]), "equally long and not empty, got 1, 2 and 2"),
    (lambda: paired_test([1, 0], [1, 1], [0, 0], method="mcnemar"), "one of t, permutation, got 'mcnemar'"),
    (lambda: power(1, 0.1, rate=0.5), "prompts must be at least 2, got 1"),
    (lambda: power(50, 0.1, rate=0.5, answers=0), "answers must be at least 1, got 0"),
    (lambda: power(50, 0.2, rate=0.9), r"must be in \[0, 1\], got \(0, 0, 0.9, 1.1"),
    (lambda: power(50, 0.2, rate=0.5, within=-0.1), r"must be in \[0, 1\], got \(0, -0.1"),
    (lambda: detectable_difference(50, rate=0.5, wanted=1), "wanted must be above 0.05 and below 1, got 1"),
])  # fmt: skip
def test_what_is_wrong_is_said(wrong, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrong()


# --- two systems ---


def test_paired_test_by_hand() -> None:
    """Differences of three prompts 1/2, 1 and 0: t = 0.5/0.288675 = √3, whose p with 2 degrees of freedom is
    1 − √3/√(3 + 2) = 0.225403."""
    a, b, prompts = [1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2]
    found = paired_test(a, b, prompts)
    assert (found.method, found.difference, found.p_value) == ("t", 0.5, pytest.approx(0.225403, abs=1e-6))
    assert (found.low, found.high) == pytest.approx((0.5 - 1.242068, 0.5 + 1.242068), abs=1e-6)
    back = paired_test(b, a, prompts)
    assert (back.difference, back.low, back.p_value) == pytest.approx((-0.5, -found.high, found.p_value))
    same = paired_test(a, a, prompts)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    alone = paired_test([0, 1], [1, 1], [0, 0])
    assert alone.difference == 0.5 and math.isnan(alone.low) and math.isnan(alone.p_value)


def test_the_permutation_flips_every_sign() -> None:
    rng = np.random.default_rng(1)
    a, b, prompts = rng.random(16), rng.random(16) + 0.2, np.repeat(np.arange(8), 2)
    changes = (b - a).reshape(8, 2).mean(1)
    flips = np.array(list(product((1, -1), repeat=8))) @ changes
    expected = (abs(flips) >= abs(changes.sum()) - 1e-12).mean()
    assert paired_test(a, b, prompts, method="permutation").p_value == pytest.approx(expected)


def test_single_marks_go_to_mcnemar() -> None:
    rng = random.Random(0)
    a, b = ([rng.random() < rate for _ in range(40)] for rate in (0.4, 0.6))
    found = paired_test(a, b, range(40))
    assert (found.method, found.p_value) == ("mcnemar", mcnemar(a, b))
    changed = [y - x for x, y in zip(a, b, strict=True)]
    expected = stats.binomtest(changed.count(1), changed.count(1) + changed.count(-1)).pvalue
    assert found.p_value == pytest.approx(expected, abs=1e-12)
    # All flips of single marks are the fair coins of McNemar: the same p, from 9,999 draws.
    assert paired_test(a, b, range(40), method="permutation").p_value == pytest.approx(expected, abs=0.02)
    # On two answers a prompt there is no McNemar.
    assert paired_test(a, b, [i // 2 for i in range(40)]).method == "t"


# --- real tables ---


def pairs(folder: Path) -> Iterator[dict]:
    with (folder / "ultrafeedback/eval_clean.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def test_real_tables_give_what_scipy_gives(real_data: Path) -> None:
    """Lengths of chosen and rejected answers, two to a prompt; rows with one prompt belong together."""
    rows = list(pairs(real_data))
    assert len(rows) > 50
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = ([len(row[name]) for row in rows] for name in ("chosen", "rejected"))
    own = {prompt: [] for prompt in prompts}
    for prompt, a, b in zip(prompts, chosen, rejected, strict=True):
        own[prompt].append((a, b))
    means = np.array([np.mean(lengths, axis=0) for lengths in own.values()])  # (P, 2)

    expected = stats.ttest_1samp(means.mean(1), 0).confidence_interval()
    found = clustered_interval(chosen + rejected, prompts * 2)
    assert found == pytest.approx((means.mean(), expected.low, expected.high), rel=1e-12)
    expected = stats.bootstrap((means.mean(1),), np.mean, method="percentile", rng=5).confidence_interval
    assert clustered_interval(chosen + rejected, prompts * 2, method="bootstrap", seed=5)[1:] == pytest.approx(expected)

    related = stats.ttest_rel(means[:, 1], means[:, 0])
    found = paired_test(chosen, rejected, prompts)
    assert (found.p_value, found.difference) == pytest.approx((related.pvalue, (means[:, 1] - means[:, 0]).mean()))
    assert (found.low, found.high) == pytest.approx(tuple(related.confidence_interval()), rel=1e-9)


# --- true in simulation ---


def covered(
    rate: float, correlation: float, prompts: int, answers: int, runs: int, seed: int = 0
) -> tuple[float, float]:
    """How often `clustered_interval` holds the true rate, and how often Wilson's over all answers does."""
    rng, clustered, all_answers = np.random.default_rng(seed), 0, 0
    for _ in range(runs):
        values, names = flat(beta_binomial(rng, prompts, answers, rate, correlation))
        _, low, high = clustered_interval(values, names)
        clustered += low <= rate <= high
        low, high = wilson_interval(sum(values), len(values))
        all_answers += low <= rate <= high
    return clustered / runs, all_answers / runs


@pytest.mark.parametrize(("rate", "correlation"), [(0.1, 0.7), (0.3, 0.4), (0.9, 0.1)])
def test_intervals_cover_the_truth(rate: float, correlation: float) -> None:
    """50 prompts of 16 answers, 3,000 runs (their share is known to 0.4 points): 93 to 97 %."""
    assert 0.93 <= covered(rate, correlation, 50, 16, 3000)[0] <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.1, 0.4, 0.7])
@pytest.mark.parametrize(("prompts", "answers"), [(50, 4), (50, 16), (200, 16), (1000, 4)])
def test_intervals_cover_the_truth_everywhere(prompts: int, answers: int, correlation: float) -> None:
    """Nine rates from 0.1 to 0.9, 4,000 runs each: 93 to 97 %."""
    shares = {rate / 10: covered(rate / 10, correlation, prompts, answers, 4000, rate)[0] for rate in range(1, 10)}
    assert not {rate: share for rate, share in shares.items() if not 0.93 <= share <= 0.97}, shares


def test_answers_to_one_prompt_are_no_independent_tries() -> None:
    """Wilson's interval over 50 × 16 answers of correlation 0.376 is √(1 + 15·0.376) = 2.58 times too narrow.

    It reaches 0.76 standard errors, which holds the truth 55 % of the time, as on the answers of a real run (56 %).
    """
    clustered, all_answers = covered(0.35, 0.376, 50, 16, 2000)
    expected = 1 - 2 * stats.norm.sf(1.96 / math.sqrt(1 + 15 * 0.376))
    assert expected == pytest.approx(0.553, abs=0.001)
    assert all_answers == pytest.approx(expected, abs=0.04) and clustered > 0.93


def two_systems(rng, prompts: int, answers: int, easy: tuple, hard: tuple) -> tuple[list[bool], list[bool], list[int]]:
    """Marks of two systems; half of the prompts are easy for both, and the pairs are their rates there."""
    own = np.where(rng.random(prompts)[:, None] < 0.5, easy, hard)  # (P, 2)
    marks = rng.random((2, prompts, answers)) < own.T[:, :, None]
    return flat(marks[0])[0], *flat(marks[1])


def found(answers: int, easy: tuple, hard: tuple, prompts: int, runs: int, **options) -> float:
    rng = np.random.default_rng(7)
    sides = (two_systems(rng, prompts, answers, easy, hard) for _ in range(runs))
    return sum(paired_test(*side, **options).p_value < 0.05 for side in sides) / runs


def test_power_by_hand() -> None:
    """0.5 against 0.6 on 100 prompts, one answer each: se is √((0.25 + 0.24)/100) = 0.07, and 0.1 is 1.428571 of it.

    t is 1.984217 with 99 degrees of freedom: Φ(−0.555646) + Φ(−3.412788) = 0.289224 + 0.000322.
    """
    assert power(100, 0.1, rate=0.5) == pytest.approx(0.289546, abs=2e-5)
    assert power(100, -0.1, rate=0.6) == pytest.approx(0.289546, abs=2e-5)
    # 16 answers of correlation 0.2, to difficulties that the systems do not share: 0.49·(1 + 15·0.2)/16 = 0.1225.
    expected = stats.norm.cdf(0.1 / math.sqrt(0.1225 / 100) - 1.984217)
    assert power(100, 0.1, rate=0.5, within=0.2, answers=16) == pytest.approx(expected, abs=1e-5)
    # Right wherever the first was, and on 5 in 100 more: the variance is that of these flips, 0.05·0.95.
    expected = stats.norm.cdf(0.05 / math.sqrt(0.05 * 0.95 / 100) - 1.984217)
    assert power(100, 0.05, rate=0.4, correlation=1) == pytest.approx(expected, abs=1e-5)
    assert power(100, -0.05, rate=0.45, correlation=1) == pytest.approx(expected, abs=1e-5)
    assert power(100, 1.0, rate=0.0) == 1 and power(100, 0.0, rate=0.0) <= 0.05
    assert power(10**6, 0.0, rate=0.4) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"correlation": 0.3}, {"correlation": 0.3, "within": 0.5, "answers": 16}])
def test_what_can_be_detected_is(options: dict) -> None:
    smallest = detectable_difference(200, rate=0.4, **options)
    assert 0 < smallest < 0.6 and power(200, smallest, rate=0.4, **options) == pytest.approx(0.8)
    assert detectable_difference(800, rate=0.4, **options) == pytest.approx(smallest / 2, rel=0.05)  # by √prompts
    assert detectable_difference(200, rate=0.4, wanted=0.5, **options) < smallest
    assert math.isnan(detectable_difference(2, rate=0.4, **options))


# Rates 0.7 and 0.1 on easy and hard prompts, the second system better by `gain` on both: the correlation of two answers
# to one prompt is 0.09 / √(p(1 − p)·q(1 − q)), within and between.
@pytest.mark.parametrize(("prompts", "answers", "gain", "method"), [
    (50, 16, 0.0, "t"), (50, 16, 0.05, "t"), (200, 1, 0.1, "t"),
    pytest.param(50, 4, 0.1, "permutation", marks=pytest.mark.slow),
])  # fmt: skip
def test_false_alarms_and_power_are_as_computed(prompts: int, answers: int, gain: float, method: str) -> None:
    """1,500 runs: a share of 5 % is known to 0.6 points, one of 50 % to 1.3; the formula is within 4 points."""
    runs = 400 if method == "permutation" else 1500
    share = found(answers, (0.7, 0.7 + gain), (0.1, 0.1 + gain), prompts, runs, method=method)
    q = 0.4 + gain
    correlation = 0.09 / math.sqrt(0.24 * q * (1 - q))
    expected = power(prompts, gain, rate=0.4, correlation=correlation, answers=answers)
    assert share == pytest.approx(expected, abs=0.04 if gain else 0.015)
    assert gain == 0 or 0.25 < expected < 0.95


@pytest.mark.long
def test_mcnemar_finds_a_little_less() -> None:
    """0.40 against 0.45 on 1,000 prompts without correlation: 0.62 by t, and exact McNemar 0.59, a known figure."""
    share = found(1, (0.4, 0.45), (0.4, 0.45), 1000, 1000)
    assert share == pytest.approx(0.59, abs=0.04)
    expected = power(1000, 0.05, rate=0.4)
    assert expected == pytest.approx(0.619, abs=0.001)
    assert expected - 0.07 < share < expected + 0.02
    assert found(1, (0.4, 0.4), (0.4, 0.4), 1000, 1000) < 0.065
