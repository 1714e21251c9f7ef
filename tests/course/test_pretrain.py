"""The tiny model's own recipe: a few real steps of it, killed and resumed, end in a folder that loads everywhere."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import pytest
import torch
from random_signals import disturbed

from qftlab.model.loading import load_model
from qftlab.rows.tokenizer import load_tokenizer
from qftlab_course.world import corpus
from qftlab_course.world.pretrain import PretrainConfig, build_tokenizer, encode_documents, learning_rate, pretrain

SMALL = {
    "documents_per_step": 8, "hidden_size": 32, "intermediate_size": 64, "layers": 2,
    "save_every": 2, "polish_steps": 2,
}  # fmt: skip


def test_the_bundled_tokenizer_is_the_recipe_s():
    built, shipped = build_tokenizer(1_000), load_tokenizer("tiny")
    assert built.get_vocab() == shipped.get_vocab() and built.chat_template == shipped.chat_template
    text = "What is 47 + 38? Sort: 1234\n\n  'tis <|im_start|>user\nÜber 你好<|im_end|>"
    assert built(text).input_ids == shipped(text).input_ids
    assert [shipped.decode(i) for i in shipped("1234").input_ids] == ["1", "2", "3", "4"]
    assert shipped.decode(shipped(text).input_ids) == text


def test_only_the_trained_spans_of_documents_are_learned():
    tokenizer = load_tokenizer("tiny")
    document = corpus.Document().add("2 + 3 =", trained=False).add(" 5" + corpus.END, trained=True)
    example = encode_documents(tokenizer, [document])[0]
    kept = [i for i, k in zip(example.input_ids, example.loss_mask, strict=True) if k]
    assert tokenizer.decode(kept) == " 5<|endoftext|>"


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = pretrain(PretrainConfig(output=str(tmp_path / "a"), steps=2, warmup=2, **SMALL))

    class Killed(Exception):
        pass

    config = PretrainConfig(output=str(tmp_path / "b"), steps=2, warmup=2, **SMALL)
    with pytest.MonkeyPatch.context() as patch:

        def dies(seed, step, count):
            if step == 3:
                raise Killed
            return corpus.documents(seed, step, count)

        patch.setattr("qftlab_course.world.pretrain.documents", dies)
        with pytest.raises(Killed):
            pretrain(config)
    resumed = pretrain(config)
    a, b = load_model(whole).state_dict(), load_model(resumed).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (resumed / "checkpoints").exists()
    record = json.loads((resumed / "pretraining.json").read_text())
    assert record["config"]["steps"] == 2 and record["tokens"] > 100


@pytest.mark.long
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_random_signals_change_nothing(count: int, tmp_path):
    """The same command goes on after each, to the same bytes."""
    torch.set_num_threads(1)
    config = PretrainConfig(steps=4, warmup=2, **SMALL | {"save_every": 1})
    clock = time.perf_counter()
    whole = pretrain(replace(config, output=str(tmp_path / "whole")))
    seconds, chance = time.perf_counter() - clock, random.Random(count)
    for number in range(count):
        ours = replace(config, output=str(tmp_path / str(number)))
        disturbed(pretrain, (ours,), tmp_path / str(number), chance, seconds)
        folder = pretrain(ours)
        for name in ("model.safetensors", "pretraining.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), number


def test_schedule_and_settings():
    config = PretrainConfig(steps=100, warmup=10, decay=0.3, lr=1.0, polish_steps=10, polish_lr=0.5)
    rates = [learning_rate(config, i) for i in (0, 9, 50, 69, 85, 99, 100, 109)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 1 / 30, 0.5, 0.05])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        replace(config, steps=0)
    with pytest.raises(ValueError, match="rows must be at least vocab_size"):
        replace(config, rows=10)
