"""Answers of a rollout by hand: what a log says of them, how they are split, and the figures of a policy step."""

from __future__ import annotations

import time

import pytest
import torch
from random_models import random_model

from qftlab.decoding.engine import Completion
from qftlab.rows.batches import split_step
from qftlab.settings import PolicyConfig, PreferenceLoss, TrainConfig
from qftlab.train.dpo import PairStep
from qftlab.train.meter import samples_of, table_of
from qftlab.train.rloo import PolicyStep, held_out_rewards
from qftlab.train.rollouts import Prompt, Rollout, RolloutSource, equal_groups, statistics_of


def answer(reward: float, number: int = 1, length: int = 2, prompt: int = 3, reason: str = "stop") -> Rollout:
    completion = Completion([7] * prompt, [8] * length, f"says {reward}", reason)
    return Rollout(number, completion, {"a": reward, "b": 2.0}, reward)


PROMPTS = [Prompt([{"role": "user", "content": f"q{n}"}], [7, 7, 7], {}, n) for n in range(1, 7)]
THREES = [answer(reward, number) for number in range(1, 7) for reward in (number / 10, 0.0, 0.5)]


def test_figures_of_answers_by_hand() -> None:
    rollouts = [answer(1.0), answer(0.0, length=4, reason="length"), answer(0.5), answer(0.5, reason="cancelled")]
    assert equal_groups(rollouts, 2) == [False, True] and equal_groups(rollouts, 4) == [False]
    assert statistics_of(rollouts, 2) == {
        "reward": 0.5, "reward_std": pytest.approx(0.125**0.5, abs=5e-7), "reward_a": 0.5, "reward_b": 2.0,
        "length": 2.5, "truncated": 0.5, "equal_groups": 0.5,
    }  # fmt: skip
    third = statistics_of([answer(1.0), answer(0.0), answer(0.0)], 3)["reward"]
    assert third == 0.333333, "six decimals"


def test_the_best_and_the_worst_answer_to_four_prompts() -> None:
    samples = samples_of(THREES, PROMPTS, 3)
    assert [(s["row"], s["reward"]) for s in samples] == [
        (1, 0.5), (1, 0.0), (2, 0.5), (2, 0.0), (3, 0.5), (3, 0.0), (4, 0.5), (4, 0.0),
    ]  # fmt: skip
    assert samples[0] == {"row": 1, "prompt": "q1", "text": "says 0.5", "reward": 0.5, "finish_reason": "stop"}
    last = samples_of(THREES, PROMPTS, 3, count=6)[-2:]
    assert [s["reward"] for s in last] == [0.6, 0.0]
    assert table_of(samples[:1]).split("\n") == ["  row        reward  prompt, answer",
                                                 "  row 1        0.500  'q1'  'says 0.5'"]  # fmt: skip


