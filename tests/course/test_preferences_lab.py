"""Helpers of notebook 07, and gains in the token view."""

from __future__ import annotations

import copy
import json

import matplotlib
import pytest
import torch

from qftlab.decoding.engine import generate
from qftlab.files import bundled
from qftlab.maths.losses import sum_by_document
from qftlab.model.loading import load_model
from qftlab.rows.batches import pad
from qftlab.rows.examples import encode_pairs
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.reward import ImplicitReward
from qftlab.train.step import Step
from qftlab_course import views
from qftlab_course.drawing import PALE_BLUE
from qftlab_course.exercises.nb07 import best_of
from qftlab_course.lessons import preference_plots, preferences
from qftlab_course.plots import PALETTE, new_axes

ROWS = [
    {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "six or so"},
    {"prompt": "Add 4 and 4.", "chosen": "eight, surely", "rejected": "9"},
    {"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "3"},
]


@pytest.fixture(scope="module")
def models() -> tuple:
    model = load_model("tiny")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    return model, other, load_tokenizer("tiny")


def test_gains_add_up_to_the_implicit_reward_and_leave_the_prompt_out(models) -> None:
    reference, policy, tokenizer = models
    pair = encode_pairs(tokenizer, ROWS)[0][1]
    gains = preferences.token_gains(policy, reference, pair.chosen)
    assert [gain is not None for gain in gains] == list(pair.chosen.loss_mask)
    batch = pad([pair.chosen], 0)
    with torch.no_grad():
        one, two = (sum_by_document(Step(m)(**batch, want="logprobs")).item() for m in (policy, reference))
    total = sum(gain for gain in gains if gain is not None)
    assert total == pytest.approx(one - two, abs=1e-4) and abs(total) > 1e-3
    ids = [i for i, is_trained in zip(pair.chosen.input_ids, pair.chosen.loss_mask, strict=True) if is_trained]
    reward = ImplicitReward(policy, reference, tokenizer, beta=0.5)
    prompt = [{"role": "user", "content": ROWS[1]["prompt"]}]
    assert reward(prompt, ids, "", {}) == pytest.approx(0.5 * total, abs=1e-4)


def test_gains_of_a_model_over_itself_are_zero(models) -> None:
    model, _, tokenizer = models
    pair = encode_pairs(tokenizer, ROWS)[0][0]
    assert {gain for gain in preferences.token_gains(model, model, pair.rejected) if gain is not None} == {0.0}


def test_a_careless_annotator_takes_the_longer_answer_in_a_share_of_the_rows() -> None:
    assert [r["chosen"] for r in preferences.careless(ROWS, 0.0)] == ["5", "eight, surely", "2"]
    assert [r["chosen"] for r in preferences.careless(ROWS, 1.0)] == ["six or so", "eight, surely", "2"]
    many = [dict(ROWS[0], score_chosen=1.0, score_rejected=0.0)] * 400
    labelled = preferences.careless(many, 0.3, seed=1)
    flipped = sum(row["chosen"] == "six or so" for row in labelled)
    assert 80 < flipped < 160  # 120 ± 4 standard deviations
    assert labelled == preferences.careless(many, 0.3, seed=1) != preferences.careless(many, 0.3, seed=2)
    assert set(labelled[0]) == {"prompt", "chosen", "rejected"} and many[0]["chosen"] == "5"


def test_answers_come_in_the_form_that_rewards_take(models) -> None:
    model, _, tokenizer = models
    rows = [{"instruction": "Use the numbers 1, 2 once each to make 3.", "input": "", "output": "", "numbers": [1, 2],
             "target": 3}] * 2  # fmt: skip
    answers = preferences.answers_to(model, tokenizer, rows, number=3, temperature=1.0)
    assert len(answers) == 6 and all(row is rows[0] or row is rows[1] for *_, row in answers)
    assert answers == preferences.answers_to(model, tokenizer, rows, number=3, temperature=1.0)
    right = (answers[0][0], [], "<answer>1 + 2</answer>", rows[0])
    wrong = (answers[0][0], [], "<answer>1 - 2</answer>", rows[0])
    assert preferences.is_right(right) and not preferences.is_right(wrong)
    assert preferences.share_right([right, wrong, wrong, wrong]) == 0.25


def test_the_token_view_shows_gains_with_sign_and_words(models) -> None:
    _, _, tokenizer = models
    ids = tokenizer("Add 2 and 3.").input_ids
    mask = [False] + [True] * (len(ids) - 1)
    gains = [None, -3.26, 0.04, *[1.0] * (len(ids) - 3)]
    view = views.token_view(tokenizer, ids, mask, gains=gains)
    text = str(view)
    assert "gain" in text.splitlines()[2] and "−3.3" in text and "+1.0" in text
    assert "0.0" in text and "-0.0" not in text and "+0.0" not in text
    drawn = view.svg()
    assert "−3.3" in drawn and "fill-opacity" in drawn and "orange is down" in drawn
    assert PALE_BLUE not in drawn, "the colour of trained tokens would read as a gain"
    assert "<td>−3.3</td>" in view._repr_html_().replace("<bdi>", "").replace("</bdi>", "")
    plain = views.token_view(tokenizer, ids, mask)
    assert "gain" not in str(plain) and "fill-opacity" not in plain.svg()
    with pytest.raises(ValueError, match="gains must have one value"):
        views.token_view(tokenizer, ids, mask, gains=[0.0])


def test_runs_are_thin_lines_with_their_mean_and_bars_carry_a_point_for_each_run() -> None:
    matplotlib.use("Agg")
    ax = new_axes(None)
    preference_plots.runs(ax, [0, 1], [[0.0, 2.0], [2.0, 6.0]], "o-", color="black", label="both")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 2], [2, 6], [1, 4]]
    widths = [line.get_linewidth() for line in ax.lines]
    assert widths[0] == widths[1] < widths[2] and ax.lines[2].get_label() == "both"
    for flat in (False, True):
        ax = new_axes(None)
        preference_plots.bars(ax, ["x", "y"], {"a": [[0.1], [0.2, 0.4]], "b": [[0.5], [0.6]]}, flat=flat)
        sizes = [round(bar.get_width() if flat else bar.get_height()) for bar in ax.patches]
        assert sizes == [10, 30, 50, 60]
        (points,) = ax.lines  # one run is no spread
        assert (points.get_xdata() if flat else points.get_ydata()).tolist() == pytest.approx([20, 40])


