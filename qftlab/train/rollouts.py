"""Rollouts: prompts, sampled answers and their scores, and the micro-batches that RLOO makes of them."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qftlab.decoding.decoder import Decoder, best_layout
from qftlab.decoding.engine import Completion, generate
from qftlab.maths.losses import penalised_advantages, sum_by_document
from qftlab.maths.sampling import SamplingParams
from qftlab.maths.verify import is_finite
from qftlab.model.attention import NAME as PACKED
from qftlab.model.head import bump_weights_version_, causal_model, module_mode
from qftlab.rows.batches import Example, batches, first_fit_decreasing, pack, pad, split_step
from qftlab.rows.chat import render_prompt
from qftlab.rows.examples import Usage
from qftlab.rows.schemas import row_to_prompt
from qftlab.settings import PolicyConfig, TrainConfig
from qftlab.train.distributed import Ranks, autocast, step_seed
from qftlab.train.optimizer import MicroBatch
from qftlab.train.step import IGNORED, Step, to_device

log = logging.getLogger(__name__)
Reward = Callable[[list[dict], list[int], str, dict], float]  # of (prompt, completion_ids, text, row)


@dataclass(frozen=True)
class Prompt:
    """A prompt as messages and as ids, with the row it is from; `number` is that of the row, from 1."""

    messages: list[dict]
    ids: list[int]
    row: dict
    number: int


@dataclass(frozen=True)
class Rollout:
    """An answer with what each reward function gave it and, as `reward`, their weighted sum."""

    number: int
    completion: Completion
    rewards: dict[str, float]
    reward: float

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut off at the limit of tokens."""
        return self.completion.finish_reason != "stop"

    def example(self, truncated: str) -> Example:
        """The document that is scored and trained: no token of an answer that `truncated` ("mask") leaves out."""
        before, after = len(self.completion.prompt_ids), len(self.completion.token_ids)
        is_trained = not (truncated == "mask" and self.is_truncated)
        ids = [*self.completion.prompt_ids, *self.completion.token_ids]
        return Example(ids, [False] * before + [is_trained] * after)


class RewardError(ValueError):
    """A reward function failed, or gave what is no number; the weights are those before that step."""


class Sampler(Protocol):
    """What writes the answers: the model itself, or a server."""

    def sample(
        self, prompts: Sequence[list[int]], *, seed: int, temperature: float, num_generations: int
    ) -> list[Completion]:
        """`num_generations` answers to each prompt, those of one prompt side by side; temperature 0 is greedy."""
        ...


class ModelSampler:
    """Samples from the model as it is when `sample` is called, through one decoder that is kept.

    Its snapshot, if its layout has one, is refreshed before each rollout.

    Args:
        model, tokenizer: as in `generate`.
        config: limits.
        layout: of the decoder, as `layouts.py` writes it; by default the one that `best_layout` finds.
    """

    def __init__(self, model, tokenizer, config: PolicyConfig, layout: str | None = None) -> None:
        self.model, self.tokenizer, self.config, self.layout = model, tokenizer, config, layout
        self._decoder: Decoder | None = None

    def sample(
        self, prompts: Sequence[list[int]], *, seed: int, temperature: float, num_generations: int
    ) -> list[Completion]:
        """As `Sampler` says; raises what `generate` raises."""
        return generate(self.model, self.tokenizer, list(prompts), max_new_tokens=self.config.max_new_tokens, seed=seed,
                        params=SamplingParams(temperature=temperature), batch_size=self.config.rollout_batch_size,
                        num_generations=num_generations, return_logprobs=True, decoder=self._fresh())  # fmt: skip

    def _fresh(self) -> Decoder:
        """The decoder, with the weights of now."""
        if self._decoder is None:
            self.layout = self.layout or best_layout(self.model)
            self._decoder = Decoder(self.model, layout=self.layout)
            size = self._decoder.snapshot_bytes / 1e6
            log.info("rollouts are decoded in the layout %s, a snapshot of %.0f MB", self.layout, size)
        elif self._decoder.layout != "plain":
            bump_weights_version_(self.model)
            self._decoder.refresh_()
        return self._decoder


