"""What RLOO trains and what it is held to: the clipped policy gradient of answers, and the frozen reference."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from qftlab.maths.losses import clipped_policy_loss, is_clipped, kl_estimate, leave_one_out_advantages, sum_by_document
from qftlab.model.loading import module_mode
from qftlab.train.policy_config import PolicyConfig
from qftlab.train.step import IGNORED, Step


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
            groups = (rewards - self.config.beta * kl).view(-1, self.config.num_generations)
            advantages = leave_one_out_advantages(groups).flatten()
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


class PolicyReference:
    """What the KL penalty holds the policy to: its trainable weights as they were, or the model without adapters.

    Only trained weights are copied, so that adapters need no second model.

    Args:
        step: of the policy, before its first update.
        which: "start" or "base".

    Raises:
        ValueError: for "base" without adapters.
    """

    def __init__(self, step: Step, which: str) -> None:
        if which == "base" and not hasattr(step.model, "disable_adapter"):
            raise ValueError("policy.reference must be start without adapters, got base: add some (lora.rank 16)")
        self.step, self.which = step, which
        named = step.named_parameters() if which == "start" else ()
        self.frozen = {name: p.detach().clone() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], temperature: float) -> Tensor:
        """Log-probabilities of the labels, (B, T − 1) fp32 nats, 0 where there is none."""
        arguments = {**batch, "want": "logprobs", "temperature": temperature}
        is_base = self.which == "base"
        with module_mode(self.step, False), self.step.model.disable_adapter() if is_base else nullcontext():
            if is_base:
                return self.step(**arguments)
            return torch.func.functional_call(self.step, self.frozen, (), arguments)


def count_answers(batch: Mapping[str, Tensor]) -> int:
    """Answers a batch stands for: its own, and those left out because they move nothing."""
    return int(batch["stands_for"])
