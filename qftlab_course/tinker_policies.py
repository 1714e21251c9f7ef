"""DPO and RLOO on Tinker: the losses are the library's; the service gives log-probabilities and takes gradients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from qftlab.decoding.engine import Completion
from qftlab.maths.losses import dpo_loss, leave_one_out_advantages, preference_accuracy
from qftlab.remote.tinker import TinkerConfig, check_moved, datum, result_of
from qftlab.rows.batches import batches
from qftlab.rows.examples import Pair, documents
from qftlab.settings import PolicyConfig
from qftlab.train.rollouts import Prompt, score
from qftlab_course.asking import seed_of
from qftlab_course.tinker_asking import sampled

log = logging.getLogger(__name__)


def answers_logprobs(client, pairs: Sequence[Pair]) -> torch.Tensor:
    """Of the answers of pairs as the weights are now, (P, 2) chosen and rejected, in nats, summed over tokens."""
    data = [datum(example, 1) for example in documents(pairs)]
    found = result_of(client.forward(data, "cross_entropy")).loss_fn_outputs
    sums = [one["logprobs"].to_torch() @ d.loss_fn_inputs["weights"].to_torch()
            for one, d in zip(found, data, strict=True)]  # fmt: skip
    return torch.stack(sums).view(-1, 2)


def train_pairs(client, pairs: Sequence[Pair], config: TinkerConfig, beta: float = 0.1) -> list[float]:
    """DPO against the weights as they are before the first step; the mean loss of each epoch, in nats a pair.

    The loss is taken here and its gradient sent back, which costs a forward pass more a step.

    Raises:
        ValueError: if the log-probabilities have not moved at all.
        ServerError: as `result_of`.
    """
    from tinker import types

    reference, losses = answers_logprobs(client, pairs), []

    def loss_of(numbers: list[int]):
        def loss(data, logprobs):
            sums = [one @ d.loss_fn_inputs["weights"].to_torch() for one, d in zip(logprobs, data, strict=True)]
            chosen, rejected = torch.stack(sums).view(-1, 2).T
            ref_chosen, ref_rejected = reference[numbers].T
            each = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
            margins = chosen - ref_chosen - rejected + ref_rejected
            return each.mean(), {"accuracy:mean": preference_accuracy(margins).item()}

        return loss

    for epoch in range(config.epochs):
        total = 0.0
        for numbers in batches(len(pairs), batch_size=config.batch_size, seed=config.seed, epoch=epoch):
            data = [datum(example, 1) for example in documents([pairs[i] for i in numbers])]
            waiting = client.forward_backward_custom(data, loss_of(numbers))
            update = client.optim_step(types.AdamParams(learning_rate=config.lr))
            total += result_of(waiting).metrics["loss:sum"] * len(numbers)
            result_of(update)
        losses.append(total / len(pairs))
        log.info("epoch %d/%d: loss %.4f nats a pair", epoch + 1, config.epochs, losses[-1])
    check_moved([float(reference.sum()), float(answers_logprobs(client, pairs).sum())])
    return losses


def answers(client, tokenizer, prompts: Sequence[Prompt], policy: PolicyConfig, seed: int) -> list[Completion]:
    """Completions of prompts by the weights as they are, `num_generations` to each, at temperature 1."""
    sampler, seeds = client.save_weights_and_get_sampling_client(), [seed_of(seed, prompt.number) for prompt in prompts]
    found = sampled(result_of(sampler), tokenizer, [prompt.ids for prompt in prompts], seeds, policy.num_generations,
                    max_tokens=policy.max_new_tokens, temperature=1.0)  # fmt: skip
    return [Completion(ids, list(one.tokens), text, one.stop_reason, list(one.logprobs)) for ids, one, text in found]


def policy_datum(completion: Completion, weight: float):
    """A completion for importance sampling: each of its tokens with the log-probability it was sampled at, and one
    weight, its advantage ÷ the completions of the step; nothing for the prompt."""
    from tinker import types

    before = len(completion.prompt_ids) - 1
    ids, count = [*completion.prompt_ids, *completion.token_ids], len(completion.token_ids)
    inputs = {"target_tokens": ids[1:], "logprobs": [0.0] * before + completion.logprobs,
              "advantages": [0.0] * before + [weight] * count}  # fmt: skip
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)


def train_policy(
    client, tokenizer, prompts: Sequence[Prompt], rewards: Mapping, config: TinkerConfig, policy: PolicyConfig
) -> list[float]:
    """RLOO: each answer against the mean of the others to its prompt; the mean reward of each epoch.

    One step a rollout, so that importance sampling is the policy gradient. There is no KL penalty here: `policy.beta`
    must be 0.

    Raises:
        ValueError: for a beta or temperature that is not had here.
        ServerError: as `result_of`.
    """
    from tinker import types

    if policy.beta or policy.temperature != 1:
        raise ValueError(f"beta must be 0 and temperature 1 on Tinker, got {policy.beta} and {policy.temperature}")
    means, number = [], 0
    for epoch in range(config.epochs):
        seen = []
        for numbers in batches(len(prompts), batch_size=config.batch_size, seed=config.seed, epoch=epoch):
            asked, number = [prompts[i] for i in numbers], number + 1
            completions = answers(client, tokenizer, asked, policy, config.seed + number)
            earned = torch.tensor([one.reward for one in score(rewards, asked, completions, policy)])
            seen += earned.tolist()
            weights = leave_one_out_advantages(earned.view(-1, policy.num_generations)).flatten() / len(completions)
            data = [policy_datum(c, w) for c, w in zip(completions, weights.tolist(), strict=True) if w]
            if not data:
                log.info("step %d: all answers to each prompt earn the same, and nothing is learned", number)
                continue
            waiting = client.forward_backward(data, "importance_sampling")
            update = client.optim_step(types.AdamParams(learning_rate=config.lr))
            result_of(waiting)
            result_of(update)
            log.info("step %d: mean reward %.3f", number, earned.mean())
        means.append(sum(seen) / len(seen))
        log.info("epoch %d/%d: mean reward %.4f", epoch + 1, config.epochs, means[-1])
    return means