class Fake:
    """Answers every prompt with what the test says, and notes what it was asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[dict] = []
        self.seconds = seconds

    def sample(self, prompts, **options) -> list[Completion]:
        self.asked.append(options)
        late = time.process_time() + self.seconds
        while time.process_time() < late:
            pass
        each = options["num_generations"]
        return [Completion(ids, [8] * (i + 1), str(i), "stop") for i, ids in enumerate(prompts * each)]


def source(sampler: Fake, policy: PolicyConfig | None = None, **options) -> RolloutSource:
    policy = policy or PolicyConfig(num_generations=2)
    step = PolicyStep(random_model(), policy).step
    rewards = {"length": lambda prompt, ids, text, row: len(ids) % 3}
    return RolloutSource(PROMPTS, rewards, sampler, TrainConfig(batch_size=4, **options), policy, step)


def test_seconds_are_of_sampling_and_of_rewards() -> None:
    sampler, start = Fake(0.05), time.process_time()
    found = source(sampler)
    assert found.steps_per_epoch == 2
    found(0, 0)
    spent = time.process_time() - start
    assert 0.05 <= found.found["rollout_seconds"] <= spent + 1e-3
    assert 0 <= found.found["reward_seconds"] <= spent and 0 <= found.found["score_seconds"] <= spent
    found(0, 0)
    assert len(sampler.asked) == 1, "the same step again is not sampled again"
    assert sampler.asked[0]["temperature"] == 1.0 and sampler.asked[0]["num_generations"] == 2


def test_held_out_answers_are_greedy_one_each_and_always_of_seed_0() -> None:
    sampler = Fake()
    loss, figures = held_out_rewards(PROMPTS[:3], source(sampler))
    assert sampler.asked == [{"seed": 0, "temperature": 0.0, "num_generations": 1}]
    assert loss == -1.0 and figures["held_out_reward"] == 1.0  # 1, 2 and 0
    assert set(figures) == {"held_out_reward", "held_out_reward_length", "held_out_length", "held_out_truncated"}


def test_groups_stay_within_the_budget_of_a_micro_batch() -> None:
    # Groups of two answers of 5, 7 and 4 tokens each, prompt included: 10, 14 and 8 packed.
    rollouts = [answer(r, n, length) for n, length in ((1, 2), (2, 4), (3, 1)) for r in (0.0, 1.0)]

    def split(**options) -> tuple:
        return source(Fake(), **options)._split(rollouts)

    assert split() == ([[0, 1, 2, 3, 4, 5]], True)
    assert split(micro_batch_size=2) == ([[0, 1, 2, 3], [4, 5]], True)
    assert split(tokens_per_micro_batch=18) == ([[2, 3], [0, 1, 4, 5]], True)
    assert split(tokens_per_micro_batch=13) == ([[2, 0], [3, 1], [4, 5]], False)
    # Rectangles of two rows a group: 14 tokens a pass are one group of 7, 20 are two of 5.
    assert split(tokens_per_micro_batch=14, packing=False) == ([[2, 3], [0, 1], [4, 5]], True)
    assert split(tokens_per_micro_batch=20, packing=False) == ([[2, 3], [0, 1, 4, 5]], True)
    assert split_step([5, 7, 4], TrainConfig()) == [[0, 1, 2]]
    assert split_step([5, 7, 4], TrainConfig(micro_batch_size=2)) == [[0, 1], [2]]
    rectangles = TrainConfig(packing=False, tokens_per_micro_batch=24)
    assert split_step([5, 6, 4], rectangles, 2) == [[1, 0], [2]]  # two of 6 tokens are two rows each: 24 in all
    assert split_step([5, 6, 4], rectangles) == [[1, 0, 2]]


def test_figures_of_a_policy_step_by_hand() -> None:
    step = PolicyStep(random_model(), PolicyConfig(beta=0.1))
    assert step.take() == {} and step.seen.maxlen == 4096
    # Tokens, entropy, k1, k3, gap and its greatest, answers, clipped.
    step.seen.extend(torch.tensor([[4.0, 8, 1, 2, 0.4, 0.3, 2, 1], [6, 12, 2, 4, 0.6, 0.2, 3, 0]]).double())
    assert step.take() == pytest.approx(
        {"entropy": 2.0, "kl": 0.3, "kl_k3": 0.6, "clip_fraction": 0.2, "sampler_gap": 0.1, "sampler_gap_max": 0.3}
    )
    assert step.take() == {}
    step.seen.append(torch.tensor([0.0, 0, 0, 0, 0, 0, 2, 0]).double())
    assert step.take()["entropy"] == 0, "no trained token, as where all answers are cut and masked"


def test_figures_of_a_pair_step_by_hand() -> None:
    step = PairStep(random_model(), PreferenceLoss())
    assert step.take() == {} and step.suspects() == "no pair by itself" and step.seen.maxlen == 4096
    values = torch.tensor([[0.5, 0.5], [1.0, 0.0], [-3.0, -4.0], [-5.0, -7.0]])  # loss, margin, chosen, rejected
    step.seen.append((torch.tensor([4, 9]), values))
    step.seen.append((torch.tensor([2]), torch.tensor([[0.1], [-0.00001], [-2.0], [-3.0]])))
    assert step.take() == {"margin": 0.33333, "preference_accuracy": 0.5, "chosen_logprob": -3.0,
                           "rejected_logprob": -5.0}  # fmt: skip
    step.seen.append((torch.tensor([2]), torch.tensor([[0.1], [1.0000014], [-2.0], [-3.0]])))
    assert step.take()["margin"] == 1.000001, "six decimals"
    bad = torch.full((4, 7), float("nan"))
    step.seen.append((torch.arange(1, 8), bad))
    assert step.suspects().count("pair of row") == 5 and "pair of row 1: log-probability nan chosen" in step.suspects()
