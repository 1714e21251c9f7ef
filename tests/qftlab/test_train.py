"""The step, the loop and SFT, against transformers, TRL and a plain torch loop.

Tolerances: fp32 sums in another order differ by about 1e-7. Adam divides by the root of the second moment, so where a
gradient is nearly 0 its steps may differ by a thousandth of lr: weights after several steps are compared to 1e-5.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_scheduler,
)

from qftlab import cli
from qftlab.evaluate.plots import draw_curves
from qftlab.files import bundled, sha256
from qftlab.model.attention import register_packed_attention
from qftlab.model.loading import load_model, save_model
from qftlab.rows.batches import Example, pack, pad
from qftlab.rows.examples import NOTHING
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train import loop, run, sft
from qftlab.train.loop import train
from qftlab.train.optimizer import MicroBatch, NonFiniteLoss, learning_rate, make_optimizer
from qftlab.train.step import Step, count_trained_tokens

V = 64
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM, True), "qwen3": (Qwen3Config, Qwen3ForCausalLM, False),
            "llama": (LlamaConfig, LlamaForCausalLM, False)}  # fmt: skip


def small_model(family: str = "qwen2", attention: str = "packed", seed: int = 0, **shape):
    config, kind, tied = FAMILIES[family]
    config = config(**{**SHAPE, "tie_word_embeddings": tied, "head_dim": 8, **shape})
    config._attn_implementation = register_packed_attention() if attention == "packed" else attention
    torch.manual_seed(seed)
    return kind(config).eval()


def random_examples(count: int = 8, seed: int = 0, low: int = 3, high: int = 20) -> list[Example]:
    """Random documents whose last half is trained."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=g).tolist()
    return [
        Example(torch.randint(0, V, (n,), generator=g).tolist(), [False] * (n // 2) + [True] * (n - n // 2))
        for n in lengths
    ]


def gradients(step, batch, num_tokens) -> tuple[float, dict]:
    step.zero_grad()
    loss = step(**batch, num_tokens=num_tokens)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}


def assert_close(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- the step ---------------------------------------------------------------------------------------------------------


def test_step_by_hand() -> None:
    """With a head of zeros every token has probability 1/V: two trained tokens cost 2 ln V."""
    model = small_model("qwen3")
    torch.nn.init.zeros_(model.lm_head.weight)
    batch = pack([Example([1, 2, 3, 4], [True, False, True, True])])
    assert count_trained_tokens(batch) == 2
    assert count_trained_tokens({"labels": torch.tensor([[1, 2, -100], [-100, 3, 4]])}) == 3, "nothing predicts the 1"
    assert Step(model)(**batch, num_tokens=2).item() == pytest.approx(math.log(V), abs=1e-6)
    assert Step(model)(**batch, num_tokens=8).item() == pytest.approx(2 * math.log(V) / 8, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_step_equals_transformers_loss_and_gradients(family: str, side: str) -> None:
    model = small_model(family)
    batch = pad(random_examples(), pad_id=0, side=side)
    num_tokens = count_trained_tokens(batch)
    loss, grads = gradients(Step(model), batch, num_tokens)
    model.zero_grad()
    theirs = model(**batch, num_items_in_batch=num_tokens).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-6)
    assert_close(grads, {n: p.grad for n, p in model.named_parameters()}, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_packed_equals_padded_equals_one_by_one(family: str, attention: str) -> None:
    step, examples = Step(small_model(family, attention)), random_examples()
    num_tokens = sum(count_trained_tokens(pack([e])) for e in examples)
    packed = gradients(step, pack(examples), num_tokens)
    padded = gradients(step, pad(examples, pad_id=0), num_tokens)
    assert packed[0] == pytest.approx(padded[0], abs=1e-6)
    assert_close(packed[1], padded[1], atol=1e-6)
    alone = sum(step(**pack([e]), num_tokens=num_tokens).item() for e in examples)
    assert packed[0] == pytest.approx(alone, abs=1e-6)


def test_step_under_lora_equals_transformers() -> None:
    """With an adapter on the head as well, whose `.weight` alone would be the base weight."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(small_model("qwen3"), lora).eval()
    batch = pad(random_examples(), pad_id=0)
    num_tokens = count_trained_tokens(batch)
    loss, grads = gradients(Step(model), batch, num_tokens)
    assert grads and all("lora" in name for name in grads)
    model.zero_grad()
    theirs = model(**batch, num_items_in_batch=num_tokens).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-6)
    assert_close(grads, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, atol=1e-6)


def test_step_computes_the_head_at_trained_positions_only() -> None:
    model, seen = small_model(), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    batch = pack(random_examples())
    Step(model)(**batch, num_tokens=1)
    assert seen == [(count_trained_tokens(batch), V)]


@pytest.mark.parametrize("collate", [pack, lambda examples: pad(examples, pad_id=0)], ids=["packed", "padded"])
@pytest.mark.parametrize("want", ["loss", "logprobs"])
def test_the_last_mlp_sees_what_the_head_reads_and_nothing_changes(want: str, collate, monkeypatch) -> None:
    """Loss, log-probabilities and gradients with it on those tokens and on all, to 1e-6; its hooks are gone after."""
    model, batch, seen, found = small_model(), collate(random_examples()), [], []
    last, forward = model.model.layers[-1].mlp, type(model.model.layers[-1].mlp).forward

    def watched(mlp, x: torch.Tensor) -> torch.Tensor:  # a hook would have it run on all
        seen.extend([x.numel()] if mlp is last else [])
        return forward(mlp, x)

    monkeypatch.setattr(type(last), "forward", watched)
    for share in (0.9, 0.0):
        monkeypatch.setattr("qftlab.train.step.MOST_ROWS", share)
        model.zero_grad()
        out = Step(model)(**batch, want=want, num_tokens=7)
        out.square().sum().backward()
        found.append(({"out": out.detach()}, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert seen == [32 * count_trained_tokens(batch), 32 * batch["input_ids"].numel()]
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, atol=1e-6 * max(t.abs().max().item() for t in theirs.values()))
    mlp = model.model.layers[-1].mlp
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks


def test_where_the_last_mlp_runs_on_all_tokens_it_is_said_once(caplog) -> None:
    """Under gradient checkpointing, and for a family whose layers may be built otherwise."""
    from qftlab.train import step as module

    module._say_whole.cache_clear()
    model, batch = small_model(), pad(random_examples(), pad_id=0)
    expected = gradients(Step(model), batch, 5)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with caplog.at_level("INFO", "qftlab.train.step"):
        for _ in range(2):
            found = gradients(Step(model), batch, 5)
        model.eval().config.model_type = "other"
        gradients(Step(model), batch, 5)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)  # 8 roundings of a sum of some 50 nats
    assert_close(found[1], expected[1], atol=1e-6)
    assert caplog.text.count("the last MLP runs on all tokens") == 2
    assert "gradient checkpointing" in caplog.text and "this is other" in caplog.text


@pytest.mark.parametrize("place", ["model", "model.norm", "model.layers.1", "model.layers.1.mlp",
                                   "model.layers.1.mlp.gate_proj"])  # fmt: skip
def test_hooks_in_training_see_what_they_would_see(place: str) -> None:
    """The last MLP then runs on all tokens; without a hook on it or after it, on those that the head reads."""
    model, batch, seen = small_model(), pad(random_examples(), pad_id=0), []
    step = Step(model)
    expected = gradients(step, batch, 5)

    def watch(module, args, output) -> None:
        seen.append((output.last_hidden_state if place == "model" else output).detach())

    hook = model.get_submodule(place).register_forward_hook(watch)
    found = gradients(step, batch, 5)
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert_close(found[1], expected[1], atol=1e-6)


def test_what_training_would_pass_by_is_refused_by_name() -> None:
    """Step calls backbone and head: what is around the model itself, or its wrapper, would not be run."""
    from peft import LoraConfig, get_peft_model

    model, batch = small_model(), pad(random_examples(), pad_id=0)
    wrapped = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for around, named in ((model, "Qwen2ForCausalLM"), (wrapped, "PeftModel"), (wrapped.base_model.model, "Qwen2")):
        step = Step(wrapped if around is not model else model)
        step(**batch, num_tokens=3)
        hook = around.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=f"{named}.* must be as transformers made it, got hooks, which would be"):
            step(**batch, num_tokens=3)
        hook.remove()
    hook = model.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM must be as transformers made it, got hooks"):
        Step(model)(**batch, num_tokens=3)
    hook.remove()
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="Qwen2ForCausalLM must be as transformers made it, got another forward"):
        Step(model)(**batch, num_tokens=3)


def test_models_without_a_head_are_refused_by_name() -> None:
    from transformers import Qwen2ForSequenceClassification

    scorer, batch = Qwen2ForSequenceClassification(small_model().config), pad(random_examples(), pad_id=0)
    for model, named in ((small_model().model, "Qwen2Model"), (scorer, "Qwen2ForSequenceClassification")):
        with pytest.raises(ValueError, match=f"model must have a head for logits, got a {named}"):
            Step(model)(**batch, num_tokens=3)


# --- the loop ---------------------------------------------------------------------------------------------------------


def fit(examples, **changes):
    model = small_model()
    config = TrainConfig(**{"lr": 1e-3, "batch_size": 8, "max_steps": 4, "warmup_ratio": 0.25, **changes})
    result = sft.fit_examples(model, examples, config)
    return model, result


@pytest.mark.parametrize("packing", [True, False])
def test_splitting_a_step_changes_nothing(packing: bool) -> None:
    """Accumulation 1x8 = 2x4 = 8x1, in gradients, losses and weights, with rows of very different length."""
    examples = random_examples(16, low=2, high=40)
    runs = [fit(examples, micro_batch_size=size, packing=packing) for size in (8, 4, 1)]
    for model, result in runs[1:]:
        assert result.losses == pytest.approx(runs[0][1].losses, abs=1e-6)
        assert_close(dict(model.named_parameters()), dict(runs[0][0].named_parameters()), atol=1e-6)
    step = Step(small_model())
    num_tokens = sum(count_trained_tokens(pack([e])) for e in examples[:8])
    collected = []
    for size in (8, 4, 1):
        step.zero_grad()
        for i in range(0, 8, size):
            batch = pack(examples[i : i + size]) if packing else pad(examples[i : i + size], 0)
            step(**batch, num_tokens=num_tokens).backward()
        collected.append({n: p.grad.clone() for n, p in step.named_parameters()})
    assert_close(collected[0], collected[1], atol=1e-6)
    assert_close(collected[0], collected[2], atol=1e-6)


def test_loop_equals_a_plain_torch_loop() -> None:
    """transformers' loss, torch's AdamW and clipping, transformers' cosine schedule; three epochs of two steps."""
    examples = random_examples(6)
    config = TrainConfig(lr=1e-2, epochs=3, batch_size=4, warmup_ratio=0, weight_decay=0.1, max_grad_norm=0.5, seed=3)
    ours = small_model()
    result = sft.fit_examples(ours, examples, config)
    model = small_model()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=6)
    losses = []
    for number in range(6):
        order = sft.batches(6, batch_size=4, seed=3, epoch=number // 2)[number % 2]
        loss = model(**pad([examples[i] for i in order], 0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert_close(dict(ours.named_parameters()), dict(model.named_parameters()), atol=1e-5)


def test_loop_equals_trl(tmp_path) -> None:
    """TRL's SFT on the same labels: first loss to 1e-6, three steps of losses and weights to 1e-5."""
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    examples = random_examples(8)
    ours, theirs = (small_model(attention="sdpa", vocab_size=1024) for _ in range(2))
    config = TrainConfig(lr=1e-3, epochs=3, batch_size=8, micro_batch_size=4, warmup_ratio=0, schedule="constant",
                         weight_decay=0.0, max_grad_norm=1.0)  # fmt: skip
    result = sft.fit_examples(ours, examples, config)
    settings = TRLConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3, logging_steps=1,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.98, max_grad_norm=1.0,
        report_to=[], save_strategy="no", max_length=None, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels()} for e in examples])
    trainer = SFTTrainer(theirs, args=settings, train_dataset=data, processing_class=load_tokenizer("tiny"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert result.losses[0] == pytest.approx(losses[0], abs=1e-6)
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-5)


def test_first_gradients_equal_trl(tmp_path) -> None:
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    examples, model = random_examples(8), small_model(attention="sdpa", vocab_size=1024)
    _, grads = gradients(Step(model), pack(examples), sum(count_trained_tokens(pack([e])) for e in examples))
    settings = TRLConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
                         report_to=[], max_length=None, disable_tqdm=True)  # fmt: skip
    data = Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels()} for e in examples])
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=load_tokenizer("tiny"))
    model.zero_grad()
    batch = trainer.data_collator(list(data))
    trainer.compute_loss(model, batch).backward()
    assert_close(grads, {n: p.grad for n, p in model.named_parameters()}, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_equal_transformers_after_the_warmup(schedule: str) -> None:
    config = TrainConfig(lr=0.5, warmup_ratio=0.2, schedule=schedule)
    ours = [learning_rate(config, step, 20) for step in range(20)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs, scheduler = [], get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    for _ in range(20):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert ours[4:] == pytest.approx(theirs[4:], abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_is_on_matrices_only(family: str) -> None:
    model = small_model(family)
    decayed, others = make_optimizer(Step(model), TrainConfig(weight_decay=0.1)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert all("proj" in names[id(p)] or "lm_head" in names[id(p)] for p in decayed["params"])
    assert {id(p) for p in [*decayed["params"], *others["params"]]} == set(names)
    for kind in ("embed", "norm"):
        assert any(kind in names[id(p)] for p in others["params"])


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have a trainable parameter, got none"):
        make_optimizer(Step(small_model().requires_grad_(False)), TrainConfig())


def test_a_non_finite_loss_names_its_rows_and_leaves_the_weights(monkeypatch) -> None:
    """Row 5 has a token whose embedding is nan."""
    examples = [Example([i + 1, 2, 3, 4], [False, True, True, True]) for i in range(6)]
    examples[5] = Example([V - 1, 2, 3, 4], [False, True, True, True])
    model = small_model("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight[V - 1] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"loss must be finite, got nan at step 1 in rows 5: look at these rows"):
        sft.fit_examples(model, examples, TrainConfig(batch_size=6, micro_batch_size=1))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], equal_nan=True, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_without_a_trained_token_is_refused() -> None:
    empty = MicroBatch(pack([Example([1, 2, 3], [True, False, False])]), (7,))
    step = Step(small_model())
    with pytest.raises(ValueError, match="step 1 must have a trained token, got none in rows 7"):
        loop.optimizer_step(step, make_optimizer(step, TrainConfig()), [empty], 1e-3, 1.0)


def test_ctrl_c_returns_what_there_is() -> None:
    def stop_at_3(record: dict) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    result = sft.fit_examples(small_model(), random_examples(), TrainConfig(batch_size=1), on_log=stop_at_3)
    assert result.interrupted and result.steps == 3 and len(result.losses) == 3


def test_modes_and_random_state_are_given_back() -> None:
    model = small_model()
    model.model.layers[0].train()
    modes = {name: m.training for name, m in model.named_modules()}
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(m.training))
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sft.fit_examples(model, random_examples(), TrainConfig(max_steps=2), held_out=random_examples(seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert seen == [False, True, True, False]  # held out, two steps, held out


def test_the_seed_decides_dropout() -> None:
    def losses(seed: int) -> list[float]:
        model = small_model(attention="sdpa", attention_dropout=0.5)
        return sft.fit_examples(model, random_examples(), TrainConfig(max_steps=2, batch_size=8, seed=seed)).losses

    assert losses(0) == losses(0)
    assert losses(0)[0] != losses(1)[0]


def test_metrics_of_every_step() -> None:
    records: list[dict] = []
    examples = random_examples(5)
    config = TrainConfig(epochs=2, batch_size=2, eval_every=2, packing=False)
    result = sft.fit_examples(small_model(), examples, config, held_out=examples, on_log=records.append)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["epoch"] for r in steps] == [0, 0, 0, 1, 1, 1]
    assert result.losses == [r["loss"] for r in steps]
    assert [step for step, _ in result.held_out] == [0, 2, 4, 6]
    # Real tokens are counted, never padding: twice the documents.
    assert result.tokens == steps[-1]["tokens"] == 2 * sum(len(e.input_ids) for e in examples)
    assert result.trained_tokens == 2 * sum(count_trained_tokens(pack([e])) for e in examples)
    names = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "seconds", "tokens_per_second"}
    assert steps[0].keys() == names | {"peak_gb"}
    assert steps[-1]["seconds"] >= steps[0]["seconds"] >= 0


def test_the_log_has_a_line_every_few_steps_and_one_of_the_last(caplog) -> None:
    with caplog.at_level("INFO", "qftlab.train.loop"):
        fit(random_examples(), max_steps=5, log_every=2)
    assert [said.split(":")[0] for said in caplog.messages] == ["step 2/5", "step 4/5", "step 5/5"]


def test_held_out_loss_is_the_mean_over_its_tokens() -> None:
    examples, model = random_examples(7), small_model()
    measure = sft.held_out_loss(Step(model), examples, TrainConfig(batch_size=2))
    assert measure() == pytest.approx(model(**pad(examples, 0)).loss.item(), abs=1e-6)


def test_batches_are_a_function_of_seed_epoch_and_step() -> None:
    config = TrainConfig(batch_size=3, micro_batch_size=2, seed=1)
    source, again = (sft.ExampleSource(random_examples(8), config) for _ in range(2))
    rows = {(e, s): [m.rows for m in source(e, s)] for e in range(2) for s in range(3)}
    for e, s in [(1, 2), (0, 0), (1, 0), (0, 2), (0, 1), (1, 1)]:  # in any order
        assert [m.rows for m in again(e, s)] == rows[e, s]
    for epoch in range(2):
        assert sorted(i for s in range(3) for part in rows[epoch, s] for i in part) == list(range(8))
    assert rows[0, 0] != rows[1, 0]
    assert [len(part) for part in rows[0, 0]] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "lr must be positive and finite, got 0"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"epochs": -1}, "epochs must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"warmup_ratio": 1}, r"warmup_ratio must be in \[0, 1\), got 1"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, got 'step'"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be at least 0, got nan"),
    ],
)
def test_configurations_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_sft_config_is_checked() -> None:
    with pytest.raises(ValueError, match="data must name at least one file"):
        SFTConfig()
    with pytest.raises(ValueError, match="train_on must be one of all, last, got 'first'"):
        SFTConfig(data="x.jsonl", train_on="first")
    assert SFTConfig(data="x.jsonl").data == ("x.jsonl",)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(*pairs: tuple[str, str]) -> list[dict]:
    return [{"instruction": a, "input": "", "output": b} for a, b in pairs]


