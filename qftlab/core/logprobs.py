"""Log-probabilities and entropy, in nats and fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label given what precedes it.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, unshifted, −100 where not wanted.

    Returns:
        (B, T − 1) fp32, 0 where not wanted; column t belongs to the label at t + 1.

    Raises:
        ValueError: if the shapes disagree.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} like logits, got {tuple(labels.shape)}")
    targets = labels[:, 1:]
    scores = logits[:, :-1].float().log_softmax(-1)
    picked = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets == -100, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, in nats: (…, V) → (…)."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)
