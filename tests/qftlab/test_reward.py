"""Reward models: the loss by hand, what training gives, files to files, and as a reward of RLOO on real preferences."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from random_models import random_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from qftlab.files import sha256
from qftlab.model.loading import save_model
from qftlab.rows.examples import encode_pairs
from qftlab.rows.sources import load
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import PolicyConfig, RewardConfig, TrainConfig
from qftlab.train.dpo import PairSource, fit_pairs
from qftlab.train.reward import ImplicitReward, ModelReward, RewardStep, ended, fit_reward, reward, reward_model
from qftlab.train.rloo import fit_policy


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def polite_rows(words: str) -> list[dict]:
    return [{"prompt": f"Say {w}.", "chosen": f"{w.title()}, gladly.", "rejected": f"{w}"} for w in words.split()]


TRAIN, HELD = "one two three four five six seven eight", "nine ten eleven twelve"


def random_head(model, seed: int = 0) -> None:
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))


def test_a_fresh_model_ties_all_pairs_at_log_two(tokenizer) -> None:
    logs: list[dict] = []
    config = TrainConfig(lr=1e-9, batch_size=8, max_steps=1)
    fit_reward(reward_model(random_model(), tokenizer), tokenizer, polite_rows(TRAIN), config,
               held_out_rows=polite_rows(HELD), on_log=logs.append)  # fmt: skip
    assert logs[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[0]["held_out_accuracy"] == 0.5 and logs[1]["pairs"] == 8


def test_the_loss_is_what_transformers_scores_say(tokenizer) -> None:
    """Packed, padded and split, against transformers' own classifier on one document at a time."""
    model = reward_model(random_model(), tokenizer)
    random_head(model)
    rows = polite_rows(TRAIN)
    pairs = [type(p)(ended(p.chosen), ended(p.rejected), p.number) for p in encode_pairs(tokenizer, rows)[0]]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(p.chosen.input_ids[-1] == p.rejected.input_ids[-1] == end for p in pairs)

    def alone(example) -> torch.Tensor:
        return model(input_ids=torch.tensor([example.input_ids])).logits[0, 0]

    with torch.no_grad():
        margins = torch.stack([alone(p.chosen) - alone(p.rejected) for p in pairs])
    wanted = math.fsum(math.log1p(math.exp(-m)) for m in margins.tolist()) / len(pairs)
    for change in ({}, {"packing": False}, {"micro_batch_size": 3}, {"packing": False, "tokens_per_micro_batch": 200}):
        step = RewardStep(model)
        source = PairSource(pairs, torch.zeros(8, 2), TrainConfig(batch_size=8, **change))
        loss = sum(step(**part.tensors, num_tokens=8) for part in source.split(range(8)))
        assert loss.item() == pytest.approx(wanted, abs=1e-5)
        assert step.take()["margin"] == pytest.approx(margins.mean().item(), abs=1e-5)


def test_training_ranks_held_out_pairs_and_both_forms_of_scoring_agree(tokenizer, tmp_path) -> None:
    model, logs = reward_model(random_model(), tokenizer), []
    fit_reward(model, tokenizer, polite_rows(TRAIN), TrainConfig(lr=3e-3, epochs=15, batch_size=8),
               held_out_rows=polite_rows(HELD), on_log=logs.append)  # fmt: skip
    held = [record for record in logs if "held_out_loss" in record]
    assert held[-1]["held_out_accuracy"] == 1 > held[0]["held_out_accuracy"] and held[-1]["held_out_margin"] > 1
    save_model(model, tokenizer, tmp_path / "model")
    loaded = ModelReward.load(str(tmp_path / "model"))
    texts = ["Nine, gladly.", "nine", "Nine, gladly. Nine, gladly, again and again.", ""]
    asked = [([{"role": "user", "content": "Say nine."}], [5], text, {}) for text in texts]
    together, apart = loaded.many(asked), [ModelReward(model, tokenizer)(*one) for one in asked]
    assert together == pytest.approx(apart, abs=1e-4) and together[0] > together[1]


def test_a_reward_model_has_one_label(tokenizer, tmp_path) -> None:
    config = random_model().config
    config.num_labels, config.pad_token_id = 3, 0
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="must have one label, got 3"):
        ModelReward.load(str(tmp_path))