def test_rows_that_cannot_be_trained_on_are_counted() -> None:
    tokenizer = load_tokenizer("tiny")
    rows = rows_of(("hi", "yes"), ("hi", ""), ("hi", "no " * 90), ("hi", "yes"))
    rows.append({"messages": [{"role": "user", "content": "alone"}]})
    examples, usage = sft.encode_rows(tokenizer, rows, max_length=64)
    assert (usage.rows, usage.documents, len(examples)) == (5, 2, 2)
    assert usage.left_out == {NOTHING: [2, 5], "too long": [3]}
    assert f"2 left out: {NOTHING} (row 2, 5); 1 left out: too long (row 3)" in usage.summary()
    assert usage.tokens == sum(len(e.input_ids) for e in examples)
    # The assistant's content and its <|im_end|>, nothing else.
    kept = [t for t, is_trained in zip(examples[0].input_ids, examples[0].loss_mask, strict=True) if is_trained]
    assert tokenizer.decode(kept) == "yes<|im_end|>"
    with pytest.raises(ValueError, match="rows must hold something to train on, got 1 rows"):
        sft.encode_rows(tokenizer, rows[1:2])


def test_a_row_that_cannot_be_rendered_is_named() -> None:
    bad = {"messages": [{"role": "assistant", "content": 1}]}
    with pytest.raises(ValueError, match="row 2, turn 1 must have a text"):
        sft.encode_rows(load_tokenizer("tiny"), [*rows_of(("a", "b")), bad])


