"""Rollouts: prompts → sampled answers → rewards; a function of the weights, the seed and the number of the rollout."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qftlab.generate.decoder import Decoder, bump_weights_version_
from qftlab.generate.engine import Completion, generate
from qftlab.generate.layouts import choose_layout
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.batches import Example
from qftlab.rows.chat import render_prompt, row_to_messages
from qftlab.rows.schemas import convert_row
from qftlab.train.policy_config import PolicyConfig

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
        layout: of the decoder, as `Layout` spells it; by default the one that `choose_layout` finds.
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
            self.layout = self.layout or str(choose_layout(self.model))
            self._decoder = Decoder(self.model, layout=self.layout)
            log.info("rollouts are decoded in the layout %s, a snapshot of %.0f MB", self.layout,
                     self._decoder.snapshot_bytes / 1e6)  # fmt: skip
        elif not self._decoder.layout.is_plain:
            bump_weights_version_(self.model)
            self._decoder.refresh_()
        return self._decoder


def encode_prompts(tokenizer, rows: Sequence[dict], *, max_length: int | None = None) -> list[Prompt]:
    """The prompts of rows; what answers the rows hold is not looked at.

    Args:
        tokenizer: one with a chat template.
        rows: with "prompt" (text or messages), "messages" (up to the last answer), or "instruction" and "input";
            preference rows and Countdown problems as well.
        max_length: the most tokens of a prompt; longer ones are left out and counted.

    Raises:
        ValueError: if a row is none of these or cannot be rendered (its number is named), or no prompt is left.
    """
    prompts, long = [], []
    for number, row in enumerate(rows, 1):
        try:
            messages, row = _messages(dict(row), f"row {number}")
            ids = render_prompt(tokenizer, messages)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if max_length is not None and len(ids) > max_length:
            long.append(number)
        else:
            prompts.append(Prompt(messages, ids, row, number))
    if not prompts:
        raise ValueError(f"rows must hold a prompt of at most {max_length} tokens, got {len(rows)} rows without one")
    if long:
        log.warning("%d of %d prompts left out: longer than %s tokens (row %s%s)", len(long), len(rows), max_length,
                    ", ".join(map(str, long[:5])), ", …" if long[5:] else "")  # fmt: skip
    return prompts


def _messages(row: dict, where: str) -> tuple[list[dict], dict]:
    """The turns before the answer, and the row in the lab's form."""
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}], row
    if not {"prompt", "messages", "instruction"} & row.keys():
        row = convert_row(row, where)
    messages = list(row["prompt"]) if "prompt" in row else row_to_messages(row)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages, row


def rollout_seed(seed: int, number: int, rank: int = 0) -> int:
    """What the answers of a rollout are drawn from."""
    return int.from_bytes(hashlib.sha256(f"rollout {seed} {number} {rank}".encode()).digest()[:7], "big")


def score(
    rewards: Mapping[str, Reward], prompts: Sequence[Prompt], completions: Sequence[Completion], config: PolicyConfig
) -> list[Rollout]:
    """Answers with their rewards.

    Args:
        rewards: by name. A function with an attribute `many` is called once, as `many([(prompt, completion_ids, text,
            row), …])`, and returns a list: the way to batch a reward model.
        prompts: P of them.
        completions: G to each prompt, side by side.
        config: weights, and what a truncated answer earns.

    Raises:
        RewardError: naming function and row, for one that fails or gives nan, infinity, or no number.
    """
    size = len(completions) // len(prompts)
    asked = [(prompts[i // size], c) for i, c in enumerate(completions)]
    arguments = [(p.messages, c.token_ids, c.text, p.row) for p, c in asked]
    columns = {name: _column(name, function, arguments, asked) for name, function in rewards.items()}
    rollouts = []
    for i, (prompt, completion) in enumerate(asked):
        each = {name: column[i] for name, column in columns.items()}
        total = sum(config.weights.get(name, 1.0) * value for name, value in each.items())
        if config.truncated == "zero" and completion.finish_reason != "stop":
            total = 0.0
        rollouts.append(Rollout(prompt.number, completion, each, total))
    return rollouts


def _column(name: str, function: Reward, arguments: list[tuple], asked: list[tuple]) -> list[float]:
    """What one function gives all answers."""
    if many := getattr(function, "many", None):
        try:
            values = list(many(arguments))
        except Exception as error:
            rows = sorted({prompt.number for prompt, _ in asked})
            raise RewardError(f"reward {name!r} failed on the answers to rows {rows[0]} to {rows[-1]}: "
                              f"{type(error).__name__}: {error}") from error  # fmt: skip
        if len(values) != len(arguments):
            raise RewardError(f"reward {name!r} must give {len(arguments)} values, got {len(values)}")
    else:
        values = [_one(name, function, each, prompt) for each, (prompt, _) in zip(arguments, asked, strict=True)]
    for value, (prompt, completion) in zip(values, asked, strict=True):
        if not _is_number(value):
            raise RewardError(f"reward {name!r} must be a finite number, got {value!r} for an answer to row "
                              f"{prompt.number}: {completion.text!r:.200}")  # fmt: skip
    return list(map(float, values))


def _one(name: str, function: Reward, arguments: tuple, prompt: Prompt) -> float:
    try:
        return function(*arguments)
    except Exception as error:
        what = f"{type(error).__name__}: {error}; the answer was {arguments[2]!r:.200}"
        raise RewardError(f"reward {name!r} failed on an answer to row {prompt.number}: {what}") from error


def _is_number(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


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


def samples_of(rollouts: Sequence[Rollout], prompts: Sequence[Prompt], size: int, count: int = 4) -> list[dict]:
    """The best and the worst answer to each of the first few prompts: row, prompt, text, reward, finish_reason."""
    kept = []
    for i, prompt in enumerate(prompts[:count]):
        group = sorted(rollouts[i * size : (i + 1) * size], key=lambda r: -r.reward)
        for rollout in (group[0], group[-1]):
            answer = rollout.completion
            kept.append({"row": prompt.number, "prompt": prompt.messages[-1]["content"], "text": answer.text,
                         "reward": rollout.reward, "finish_reason": answer.finish_reason})  # fmt: skip
    return kept


def table_of(samples: Sequence[dict]) -> str:
    """Samples as lines of text."""
    lines = (f"  row {s['row']:<6} {s['reward']:7.3f}  {s['prompt']!r:.60}  {s['text']!r:.100}" for s in samples)
    return "\n".join(["  row        reward  prompt, answer", *lines])