def encode_prompts(
    tokenizer,
    rows: Sequence[dict],
    *,
    max_length: int | None = None,
    thinking: bool | None = None,
    sources: Mapping[str, int] | None = None,
) -> list[Prompt]:
    """The prompts of rows; what answers the rows hold is not looked at.

    Args:
        tokenizer: one with a chat template.
        rows: with "prompt" (text or messages), "messages" (up to the last answer), or "instruction" and "input";
            preference rows and Countdown problems as well.
        max_length: the most tokens of a prompt; longer ones are left out and counted.
        thinking: as in `render_prompt`.
        sources: rows by source, as `load_wanted` gives them: messages then name the file as well.

    Raises:
        ValueError: if a row is none of these or cannot be rendered (its place is named), or no prompt is left.
    """
    prompts, usage = [], Usage(sources=dict(sources or {}))
    for number, where, row in usage.fit(rows, "problem"):
        messages = row_to_prompt(row)
        try:
            ids = render_prompt(tokenizer, messages, thinking=thinking)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        if max_length is not None and len(ids) > max_length:
            usage.leave_out(number, "too long")
        else:  # rewards read the row as it came
            prompts.append(Prompt(messages, ids, {**row, **rows[number - 1]}, number))
    if not prompts:
        raise ValueError(f"rows must hold a prompt of at most {max_length} tokens, got none{usage.remainder()}")
    (log.warning if usage.left_out else log.info)("%d of %d prompts kept%s", len(prompts), len(rows), usage.remainder())
    return prompts


