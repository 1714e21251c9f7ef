"""DPO: pairs, the reference, training against TRL, files to files, kills, and pairs that a model writes itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from random_models import random_model
from random_signals import killed
from torch.testing import assert_close

from benchmarks import harness, preference
from qftlab.files import sha256
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import add_adapters
from qftlab.rows.batches import Example
from qftlab.rows.examples import Pair, encode_pairs
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import DPOConfig, LoRAConfig, PreferenceLoss, TrainConfig
from qftlab.train.dpo import PairSource, PairStep, Reference, count_pairs, dpo, fit_encoded_pairs, fit_pairs
from qftlab.train.optimizer import NonFiniteLoss
from qftlab_course.world.style import ENDING, STYLE_SKILLS, is_polite, style_pairs

CONSTANT = {"warmup_ratio": 0, "schedule": "constant", "weight_decay": 0.0}


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs of ragged random answers, one token at the shortest, to ragged random prompts."""
    torch.manual_seed(seed)
    pairs = []
    for number in range(1, count + 1):
        prompt = torch.randint(3, 1024, (int(torch.randint(2, 12, ())),)).tolist()
        answers = [torch.randint(3, 1024, (int(torch.randint(1, 15, ())),)).tolist() for _ in range(2)]
        masks = [[False] * len(prompt) + [True] * len(answer) for answer in answers]
        pairs.append(Pair(*(Example(prompt + a, m) for a, m in zip(answers, masks, strict=True)), number))
    return pairs


