"""Packed attention for transformers models: documents of one row never see each other, and no padding is computed.

Registered with transformers under the name "packed". A batch that carries `cu_seq_lens_q` (the cumulative document
lengths, the keyword transformers hands to FlashAttention) is attended document by document: by torch's `varlen_attn` on
CUDA, otherwise by `scaled_dot_product_attention` on groups of documents of about one length. A batch without it takes
transformers' own `sdpa` path, so one loaded model serves training, scoring and generation.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

log = logging.getLogger(__name__)
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
        kwargs: `cu_seq_lens_q` (N + 1,) int32 selects the packed path, `max_length_q` saves finding the longest
            document; `scaling`, `dropout` as in transformers.

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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    if q.is_cuda and (reason := _why_not_varlen(q.dtype, q.shape[-1], dropout, q.device)) is None:
        longest = kwargs.get("max_length_q") or int(cu_seq_lens.diff().max())
        return _varlen(q, k, v, cu_seq_lens, int(longest), scale).unsqueeze(0), None
    if q.is_cuda:
        _say_once(reason)
    return _by_document(q, k, v, cu_seq_lens, scale, dropout).unsqueeze(0), None


def _by_document(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, dropout: float) -> Tensor:
    """(T, H, d) from q, k, v of (T, H or H_kv, d): one call of sdpa for each group of documents."""
    groups = q.shape[1] // k.shape[1]
    tables, back = _plan(cu_seq_lens, q.device)
    pieces = []
    for rows in tables:
        qs, ks, vs = (x[rows.clamp(min=0)].transpose(1, 2) for x in (q, k, v))  # (n, H, t, d)
        if groups > 1:
            ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        # Right padding under a causal mask: a real query never looks at a padded key, so no mask is needed.
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, dropout_p=dropout)
        pieces.append(y.transpose(1, 2)[rows >= 0])
    return torch.cat(pieces)[back]


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scale: float) -> Tensor:
    """(T, H, d) from q, k, v of (T, H or H_kv, d), by FlashAttention's kernel for rows of many documents."""
    attend = _varlen_attn()
    names = inspect.signature(attend).parameters
    if "enable_gqa" not in names and (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if "scale" not in names:
        q = q * (scale * q.shape[-1] ** 0.5)
    bounds = cu_seq_lens.to(q.device, torch.int32)
    return attend(q, k, v, bounds, bounds, longest, longest, **varlen_options(names, scale))


def varlen_options(names: Collection[str], scale: float) -> dict:
    """Causal attention in the words of the installed `varlen_attn`, which changed them between torch 2.10 and 2.13.

    Args:
        names: of its parameters.
        scale: of the scores.
    """
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return {**causal, **{n: x for n, x in (("scale", scale), ("enable_gqa", True)) if n in names}}


@cache
def _varlen_attn() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _why_not_varlen(dtype: torch.dtype, width: int, dropout: float, device: torch.device) -> str | None:
    """What keeps the kernel from being used, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes half precision, and this is {dtype}"
    if dropout:
        return "it knows no dropout"
    if width > 256 or width % 8:
        return f"a head must be a multiple of 8 and at most 256 wide, and this is {width}"
    if _varlen_attn() is None:
        return "this torch has none (2.10 has)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


@cache
def _say_once(reason: str) -> None:
    log.info("packed attention runs document by document, without torch's varlen kernel: %s", reason)


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
