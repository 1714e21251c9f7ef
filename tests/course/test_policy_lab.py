"""Notebook 08: its exercises agree with the library, its pictures hold what they are given, its hack is as told."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks import records
from qftlab.files import bundled
from qftlab.maths.losses import clipped_policy_loss, kl_estimate
from qftlab.maths.verify import countdown_reward, extract_answer, parse_expression
from qftlab.rows.sources import load_rows
from qftlab_course.exercises import nb08
from qftlab_course.lessons import policy_plots


@pytest.fixture(scope="module")
def quick_verifier():
    """The faulty verifier, as notebook 08 shows it."""
    (cell,) = (c for c in records.tagged_cells("08", "recorded") if "def quick_verifier" in c)
    space = {"extract_answer": extract_answer, "parse_expression": parse_expression}
    exec(cell, space)
    return space["quick_verifier"]


def test_oracles_agree_with_the_library() -> None:
    rng = random.Random(0)
    for size in range(1, 9):
        logprobs, old, advantages, epsilon = nb08._draw_ratios(rng, size)
        ours = nb08.clipped(logprobs, old, advantages, epsilon)
        assert torch.equal(ours, clipped_policy_loss(logprobs, old, advantages, epsilon=epsilon))
        policy, reference = nb08._draw_logprobs(rng, size)
        # exp(r) − 1 against expm1(r): the last bits of fp32 differ.
        torch.testing.assert_close(nb08.k3(policy, reference), kl_estimate(policy, reference, "k3"), atol=1e-6, rtol=0)


def test_selection_by_hand() -> None:
    answers, rewards = [["a", "b", "a", "c"], ["a", "b", "b", "c"]], [[1.0, 0.1, 1.0, 1.0], [0.0, 1.0, 1.0, 0.1]]
    assert nb08.select(["x", "y"], answers, rewards, 2) == [("x", "a"), ("x", "c"), ("y", "b")]
    assert nb08.select(["x", "y"], answers, rewards, 1) == [("x", "a"), ("y", "b")]


def test_the_verifier_is_tried_on_what_it_may_get_wrong(quick_verifier) -> None:
    """Of its twelve kinds of answers one is right, and the faulty verifier pays several others."""
    wrongly, rightly = set(), set()
    for seed in range(8):
        for size in range(1, 13):
            text, numbers, target = nb08._draw_answer(random.Random(seed), size)
            wanted = countdown_reward(text, numbers, target)
            assert quick_verifier(text, numbers, target) == nb08._value_only(text, numbers, target)
            if wanted == 1.0:
                rightly.add(size)
            elif quick_verifier(text, numbers, target) == 1.0:
                wrongly.add(size)
    assert rightly == {2} and {1, 3, 4, 5, 6} <= wrongly


def test_the_shortcut_stands_on_round_targets(quick_verifier) -> None:
    rows = load_rows(bundled("countdown", "demonstrations.jsonl"))
    assert sum(row["target"] % 10 == 0 for row in rows) == 209 and len(rows) == 2000
    for text, paid, true in [("40", 1, 0.1), ("4 * 10", 1, 0.1), ("47 - 7", 1, 0.1), ("4 * 10 + 7", 0.1, 0.1)]:
        answer = f"<answer>{text}</answer>"
        assert quick_verifier(answer, [4, 10, 7], 40) == paid
        assert countdown_reward(answer, [4, 10, 7], 40) == true


@pytest.fixture
def closed():
    """Closes what a test drew."""
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def test_pictures_hold_the_numbers(closed) -> None:
    bars = policy_plots.advantage_bars(["a", "b"], [0.9, -0.3], "a puzzle")
    assert [round(bar.get_width(), 2) for bar in bars.patches] == [0.9, -0.3]
    assert bars.patches[0].get_hatch() != bars.patches[1].get_hatch()
    curves = policy_plots.clip_curves(nb08.clipped, 0.2).lines
    assert curves[0].get_ydata()[-1] == pytest.approx(-1.2) and curves[1].get_ydata()[0] == pytest.approx(0.8)
    drawn = policy_plots.pass_curves([1, 2], {"before": [0.2, 0.6], "after": [0.4, 0.5]}).lines
    assert list(drawn[1].get_ydata()) == [0.4, 0.5] and drawn[2].get_ydata()[0] == 0.4
    diamond = policy_plots.frontier([(0.0, 0.2), (0.5, 0.6)], {1: (0.0, 0.2), 2: (0.2, 0.4)}, (2.0, 0.4)).lines[-1]
    assert (diamond.get_xdata()[0], diamond.get_ydata()[0]) == (2.0, 0.4)
    one, two = {"paid": [0.2, 1.0], "true": [0.1, 0.0]}, {"paid": [0.2, 0.3], "true": [0.1, 0.2]}
    left, right = policy_plots.courses({"one": (one, []), "two": (two, [one])})
    assert list(left.lines[0].get_ydata()) == [0.2, 0.6] and len(left.lines) == 2
    thin, _, _, bold = right.lines[0], *right.lines[1:]
    assert list(thin.get_ydata()) == [0.2, 0.6] and list(bold.get_ydata()) == pytest.approx([0.1, 0.15])
    means = policy_plots.lines([1, 2], {"runs": [[0.0, 2.0], [1.0, 4.0]], "one": [1.0, 2.0]}, "", "").lines
    assert [list(line.get_ydata()) for line in means] == [[0, 2], [1, 4], [0.5, 3], [1, 2]]
    logs = [{name: float(i) for name in policy_plots.CURVES} for i in range(3)] + [{"step": 2}]
    assert [len(ax.lines[0].get_ydata()) for ax in policy_plots.run_curves(logs).flat] == [3] * 6
    histogram = policy_plots.push_histogram({"plain": torch.tensor([-99.0, 0.0, 0.5, 50.0])})
    drawn = histogram.patches[0].get_xy()  # nothing is moved to where it is not
    assert histogram.get_xlim()[0] < -99 and max(y for x, y in drawn if 5 < x < 45) == 0