def test_the_implicit_reward_is_the_margin_of_dpo(tokenizer) -> None:
    """Differences of implicit rewards are the margins that DPO logs, 0 for a model that is its reference."""
    rows, logs = polite_rows(HELD), []
    model, reference = random_model(), random_model()
    fit_pairs(model, tokenizer, polite_rows(TRAIN), TrainConfig(lr=1e-3, epochs=3, batch_size=8),
              held_out_rows=rows, on_log=logs.append)  # fmt: skip
    margin = [record for record in logs if "held_out_loss" in record][-1]["held_out_margin"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def asked(side: str) -> list[tuple]:
        prompts = [[{"role": "user", "content": r["prompt"]}] for r in rows]
        return [(p, [*tokenizer(r[side]).input_ids, end], r[side], r) for p, r in zip(prompts, rows, strict=True)]

    function = ImplicitReward(model, reference, tokenizer, beta=0.1, batch_size=3)
    gaps = [a - b for a, b in zip(function.many(asked("chosen")), function.many(asked("rejected")), strict=True)]
    assert sum(gaps) / len(gaps) == pytest.approx(margin, abs=1e-4) and abs(margin) > 0.01
    assert_close(torch.tensor(ImplicitReward(model, model, tokenizer).many(asked("chosen"))), torch.zeros(4))


def test_files_to_files_and_resume(tokenizer, tmp_path) -> None:
    save_model(random_model(attention_dropout=0.1), tokenizer, tmp_path / "start")
    for name, words in (("train", TRAIN), ("held", HELD)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, polite_rows(words))), encoding="utf-8")

    def config(steps: int, output: str, resume: str | None = None) -> RewardConfig:
        train = TrainConfig(lr=3e-3, max_steps=steps, batch_size=4, eval_every=2, save_every=2, schedule="constant",
                            warmup_ratio=0.0)  # fmt: skip
        return RewardConfig(model=str(tmp_path / "start"), data=str(tmp_path / "train.jsonl"), device="cpu",
                            held_out=str(tmp_path / "held.jsonl"), output=str(tmp_path / output), resume=resume,
                            train=train)  # fmt: skip

    whole = reward(config(6, "whole"))
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "held_out_accuracy" in r] == [0, 2, 4, 6]
    answer = ([{"role": "user", "content": "Say ten."}], [5], "ten", {})
    assert ModelReward.load(str(whole / "checkpoints" / "initial"))(*answer) == 0, "before its first step all tie"
    assert ModelReward.load(str(whole / "checkpoints" / "final"))(*answer) == ModelReward.load(str(whole))(*answer) != 0
    first = reward(config(6, "cut"))
    digest = sha256(first / "model" / "model.safetensors")
    assert digest == sha256(whole / "model" / "model.safetensors")
    shutil.rmtree(first / "model")
    shutil.rmtree(first / "checkpoints" / "reward" / "step-000006")
    assert reward(config(6, "cut", resume="last")) == first
    assert sha256(first / "model" / "model.safetensors") == digest
    assert math.isfinite(ModelReward.load(str(first))([{"role": "user", "content": "Say ten."}], [5], "ten", {}))


def test_rloo_on_ultrafeedback_with_a_reward_model(real_data: Path, tokenizer) -> None:
    """Real prompts, a reward model trained on their pairs, and RLOO that raises its reward."""
    rows = [r for r in load(str(real_data / "ultrafeedback"), limit=80).rows if len(r["chosen"]) < 600][:24]
    assert len(rows) >= 12
    policy_model = random_model(max_position_embeddings=4096)
    scorer = reward_model(random_model(max_position_embeddings=4096), tokenizer)
    logs: list[dict] = []
    fit_reward(scorer, tokenizer, rows, TrainConfig(lr=1e-3, epochs=4, batch_size=8), on_log=logs.append)
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["accuracy"] > 0.5
    steps: list[dict] = []
    config = TrainConfig(lr=3e-3, max_steps=12, batch_size=4, schedule="constant", warmup_ratio=0)
    fit_policy(policy_model, tokenizer, rows, {"model": ModelReward(scorer, tokenizer)}, config,
               PolicyConfig(num_generations=4, max_new_tokens=12, beta=0.01), max_length=512,
               on_log=steps.append)  # fmt: skip
    values = [r["reward_model"] for r in steps]
    assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.01