PATH = [{"pairs": 16 * k, "margin": k, "preference_accuracy": 0.5, "chosen_logprob": -k, "rejected_logprob": -2 * k}
        for k in range(3)]  # fmt: skip
# One draw of every record, as data/records has them.
DRAWS = [{"seed": 0, "numerics": "plain", "before": {"solved": [0.3, 0.4]},
          **{name: {"path": PATH, "solved": [0.1, 0.2]} for name in ("one", "two")},
          " Bye!": [{"preferred": 0.5, "said": {" Bye!": [0, 0]}}, {"preferred": 1, "said": {" Bye!": [0.9, 0.8]}}],
          "judge": {"score": [0.0, 2.0], "right": [0.5, 0.0], "proxy": [0.0, 0.5], "truth": [0.2, 0.1]}}]  # fmt: skip
PICTURES = {
    "bandit": lambda: preference_plots.bandit([0.1, 1.0], torch.eye(2), [0.1, 1.0], torch.eye(2), ["x", "y"]),
    "easy": lambda: preference_plots.easy(PATH, [0.1, 0.3], [1.0, 0.9]),
    "logs": lambda: preference_plots.logs(DRAWS, ["one", "two"], every=64),
    "collapse": lambda: preference_plots.collapse(DRAWS, ["one", "two"], ["two"], every=64),
    "habits": lambda: preference_plots.habits(DRAWS, [" Bye!", " Bye!"]),
    "taste": lambda: preference_plots.taste([1, 2], DRAWS, ["judge"]),
    "search": lambda: preference_plots.search([1, 2], DRAWS, ["judge"]),
}


def test_pictures_say_what_they_were_given() -> None:
    matplotlib.use("Agg")
    drawn = {name: draw() for name, draw in PICTURES.items()}
    lines = {name: [line.get_ydata().tolist() for line in ax.lines] for name, ax in drawn.items()}
    heights = {name: [round(bar.get_height()) for bar in ax.figure.axes[-1].patches] for name, ax in drawn.items()}
    assert [line.get_xdata().tolist() for line in drawn["logs"].lines] == [[0, 64, 128]] * 4
    assert [line.get_xdata().tolist() for line in drawn["easy"].lines] == [[0, 16, 32]] * 4
    assert lines["collapse"] == [[0, -1, -2]] * 2 + [[0, -2, -4]] * 2
    colors = {line.get_color() for line in drawn["collapse"].lines if line.get_linewidth() > 1}
    assert colors == {PALETTE[1]}, "a run has the colour that `logs` gives it"
    assert [round(bar.get_width()) for bar in drawn["collapse"].figure.axes[1].patches] == [30, 10, 10, 40, 20, 20]
    assert heights["easy"] == [10, 30, 100, 90] and heights["habits"] == [50, 0, 0, 100, 90, 80]
    assert lines["taste"][-1] == [0, 2] and drawn["taste"].figure.axes[1].lines[-1].get_ydata().tolist() == [50, 0]
    assert drawn["search"].figure.axes[1].lines[-1].get_ydata().tolist() == pytest.approx([20, 10])
    assert [text.get_text() for text in drawn["bandit"].get_legend().get_texts()] == ["x", "y"]