def rows_about(words: str = "one two three four five six") -> list[dict]:
    return [{"prompt": f"Say {w}.", "chosen": f"{w.title()}, gladly.", "rejected": f"{w}"} for w in words.split()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


# Pairs


def test_pairs_train_the_answers_and_their_end(tokenizer) -> None:
    pairs, usage = encode_pairs(tokenizer, rows_about())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for pair, row in zip(pairs, rows_about(), strict=True):
        for side in ("chosen", "rejected"):
            example = getattr(pair, side)
            trained = [t for t, kept in zip(example.input_ids, example.loss_mask, strict=True) if kept]
            assert tokenizer.decode(trained) == row[side] + "<|im_end|>" and trained[-1] == end
        first = pair.chosen.loss_mask.index(True)
        assert pair.chosen.input_ids[:first] == pair.rejected.input_ids[:first], "both answer one prompt"
    assert (usage.rows, usage.documents, usage.left_out) == (6, 12, {})


def test_both_forms_of_rows_give_the_same_pair(tokenizer) -> None:
    """Texts with a prompt, and conversations that hold the prompt themselves (UltraFeedback's form)."""
    [row] = rows_about("one")
    user = {"role": "user", "content": row["prompt"]}
    said = {side: [user, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    forms = [row, said, {**row, **said}, {"prompt": [user], "chosen": row["chosen"], "rejected": row["rejected"]}]
    first, *others = [encode_pairs(tokenizer, [form])[0] for form in forms]
    assert all(other == first for other in others)


def test_pairs_that_teach_nothing_are_left_out_by_row(tokenizer, caplog) -> None:
    one, two, three, four, five, six = rows_about()
    rows = [one, {**two, "rejected": two["chosen"]}, {**three, "score_chosen": 5.0, "score_rejected": 5.0},
            {**four, "rejected": " "}, {**five, "chosen": "very " * 99}, six]  # fmt: skip
    pairs, usage = encode_pairs(tokenizer, rows, max_length=60)
    assert [p.number for p in pairs] == [1, 6]
    assert usage.left_out == {"equal pair": [2], "score tie": [3], "empty answer": [4], "too long": [5]}
    assert "1 left out: equal pair (row 2)" in caplog.text
    with pytest.raises(ValueError, match="must hold something to train on"):
        encode_pairs(tokenizer, rows[1:2])
    with pytest.raises(ValueError, match="row 2"):
        encode_pairs(tokenizer, [one, {"prompt": "p", "chosen": "c"}])
    usage = encode_pairs(tokenizer, rows, max_length=60, sources={"a.jsonl": 2, "b.jsonl": 4})[1]
    assert "equal pair (a.jsonl, row 2); 1 left out: score tie (b.jsonl, row 1)" in usage.summary()
    with pytest.raises(ValueError, match="b.jsonl, row 1"):
        encode_pairs(tokenizer, [one, {"prompt": "p", "chosen": "c"}], sources={"a.jsonl": 1, "b.jsonl": 1})


def test_ultrafeedback_gives_pairs(real_data) -> None:
    from qftlab.rows.sources import load

    rows = load(str(real_data / "ultrafeedback"), limit=60).rows
    qwen = load_tokenizer(str(real_data / "qwen2.5-0.5b"))
    pairs, usage = encode_pairs(qwen, rows, max_length=2048)
    assert usage.rows == 60 and usage.documents == 2 * len(pairs) > 60
    ties = {i for i, row in enumerate(rows, 1) if row["score_chosen"] == row["score_rejected"]}
    assert ties == set(usage.left_out.get("score tie", [])) | ties.intersection(usage.left_out.get("equal pair", []))


# Loss and reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_splits_packed_and_padded_give_one_loss_and_gradient(loss_type: str) -> None:
    pairs, model = random_pairs(9), random_model()
    reference = Reference(random_model(initializer_range=0.19), "start", TrainConfig(batch_size=4)).logprobs(pairs)
    loss = PreferenceLoss(beta=0.3, loss_type=loss_type, nll_weight=0.7)
    found = []
    for split in ({}, {"micro_batch_size": 2}, {"tokens_per_micro_batch": 80}, {"packing": False},
                  {"packing": False, "micro_batch_size": 4}):  # fmt: skip
        step = PairStep(model, loss)
        step.zero_grad()
        parts = PairSource(pairs, reference, TrainConfig(batch_size=9, **split)).split(range(9))
        assert sum(count_pairs(part.tensors) for part in parts) == 9
        total = sum(step(**part.tensors, num_tokens=9) for part in parts)
        total.backward()
        found.append((total.detach(), [p.grad.clone() for p in model.parameters()]))
    for total, grads in found[1:]:
        assert_close(total, found[0][0], rtol=1e-6, atol=1e-5)
        assert_close(grads, found[0][1], rtol=1e-4, atol=1e-5)


def test_a_policy_that_is_its_reference_begins_at_log_two_and_half_right() -> None:
    logs: list[dict] = []
    fit_encoded_pairs(random_model(), random_pairs(10), TrainConfig(lr=1e-9, batch_size=5, max_steps=1),
                      held_out=random_pairs(7, seed=1), on_log=logs.append)  # fmt: skip
    before, step, _ = logs
    assert before["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["held_out_preference_accuracy"] == 0.5, "exact ties, measured as the reference was"
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert step["pairs"] == 5 and "trained_tokens" not in step
    assert abs(step["margin"]) < 1e-5


def test_training_ranks_the_pairs_and_says_so(tokenizer) -> None:
    logs: list[dict] = []
    model = random_model()
    fit_pairs(model, tokenizer, rows_about(), TrainConfig(lr=3e-3, epochs=20, batch_size=6),
              held_out_rows=rows_about("seven eight nine ten"), on_log=logs.append)  # fmt: skip
    steps = [record for record in logs if "loss" in record]
    held = [record for record in logs if "held_out_loss" in record]
    assert steps[-1]["preference_accuracy"] == 1 and steps[-1]["margin"] > 1
    assert held[-1]["held_out_preference_accuracy"] == 1 > held[0]["held_out_preference_accuracy"]
    assert held[-1]["held_out_margin"] > 0.5
    gaps = [record["chosen_logprob"] - record["rejected_logprob"] for record in steps]
    assert gaps[-1] > gaps[0] + 1


def test_the_reference_is_computed_once_and_kept(tmp_path, monkeypatch) -> None:
    pairs, model, config = random_pairs(5), random_model(), TrainConfig(batch_size=2)
    path, calls = tmp_path / "reference.safetensors", []
    share = Reference._share
    monkeypatch.setattr(Reference, "_share", lambda *a: calls.append(1) or share(*a))
    first = Reference(model, "start", config).logprobs(pairs, path)
    again = Reference(model, "start", config).logprobs(pairs, path)
    assert len(calls) == 1 and torch.equal(first, again)
    Reference(model, "start", config).logprobs(pairs[:4], path)
    assert len(calls) == 2, "other data"
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] += 1e-3
    Reference(model, "start", config).logprobs(pairs[:4], path)
    assert len(calls) == 3, "other weights"
    path.write_bytes(path.read_bytes()[:-3])
    assert Reference(model, "start", config).logprobs(pairs[:4], path).shape == (4, 2)
    assert len(calls) == 4, "a damaged file"


def test_the_reference_of_an_adapted_model() -> None:
    """Start is the model as it is, base the model without its adapters, and training goes on from the former."""
    pairs, config = random_pairs(6), TrainConfig(batch_size=6, lr=1e-3, max_steps=2)
    plain = Reference(random_model(), "start", config).logprobs(pairs)
    model = add_adapters(random_model(), LoRAConfig(rank=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    base = Reference(model, "base", config).logprobs(pairs)
    start = Reference(model, "start", config).logprobs(pairs)
    assert_close(base, plain, atol=1e-4, rtol=1e-6)
    assert (start - base).abs().max() > 0.1
    losses = [fit_encoded_pairs(add_adapters(random_model(), LoRAConfig(rank=2)), pairs, config,
                                PreferenceLoss(reference=which)).losses for which in ("start", "base")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-6), "fresh adapters change nothing, so both are the base"
    with pytest.raises(ValueError, match="got base"):
        fit_encoded_pairs(random_model(), pairs, config, PreferenceLoss(reference="base"))


def test_another_model_and_none_as_reference() -> None:
    pairs, config = random_pairs(6), TrainConfig(batch_size=6, lr=1e-9, max_steps=1)
    other = random_model(initializer_range=0.15)
    step = PairStep(random_model(), PreferenceLoss(beta=0.1))
    known = Reference(other, "start", config).logprobs(pairs)
    wanted = step(**PairSource(pairs, known, config).split(range(6))[0].tensors, num_tokens=6).item()
    found = fit_encoded_pairs(random_model(), pairs, config, reference_model=other).losses[0]
    assert found == pytest.approx(wanted, abs=1e-5)
    free = fit_encoded_pairs(random_model(), pairs, config, PreferenceLoss(reference="none")).losses[0]
    policy = Reference(random_model(), "start", config).logprobs(pairs)
    by_hand = -torch.nn.functional.logsigmoid(0.1 * (policy[:, 0] - policy[:, 1])).mean().item()
    assert free == pytest.approx(by_hand, abs=1e-5)


def test_a_loss_that_is_no_number_names_the_pair() -> None:
    """One row of the embedding is nan, and only the third pair's rejected answer has it."""
    pairs, model = random_pairs(6), random_model(tie_word_embeddings=False)
    bad = 1000
    used = {token for p in pairs for e in (p.chosen, p.rejected) for token in e.input_ids}
    assert bad not in used
    ids = pairs[2].rejected.input_ids
    third = Pair(pairs[2].chosen, Example([*ids, bad, 5], [*pairs[2].rejected.loss_mask, True, True]), 3)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    before = [p.clone() for p in model.parameters()]
    # The reference of a sound model: else its numbers would be nan as well.
    with pytest.raises(NonFiniteLoss, match=r"not finite: pair of row 3: log-probability -[\d.]+ chosen, nan rejected"):
        fit_encoded_pairs(model, [*pairs[:2], third, *pairs[3:]], TrainConfig(batch_size=6),
                          reference_model=random_model())  # fmt: skip
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


# Against TRL


@pytest.mark.long
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss_type, beta, nll", [("sigmoid", 0.1, 0.0), ("sigmoid", 0.1, 0.5), ("ipo", 1.0, 0.0)])
def test_ten_steps_equal_trl(tmp_path, packing: bool, loss_type: str, beta: float, nll: float) -> None:
    """Losses of ten steps and the weights after them to 1e-5; log-probabilities of -60 nats to 1e-5 of themselves."""
    from datasets import Dataset
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    pairs = random_pairs(12)
    ours, theirs = random_model(), random_model()
    theirs.set_attn_implementation("sdpa")
    save_model(theirs, load_tokenizer("tiny"), tmp_path / "start")
    theirs.config._name_or_path = str(tmp_path / "start")
    config = TrainConfig(lr=1e-4, max_steps=10, batch_size=12, packing=packing, **CONSTANT)
    logs: list[dict] = []
    loss = PreferenceLoss(beta=beta, loss_type=loss_type, nll_weight=nll)
    result = fit_encoded_pairs(ours, pairs, config, loss, on_log=logs.append)
    settings = TRLConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-4,
        per_device_train_batch_size=12, max_steps=10, logging_steps=1, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.98, max_grad_norm=1.0, report_to=[], save_strategy="no", disable_tqdm=True,
        beta=beta, max_length=None, loss_type=[loss_type, "sft"] if nll else [loss_type],
        loss_weights=[1.0, nll] if nll else None,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(theirs, args=settings, train_dataset=data, processing_class=load_tokenizer("tiny"))
    trainer.train_dataset = Dataset.from_list([split_ids(pair) for pair in pairs])
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 10
    assert result.losses == pytest.approx([entry["loss"] for entry in log], abs=1e-5)
    for name, key in (("chosen_logprob", "logps/chosen"), ("rejected_logprob", "logps/rejected")):
        assert [r[name] for r in logs] == pytest.approx([entry[key] for entry in log], rel=1e-5)
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-5, rtol=0)
    assert result.losses[-1] < result.losses[0] - 0.02


def split_ids(pair: Pair) -> dict:
    first = pair.chosen.loss_mask.index(True)
    return {"prompt_ids": pair.chosen.input_ids[:first], "chosen_ids": pair.chosen.input_ids[first:],
            "rejected_ids": pair.rejected.input_ids[first:]}  # fmt: skip


# Files to files


def little_run(folder: Path, output: str, resume: str | None = None, **changes) -> DPOConfig:
    train = TrainConfig(**{"lr": 3e-3, "max_steps": 8, "batch_size": 3, "eval_every": 4, "save_every": 1, **changes})
    return DPOConfig(model=str(folder / "start"), data=str(folder / "train.jsonl"), held_out=str(folder / "held.jsonl"),
                     output=str(folder / output), device="cpu", resume=resume, train=train)  # fmt: skip


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A folder with a random model that has dropout, and pairs, one of them equal."""
    folder = tmp_path_factory.mktemp("dpo")
    save_model(random_model(attention_dropout=0.1), load_tokenizer("tiny"), folder / "start")
    rows = [*rows_about(), {"prompt": "p", "chosen": "same", "rejected": "same"}, *rows_about("red green blue")]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, rows_about("tea milk"))), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(little) -> Path:
    """The run that nobody disturbs."""
    torch.set_num_threads(1)
    return dpo(little_run(little, "whole"))


def metrics(run: Path) -> list[dict]:
    timing = ("seconds", "tokens_per_second", "peak_gb")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def test_a_run_leaves_model_metrics_and_reference(whole) -> None:
    records = metrics(whole)
    steps = [r for r in records if "loss" in r]
    held = [r for r in records if "held_out_loss" in r]
    assert len(steps) == 8 and {"margin", "preference_accuracy", "chosen_logprob", "rejected_logprob"} <= set(steps[0])
    assert [r["step"] for r in held] == [0, 4, 8] and held[0]["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"held_out_margin", "held_out_preference_accuracy"} <= set(held[0])
    usage = json.loads((whole / "pair_usage.json").read_text())
    assert usage["documents"] == 18 and usage["left_out"] == {"equal pair": [7]}
    assert load_model(whole / "model").num_parameters() and (whole / "reference.safetensors").is_file()


def test_a_run_hashes_the_weights_of_its_reference_once(little, monkeypatch) -> None:
    hashed = []
    digest_of = Reference.digest.func

    def counted(reference: Reference) -> str:
        hashed.append(reference.which)
        return digest_of(reference)

    monkeypatch.setattr(Reference.digest, "func", counted)
    dpo(little_run(little, "hashed", max_steps=1, save_every=0))
    assert hashed == ["start"]


def test_killed_and_resumed_ends_with_the_same_bytes(little, whole) -> None:
    """Killed once a checkpoint is there, at another moment each time; weights, metrics and reference are the same."""
    for number, steps in enumerate((2, 5)):
        output = f"killed-{number}"
        killed(dpo, (little_run(little, output),), little / output, f"*/checkpoints/dpo/step-{steps:06}")
        [run] = [p for p in (little / output).iterdir() if not p.is_symlink()]
        assert not (run / "model").exists(), "killed before its end"
        if number:
            os.remove(run / "reference.safetensors")  # computed again from the start, not from the checkpoint
        assert dpo(little_run(little, output, resume="last")) == run
        assert sha256(run / "model" / "model.safetensors") == sha256(whole / "model" / "model.safetensors")
        assert metrics(run) == metrics(whole)


def test_another_loss_cannot_resume(little, whole) -> None:
    config = little_run(little, "whole", resume=str(whole))
    with pytest.raises(ValueError, match=r"loss.beta: 0.1 in the checkpoint, 0.2 now"):
        dpo(dataclasses.replace(config, loss=PreferenceLoss(beta=0.2)))


def test_another_start_cannot_resume(little, whole, tmp_path) -> None:
    """The reference is the start: a run whose model was changed beneath it would be held to something else."""
    other = random_model(attention_dropout=0.1)
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1e-3
    shutil.copytree(little / "start", tmp_path / "kept")
    try:
        save_model(other, load_tokenizer("tiny"), little / "start")
        with pytest.raises(ValueError, match=r"reference: \w+ in the checkpoint, \w+ now"):
            dpo(little_run(little, "whole", resume=str(whole)))
    finally:
        shutil.copytree(tmp_path / "kept", little / "start", dirs_exist_ok=True)


def test_config_refuses() -> None:
    with pytest.raises(ValueError, match="data must name at least one file of pairs"):
        DPOConfig()
    for change, message in (({"beta": 0}, "beta must be positive"), ({"loss_type": "kto"}, "loss_type must be one of"),
                            ({"reference": "old"}, "reference must be one of"), ({"nll_weight": -1}, "nll_weight"),
                            ({"loss_type": "ipo", "label_smoothing": 0.1}, "0 with ipo")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PreferenceLoss(**change)


# The style set, and pairs a model writes itself


def test_the_style_set_differs_in_style_alone(tokenizer) -> None:
    """Both answers are right, no held-out problem is trained on, and the same seed gives the same rows."""
    train, held = style_pairs(160, seed=1), style_pairs(80, held_out=True)
    assert train == style_pairs(160, seed=1) != style_pairs(160, seed=2)
    assert {row["skill"] for row in train} == set(STYLE_SKILLS)
    for row in train + held:
        assert row["chosen"] == row["rejected"] + ENDING and is_polite(row["chosen"]) > is_polite(row["rejected"])
    sums = [row for row in train if row["skill"] == "add"]
    assert sums and all(sum(map(int, re.findall(r"\d+", r["prompt"]))) == int(r["rejected"]) for r in sums)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    pairs, usage = encode_pairs(tokenizer, train)
    assert usage.documents == 320 and not usage.left_out


# The benchmark


@pytest.mark.long
def test_c5_runs_at_a_tiny_size_and_its_sides_agree(tmp_path) -> None:
    """TRL's losses, with the reference computed in the run and known before it, equal ours to 1e-5 at every step."""
    record = harness.measure("C5", preference.BENCHMARKS["C5"], harness.Options(rounds=1, quick=True), tmp_path)
    assert (record["status"], record["problems"]) == ("complete", [])
    assert [len(row["checked"]) for row in record["rows"]] == [2, 2] and not any(r["skipped"] for r in record["rows"])
    assert set(record["rows"][0]["phases"]) == {"reference", "batches", "forward", "backward", "clip and optimizer"}
