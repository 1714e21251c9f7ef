"""Helpers of notebook 07, and gains in the token view."""

from __future__ import annotations

import copy

import matplotlib
import pytest
import torch

from qftlab.core.losses import sum_by_document
from qftlab.data.batching import pad
from qftlab.model.loading import load_model
from qftlab.teach import preference_plots, preferences, views
from qftlab.teach.drawing import PALE_BLUE
from qftlab.text.tokenizer import load_tokenizer
from qftlab.train.pair_rows import encode_pairs
from qftlab.train.reward import ImplicitReward
from qftlab.train.step import Step

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


def test_pictures_say_what_they_were_given() -> None:
    matplotlib.use("Agg")
    path = [{"margin": k, "preference_accuracy": 0.5, "chosen_logprob": -k, "rejected_logprob": -2 * k}
            for k in range(3)]  # fmt: skip
    paths = {"one": path, "two": path}
    ax = preference_plots.logs(paths, every=64)
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0, 64, 128]] * 2
    ax = preference_plots.collapse(paths, {"one": [0.1, 0.2], "two": [0.3, 0.4]}, every=64, shown=["two"])
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, -1, -2], [0, -2, -4]]
    bars = ax.figure.axes[1].patches
    assert [round(bar.get_width()) for bar in bars] == [10, 30, 20, 40]
    ax = preference_plots.habits(["a", "b"], [[0.5, 0, 0]] * 2, [[1, 0, 0], [1, 0.9, 0.8]])
    assert [round(bar.get_height()) for bar in ax.figure.axes[1].patches] == [50, 0, 0, 100, 90, 80]
    tokens, right = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    ax = preference_plots.taste(tokens, {"judge": torch.tensor([0.0, 0.0, 1.0, 1.0])}, right, [1, 2])
    assert [bar.get_height() for bar in ax.figure.axes[1].patches] == [50, 0]
    ax = preference_plots.search([1, 2, 4], {"judge": [0.0, 0.5, 0.9]}, {"judge": [0.2, 0.1, 0.0]})
    assert ax.figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([20, 10, 0])
    ax = preference_plots.bandit([0.1, 1.0], torch.eye(2), [0.1, 1.0], torch.eye(2), ["x", "y"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y"]


def test_products_are_counted_and_the_end_of_a_tag_is_none() -> None:
    answers = [([], [], f"<answer>{text}</answer>", {}) for text in ("1 + 2", "4 * 5", "4 / 2", "9 - 3")]
    assert preferences.share_of_products(answers) == 0.5
