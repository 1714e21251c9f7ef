"""Notebook 09: its game is fair and scored, its pictures hold their numbers, its fresh process says what it says."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from qftlab import export_model, generate
from qftlab.evaluate.statistics import clustered_interval
from qftlab_course import stages
from qftlab_course.exercises import nb09
from qftlab_course.lessons import ab_game, evaluation_plots
from qftlab_course.lessons.handover import answer_in_a_fresh_process


def test_a_game_is_half_real_and_b_always_looks_better() -> None:
    gaps = []
    for seed in range(20):
        results = ab_game.planted_results(seed=seed)
        assert Counter(r.truth for r in results) == {"real": 10, "noise": 10}
        assert all(r.gap > 0 and len(r.a) == len(r.b) in ab_game.SIZES for r in results)
        gaps += [r.gap - r.gain for r in results if r.gain and len(r.a) == 2000]
    assert abs(np.mean(gaps)) < 0.01  # what is planted is what is measured
    assert ab_game.planted_results(seed=3) == ab_game.planted_results(seed=3) != ab_game.planted_results(seed=4)


def test_marks_have_their_rates_and_correlate() -> None:
    a, b = ab_game.alike_marks(np.random.default_rng(0), 200_000, 0.4, 0.45, 0.6)
    assert abs(a.mean() - 0.4) < 0.006 and abs(b.mean() - 0.45) < 0.006
    assert 0.38 < np.corrcoef(a, b)[0, 1] < 0.44  # of the marks; 0.6 is that of what lies behind
    a, b = ab_game.alike_marks(np.random.default_rng(0), 200_000, 0.4, 0.45, 0.0)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01


def test_the_game_by_buttons_and_by_letters() -> None:
    results = ab_game.planted_results(seed=0)
    truth = "".join(result.truth[0] for result in results)
    game = ab_game.ABGame(results)
    assert game.score is None and "Result 1 of 20" in game.output.value and "Result 1 of 20" in str(game)
    for i, letter in enumerate(truth):
        (game.noise if letter == "n" and i != 4 else game.real).click()  # one of them wrong
    wrong = int(truth[4] == "n")
    assert game.score == 20 - wrong and f"{20 - wrong} are true" in game.output.value
    game.real.click()  # nothing is left to say
    assert len(game.calls) == 20
    game.back.click()
    assert game.score is None and len(game.calls) == 19 and "Result 20 of 20" in game.output.value
    typed = ab_game.ABGame(results, typed=f" {truth[:10]} {truth[10:].upper()}")
    assert typed.score == 20
    assert list(typed.table()["truth"]) == [result.truth for result in results]
    assert "text/plain" in typed._repr_mimebundle_() and "text/html" in typed._repr_mimebundle_()


@pytest.mark.parametrize("typed", ["rx", "r" * 21])
def test_other_letters_and_too_many_are_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="20 letters r or n"):
        ab_game.ABGame(ab_game.planted_results(), typed=typed)


def test_calls_are_counted_by_hand() -> None:
    real, noise = ab_game.ABResult((0, 1), (1, 1), 0.1), ab_game.ABResult((0, 0), (0, 1), 0.0)
    assert real.gap == 0.5 and real.p_value == 1.0
    assert ab_game.count_right([real, noise], ["real", "real"]) == 1
    assert ab_game.count_right([real, noise], ["real", "noise"]) == 2
    with pytest.raises(ValueError, match="2 times real or noise"):
        ab_game.count_right([real, noise], ["real"])


def test_oracles_agree_with_the_library() -> None:
    for size in range(1, 9):
        values, prompts = nb09._draw_answers(random.Random(size), size)
        ours = nb09.prompt_interval(values, prompts)
        np.testing.assert_allclose(ours, clustered_interval(values, prompts, method="t"), atol=1e-12)


def test_win_rate_by_hand() -> None:
    # A wins both; the order decides; two ties; a tie and a loss.
    assert nb09.win_rate(["first", "first", "tie", "tie"], ["second", "first", "tie", "first"]) == (2.25 / 4, 0.25)


def test_pictures_hold_the_numbers() -> None:
    from matplotlib import pyplot

    left, right = evaluation_plots.coverage({"a": [(0.1, 0.3), (0.3, 0.4)], "b": [(0.1, 0.3)] * 2}, 0.2, "rate").axes
    assert left.get_title(loc="left") == "a: 1 of 2 miss" and right.get_title(loc="left") == "b: 0 of 2 miss"
    assert list(left.lines[1].get_xdata()) == [0.3, 0.4] and left.lines[2].get_marker() == "x"
    ax = evaluation_plots.differences({"unpaired": (0.05, -0.1, 0.2), "paired": (0.05, 0.01, 0.09)})
    assert list(ax.lines[2].get_xdata()) == [0.01, 0.09]
    ax = evaluation_plots.power_curves([100, 1000], {"c 0": [0.1, 0.6], "c 1": [0.2, 0.9]})
    assert list(ax.lines[1].get_ydata()) == [0.2, 0.9]
    ax = evaluation_plots.picked({"verifier": {1: 0.3, 2: 0.5}, "first": {1: 0.3, 2: 0.3}})
    assert list(ax.lines[0].get_ydata()) == [0.3, 0.5] and ax.get_ylim()[0] == 0
    pyplot.close("all")


@pytest.mark.long
def test_a_fresh_process_answers_and_its_failure_is_said(tmp_path) -> None:
    stage, asked = stages.stage("sft", preset="tiny"), [{"role": "user", "content": "What is 12 + 7?"}]
    model = stage.model.float()
    export_model(model, stage.tokenizer, tmp_path / "exported")
    ours = generate(model, stage.tokenizer, [asked], max_new_tokens=8)[0]
    assert answer_in_a_fresh_process(tmp_path / "exported", asked, 8) == ours.token_ids
    with pytest.raises(RuntimeError, match="the fresh process failed"):
        answer_in_a_fresh_process(tmp_path / "empty", asked, 8)
