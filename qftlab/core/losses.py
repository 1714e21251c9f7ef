"""Losses of whole batches, in nats."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def masked_cross_entropy(logits: Tensor, labels: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """Summed surprise of the trained tokens, divided by their number; position t is predicted from t − 1.

    Args:
        logits: (B, T, V), any float type; the sum is taken in fp32.
        labels: (B, T) int64, unshifted, −100 where not trained.
        num_tokens: the divisor, if this is a part of a larger step: the trained tokens of the *whole* step.

    Returns:
        A scalar, in nats per token.

    Raises:
        ValueError: if the shapes disagree, or nothing is trained and no `num_tokens` is given.

    Source: transformers' `ForCausalLMLoss`, with which it agrees to 1e-6 in fp32.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} like logits, got {tuple(labels.shape)}")
    targets = labels[:, 1:].reshape(-1)
    if num_tokens is None:
        num_tokens = int((targets != -100).sum())
        if not num_tokens:
            raise ValueError("labels must hold at least one trained token after the first position, got only -100")
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum") / num_tokens