# --- from files to files ----------------------------------------------------------------------------------------------


@pytest.fixture
def little(tmp_path):
    """A folder with a random model of the tiny tokenizer, training rows and held-out rows."""
    tokenizer = load_tokenizer("tiny")
    model = small_model(vocab_size=1024, max_position_embeddings=128)
    save_model(model, tokenizer, tmp_path / "start")
    rows = load_rows(bundled("instructions", "train.jsonl"))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:60])), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows[60:80])), encoding="utf-8")
    return tmp_path


def little_config(folder, **changes) -> SFTConfig:
    train = TrainConfig(lr=1e-2, max_steps=6, batch_size=16, eval_every=3)
    settings = {"model": str(folder / "start"), "data": str(folder / "train.jsonl"), "output": str(folder / "runs"),
                "held_out": str(folder / "held.jsonl"), "device": "cpu", "train": train}  # fmt: skip
    return SFTConfig(**{**settings, **changes})


def test_sft_from_files_to_a_run_folder(little) -> None:
    folder = sft.sft(little_config(little))
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["train"]["lr"] == 1e-2
    assert config["data_sha256"][str(little / "train.jsonl")] == sha256(little / "train.jsonl")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    held = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
    assert len(losses) == 6 and losses[-1] < losses[0] and len(held) == 3 and held[-1] < held[0]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    usage = json.loads((folder / "token_usage.json").read_text())
    assert usage["rows"] == usage["documents"] == 60 and usage["tokens_seen"] > 0 and usage["left_out"] == {}
    latest = run.resolve_model(little / "runs" / "latest")
    model, tokenizer = load_model(latest), load_tokenizer(latest)
    assert len(tokenizer) == 1002 and tokenizer.convert_tokens_to_ids("<|EDIT|>") == 1001
    assert model.get_input_embeddings().weight.shape[0] == 1024
    # What was saved is what was trained: its held-out loss is the last one measured.
    examples, _ = sft.encode_rows(tokenizer, load_rows(little / "held.jsonl"))
    assert sft.held_out_loss(Step(model), examples, TrainConfig())() == pytest.approx(held[-1], abs=1e-5)


