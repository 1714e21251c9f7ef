"""Where RLOO's micro-batches come from: a rollout, its scores, and whole groups of answers packed together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qftlab.maths.losses import leave_one_out_advantages, sum_by_document
from qftlab.model.cpu import pack_answers
from qftlab.model.loading import module_mode
from qftlab.rows.batches import batches, first_fit_decreasing, group_by_length, pack, pad
from qftlab.train.config import TrainConfig
from qftlab.train.distributed import World, autocast
from qftlab.train.loop import MicroBatch
from qftlab.train.policy_config import PolicyConfig
from qftlab.train.rollouts import (
    Prompt,
    Reward,
    RewardError,
    Rollout,
    Sampler,
    equal_groups,
    rollout_seed,
    samples_of,
    score,
    statistics_of,
)
from qftlab.train.step import IGNORED, Step, to_device

log = logging.getLogger(__name__)
# What stops a run between two steps, so that it can be saved: rewards that are no numbers, a server that is down.
STOPS = (RewardError, ConnectionError)


class RolloutSource:
    """Micro-batches of answers that are sampled when they are asked for: a function of (weights, seed, step).

    Each process samples and scores its share of the prompts; all get all answers.

    Args:
        prompts: what is answered.
        rewards: by name.
        sampler: writes the answers.
        config: batch sizes (in prompts), packing, precision and seed.
        policy: how many answers, and what becomes of them.
        step: the policy, for log-probabilities without gradient.
        reference: gives (B, T − 1) log-probabilities of a batch at a temperature; None without a KL penalty.

    Attributes:
        found: `statistics_of` the last rollout, and seconds (of process CPU time) it took to sample and to score.
        samples: of it.
        failure: what stopped the run. The loop is then told so as by Ctrl-C: it saves and ends.
    """

    def __init__(
        self, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], sampler: Sampler, config: TrainConfig,
        policy: PolicyConfig, step: Step, reference: Callable[[dict, float], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.prompts, self.rewards, self.sampler, self.config, self.policy = prompts, rewards, sampler, config, policy
        self.step, self.reference = step, reference
        self.world, self.updates = World.current(), policy.updates_per_rollout
        self.steps_per_epoch = -(-len(prompts) // config.batch_size) * self.updates
        self.found: dict[str, float] = {}
        self.samples: list[dict] = []
        self.failure: Exception | None = None
        self._last: tuple[int, list[MicroBatch]] = (-1, [])

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step; the weights must be those of that step."""
        number = (epoch * self.steps_per_epoch + step) // self.updates
        if self._last[0] != number:
            if step % self.updates:
                log.warning("resumed between two updates on the same answers: they are sampled anew")
            order = batches(len(self.prompts), batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch)
            prompts = [self.prompts[i] for i in order[step // self.updates]]
            rollouts = self._roll_out(prompts, number)
            start = time.process_time()
            self._last = number, self._micro_batches(rollouts)
            self.found["score_seconds"] = round(time.process_time() - start, 3)
        return self._last[1]

    def _roll_out(self, prompts: list[Prompt], number: int) -> list[Rollout]:
        """Answers to all prompts, with rewards."""
        world, size, start = self.world, self.policy.num_generations, time.process_time()
        share = -(-len(prompts) // world.size)
        mine, rollouts = prompts[world.rank * share :][:share], []
        try:
            if mine:
                seed = rollout_seed(self.config.seed, number, world.rank)
                answers = self.sampler.sample([p.ids for p in mine], seed=seed, num_generations=size,
                                              temperature=self.policy.temperature)  # fmt: skip
                sampled = time.process_time()
                rollouts = score(self.rewards, mine, answers, self.policy)
        except STOPS as error:
            self.failure = error
        failures = [f for f in world.gather(self.failure) if f]
        if failures:
            self.failure = failures[0]
            log.error("stopped before step %d: %s", number * self.updates + 1, self.failure)
            raise KeyboardInterrupt
        rollouts = [r for part in world.gather(rollouts) for r in part]
        self.found = statistics_of(rollouts, size)
        self.found["rollout_seconds"] = round(sampled - start, 3) if mine else 0.0
        self.found["reward_seconds"] = round(time.process_time() - sampled, 3) if mine else 0.0
        self.samples = samples_of(rollouts, prompts, size)
        return rollouts

    def _micro_batches(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        """Answers as batches, with what their advantages are made of, or the advantages if they are known already."""
        size, policy = self.policy.num_generations, self.policy
        is_equal = equal_groups(rollouts, size)
        kept = [r for i, r in enumerate(rollouts) if not is_equal[i // size] or (policy.beta and not policy.skip_equal)]
        is_idle = not kept  # a step needs something to do: a group whose advantages are 0
        kept = kept or rollouts[:size]
        parts, are_whole = self._split(kept)
        left_out = len(rollouts) - len(kept)  # counted with the first part
        every = [self._batch([kept[i] for i in part], left_out * (n == 0)) for n, part in enumerate(parts)]
        is_plain = is_idle or not policy.beta  # advantages need no log-probabilities
        needs_old = self.updates > 1 or not (is_plain or are_whole)
        mine = list(range(len(every)))[self.world.rank :: self.world.size] or [0]
        for n in mine if self.reference or needs_old else ():
            every[n] |= self._scored(every[n], needs_old)
        rewards = torch.tensor([r.reward for r in kept])
        if needs_old and not is_plain:
            rewards -= policy.beta * self._kl(every, parts, mine, len(kept))
        if needs_old or is_plain:
            known = "advantages", leave_one_out_advantages(rewards.view(-1, size)).flatten()
        else:
            known = "rewards", rewards
        for batch, part in zip(every, parts, strict=True):
            batch[known[0]] = known[1][part]
        rows = [tuple(dict.fromkeys(kept[i].number for i in part)) for part in parts]
        return [MicroBatch(batch, names) for batch, names in zip(every, rows, strict=True)]

    def _split(self, kept: list[Rollout]) -> tuple[list[list[int]], bool]:
        """Answers by number for each micro-batch, and whether the groups stayed whole.

        They do, unless a packed group by itself has more tokens than a micro-batch may have.
        """
        size, world = self.policy.num_generations, self.world.size
        rows, budget = self.config.micro_batch_size, self.config.tokens_per_micro_batch
        if world > 1 and not (rows or budget):
            rows = -(-self.config.batch_size // world)
        lengths = [len(r.completion.prompt_ids) + len(r.completion.token_ids) for r in kept]
        groups = [lengths[i : i + size] for i in range(0, len(kept), size)]
        if not self.config.packing:
            parts = group_by_length([max(g) for g in groups], budget=budget and budget // size, rows=rows)
        elif budget is None:
            step = rows or len(groups)
            parts = [list(range(i, min(i + step, len(groups)))) for i in range(0, len(groups), step)]
        elif max(map(sum, groups)) > budget:
            return first_fit_decreasing(lengths, budget), False
        else:
            parts = first_fit_decreasing([sum(g) for g in groups], budget)
        return [[g * size + i for g in part for i in range(size)] for part in parts], True

    def _batch(self, rollouts: list[Rollout], extra: int) -> dict[str, Tensor]:
        """The documents of some answers, with the sampler's log-probabilities, and how many answers they stand for."""
        examples = [r.example(self.policy.truncated) for r in rollouts]
        if self.config.packing and next(self.step.parameters()).device.type == "cpu":
            starts = [len(r.completion.prompt_ids) for r in rollouts]
            batch = pack_answers(examples, [r.number for r in rollouts], starts)
        else:
            batch = pack(examples) if self.config.packing else pad(examples, 0)
        batch["stands_for"] = torch.tensor(len(rollouts) + extra)
        logprobs = [r.completion.logprobs for r in rollouts]
        if all(values is not None for values in logprobs):
            trained = [v for e, values in zip(examples, logprobs, strict=True) if e.loss_mask[-1] for v in values]
            batch["sampler_logprobs"] = at_labels(trained, batch["labels"])
        return batch

    @torch.no_grad()
    def _scored(self, batch: dict[str, Tensor], needs_old: bool) -> dict[str, Tensor]:
        """Log-probabilities of a batch under the reference and, if needed, under the policy as it is, on the CPU."""
        device, temperature, found = next(self.step.parameters()).device, self.policy.temperature, {}
        left = ("stands_for", "sampler_logprobs")
        inputs = to_device({k: v for k, v in batch.items() if k not in left}, device)
        with autocast(self.config, device):
            if self.reference:
                found["ref_logprobs"] = self.reference(inputs, temperature).cpu()
            if needs_old:
                with module_mode(self.step, False):
                    tokens = self.step(**inputs, want="logprobs", temperature=temperature)
                found["old_logprobs"] = sum_by_document(tokens, inputs.get("cu_seq_lens_q")).cpu()
        return found

    def _kl(self, every: list[dict], parts: list[list[int]], mine: list[int], count: int) -> Tensor:
        """log π_old − log π_ref of all answers, (N,) nats, from the parts that each process has scored."""
        kl, share = torch.zeros(count), []
        for n in mine:
            reference = sum_by_document(every[n]["ref_logprobs"], every[n].get("cu_seq_lens_q"))
            share.append((parts[n], every[n]["old_logprobs"] - reference))
        for part, values in (pair for each in self.world.gather(share) for pair in each):
            kl[part] = values
        return kl


def at_labels(values: Sequence[float], labels: Tensor) -> Tensor:
    """(B, T − 1) fp32 with a value at each trained label, in reading order, and 0 elsewhere."""
    kept = labels[:, 1:] != IGNORED
    return torch.zeros(kept.shape).masked_scatter(kept, torch.tensor(values, dtype=torch.float32))


def held_out_rewards(
    prompts: Sequence[Prompt], rewards: Mapping[str, Reward], sampler: Sampler, policy: PolicyConfig
) -> dict[str, float]:
    """held_out_reward and the other figures of `statistics_of`, of one greedy answer to each prompt."""
    answers = sampler.sample([p.ids for p in prompts], seed=0, temperature=0.0, num_generations=1)
    found = statistics_of(score(rewards, prompts, answers, policy), 1)
    return {f"held_out_{name}": value for name, value in found.items() if name not in ("equal_groups", "reward_std")}
