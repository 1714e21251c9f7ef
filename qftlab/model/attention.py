"""Packed attention for transformers models: documents of one row never see each other, and no padding is computed.

Registered with transformers under the name "packed". A batch that carries `cu_seq_lens_q` (the cumulative document
lengths, the keyword transformers hands to FlashAttention) is attended document by document; a batch without it takes
transformers' own `sdpa` path, so one loaded model serves training, scoring and generation.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"
# Documents are grouped with others of about their length: a group is closed when padding it would waste this share.
MAX_WASTE = 0.3


def register_packed_attention() -> str:
    """Registers "packed" with transformers (again is harmless) and returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _lazy_mask)
    return NAME


def _lazy_mask(*args, **kwargs) -> Tensor:
    """An empty tensor that builds the sdpa mask when asked: a packed row never asks for T x T booleans."""
    marker = torch.empty(0)
    marker.build = cache(lambda: sdpa_mask(*args, **kwargs))
    return marker


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        module: the attention module (its `scaling` and grouping are used).
        query: (1, H, T, d); key, value: (1, H_kv, T, d), documents one after the other.
        attention_mask: ignored where `cu_seq_lens_q` is given, passed to `sdpa` otherwise.
        kwargs: `cu_seq_lens_q` (N + 1,) int32 selects the packed path; `scaling`, `dropout` as in transformers.

    Returns:
        (1, T, H, d) and None (no attention weights).

    Raises:
        ValueError: if a packed batch has more than one row, or carries a cache.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if cu_seq_lens is None:
        attention_mask = attention_mask.build() if hasattr(attention_mask, "build") else attention_mask
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed attention takes one row and no cache, got query {tuple(query.shape)}, key {tuple(key.shape)}: "
            "leave out cu_seq_lens_q for padded batches, and use_cache=False for packed ones"
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    tables, back = _plan(cu_seq_lens, q.device)
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    pieces = []
    for rows in tables:
        qs, ks, vs = (x[rows.clamp(min=0)].transpose(1, 2) for x in (q, k, v))  # (n, H, t, d)
        if groups > 1:
            ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        # Right padding under a causal mask: a real query never looks at a padded key, so no mask is needed.
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=kwargs.get("scaling"), dropout_p=dropout)
        pieces.append(y.transpose(1, 2)[rows >= 0])
    return torch.cat(pieces)[back].unsqueeze(0), None


def _plan(cu_seq_lens: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Groups of documents, each an (n, t) table of token positions (−1 where padded), and the way back to the row.

    Kept on the tensor: the layers of one pass share it.
    """
    plan = getattr(cu_seq_lens, "_packed_plan", None)
    if plan is None:
        bounds = cu_seq_lens.tolist()
        spans = sorted(zip(bounds[:-1], bounds[1:], strict=True), key=lambda s: s[1] - s[0])
        tables, group, used = [], [], 0
        for i, span in enumerate(spans):
            group.append(span)
            used += span[1] - span[0]
            longest = spans[i + 1][1] - spans[i + 1][0] if i + 1 < len(spans) else 0
            if not longest or used < (1 - MAX_WASTE) * longest * len(group):
                tables.append(_table(group))
                group, used = [], 0
        back = torch.argsort(torch.cat([t[t >= 0] for t in tables]))
        plan = cu_seq_lens._packed_plan = [t.to(device) for t in tables], back.to(device)
    return plan


def _table(spans: list[tuple[int, int]]) -> Tensor:
    width = max(b - a for a, b in spans)
    starts = torch.tensor([a for a, _ in spans]).unsqueeze(1)
    lengths = torch.tensor([b - a for a, b in spans]).unsqueeze(1)
    offsets = torch.arange(width).unsqueeze(0)
    return torch.where(offsets < lengths, starts + offsets, -1)
