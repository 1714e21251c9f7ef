"""RLOO: rollouts and rewards, the policy step by hand and against TRL, kills, and what stops a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import random_model
from random_signals import killed
from torch.testing import assert_close

from qftlab.decoding.engine import Completion
from qftlab.files import sha256
from qftlab.maths.losses import leave_one_out_advantages, sum_by_document
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import add_adapters
from qftlab.rows.batches import Example, pack
from qftlab.rows.countdown import fresh_problems
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import REWARDS, LoRAConfig, PolicyConfig, RLOOConfig, TrainConfig
from qftlab.train import rloo as module
from qftlab.train.reward import WANTED, named_rewards
from qftlab.train.rloo import PolicyStep, fit_policy, rloo
from qftlab.train.rollouts import ModelSampler, RewardError, RolloutSource, encode_prompts
from qftlab.train.step import Frozen

CONSTANT = {"warmup_ratio": 0, "schedule": "constant", "weight_decay": 0.0}


def parity_reward(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    """A number that any two different answers hardly share."""
    return sum(ids) % 7 / 7


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def questions(words: str = "one two three four five six") -> list[dict]:
    return [{"prompt": f"Say {w}{' please' * (i % 3)}."} for i, w in enumerate(words.split())]


class Fixed:
    """A sampler of random ragged answers that no weight moves: the same rollouts for both sides."""

    def __init__(self, seed: int = 0) -> None:
        self.given: list[list[Completion]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, prompts, *, seed, temperature, num_generations) -> list[Completion]:
        found = []
        for ids in prompts:
            for _ in range(num_generations):
                length = int(torch.randint(1, 12, (), generator=self.generator))
                answer = torch.randint(3, 1000, (length,), generator=self.generator).tolist()
                found.append(Completion(ids, answer, "", "stop" if length < 9 else "length"))
        self.given.append(found)
        return found


# Against TRL


def run_trl(tmp_path: Path, model, given: list[list[Completion]], **settings) -> tuple[list[dict], list[float]]:
    """TRL's trainer on rollouts that are given, one list for each time it would sample; its log and advantages."""
    from datasets import Dataset
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer

    arguments = TRLConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=3e-4,
        per_device_train_batch_size=len(given[0]), num_generations=4, max_steps=10, logging_steps=1, report_to=[],
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.98, max_grad_norm=1.0,
        save_strategy="no", disable_tqdm=True, max_completion_length=12, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": f"{i}"} for i in range(len(given[0]) // 4 * 10)])

    def reward(completion_ids, **_):
        return [parity_reward([], ids, "", {}) for ids in completion_ids]

    trainer = RLOOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=load_tokenizer("tiny"))
    left = iter(given)

    def generate(prompts):
        answers = next(left)
        ids = [[list(c.prompt_ids) for c in answers], [list(c.token_ids) for c in answers]]
        return *ids, ["" for _ in answers]

    trainer._generate = generate
    advantages: list[float] = []
    score = trainer._generate_and_score_completions

    def keep(inputs):
        found = score(inputs)
        advantages.extend(found["advantages"].tolist())
        return found

    trainer._generate_and_score_completions = keep
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], advantages


EVERY = [(t, beta, 1, packing) for t in (0.7, 1.0) for beta in (0.0, 0.05) for packing in (True, False)]


