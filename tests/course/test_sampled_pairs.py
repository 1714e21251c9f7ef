"""Pairs that a model wrote itself: token for token what was sampled, and a word on every prompt that gave none."""

from __future__ import annotations

import random

import pytest

from qftlab.maths.verify import countdown_reward
from qftlab.model.loading import load_model
from qftlab.rows.countdown import countdown_row, fresh_problems, random_problem
from qftlab.rows.tokenizer import load_tokenizer
from qftlab_course.sampled_pairs import sample_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def test_sampled_pairs_put_right_against_best_wrong_and_count_the_rest(tokenizer) -> None:
    """A verifier of parity gives every kind of group; the same seed gives the same pairs."""
    chance = random.Random(0)
    rows = [countdown_row(random_problem(chance)) for _ in range(24)]
    model = load_model("tiny")
    seen: list[tuple] = []

    def reward(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
        seen.append((prompt[-1]["content"], row["instruction"]))
        assert tokenizer.decode(ids).startswith(text)
        return (1.0, 0.1, 0.0, 0.0)[(len(ids) + row["target"]) % 4]

    options = {"num_generations": 4, "max_new_tokens": 12, "seed": 3}
    first = sample_pairs(model, tokenizer, rows, reward, **options)
    assert all(prompt == instruction for prompt, instruction in seen) and len(seen) == 96
    assert len(first.pairs) + first.all_right + first.all_wrong + first.unfinished == first.num_prompts == 24
    assert first.pairs and len(first.rows) == len(first.pairs)
    for pair, row in zip(first.pairs, first.rows, strict=True):
        assert row["score_chosen"] == 1 > row["score_rejected"]
        assert row["prompt"][-1]["content"] == rows[pair.number - 1]["instruction"]
        for side in (pair.chosen, pair.rejected):
            start = side.loss_mask.index(True)
            assert side.input_ids[:start] == pair.chosen.input_ids[:start] and all(side.loss_mask[start:])
    assert sample_pairs(model, tokenizer, rows, reward, **options) == first
    assert sample_pairs(model, tokenizer, rows, reward, **{**options, "seed": 4}) != first
    with pytest.raises(ValueError, match="num_generations must be at least 2, got 1"):
        sample_pairs(model, tokenizer, rows, reward, num_generations=1)


def test_equal_rewards_give_no_pair(tokenizer) -> None:
    rows = [countdown_row(random_problem(random.Random(1)))] * 3
    for value, field in ((1.0, "all_right"), (0.0, "all_wrong")):
        found = sample_pairs(load_model("tiny"), tokenizer, rows, lambda *_, v=value: v, num_generations=2,
                             max_new_tokens=3)  # fmt: skip
        assert not found.pairs and getattr(found, field) == 3 and found.accuracy == value
        assert countdown_reward("", rows[0]["numbers"], rows[0]["target"]) == 0


def test_sampled_pairs_say_their_layout(monkeypatch) -> None:
    model, tokenizer, found = load_model("tiny"), load_tokenizer("tiny"), []
    for pin in ("plain", "tiled"):
        monkeypatch.setenv("QFTLAB_LAYOUT", pin)
        options = {"num_generations": 2, "max_new_tokens": 4}
        found.append(sample_pairs(model, tokenizer, fresh_problems(2, 0), lambda *_: 1.0, **options).layout)
    assert found == ["plain", "tiled"]