def test_held_out_rows_are_masked_as_the_trained_ones_are(little) -> None:
    """With train_on last, both losses are of the last answer; by hand, on rows whose first answer is another."""
    turn = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "a b c"}]
    rows = [{"messages": [*turn, {"role": "user", "content": word}, {"role": "assistant", "content": word}]}
            for word in ("one", "two", "three")]  # fmt: skip
    for name in ("train", "held"):
        (little / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train = TrainConfig(max_steps=1, batch_size=3)
    folder = sft.sft(little_config(little, train_on="last", new_tokens=(), train=train))
    first, *_ = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model, tokenizer = load_model(little / "start"), load_tokenizer(little / "start")
    lost = {}
    for kind in ("last", "all"):
        examples, _ = sft.encode_rows(tokenizer, rows, train_on=kind)
        lost[kind] = sft.held_out_loss(Step(model), examples, train)()
    assert first["step"] == 0 and first["held_out_loss"] == pytest.approx(lost["last"], abs=1e-5)
    assert abs(lost["last"] - lost["all"]) > 0.01, "the two can be told apart"


@pytest.mark.parametrize("max_length, too_long", [(None, [3]), (32, [2, 3])])
def test_a_run_leaves_out_what_is_longer_than_it_may_be(little, max_length: int | None, too_long: list[int]) -> None:
    """Than the model's context of 128 tokens, unless another length is asked for."""
    rows = rows_of(("hi", "yes"), ("hi", "no " * 40), ("hi", "no " * 200))
    (little / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train = TrainConfig(max_steps=1)
    folder = sft.sft(little_config(little, max_length=max_length, held_out=(), train=train))
    assert json.loads((folder / "token_usage.json").read_text())["left_out"] == {"too long": too_long}


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupted_run_keeps_what_it_did_and_latest_stays(little, monkeypatch, steps: int) -> None:
    """Stopped before its first step it has no model; in either case it can go on, and the command line says 130."""
    done, count, log = sft.sft(little_config(little)), [], run.RunFolder.log

    def stopping(self, record: dict) -> None:
        count.append(record)
        log(self, record)
        if record["step"] == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.RunFolder, "log", stopping)
    config = little_config(little)
    with pytest.raises(run.Interrupted, match=f"stopped after {steps} steps; to go on: --resume ") as caught:
        sft.sft(config)
    folder = Path(str(caught.value).rpartition(" ")[2])
    assert (folder / "model").exists() is (steps > 0) and (folder / "curves.png").exists() is (steps > 0)
    assert (little / "runs" / "latest").resolve() == done
    monkeypatch.setattr(cli, "parse", lambda name, arguments: config)
    assert cli.main(["sft"]) == 130
    monkeypatch.undo()
    again = sft.sft(dataclasses.replace(config, resume=str(folder)))
    ours, theirs = (sha256(path / "model" / "model.safetensors") for path in (again, done))
    assert ours == theirs and (little / "runs" / "latest").resolve() == again


def test_two_runs_get_two_folders_and_latest_is_the_second(tmp_path) -> None:
    first, second = (run.RunFolder(tmp_path, {"lr": 1}) for _ in range(2))
    first.finish()
    second.finish()
    assert first.path != second.path
    assert (tmp_path / "latest").resolve() == second.path.resolve()


def test_latest_is_a_text_file_where_links_are_refused(tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs) -> None:
        raise OSError("links are not allowed here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    folder = run.RunFolder(tmp_path, {})
    folder.model_path.mkdir()
    (folder.model_path / "config.json").write_text("{}")
    folder.finish()
    assert (tmp_path / "latest").read_text() == folder.path.name
    assert run.resolve_model(tmp_path / "latest") == str(folder.model_path)
    assert run.resolve_model(tmp_path / "latest" / "model") == str(folder.model_path)


def test_resolve_model_names_what_is_missing(tmp_path) -> None:
    assert run.resolve_model("tiny") == "tiny" and run.resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    with pytest.raises(FileNotFoundError, match="points nowhere"):
        run.resolve_model(tmp_path / "latest")
    folder = run.RunFolder(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="is a run without a model"):
        run.resolve_model(folder.path)


def test_fit_rows_teaches_the_bundled_model() -> None:
    """Thirty steps of the bundled model on one easy skill more than halve its loss."""
    rows = [r for r in load_rows(bundled("instructions", "train.jsonl")) if r["skill"] == "reverse"][:200]
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    result = sft.fit_rows(model, tokenizer, rows, TrainConfig(lr=1e-3, batch_size=32, max_steps=20))
    assert sum(result.losses[-3:]) / 3 < 0.5 * result.losses[0]


def test_fit_rows_measures_the_rows_held_out() -> None:
    rows = load_rows(bundled("instructions", "train.jsonl"))[:6]
    model, tokenizer, config = load_model("tiny"), load_tokenizer("tiny"), TrainConfig(max_steps=1, batch_size=4)
    result = sft.fit_rows(model, tokenizer, rows[:4], config, held_out_rows=rows[4:])
    examples, _ = sft.encode_rows(tokenizer, rows[4:])
    assert [step for step, _ in result.held_out] == [0, 1]
    assert result.held_out[-1][1] == pytest.approx(sft.held_out_loss(Step(model), examples, config)(), abs=1e-6)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_the_real_tokenizer_on_alpaca(real_data, tmp_path, kind: str) -> None:
    """151,936 rows, the real Qwen2.5 tokenizer, alpaca as JSON and as CSV: 20 steps of falling loss."""
    import csv

    source = real_data / "alpaca" / "alpaca_train_950.json"
    if kind == "csv":
        rows, source = load_rows(source), tmp_path / "alpaca.csv"
        with source.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"])
            writer.writeheader()
            writer.writerows(rows)
    tokenizer = load_tokenizer(real_data / "qwen2.5-0.5b")
    model = small_model(vocab_size=151_936, max_position_embeddings=1024, initializer_range=0.02)
    save_model(model, tokenizer, tmp_path / "start")
    train_config = TrainConfig(lr=5e-3, max_steps=20, batch_size=2, micro_batch_size=1)
    config = SFTConfig(model=str(tmp_path / "start"), data=str(source), output=str(tmp_path / "runs"), device="cpu",
                       max_length=256, train=train_config)  # fmt: skip
    folder = sft.sft(config)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20 and losses[0] == pytest.approx(math.log(151_936), abs=0.5)
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    saved = load_tokenizer(folder / "model")
    assert saved.convert_tokens_to_ids("<|AGENT|>") == 151_665
    assert load_model(folder / "model").get_input_embeddings().weight.shape[0] == 151_936


def test_the_loop_takes_any_step_and_count() -> None:
    """What DPO and RLOO will need: a step of their own and a count of pairs, not of tokens."""

    class Squares(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0]))

        def forward(self, input_ids, num_tokens):
            return (self.w * input_ids).square().sum() / num_tokens

    class Ones:
        steps_per_epoch = 2

        def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
            return [MicroBatch({"input_ids": torch.ones(1, 3)}), MicroBatch({"input_ids": torch.ones(1, 1)})]

    step = Squares()
    config = TrainConfig(lr=0.1, epochs=1, warmup_ratio=0, schedule="constant", weight_decay=0)
    result = train(step, Ones(), config, count=lambda batch: batch["input_ids"].numel())
    # w² each step: 1, then (1 − 0.1)²; Adam's first step moves by exactly lr.
    assert result.losses == pytest.approx([1.0, 0.81], abs=1e-6)


def test_a_folder_of_runs_stands_for_its_last_one(tmp_path):
    from qftlab.train.run import resolve_model

    run = tmp_path / "20260101-000000"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    (tmp_path / "latest").symlink_to(run.name)
    assert resolve_model(tmp_path).endswith("model") and resolve_model(tmp_path) == resolve_model(tmp_path / "latest")


@pytest.mark.parametrize(
    ("record", "title"),
    [
        ({}, "Loss falls"),
        ({"reward": 0.5}, "The reward"),
        ({"chosen_logprob": -3.0, "rejected_logprob": -5.0}, "The margin"),
    ],
)
def test_the_curve_is_what_a_run_is_judged_by(tmp_path, monkeypatch, record: dict, title: str) -> None:
    seen = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: seen.extend(figure.axes))
    draw_curves(tmp_path / "curves.png", [0.5, 0.4], records=[{"step": i, "loss": 0.5} | record for i in (1, 2)])
    [ax] = seen
    drawn = [y for line in ax.lines for y in line.get_ydata()]
    assert ax.get_title(loc="left").startswith(title) and set(drawn) == set(record.values() or [0.5, 0.4])
    low, high = ax.get_ylim()
    assert low <= min(drawn) and max(drawn) <= high