@pytest.mark.long
@pytest.mark.parametrize("temperature, beta, updates, packing", [*EVERY, (0.7, 0.0, 2, True), (1.0, 0.05, 2, False)])
def test_ten_steps_equal_trl(
    tmp_path, tokenizer, monkeypatch, temperature: float, beta: float, updates: int, packing: bool
) -> None:
    """Advantages, losses, KL and entropy of ten steps, and the weights after them, to 1e-5."""
    ours, theirs, sampler = random_model(), random_model(), Fixed()
    theirs.set_attn_implementation("sdpa")
    save_model(theirs, tokenizer, tmp_path / "start")
    theirs.config._name_or_path = str(tmp_path / "start")
    logs, advantages, original = [], [], module.clipped_policy_loss

    def spy(logprobs, old, values, **options):
        advantages.append(values)
        return original(logprobs, old, values, **options)

    monkeypatch.setattr(module, "clipped_policy_loss", spy)
    policy = PolicyConfig(num_generations=4, max_new_tokens=12, temperature=temperature, beta=beta,
                          updates_per_rollout=updates)  # fmt: skip
    result = fit_policy(ours, tokenizer, questions(), parity_reward,
                        TrainConfig(lr=3e-4, max_steps=10, batch_size=3, packing=packing, **CONSTANT), policy,
                        sampler=sampler, on_log=logs.append)  # fmt: skip
    log, trl_advantages = run_trl(tmp_path, theirs, sampler.given, temperature=temperature, beta=beta,
                                  num_iterations=updates)  # fmt: skip
    assert len(log) == 10 and len(sampler.given) == 10 // updates
    wanted = torch.tensor(trl_advantages).view(-1, 12)
    for mine, expected in zip(advantages[::updates], wanted, strict=True):
        # Padded batches put groups of like length together, so the order differs there.
        pair = (mine, expected) if packing else (mine.sort().values, expected.sort().values)
        assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert result.losses == pytest.approx([entry["loss"] for entry in log], abs=1e-5)
    assert [r["entropy"] for r in logs] == pytest.approx([entry["entropy"] for entry in log], rel=1e-5)
    assert [r["grad_norm"] for r in logs] == pytest.approx([entry["grad_norm"] for entry in log], rel=1e-4)
    clipped = [entry["clip_ratio/region_mean"] for entry in log]
    assert [r["clip_fraction"] for r in logs] == pytest.approx(clipped, abs=1e-6)
    if updates > 1:
        assert max(clipped) > 0 and max(map(abs, result.losses)) > 1e-3, "the second update has something to clip"
    if beta and updates == 1:
        assert [r["kl"] for r in logs] == pytest.approx([entry["kl"] for entry in log], abs=1e-5)
        assert logs[-1]["kl_k3"] > 1e-4 and logs[0]["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-5, rtol=0)
    start = load_model(tmp_path / "start")
    moved = max((a - b).abs().max() for a, b in zip(ours.parameters(), start.parameters(), strict=True))
    assert moved > 1e-3, "up to ten steps of 3e-4 each"


# Rollouts, batches and what is logged


def micro_batches(policy: PolicyConfig, model=None, **config) -> tuple[PolicyStep, list]:
    """The step and the parts of one rollout of 3 x 4 fixed answers."""
    model = model or random_model()
    step = PolicyStep(model, policy)
    reference = Frozen(PolicyStep(random_model(initializer_range=0.19), policy).step, "start")
    prompts = encode_prompts(load_tokenizer("tiny"), questions("one two three"))
    source = RolloutSource(prompts, {"parity": parity_reward}, Fixed(), TrainConfig(batch_size=3, **config), policy,
                           step.step, reference if policy.beta else None)  # fmt: skip
    return step, [part.tensors for part in source(0, 0)]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("updates", [1, 2])
def test_splits_packed_and_padded_give_one_loss_and_gradient(beta: float, updates: int) -> None:
    """Whole groups in one or several parts, and groups that are split because one alone exceeds the budget."""
    policy, found = PolicyConfig(num_generations=4, beta=beta, updates_per_rollout=updates, temperature=0.8), []
    for split in ({}, {"micro_batch_size": 1}, {"tokens_per_micro_batch": 300}, {"tokens_per_micro_batch": 60},
                  {"packing": False}, {"packing": False, "micro_batch_size": 2}):  # fmt: skip
        step, parts = micro_batches(policy, **split)
        assert sum(int(part["stands_for"]) for part in parts) == 12
        total = sum(step(**part, num_tokens=12) for part in parts)
        total.backward()
        found.append((len(parts), total.detach(), [p.grad.clone() for p in step.parameters()]))
    assert [count for count, *_ in found][:2] == [1, 3] and found[3][0] > 3
    for _, total, grads in found[1:]:
        assert_close(total, found[0][1], rtol=1e-6, atol=1e-5)
        assert_close(grads, found[0][2], rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in found[0][2]) > 0.1


def test_by_hand() -> None:
    """Two answers, rewards 1 and 0, β 0.5: R = (1 − 0.5·KL₁, −0.5·KL₂), A = ±(R₁ − R₂), and the ratio clips at 1.2.

    The policy's log-probabilities are taken from the step; old and reference are set 0.3 and 0.1 below them, so that
    KL = log π_old − log π_ref is (−0.2, −0.2) for each answer of one token, R = (1.1, 0.1), A = (1, −1), ρ = e^0.3 =
    1.35. Losses: −min(1.35, 1.2) = −1.2 and +max(1.35, 1.2) = 1.35; together 0.15.
    """
    step = PolicyStep(random_model(), PolicyConfig(num_generations=2, beta=0.5))
    batch = pack([Example([5, 6, 7], [False, False, True]), Example([5, 6, 9], [False, False, True])])
    tokens = step.step(labels=batch["labels"], want="logprobs", **{k: v for k, v in batch.items() if k != "labels"})
    logprobs = tokens.detach()[0, [1, 4]]
    trained = batch["labels"][:, 1:] != -100
    batch |= {"stands_for": torch.tensor(2), "rewards": torch.tensor([1.0, 0.0]), "old_logprobs": logprobs - 0.3,
              "ref_logprobs": (tokens.detach() - 0.1) * trained}  # fmt: skip
    loss = step(**batch, num_tokens=1)
    assert loss.item() == pytest.approx(-1.2 + math.exp(0.3), abs=1e-5)
    found = step.take()
    assert found["clip_fraction"] == 0.5 and found["kl"] == pytest.approx(0.1, abs=1e-6)
    assert found["kl_k3"] == pytest.approx(math.exp(-0.1) - 1 + 0.1, abs=1e-6)


def test_the_shared_prompt_changes_nothing_but_the_number_of_tokens() -> None:
    """Against one document for each answer; a lone prompt of one token and a group of one are there too."""
    from qftlab.model.cpu import pack_answers

    torch.manual_seed(0)
    sizes = [(9, (3, 5, 1)), (1, (4, 2)), (12, (6,)), (30, (2, 40, 7))]
    examples, numbers, starts = [], [], []
    for number, (before, answers) in enumerate(sizes):
        prompt = torch.randint(3, 1000, (before,)).tolist()
        for after in answers:
            answer = torch.randint(3, 1000, (after,)).tolist()
            examples.append(Example(prompt + answer, [False] * before + [True] * after))
            numbers.append(number)
            starts.append(before)
    shared, plain = pack_answers(examples, numbers, starts), pack(examples)
    assert shared["input_ids"].numel() == sum(b - 1 + sum(a + 1 for a in answers) for b, answers in sizes)
    found = []
    for batch in (shared, plain):
        step = module.Step(random_model())
        logprobs, spread = step(want="logprobs+entropy", **batch)
        found.append((logprobs[logprobs != 0], spread[spread != 0], logprobs))
        logprobs.square().sum().backward()
        found[-1] += ([p.grad for p in step.parameters()],)
    assert_close(found[0][:2], found[1][:2], atol=1e-5, rtol=1e-5)
    assert_close(found[0][3], found[1][3], atol=1e-3, rtol=1e-4)
    copy = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in shared.items()}
    assert_close(step(want="logprobs", **copy), found[0][2], rtol=0, atol=0)
    sums = [sum_by_document(f[2], b["cu_seq_lens_q"]) for f, b in zip(found, (shared, plain), strict=True)]
    assert_close(*sums, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_answers_share_their_prompt_only_where_attention_sees_it(attention: str, tokenizer) -> None:
    """Others would have them answer nothing: a loss that is off, without a word."""
    model, config = random_model(), TrainConfig(batch_size=6)
    model.set_attn_implementation(attention)
    policy = PolicyConfig(num_generations=2, max_new_tokens=4)
    step = PolicyStep(model, policy).step
    source = RolloutSource(encode_prompts(tokenizer, questions()), {"parity": parity_reward},
                           ModelSampler(model, tokenizer, policy), config, policy, step)  # fmt: skip
    [part] = source(0, 0)
    assert ("documents" in part.tensors) == (attention == "packed")
    inputs = {name: part.tensors[name] for name in part.tensors.keys() & {*pack([Example([1], [True])]), "documents"}}
    logprobs = step(**inputs, want="logprobs")
    assert_close(logprobs, part.tensors["sampler_logprobs"], rtol=0, atol=1e-4)


def test_the_sampler_is_the_policy(tokenizer) -> None:
    """Fused decoding against the training step after every update: log-probabilities at temperature 0.7 to 1e-4."""
    logs: list[dict] = []
    fit_policy(random_model(), tokenizer, questions(), parity_reward,
               TrainConfig(lr=3e-3, max_steps=4, batch_size=6, **CONSTANT),
               PolicyConfig(num_generations=4, max_new_tokens=9, temperature=0.7), on_log=logs.append)  # fmt: skip
    assert len(logs) == 4 and all(record["sampler_gap_max"] < 1e-4 for record in logs)
    names = {"reward", "reward_std", "reward_parity_reward", "length", "truncated", "equal_groups", "entropy",
             "clip_fraction", "sampler_gap", "rollout_seconds", "reward_seconds", "score_seconds"}  # fmt: skip
    assert names <= set(logs[0]) and logs[-1]["answers"] == 4 * 24


def test_a_reward_is_learned(tokenizer) -> None:
    """Answers that are short: the share that ends at once rises, and the samples show it."""
    logs: list[dict] = []
    fit_policy(random_model(), tokenizer, questions(), {"short": lambda p, ids, text, row: -len(ids) / 12},
               TrainConfig(lr=1e-2, max_steps=25, batch_size=6, **CONSTANT),
               PolicyConfig(num_generations=8, max_new_tokens=12, sample_every=25), on_log=logs.append,
               held_out_rows=questions("seven eight"))  # fmt: skip
    steps = [r for r in logs if "reward" in r]
    assert steps[-1]["length"] < steps[0]["length"] - 3
    held = [r for r in logs if "held_out_reward" in r]
    assert held[-1]["held_out_reward"] > held[0]["held_out_reward"] == -held[0]["held_out_loss"]
    [samples] = [r["samples"] for r in logs if "samples" in r]
    assert samples[0]["reward"] >= samples[1]["reward"] and samples[0]["row"] == samples[1]["row"]


def test_equal_rewards_move_nothing_and_are_counted(tokenizer) -> None:
    """β 0 and all answers equal: the step is taken without a gradient, and the run goes on."""
    model, logs = random_model(), []
    before = [p.clone() for p in model.parameters()]
    fit_policy(model, tokenizer, questions(), lambda *_: 0.5,
               TrainConfig(lr=1e-2, max_steps=3, batch_size=6, **CONSTANT),
               PolicyConfig(num_generations=4, max_new_tokens=5), on_log=logs.append)  # fmt: skip
    assert [r["equal_groups"] for r in logs] == [1, 1, 1] and logs[-1]["answers"] == 72
    assert all(r["loss"] == 0 and r["grad_norm"] == 0 for r in logs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_leaving_equal_groups_out_changes_nothing_without_kl() -> None:
    """One group of three is equal: without β its answers are left out, counted, and the gradient is the same."""

    def some_equal(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
        return 0.0 if "two" in row["prompt"] else parity_reward(prompt, ids, text, row)

    found = []
    for beta, skip in ((0.0, False), (0.3, False), (0.3, True)):
        policy = PolicyConfig(num_generations=4, beta=beta, skip_equal=skip)
        step = PolicyStep(random_model(), policy)
        prompts = encode_prompts(load_tokenizer("tiny"), questions("one two three"))
        source = RolloutSource(prompts, {"r": some_equal}, Fixed(), TrainConfig(batch_size=3), policy, step.step,
                               Frozen(step.step, "start") if beta else None)  # fmt: skip
        [part] = source(0, 0)
        step(**part.tensors, num_tokens=12).backward()
        found.append((len(part.rows), int(part.tensors["stands_for"]), [p.grad.clone() for p in step.parameters()]))
    assert [f[:2] for f in found] == [(2, 12), (3, 12), (2, 12)]
    for _, _, grads in found[1:]:  # policy and reference are one model, so the penalty is 0
        assert_close(grads, found[0][2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("truncated", ["keep", "mask", "zero"])
def test_truncated_answers(truncated: str) -> None:
    policy = PolicyConfig(num_generations=4, truncated=truncated)
    step, [batch] = micro_batches(policy)
    sampler = Fixed()
    answers = sampler.sample([[1]] * 3, seed=0, temperature=1, num_generations=4)
    is_cut = torch.tensor([c.finish_reason == "length" for c in answers])
    assert 0 < is_cut.sum() < 12
    rewards = torch.tensor([parity_reward([], c.token_ids, "", {}) for c in answers])
    if truncated == "zero":
        rewards[is_cut] = 0
    assert_close(batch["advantages"], leave_one_out_advantages(rewards.view(3, 4)).flatten())
    trained = sum_by_document((batch["labels"][:, 1:] != -100).float(), batch["cu_seq_lens_q"])
    lengths = torch.tensor([float(len(c.token_ids)) for c in answers])
    assert_close(trained, lengths * ~is_cut if truncated == "mask" else lengths)
    assert step(**batch, num_tokens=12).isfinite()


def test_a_step_whose_answers_are_all_cut_and_masked_moves_nothing(tokenizer) -> None:
    class Cut(Fixed):
        def sample(self, prompts, **options) -> list[Completion]:
            return [dataclasses.replace(c, finish_reason="length") for c in super().sample(prompts, **options)]

    logs: list[dict] = []
    config = TrainConfig(max_steps=1, batch_size=6, **CONSTANT)
    fit_policy(random_model(), tokenizer, questions(), parity_reward, config,
               PolicyConfig(num_generations=4, truncated="mask"), sampler=Cut(), on_log=logs.append)  # fmt: skip
    assert logs[0]["truncated"] == 1 and logs[0]["grad_norm"] == 0 and logs[0]["equal_groups"] < 1


def test_prompts_of_every_kind_of_row(tokenizer, caplog) -> None:
    user = {"role": "user", "content": "Say one."}
    rows = [{"prompt": "Say one."}, {"prompt": [user], "chosen": "a", "rejected": "b"},
            {"messages": [user, {"role": "assistant", "content": "one"}]}, {"messages": [user]},
            {"instruction": "Say one.", "output": "one"},
            {side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}]  # fmt: skip
    found = encode_prompts(tokenizer, rows)
    assert all(p.messages == [user] and p.ids == found[0].ids for p in found)
    assert [p.number for p in found] == [1, 2, 3, 4, 5, 6]
    [countdown] = encode_prompts(tokenizer, [{"nums": [3, 4, 5], "target": 35}])
    assert "3, 4, 5" in countdown.messages[0]["content"] and countdown.row["numbers"] == [3, 4, 5]
    kept = encode_prompts(tokenizer, [rows[0], {"prompt": "Say " * 99}], max_length=60)
    assert len(kept) == 1 and "1 of 2 prompts kept; 1 left out: too long (row 2)" in caplog.text
    with pytest.raises(ValueError, match="row 2"):
        encode_prompts(tokenizer, [rows[0], {"prompt": []}])


def test_adapters_need_no_second_model(tokenizer) -> None:
    """Start and base are one reference for fresh adapters; only adapters are copied and moved."""
    losses = []
    for which in ("start", "base"):
        model = add_adapters(random_model(), LoRAConfig(rank=2))
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        policy = PolicyConfig(num_generations=4, max_new_tokens=6, beta=0.5, reference=which, updates_per_rollout=2)
        step = PolicyStep(model, policy)
        copied = sum(p.numel() for p in Frozen(step.step, which).weights.values())
        assert copied == (sum(p.numel() for p in model.parameters() if p.requires_grad) if which == "start" else 0)
        result = fit_policy(model, tokenizer, questions(), parity_reward,
                            TrainConfig(lr=1e-2, max_steps=6, batch_size=6, **CONSTANT), policy)  # fmt: skip
        losses.append(result.losses)
        assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and max(map(abs, losses[0])) > 1e-3
    with pytest.raises(ValueError, match="reference must be start without adapters, got base"):
        fit_policy(random_model(), tokenizer, questions(), parity_reward, TrainConfig(max_steps=1),
                   PolicyConfig(beta=0.1, reference="base"))  # fmt: skip


def test_weights_that_cannot_be_fused_are_used_as_they_are(tokenizer, caplog, monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.delenv("QFTLAB_LAYOUT", raising=False)
    caplog.set_level("INFO")
    model = get_peft_model(random_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    sampler = ModelSampler(model, tokenizer, PolicyConfig(max_new_tokens=3))
    ids = [p.ids for p in encode_prompts(tokenizer, questions("one two"))]
    for _ in range(2):
        assert len(sampler.sample(ids, seed=0, temperature=1.0, num_generations=2)) == 4
    assert caplog.text.count("unfused") == 1


# What stops a run


def good(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    return len(set(ids)) / 12


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: math.nan, r"reward 'fragile' must be a finite number, got nan for an answer to row \d"),
        (lambda: None, "must be a finite number, got None"),
        (lambda: 1 / 0, r"reward 'fragile' failed on an answer to row \d: ZeroDivisionError: division by zero"),
        (lambda: 10**400, r"must be a finite number, got 1000+ for an answer to row \d"),
        (lambda: 10**9999, r"reward 'fragile' failed on an answer to row \d: ValueError: Exceeds the limit"),
        (lambda: torch.zeros(2), r"must be a finite number, got tensor\(\[0., 0.\]\) for an answer to row \d"),
        (lambda: "1", "must be a finite number, got '1' for"),
        (lambda: sys.exit(3), r"reward 'fragile' failed on an answer to row \d: SystemExit: 3; the answer was"),
    ],
)
def test_a_bad_reward_stops_the_run_and_nothing_is_lost(tokenizer, tmp_path, bad, message: str) -> None:
    """It fails in the third step; resumed with a whole reward, the run ends as one that was never disturbed."""
    config = TrainConfig(lr=1e-2, max_steps=5, batch_size=3, **CONSTANT)
    policy = PolicyConfig(num_generations=4, max_new_tokens=6, beta=0.1)
    calls: list[int] = []

    def fragile(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
        calls.append(1)
        return bad() if len(calls) == 2 * 12 + 5 else good(prompt, ids, text, row)

    model = random_model()
    with pytest.raises(RewardError, match=message):
        fit_policy(model, tokenizer, questions(), {"fragile": fragile}, config, policy, checkpoints=tmp_path)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000002"], "saved where it stopped"
    model = random_model()
    resumed = fit_policy(model, tokenizer, questions(), {"fragile": good}, config, policy, checkpoints=tmp_path,
                         resume=True)  # fmt: skip
    undisturbed = random_model()
    whole = fit_policy(undisturbed, tokenizer, questions(), {"fragile": good}, config, policy)
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))


def test_a_reward_gets_copies(tokenizer) -> None:
    """What one does to row, prompt and ids reaches neither the next, nor its own next call, nor training."""
    rows = [{"prompt": [{"role": "user", "content": "1?"}], "tags": ["a"]}, {"prompt": "2?", "tags": ["a"]}]
    seen: list[tuple] = []

    def rude(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
        seen.append((len(prompt), prompt[0]["content"], len(row["tags"]), set(row)))
        prompt[0]["content"] = "changed"
        prompt.clear()
        ids.clear()
        row["tags"].append("b")
        row.pop("prompt")
        return float(len(seen))

    def many(answers: list[tuple]) -> list[float]:
        return [rude(*answer) for answer in answers]

    class Many:
        def __init__(self) -> None:
            self.many = many

    policy = PolicyConfig(num_generations=2, max_new_tokens=3)
    config = TrainConfig(lr=1e-3, epochs=2, batch_size=2, **CONSTANT)
    before = copy.deepcopy(rows)
    fit_policy(random_model(), tokenizer, rows, {"a": rude, "b": Many(), "c": good}, config, policy)
    assert rows == before and len(seen) == 2 * 2 * 2 * 2
    assert {(count, tags) for count, _, tags, _ in seen} == {(1, 1)} and {said for _, said, *_ in seen} == {"1?", "2?"}


@pytest.mark.parametrize(
    ("many", "message"),
    [
        (lambda answers: [0.0], r"reward 'all' must give 4 values, got 1"),
        (lambda answers: 7, r"reward 'all' failed on the answers to rows 1 to 2: TypeError"),
        (lambda answers: [0.0, 0.0, 0.0, torch.ones(2)], r"reward 'all' must be a finite number, got tensor.* row \d"),
        (lambda answers: (1 / (3 - i) for i in range(4)), "failed on the answers to rows 1 to 2: ZeroDivisionError"),
        (lambda answers: [1e308] * 4, "rewards must have a finite weighted sum, got {'all': 1e[+]308} for row"),
    ],
)
def test_many_rewards_of_any_odd_kind_stop_the_run(tokenizer, tmp_path, many, message: str) -> None:
    function = SimpleNamespace(many=many)
    policy = PolicyConfig(num_generations=2, max_new_tokens=3, weights={"all": 100.0})
    with pytest.raises(RewardError, match=message):
        fit_policy(random_model(), tokenizer, questions("one two"), {"all": function}, TrainConfig(max_steps=1), policy)


def test_settings_that_do_not_fit_are_refused(tokenizer, tmp_path) -> None:
    run = [random_model(), tokenizer, questions(), {"good": good}]
    with pytest.raises(ValueError, match="save_every must be a multiple of updates_per_rollout, got 500 and 3"):
        fit_policy(*run, TrainConfig(), PolicyConfig(updates_per_rollout=3), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"weights must name rewards among good, got \['bad'\]"):
        fit_policy(*run, TrainConfig(), PolicyConfig(weights={"bad": 1.0}))
    for change, message in (
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"epsilon": 1}, "epsilon must be in"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"truncated": "drop"}, "truncated must be one of"),
        ({"weights": {"a": math.nan}}, "weights must be finite"),
        ({"beta": -1}, "beta must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyConfig(**change)
    for change, message in (({}, "data or problems"), ({"problems": 3, "rewards": "best"}, "rewards must be one of"),
                            ({"problems": 3, "rewards": "model"}, "reward_model must be given for the reward model"),
                            ({"problems": 3, "rewards": ()}, "rewards must name a reward"),
                            ({"problems": 3, "reward_model": "x"}, r"add it, as in --rewards \[countdown,model\]"),
                            ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            RLOOConfig(**change)


def test_every_name_that_the_settings_know_is_a_reward(tokenizer) -> None:
    extended, names = load_tokenizer("tiny"), [name for name in REWARDS if name not in ("model", "mode")]
    assert list(named_rewards(names, extended)) == names and set(WANTED) < set(REWARDS)


def test_named_rewards_read_ids() -> None:
    """`<|AGENT|>` as a token earns 1; its letters, the other token, and both one after the other do not."""
    from qftlab.rows.tokenizer import extend_tokenizer
    from qftlab.settings import AGENT, EDIT

    tokenizer = load_tokenizer("tiny")
    with pytest.raises(ValueError, match="reward mode must have"):
        named_rewards(["mode"], tokenizer)
    extend_tokenizer(tokenizer, (AGENT, EDIT))
    rewards = named_rewards(["mode", "exact", "answer", "countdown", "reasoned"], tokenizer)
    agent, edit = (tokenizer.convert_tokens_to_ids(t) for t in (AGENT, EDIT))
    row = {"mode": "AGENT", "output": "run it", "numbers": [3, 4], "target": 7}
    body = tokenizer("run it").input_ids
    answers = ([agent, *body], body, [edit, *body], [agent, edit], [])
    assert [rewards["mode"]([], ids, "run it", row) for ids in answers] == [1, 0, 0, 0, 0]
    assert rewards["mode"]([], [edit, *body], "", {"mode": "EDIT"}) == 1
    assert tokenizer.decode([agent, *body], skip_special_tokens=True) == "run it", "text alone cannot tell"
    assert rewards["exact"]([], body, " run it\n", row) == 1
    assert rewards["answer"]([], body, "<answer>3</answer>", row) == 1
    assert rewards["countdown"]([], body, "<answer>3 + 4</answer>", row) == 1
    assert list(rewards) == ["mode", "exact", "answer", "countdown", "reasoned"]
    thought = "<think>" + "3 + 4 is 7. <answer>8</answer> " * 40 + "</think>\n<answer> 3 + 4 </answer>"
    assert [rewards[name]([], body, thought, row) for name in ("countdown", "reasoned")] == [0, 1]
    assert rewards["reasoned"]([], body, thought + "<answer>7</answer>", row) == 0, "two answers"
    assert rewards["reasoned"]([], body, "3 + 4 " * 100 + "<answer>3 + 4</answer>", row) == 0, "too long, unfinished"


# Files to files


def little_run(folder: Path, output: str, resume: str | None = None, **changes) -> RLOOConfig:
    train = TrainConfig(lr=3e-3, max_steps=8, batch_size=3, eval_every=4, save_every=2, **CONSTANT)
    policy = PolicyConfig(num_generations=4, max_new_tokens=8, beta=0.1, updates_per_rollout=2, sample_every=4)
    return RLOOConfig(model=str(folder / "start"), problems=12, held_out=str(folder / "held.jsonl"), device="cpu",
                      output=str(folder / output), resume=resume, rewards=("countdown", "answer"), policy=policy,
                      train=train, **changes)  # fmt: skip


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A folder with a random model that has dropout, and held-out problems."""
    folder = tmp_path_factory.mktemp("rloo")
    save_model(random_model(attention_dropout=0.1), load_tokenizer("tiny"), folder / "start")
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, fresh_problems(3, 9))), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(little) -> Path:
    """The run that nobody disturbs."""
    torch.set_num_threads(1)
    return rloo(little_run(little, "whole"))


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("seconds", "per_second", "peak_gb"))} for line in lines]


def test_a_run_leaves_model_metrics_and_samples(whole) -> None:
    records = metrics(whole)
    steps = [r for r in records if "reward" in r]
    assert len(steps) == 8 and {"reward_countdown", "reward_answer", "kl", "kl_k3", "clip_fraction"} <= set(steps[0])
    assert [r["step"] for r in records if "held_out_reward" in r] == [0, 4, 8]
    assert [r["step"] for r in records if "samples" in r] == [4, 8]
    assert load_model(whole / "model").num_parameters() and (whole / "checkpoints" / "initial").is_dir()


def test_the_log_says_the_reward_first(tokenizer, caplog) -> None:
    """And never the loss, which is about 0 by construction."""
    config = TrainConfig(max_steps=2, batch_size=2, log_every=1)
    with caplog.at_level("INFO", logger="qftlab.train.loop"):
        fit_policy(random_model(), tokenizer, questions(), {"good": good}, config,
                   PolicyConfig(num_generations=2, max_new_tokens=3), held_out_rows=questions()[:2])  # fmt: skip
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("step 0/2: held-out reward 0.") and said[1].startswith("step 1/2: reward 0.")
    assert said[-1].startswith("step 2/2: held-out reward 0.") and not any("loss" in line for line in said)


def test_held_out_answers_are_written_as_rollouts_are() -> None:
    """In the weights' own type, whatever training computes in: `tiny`'s fused weights take no other on a CPU."""
    model, tokenizer, found = load_model("tiny"), load_tokenizer("tiny"), []
    for precision in ("weights", "autocast"):
        logs: list[dict] = []
        config = TrainConfig(lr=1e-9, max_steps=1, batch_size=2, precision=precision)
        fit_policy(model, tokenizer, fresh_problems(2, 0), lambda prompt, ids, text, row: float(sum(ids)), config,
                   PolicyConfig(num_generations=2, max_new_tokens=4), held_out_rows=fresh_problems(3, 1),
                   on_log=logs.append)  # fmt: skip
        found.append(logs[0]["held_out_reward"])
    assert found[0] == found[1] > 0


def test_killed_and_resumed_ends_with_the_same_bytes(little, whole) -> None:
    """Killed once a checkpoint is there, at two moments; weights, metrics and samples are the same."""
    for number, steps in enumerate((2, 6)):
        output = f"killed-{number}"
        killed(rloo, (little_run(little, output),), little / output, f"*/checkpoints/rloo/step-{steps:06}")
        [run] = [p for p in (little / output).iterdir() if not p.is_symlink()]
        assert not (run / "model").exists(), "killed before its end"
        assert rloo(little_run(little, output, resume="last")) == run
        assert sha256(run / "model" / "model.safetensors") == sha256(whole / "model" / "model.safetensors")
        assert metrics(run) == metrics(whole)


def test_another_policy_cannot_resume(little, whole) -> None:
    config = little_run(little, "whole", resume=str(whole))
    for change, message in (({"policy": dataclasses.replace(config.policy, beta=0.2)}, r"policy.beta: 0.1 in the"),
                            ({"problems": 13}, r"problems: 12 in the checkpoint, 13 now")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rloo(dataclasses.replace(config, **change))


# Two processes: test_distributed.py runs this in one and in two


class ByPrompt(Fixed):
    """Answers that depend on the prompt alone: the same in one process and in two."""

    def sample(self, prompts, **options) -> list[Completion]:
        found = []
        for ids in prompts:
            self.generator.manual_seed(sum(ids))
            found += super().sample([ids], **options)
        return found


def shared_run(updates: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after six steps of 5, and at the end of an epoch of one, of 6 prompts."""
    model, tokenizer = random_model(), load_tokenizer("tiny")
    policy = PolicyConfig(num_generations=4, max_new_tokens=12, beta=0.1, updates_per_rollout=updates)
    config = TrainConfig(lr=3e-4, max_steps=6, batch_size=5, **CONSTANT)
    result = fit_policy(model, tokenizer, questions(), parity_reward, config, policy, sampler=ByPrompt())
    return result.losses, {name: p.detach().clone() for name, p in model.named_parameters()}