@pytest.mark.parametrize("picture", PICTURES)
def test_no_line_crosses_a_legend_and_no_picture_is_boxed(picture: str) -> None:
    """Legends stand over their axes; the lines of the first issue of 07 ran through one."""
    matplotlib.use("Agg")
    ax = PICTURES[picture]()
    ax.figure.canvas.draw()
    for one in ax.figure.axes:
        assert not one.spines["top"].get_visible() and not one.spines["right"].get_visible()
        if (legend := one.get_legend()) is not None:
            box = legend.get_window_extent()
            assert not any(box.overlaps(other.get_window_extent()) for other in ax.figure.axes)
            assert ax.figure.bbox.x0 <= box.x0 and box.x1 <= ax.figure.bbox.x1 and box.y1 <= ax.figure.bbox.y1


def test_products_are_counted_and_the_end_of_a_tag_is_none() -> None:
    answers = [([], [], f"<answer>{text}</answer>", {}) for text in ("1 + 2", "4 * 5", "4 / 2", "9 - 3")]
    assert preferences.share_of_products(answers) == 0.5


def test_endings_are_counted_at_the_end(models) -> None:
    model, _, tokenizer = models
    rows = [{"prompt": "Add 2 and 3."}, {"prompt": "Reverse the word cat."}]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    first, second = (completion.text for completion in generate(model, tokenizer, prompts, max_new_tokens=48))
    assert first[-4:] != second[-4:]
    assert preferences.share_ending(model, tokenizer, rows, first[-4:]) == 0.5
    assert preferences.share_ending(model, tokenizer, rows, "") == 1


def test_length_and_truth_of_answers_by_hand() -> None:
    row = {"numbers": [1, 2], "target": 3}
    answers = [([], [0] * size, f"<answer>{text}</answer>", row)
               for size, text in ((4, "1 + 2"), (4, "2 - 1"), (5, "2 + 1"), (5, "1 * 2"))]  # fmt: skip
    scores = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # mean 3; squared distances 4, 1, 0, 9 over n - 1 = 3
    scale = (14 / 3) ** 0.5
    found = preferences.by_length(scores, answers, [4, 5])
    assert found["score"] == pytest.approx([-1.5 / scale, 1.5 / scale]) and found["right"] == [0.5, 0.5]
    curves = preferences.best_of_curve(scores, answers, [1, 2], best_of)
    assert curves["truth"] == [0.5, 0.0], "of each two the wrong answer has the higher score"
    assert curves["proxy"] == pytest.approx([0, 1 / scale])  # (2 + 6) / 2 - 3


def test_a_spread_is_a_mean_and_a_standard_deviation_in_per_cent() -> None:
    assert preferences.spread([0.1, 0.2, 0.3]) == "20 ± 10 %"


def numbers(value) -> list[float]:
    """All numbers of a nested record, in order."""
    if isinstance(value, dict | list):
        return [n for one in (value.values() if isinstance(value, dict) else value) for n in numbers(one)]
    return [value]


@pytest.mark.parametrize("name", ["07_wreck", "07_style", "07_judges"])
def test_other_rounding_is_no_other_draw_of_a_short_run(name: str) -> None:
    """The lesson says so: to the third decimal of every figure, or one answer of 400."""
    runs = json.loads(bundled("records", f"{name}.json").read_text(encoding="utf-8"))["runs"]
    figures = {(run.pop("seed"), run.pop("numerics")): numbers(run) for run in runs}
    for other in ("default", "avx2"):
        assert figures[0, other] == pytest.approx(figures[0, "plain"], abs=2.5e-3)
    assert figures[0, "plain"] != pytest.approx(figures[1, "plain"], abs=0.01)
