"""RLOO: rollouts → advantages against the other answers to the same prompt → the clipped policy gradient."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from qftlab.decoding.decoder import best_layout
from qftlab.maths.losses import clipped_policy_loss, is_clipped, kl_estimate, penalised_advantages, sum_by_document
from qftlab.model.head import context_length
from qftlab.rows.batches import Example
from qftlab.rows.examples import load_wanted
from qftlab.settings import PolicyConfig, RLOOConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, read_state, training_identity, weights_digest
from qftlab.train.distributed import Ranks, per_process, wrap
from qftlab.train.loop import TrainResult, checkpoints_at, train
from qftlab.train.meter import samples_of, table_of
from qftlab.train.rollouts import (
    STOPS,
    ModelSampler,
    Prompt,
    Reward,
    RolloutSource,
    Sampler,
    encode_prompts,
    score,
    statistics_of,
)
from qftlab.train.run import RunFolder, Stage, load_extended, run_stage
from qftlab.train.step import IGNORED, Frozen, Step


class PolicyStep(nn.Module):
    """The clipped policy gradient of a batch of answers.

    Args:
        model: as `Step` takes it.
        config: temperature, KL penalty and clipping.

    Attributes:
        seen: sums over each forward pass since the last `take`: tokens, entropy, k1 and k3 (nats), distance from the
            sampler and its greatest, answers, and those of them that were clipped.
    """

    def __init__(self, model: nn.Module, config: PolicyConfig) -> None:
        super().__init__()
        self.step, self.config = Step(model), config
        self.seen: deque[Tensor] = deque(maxlen=4096)  # nobody takes them where nothing is logged

    def forward(
        self,
        labels: Tensor,
        num_tokens,
        stands_for: Tensor,
        rewards: Tensor | None = None,
        advantages: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        **inputs,
    ) -> Tensor:
        """The sum of the answers' losses ÷ `num_tokens`, the answers of the whole optimizer step; a scalar.

        Args:
            labels: of prompts with their answers, answers trained.
            num_tokens: answers of the whole step (the loop's name for what is counted).
            stands_for: how many answers this batch stands for; see `count_answers`.
            rewards: (N,) of whole groups side by side, where advantages are formed here.
            advantages: (N,), where they are known.
            old_logprobs: (N,) of the answers when they were sampled; by default the policy's own of now.
            ref_logprobs: (B, T − 1) the reference's, token by token; needed for a KL penalty.
            sampler_logprobs: (B, T − 1) the sampler's.
            inputs: what the backbone takes.
        """
        tokens, entropy = self.step(
            labels=labels, want="logprobs+entropy", temperature=self.config.temperature, **inputs
        )
        bounds = inputs.get("cu_seq_lens_q")
        logprobs = sum_by_document(tokens, bounds)
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        if advantages is None:
            kl = old - sum_by_document(ref_logprobs, bounds) if self.config.beta else 0.0
            advantages = penalised_advantages(rewards, kl, self.config.beta, self.config.num_generations)
        losses = clipped_policy_loss(logprobs, old, advantages, epsilon=self.config.epsilon)
        clipped = is_clipped(logprobs.detach(), old, advantages, epsilon=self.config.epsilon)
        self._note(tokens.detach(), labels[:, 1:] != IGNORED, entropy, ref_logprobs, sampler_logprobs, clipped)
        return losses.sum() / num_tokens

    @torch.no_grad()
    def _note(self, tokens, kept, entropy, ref_logprobs, sampler_logprobs, clipped) -> None:
        zeros = torch.zeros_like(tokens)
        kinds = [zeros if ref_logprobs is None else kl_estimate(tokens, ref_logprobs, kind) for kind in ("k1", "k3")]
        gap = zeros if sampler_logprobs is None else ((tokens - sampler_logprobs) * kept).abs()
        sums = [kept.sum(), entropy.sum(), *(k.sum() for k in kinds), gap.sum(), gap.max()]
        self.seen.append(torch.stack([*sums, clipped.new_tensor(len(clipped), dtype=torch.int64), clipped.sum()])
                         .double())  # fmt: skip

    def take(self) -> dict[str, float]:
        """Means over the answers seen since the last call, in this process; empty without any.

        Returns:
            entropy, kl and kl_k3 (nats a token; with a reference), clip_fraction (of the answers), and sampler_gap and
            sampler_gap_max, |log-probability here − that of the sampler| a token.
        """
        if not self.seen:
            return {}
        values = torch.stack(list(self.seen))
        self.seen.clear()
        count, entropy, k1, k3, gap, _, answers, clipped = values.sum(0).tolist()
        count, greatest = max(count, 1.0), values[:, 5].max().item()
        found = {"entropy": entropy / count, "clip_fraction": clipped / answers, "sampler_gap": gap / count,
                 "sampler_gap_max": greatest}  # fmt: skip
        if self.config.beta:
            found |= {"kl": k1 / count, "kl_k3": k3 / count}
        return {name: round(value, 9) for name, value in found.items()}


def count_answers(batch: Mapping[str, Tensor]) -> int:
    """Answers a batch stands for: its own, and those left out because they move nothing."""
    return int(batch["stands_for"])


log = logging.getLogger(__name__)


def fit_policy(
    model,
    tokenizer,
    rows: Sequence[dict],
    rewards: Reward | Mapping[str, Reward],
    config: TrainConfig,
    policy: PolicyConfig | None = None,
    *,
    max_length: int | None = None,
    thinking: bool | None = None,
    held_out_rows: Sequence[dict] = (),
    **options,
) -> TrainResult:
    """Trains `model` in place by RLOO: what a notebook calls.

    Args:
        model, tokenizer: as in `fit_rows`.
        rows: whose prompts are answered; see `encode_prompts`.
        rewards: a function f(prompt, completion_ids, text, row) → number, or several by name; see
            `qftlab.train.rollouts.score`.
        config: the settings of the loop; its batch counts prompts.
        policy: how answers are sampled and what is minimised.
        max_length: the most tokens of a prompt, by default what the model's context leaves.
        thinking: what prompts are asked with, as in `render_prompt`.
        held_out_rows: rows whose mean reward under greedy decoding is measured.
        options: `sampler` (a server in place of the model), and `on_log`, `progress`, `checkpoints` and `resume` as in
            `fit_rows`; with `resume` the model given must be the one the run started from. `on_log` also gets what
            `statistics_of` and `PolicyStep.take` return, seconds of sampling and scoring, and `answers` so far in place
            of trained_tokens; {step, samples} where samples are asked for; and held_out_reward with held_out_loss,
            which is its negative.

    Returns:
        Losses, which are about 0 as long as a rollout serves one update: watch the reward.

    Raises:
        ValueError: for rows without a prompt, settings that do not fit one another, or a checkpoint that is damaged or
            of another run.
        RewardError: naming function and row. As with a server that is down, the run has then been saved where there are
            checkpoints, and can be resumed.
        NonFiniteLoss, OSError: as `train`.
    """
    policy = policy or PolicyConfig()
    prompts, held_out = prompts_for(model, tokenizer, policy, max_length, rows, held_out_rows, thinking=thinking)
    functions = dict(rewards) if isinstance(rewards, Mapping) else {getattr(rewards, "__name__", "reward"): rewards}
    return fit_prompts(model, tokenizer, prompts, functions, config, policy, held_out=held_out, **options)


def prompts_for(
    model, tokenizer, policy: PolicyConfig, max_length: int | None, *sets, sources=(), thinking: bool | None = None
) -> list[list[Prompt]]:
    """Rows of each set as prompts that leave room for an answer; an empty set stays empty."""
    context = context_length(model)
    room = None if context is None else context - policy.max_new_tokens
    limit = min((n for n in (max_length, room) if n is not None), default=None)
    return [encode_prompts(tokenizer, rows, max_length=limit, thinking=thinking, sources=files) if rows else []
            for rows, files in zip_longest(sets, sources)]  # fmt: skip


def fit_prompts(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    config: TrainConfig,
    policy: PolicyConfig,
    *,
    held_out: Sequence[Prompt] = (),
    sampler: Sampler | None = None,
    on_log: Callable[[dict], None] | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    **options,
) -> TrainResult:
    """Trains `model` in place on prompts that are tokens already. Arguments as in `fit_policy`; raises what it does."""
    _check(config, policy, rewards, checkpoints is not None, bool(held_out))
    bare = PolicyStep(model, policy)
    reference = Frozen(bare.step, policy.reference) if policy.beta else None
    facts = model, config, policy, prompts, held_out, rewards
    checkpoints = checkpoints_at(checkpoints, config, policy_identity, *facts)
    if sampler is None:
        layout = keep_layout_(checkpoints, model) if checkpoints else None
        sampler = ModelSampler(model, tokenizer, policy, layout)
    step = wrap(bare, config.sharding, config.precision)
    source = RolloutSource(prompts, rewards, sampler, per_process(config), policy, bare.step, reference)
    measure = partial(held_out_rewards, held_out, source) if held_out else None
    return train(step, source, config, count=count_answers, unit="answers", take=lambda: source.found | bare.take(),
                 held_out=measure, on_log=partial(_note, source, on_log) if on_log else None, headline=headline,
                 checkpoints=checkpoints, saves_on=STOPS, **options)  # fmt: skip


def _note(source: RolloutSource, on_log: Callable[[dict], None], record: dict) -> None:
    """Hands a record on, and samples where they are due."""
    on_log(record)
    every, size = source.policy.sample_every, source.policy.num_generations
    if "reward" in record and every and record["step"] % every == 0:
        samples = samples_of(source.rollouts, source.asked, size)
        on_log({"step": record["step"], "samples": samples})
        log.info("samples of step %d\n%s", record["step"], table_of(samples))


def headline(record: dict) -> str:
    """What a log should say first: the reward, because the loss is about 0 whatever is learned."""
    if "held_out_reward" in record:
        return f"held-out reward {record['held_out_reward']:.3f}, length {record['held_out_length']:.1f}"
    return f"reward {record['reward']:.3f}, length {record['length']:.1f}, entropy {record['entropy']:.2f}"


def held_out_rewards(prompts: Sequence[Prompt], source: RolloutSource) -> tuple[float, dict]:
    """The mean reward of a greedy answer to each prompt, negated, and its figures by `statistics_of` as held_out_…."""
    device = next(source.step.parameters()).device
    with torch.autocast(device.type, enabled=False):  # as rollouts are sampled
        answers = source.sampler.sample([p.ids for p in prompts], seed=0, temperature=0.0, num_generations=1)
    found = statistics_of(score(source.rewards, prompts, answers, source.policy), 1)
    kept = {f"held_out_{name}": value for name, value in found.items() if name not in ("equal_groups", "reward_std")}
    return -found["reward"], kept


def _check(config: TrainConfig, policy: PolicyConfig, rewards: Mapping, is_saved: bool, is_measured: bool) -> None:
    """Refuses what does not go together."""
    if not rewards or set(policy.weights) - set(rewards):
        unknown = sorted(set(policy.weights) - set(rewards))
        raise ValueError(f"policy.weights must name rewards among {', '.join(rewards) or '(none)'}, got {unknown}")
    updates = policy.updates_per_rollout
    for name in ("save_every", "eval_every"):
        is_used = is_saved and (name == "save_every" or is_measured)
        if is_used and getattr(config, name) % updates:
            raise ValueError(
                f"{name} must be a multiple of updates_per_rollout, got {getattr(config, name)} and {updates}: a run "
                "can only be resumed where new answers are sampled"
            )


def policy_identity(
    model, config: TrainConfig, policy: PolicyConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt], rewards
) -> dict:
    """What decides the result of RLOO, the weights it starts from aside; of reward functions their names."""
    sets = ([Example(p.ids, [False] * len(p.ids)) for p in part] for part in (prompts, held_out))
    neutral = ("rollout_batch_size", "sample_every")
    settings = {name: value for name, value in asdict(policy).items() if name not in neutral}
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    start = weights_digest(trained) if policy.beta and policy.reference == "start" else "none"
    return training_identity(model, config, *sets) | {"policy": settings, "rewards": list(rewards), "reference": start}


def keep_layout_(checkpoints: Checkpoints, model) -> str:
    """Puts the layout that rollouts are decoded in into the checkpoints' identity, and returns it.

    Layouts differ in the last bits, and so in what is sampled: a run that is resumed keeps the one it began with, also
    on a machine that is faster with another.
    """
    if "layout" not in checkpoints.identity:
        last = checkpoints.last()
        recorded = read_state(last)["identity"].get("layout") if last else None
        layouts = Ranks.current().gather(recorded or best_layout(model))
        checkpoints.identity["layout"] = layouts[0]
    return checkpoints.identity["layout"]


def rloo(config: RLOOConfig, *, progress: bool = False) -> Path:
    """Trains from files to files; the same under torchrun and `accelerate launch`, where one process writes.

    Args:
        config: model, data and settings; `resume` goes on with a run that was killed or interrupted.
        progress: whether to draw a bar.

    Returns:
        The run's folder, as `sft` leaves it (checkpoints under checkpoints/rloo); metrics.jsonl holds the samples too.

    Raises:
        FileNotFoundError, ValueError, RewardError, ServerError, OSError: as `sft` and `fit_policy`. A reward that fails
            or a server that is down leaves a run without a model, saved at its last step: resume it.
    """
    return run_stage("rloo", config, prepare, progress)


def prepare(config: RLOOConfig) -> Stage:
    """Reads prompts, rewards and model."""
    from qftlab.rows.countdown import fresh_problems
    from qftlab.train.reward import check_columns, named_rewards

    rows, sources = load_wanted(config.data, columns=config.columns)
    rows = rows or fresh_problems(config.problems, config.train.seed)
    held_out_rows, held_out_sources = load_wanted(config.held_out, columns=config.columns)
    check_columns(config.rewards, rows, sources)
    check_columns(config.rewards, held_out_rows, held_out_sources)
    model, tokenizer = load_extended(config)
    prompts, held_out = prompts_for(model, tokenizer, config.policy, config.max_length, rows, held_out_rows,
                                    sources=(sources, held_out_sources))  # fmt: skip
    rewards = named_rewards(config.rewards, tokenizer, config.reward_model, config.device)

    sampler = None
    if config.server.url:
        from qftlab.remote.sampler import ServerSampler

        sampler = ServerSampler(config.server, model, tokenizer, config.policy)

    def fit(run: RunFolder, **options) -> TrainResult:
        return fit_prompts(model, tokenizer, prompts, rewards, config.train, config.policy, held_out=held_out,
                           sampler=sampler, **options)  # fmt: skip

    identity = policy_identity(model, config.train, config.policy, prompts, held_out, rewards)
    begin = (lambda checkpoints: None) if config.server.url else (lambda checkpoints: keep_layout_(checkpoints, model))
    return Stage(model, tokenizer, identity, fit, begin=begin)
