"""Attention of many rows over a prompt they share and over what each of them has written since."""

from __future__ import annotations

import torch
from torch import Tensor

from qftlab.generate.cache import Prefix


def attend_shared(
    q: Tensor, keys: Tensor, values: Tensor, prompt_keys: Tensor, prompt_values: Tensor, prefix: Prefix, scale: float
) -> Tensor:
    """Softmax attention over prompt and continuation, with the prompt's keys read once for all its rows.

    Two softmaxes are taken and weighed by their denominators, which gives the one softmax over both parts.

    Args:
        q: (B, H_kv, G, d), the G queries that share a key head.
        keys, values: (B, H_kv, L, d) of each row's own tokens.
        prompt_keys, prompt_values: (P, H_kv, L', d) of the prompts.
        prefix: whose rows are whose.
        scale: of the scores.

    Returns:
        (B, H_kv, G, d).

    Source: the split is that of FlashDecoding (Dao et al. 2023); sharing it among rows, Juravsky et al. 2024.
    """
    own, own_lse = _attend(q, keys, values, None, scale)
    grouped = prefix.group(q).transpose(1, 2)  # (P, H_kv, n, G, d)
    shared, lse = _attend(grouped.flatten(2, 3), prompt_keys, prompt_values, prefix.mask, scale)
    shape = grouped.shape[2:4]
    shared = prefix.ungroup(shared.unflatten(2, shape).transpose(1, 2))  # (B, H_kv, G, d)
    lse = prefix.ungroup(lse.unflatten(2, shape).transpose(1, 2))  # (B, H_kv, G)
    share = torch.sigmoid(lse - own_lse).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, shared, share)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention (.., T, d) and the logarithm of its denominators (.., T), in nats."""
    if q.device.type == "cpu":  # the kernel behind sdpa, which also returns the denominators
        mask = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return _attend_plainly(q, k, v, mask, scale)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)