def score(
    rewards: Mapping[str, Reward], prompts: Sequence[Prompt], completions: Sequence[Completion], config: PolicyConfig
) -> list[Rollout]:
    """Answers with their rewards.

    Args:
        rewards: by name. A function with an attribute `many` is called once, as `many([(prompt, completion_ids, text,
            row), …])`, and returns a list: the way to batch a reward model. What they are given are copies.
        prompts: P of them.
        completions: G to each prompt, side by side.
        config: weights, and what a truncated answer earns.

    Raises:
        RewardError: naming function and row, for one that fails or gives anything but a number that a float can hold.
    """
    size = len(completions) // len(prompts)
    asked = [(prompts[i // size], c) for i, c in enumerate(completions)]
    columns = {name: score_all(name, function, asked) for name, function in rewards.items()}
    rollouts = []
    for i, (prompt, completion) in enumerate(asked):
        each = {name: column[i] for name, column in columns.items()}
        total = sum(config.weights.get(name, 1.0) * value for name, value in each.items())
        if config.truncated == "zero" and completion.finish_reason != "stop":
            total = 0.0
        if not is_finite(total):
            raise RewardError(f"rewards must have a finite weighted sum, got {each} for row {prompt.number}")
        rollouts.append(Rollout(prompt.number, completion, each, total))
    return rollouts


def score_all(name: str, function: Reward, asked: Sequence[tuple[Prompt, Completion]]) -> list[float]:
    """What one function gives all answers; it gets copies, so that what it does to them reaches nobody else.

    Raises:
        RewardError: as `score`.
    """
    many, values = getattr(function, "many", None), []
    if many:
        rows = sorted({prompt.number for prompt, _ in asked})
        with _naming(f"reward {name!r} failed on the answers to rows {rows[0]} to {rows[-1]}"):
            values = list(many([_copied(*each) for each in asked]))
        if len(values) != len(asked):
            raise RewardError(f"reward {name!r} must give {len(asked)} values, got {len(values)}")
    found = []
    for i, (prompt, completion) in enumerate(asked):
        where, said = f"an answer to row {prompt.number}", f"the answer was {completion.text!r:.200}"
        with _naming(f"reward {name!r} failed on {where}", said):
            value = values[i] if many else function(*_copied(prompt, completion))
            shown = "" if is_finite(value) else " ".join(repr(value).split())
        if shown:
            raise RewardError(f"reward {name!r} must be a finite number, got {shown:.200} for {where}; {said}")
        found.append(float(value))
    return found


@contextmanager
def _naming(what: str, *more: str) -> Iterator[None]:
    """Makes whatever a reward function raises one sentence that names it; `sys.exit` as well."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise RewardError("; ".join([reason, *more])) from error


def _copied(prompt: Prompt, completion: Completion) -> tuple[list[dict], list[int], str, dict]:
    return copy.deepcopy(prompt.messages), list(completion.token_ids), completion.text, copy.deepcopy(prompt.row)


def equal_groups(rollouts: Sequence[Rollout], size: int) -> list[bool]:
    """For each prompt's `size` answers, whether they all earned the same."""
    groups = (rollouts[i : i + size] for i in range(0, len(rollouts), size))
    return [all(r.reward == group[0].reward for r in group) for group in groups]


def statistics_of(rollouts: Sequence[Rollout], size: int) -> dict[str, float]:
    """What the answers of a rollout were like, as a log has it.

    Returns:
        reward and reward_std (over all answers); reward_NAME of each function; length (tokens); truncated (share);
        equal_groups (share of prompts whose answers all earned the same).
    """
    totals = [r.reward for r in rollouts]
    found = {"reward": statistics.fmean(totals), "reward_std": statistics.pstdev(totals)}
    found |= {f"reward_{name}": statistics.fmean(r.rewards[name] for r in rollouts) for name in rollouts[0].rewards}
    found["length"] = statistics.fmean(len(r.completion.token_ids) for r in rollouts)
    found["truncated"] = statistics.fmean(r.is_truncated for r in rollouts)
    found["equal_groups"] = statistics.fmean(equal_groups(rollouts, size))
    return {name: round(value, 6) for name, value in found.items()}


# What stops a run between two steps, in all processes: rewards that are no numbers, a server that is down.
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
        asked, rollouts: the prompts and answers of it, `num_generations` answers to each prompt.
    """

    def __init__(
        self, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], sampler: Sampler, config: TrainConfig,
        policy: PolicyConfig, step: Step, reference: Callable[[dict, float], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.prompts, self.rewards, self.sampler, self.config, self.policy = prompts, rewards, sampler, config, policy
        self.step, self.reference = step, reference
        self.world, self.updates = Ranks.current(), policy.updates_per_rollout
        self.steps_per_epoch = -(-len(prompts) // config.batch_size) * self.updates
        self.found: dict[str, float] = {}
        self.asked: list[Prompt] = []
        self.rollouts: list[Rollout] = []
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
        mine, rollouts, failure = prompts[world.rank * share :][:share], [], None
        try:
            if mine:
                seed = step_seed("rollout", self.config.seed, number, world.rank)
                answers = self.sampler.sample([p.ids for p in mine], seed=seed, num_generations=size,
                                              temperature=self.policy.temperature)  # fmt: skip
                sampled = time.process_time()
                rollouts = score(self.rewards, mine, answers, self.policy)
        except STOPS as error:
            failure = error
        failures = [f for f in world.gather(failure) if f]
        if failures:
            raise failures[0]
        rollouts = [r for part in world.gather(rollouts) for r in part]
        self.found = statistics_of(rollouts, size)
        self.found["rollout_seconds"] = round(sampled - start, 3) if mine else 0.0
        self.found["reward_seconds"] = round(time.process_time() - sampled, 3) if mine else 0.0
        self.asked, self.rollouts = prompts, rollouts
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
        if needs_old or is_plain:
            kl = 0.0 if is_plain else self._kl(every, parts, mine, len(kept))
            known = "advantages", penalised_advantages(rewards, kl, policy.beta, size)
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
        size, budget = self.policy.num_generations, self.config.tokens_per_micro_batch
        lengths = [len(r.completion.prompt_ids) + len(r.completion.token_ids) for r in kept]
        groups = [lengths[i : i + size] for i in range(0, len(kept), size)]
        if self.config.packing and budget is not None and max(map(sum, groups)) > budget:
            return first_fit_decreasing(lengths, budget), False
        sizes = list(map(sum if self.config.packing else max, groups))
        budget = budget if self.config.packing else budget and budget // size  # a rectangle has a row for each answer
        parts = split_step(sizes, packing=self.config.packing, budget=budget, rows=self.config.micro_batch_size)
        return [[g * size + i for g in part for i in range(size)] for part in parts], True

    def _batch(self, rollouts: list[Rollout], extra: int) -> dict[str, Tensor]:
        """The documents of some answers, with the sampler's log-probabilities, and how many answers they stand for."""
        examples = [r.example(self.policy.truncated) for r in rollouts]
        sees_shared = causal_model(self.step.model).config._attn_implementation == PACKED
        if self.config.packing and sees_shared and next(self.step.parameters()).device.type == "cpu":
            from qftlab.model.cpu import pack_answers

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
