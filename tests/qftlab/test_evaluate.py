"""Intervals, tests and matches worked by hand."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab.evaluate import answers as evaluate

# --- statistics ---


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.96, z² = 3.8416: centre 0.8 + 0.19208 = 0.99208; reach 1.96·√(0.016 + 0.009604) = 0.313626;
    # both over 1.38416: (0.490, 0.943). To 1e-4, the hand's precision.
    low, high = evaluate.wilson_interval(8, 10)
    assert low == pytest.approx((0.99208 - 0.313626) / 1.38416, abs=1e-4) == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    # 0 of n: (0, z²/(n + z²)).
    assert evaluate.wilson_interval(0, 20) == pytest.approx((0.0, 3.8416 / 23.8416), abs=1e-12)
    assert evaluate.wilson_interval(20, 20) == pytest.approx((1 - 3.8416 / 23.8416, 1.0), abs=1e-12)
    assert evaluate.wilson_interval(0, 0) == (0.0, 1.0)
    for bad in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes must be from 0 to n"):
            evaluate.wilson_interval(*bad)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_ends_solve_the_score_equation(n: int, share: float) -> None:
    """Each end p₀ is where |p − p₀| = z·√(p₀(1 − p₀)/n): the definition, which the formula solves."""
    k = round(share * n)
    low, high = evaluate.wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        assert (k / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-9)


def test_wilson_covers_the_truth() -> None:
    """4,000 experiments of 50 tosses at p = 0.9: covered 93 to 97.5 % of the time (p ± z·se covers 88 %)."""
    rng = random.Random(0)
    covered = 0
    for _ in range(4000):
        low, high = evaluate.wilson_interval(sum(rng.random() < 0.9 for _ in range(50)), 50)
        covered += low <= 0.9 <= high
    assert 0.93 <= covered / 4000 <= 0.975


def test_mcnemar_by_hand() -> None:
    def p(only_a: int, only_b: int, both: int = 5) -> float:
        a = [True] * only_a + [False] * only_b + [True] * both + [False] * 3
        b = [False] * only_a + [True] * only_b + [True] * both + [False] * 3
        return evaluate.mcnemar(a, b)

    assert p(0, 5) == 2 / 32  # 2 · C(5, 0) / 2⁵
    assert p(1, 6) == 2 * (1 + 7) / 128
    assert p(8, 2) == p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert p(3, 3) == p(0, 0) == 1.0, "no evidence either way; never above 1"
    assert p(1, 6, both=400) == p(1, 6), "rows where both agree say nothing"
    assert p(0, 2000) < 1e-300 or p(0, 2000) == 0.0
    with pytest.raises(ValueError, match="same rows on both sides, got 1 and 2"):
        evaluate.mcnemar([True], [True, False])


def test_mcnemar_against_every_coin_sequence() -> None:
    """The exact test from first principles: the share of the 2^m coin sequences at least as lopsided."""
    for only_a, only_b in product(range(5), range(6)):
        m = only_a + only_b
        gap = abs(only_a - only_b)
        extreme = sum(abs(2 * sum(coins) - m) >= gap for coins in product((0, 1), repeat=m)) / 2**m
        a = [True] * only_a + [False] * only_b
        assert evaluate.mcnemar(a, [not x for x in a]) == pytest.approx(extreme, abs=1e-12)


def test_pass_at_k() -> None:
    assert evaluate.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert evaluate.pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # C(3, 2) of C(5, 2) pairs are both wrong
    assert evaluate.pass_at_k(4, 0, 4) == 0.0 and evaluate.pass_at_k(4, 1, 4) == 1.0
    for bad in ((4, 5, 1), (4, 1, 0), (4, 1, 5)):
        with pytest.raises(ValueError, match="pass_at_k needs"):
            evaluate.pass_at_k(*bad)


# --- matches ---


def test_matches() -> None:
    for left, right in (("Moscow", "moscow."), (" 4  65\n95 ", "4 65 95"), ("“Paris”!", "paris"), ("ｆｉｖｅ", "five")):
        assert evaluate.normalised_match(left, right)
    for left, right in (("-5", "5"), ("5.5", "5"), ("46595", "4 65 95"), ("", ""), (".", ","), ("5 6", "5")):
        assert not evaluate.normalised_match(left, right)


# --- matching ---


@pytest.mark.parametrize(("said", "answer"), [
    ("「東京」。", "東京"), ("１５。", "15"), ("你好, 世界！", "你好，世界"), ("东 京", "东京"), ("甲、乙", "甲,乙"),
    ("用 Python 写", "用Python写"), ("『はい』", "はい"), ("“Paris.”", "paris"), ("ﾊﾟﾘ", "パリ"), ("答：对；", "答:对"),
])  # fmt: skip
def test_matching_by_script(said: str, answer: str) -> None:
    assert evaluate.normalised_match(said, answer) and evaluate.contained(answer, said)
    assert evaluate.normalise(evaluate.normalise(said)) == evaluate.normalise(said)


@pytest.mark.parametrize(("answer", "said", "is_there"), [
    ("5", "The answer is 5.", True), ("5", "15", False), ("5", "5.2", False), ("5", "3,5", False), ("5", "-5", False),
    ("5", "x=-5", False), ("-5", "it is -5", True), ("-5", "8-5", False), ("5", "8-5", True),
    ("cat", "concatenate", False), ("cat", "A cat.", True), ("cat", "cat_x", False),
    ("new york", "In New\nYork!", True), ("5", "5, then 6", True), ("5", "一共15个", False),
    ("東京", "答えは東京です。", True), ("东京", "在东 京。", True), ("Python", "用Python写", True), 
    ("5", "一共5个", True),
    ("서울", "서울입니다", True), ("क", "कि", False), ("é", "caf\u0065\u0301", False),
    ("", "x", False), ("。", "x。", False), ("a.b", "aXb", False), ("カ", "ガ", False),
])  # fmt: skip
def test_contained_is_whole_words_or_a_run_of_characters(answer: str, said: str, is_there: bool) -> None:
    assert evaluate.contained(answer, said) == is_there


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_matches_is_contained(a: str, b: str) -> None:
    assert evaluate.contained(a, b) or not evaluate.normalised_match(b, a)


@pytest.mark.parametrize(("said", "answer"), [
    ("<think>\nx\n</think>\n\n4", "4"), ("x\n</think>\n\n4 ", "4"), ("<think>x", ""), (" 4", "4"),
    ("Write </think> here", "Write </think> here"), ("<think>\n\n</think>\n\n4", "4"),
])  # fmt: skip
def test_answers_without_their_thinking(said: str, answer: str) -> None:
    assert evaluate.answer_of(said) == answer
