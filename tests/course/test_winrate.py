"""Win rates: worked by hand, in both orders, with judges that like a place, and verdicts that cannot be read."""

from __future__ import annotations

import math
import random

import pytest

from qftlab.evaluate.statistics import clustered_interval
from qftlab_course.winrate import by_score, win_rate

PROMPTS = ["p", "q", "r", "s"]
A, B = ["aa", "a", "aa", "aaa"], ["bbb", "bb", "bb", "b"]
longer = by_score(lambda prompt, text: len(text))


def first_always(prompt, first, second) -> float:
    return 1.0


def test_worked_by_hand() -> None:
    """B is longer twice, as long once and shorter once: (1 + 1 + ½ + 0) ÷ 4."""
    found = win_rate(PROMPTS, A, B, longer)
    assert (found.rate, found.wins, found.ties, found.losses) == (0.625, 2, 1, 1)
    assert (found.by_order, found.first, found.unread) == (0, 0.5, 0)
    strict = win_rate(PROMPTS, A, B, longer, strict=True)
    assert (strict.rate, strict.wins, strict.ties, strict.losses) == (0.5, 2, 1, 1)
    other = win_rate(PROMPTS, B, A, longer)
    assert (other.rate, other.wins, other.losses) == (0.375, 1, 2)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_a_judge_that_likes_a_place_decides_nothing_and_is_seen() -> None:
    found = win_rate(PROMPTS, A, B, first_always)
    assert (found.rate, found.ties, found.by_order, found.first) == (0.5, 4, 1.0, 1.0)
    last = win_rate(PROMPTS, A, B, lambda *pair: 0)
    assert (last.rate, last.ties, last.by_order, last.first) == (0.5, 4, 1.0, 0.0)
    shy = win_rate(PROMPTS, A, B, lambda *pair: 0.5)
    assert (shy.ties, shy.by_order, shy.first) == (4, 0.0, 0.5), "a tie in both orders is no bias"


def test_a_planted_bias_is_measured_and_does_not_move_the_rate() -> None:
    """On half of the prompts the judge takes what stands first, on the others the better: B, 3 of 4 times.

    Asked once, with A first, it would say 3/8.
    """
    prompts = list(range(800))
    better = {n: n % 8 < 6 for n in prompts}  # whether B is the better

    def judge(prompt, first, second) -> float:
        return 1.0 if prompt % 2 else float((second == "b") != better[prompt])

    found = win_rate(prompts, ["a"] * 800, ["b"] * 800, judge)
    assert found.by_order == 0.5 and found.first == 0.75 and found.ties == 400
    assert found.rate == (300 * 1 + 400 * 0.5) / 800 and (found.wins, found.losses) == (300, 100)


def test_what_cannot_be_read_counts_as_a_tie_and_is_told() -> None:
    """In one order B wins and the other is unreadable: a win of three quarters. Both unreadable: a tie."""
    said = {("p", "a", "b"): None, ("p", "b", "a"): 1.0, ("q", "a", "b"): None, ("q", "b", "a"): None}
    found = win_rate(["p", "q"], ["a", "a"], ["b", "b"], lambda *pair: said[pair])
    assert (found.rate, found.wins, found.ties, found.unread, found.by_order) == (0.625, 1, 1, 3, 0)
    nothing = by_score(lambda prompt, text: None if text == "a" else 1.0)
    assert win_rate(["p"], ["a"], ["b"], nothing).unread == 2


def test_the_interval_counts_prompts() -> None:
    rng = random.Random(0)
    keys = [n // 8 for n in range(160)]
    luck = [rng.random() for _ in range(20)]
    wins = [rng.random() < luck[key] for key in keys]

    def judge(prompt, first, second) -> float:
        return float((first == "b") == wins[prompt])

    found = win_rate(range(160), ["a"] * 160, ["b"] * 160, judge, keys=keys)
    ends = clustered_interval([float(win) for win in wins], keys, method="wilson", weights=[1] * 160)
    assert (found.rate, found.low, found.high) == pytest.approx(ends)
    alone = win_rate(range(160), ["a"] * 160, ["b"] * 160, judge)
    assert found.high - found.low > 1.5 * (alone.high - alone.low) and found.rate == alone.rate
    same = win_rate(["p"] * 160, ["a"] * 160, ["b"] * 160, first_always)
    assert math.isnan(same.low), "one prompt, however many answers, shows no spread"


def test_the_items_may_be_run_elsewhere() -> None:
    """Each pair in both orders, and the results in the order of the items."""
    asked = []

    def run(function, items) -> list:
        asked.extend(items)
        return [function(item) for item in reversed(items)][::-1]

    assert win_rate(PROMPTS, A, B, longer, run=run) == win_rate(PROMPTS, A, B, longer)
    assert asked[:2] == [("p", "aa", "bbb"), ("p", "bbb", "aa")] and len(asked) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [], [], longer), "must be equally long and not empty, got 0, 0, 0"),
        ((["p"], ["a"], [], longer), "got 1, 1, 0 and 0"),
        ((["p"], ["a"], ["b"], lambda *pair: 2), "judge must give 1, 0.5, 0 or None, got 2"),
        ((["p"], ["a"], ["b"], by_score(lambda *answer: math.nan)), "scores must be finite numbers, got nan"),
    ],
)
def test_what_is_no_comparison_is_refused(arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        win_rate(*arguments)
    with pytest.raises(ValueError, match="keys must be equally long"):
        win_rate(["p", "q"], ["a"] * 2, ["b"] * 2, longer, keys=[1])
