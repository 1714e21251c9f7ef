"""Packed attention for transformers models: documents of one row never see each other, and no padding is computed.

Registered with transformers under the name "packed". A batch that carries `cu_seq_lens_q` (the cumulative document
lengths, the keyword transformers hands to FlashAttention) is attended document by document: by torch's `varlen_attn` on
CUDA, otherwise on groups of documents of about one length, in blocks (`model/cpu.py`) on the CPU and else by
`scaled_dot_product_attention`. A batch without it takes transformers' own `sdpa` path, so one loaded model serves
training, scoring and generation.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qftlab.rows.batches import PackedLayout, packed_layout

log = logging.getLogger(__name__)
NAME = "packed"
LONGEST_BLOCKED = 1024  # tokens of a document whose attention weights may be kept, see model/cpu.py


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
            document; `documents` (N, L) int64, padded with −1, says where each document's tokens stand if they share
            some (`qftlab.model.cpu.pack_answers`); `scaling`, `dropout` as in transformers.

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
    layout = _layout(cu_seq_lens, kwargs.get("documents"), q.device)
    return _by_document(q, k, v, layout, scale, dropout).unsqueeze(0), None


def _by_document(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, dropout: float) -> Tensor:
    """(T, H, d) from q, k, v of (T, H or H_kv, d): one group of documents after the other."""
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        if (reason := _why_not_blocked(q.dtype, dropout, layout)) is None:
            from qftlab.model.cpu import BlockedAttention

            return BlockedAttention.apply(q, k, v, layout, scale)
        _say_once_slower(reason)
    groups, outs = q.shape[1] // k.shape[1], []
    for pieces in zip(*map(layout.rectangles, (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(1, 2) for x in pieces)  # (n, H, t, d)
        if groups > 1:
            ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        # Right padding under a causal mask: a real query never looks at a padded key, so no mask is needed.
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, dropout_p=dropout)
        outs.append(y.transpose(1, 2))
    return layout.joined(outs)


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


def _why_not_blocked(dtype: torch.dtype, dropout: float, layout: PackedLayout) -> str | None:
    """What keeps attention on the CPU from going block by block, or None."""
    if dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return "it takes whole precision"
    if dropout:
        return "it knows no dropout"
    if (longest := max(t for _, t in layout.shapes)) > LONGEST_BLOCKED:
        return f"a document has {longest} tokens, more than {LONGEST_BLOCKED}"
    return None


@cache
def _say_once_slower(reason: str) -> None:
    log.info("packed attention runs by torch's kernel for the CPU, not block by block: %s", reason)


@cache
def _say_once(reason: str) -> None:
    log.info("packed attention runs document by document, without torch's varlen kernel: %s", reason)


def _layout(cu_seq_lens: Tensor, documents: Tensor | None, device: torch.device) -> PackedLayout:
    """The layout of a row, made once for all layers: kept on the tensor it is made of, while that stays the same."""
    key = cu_seq_lens if documents is None else documents
    version, layout = getattr(key, "_packed_layout", (None, None))
    if version != key._version:
        if documents is None:
            places = [torch.arange(a, b) for a, b in pairwise(cu_seq_lens.tolist())]
        else:
            places = [document[document >= 0] for document in documents.cpu()]
        layout = packed_layout(places, device)
        key._packed_layout = key._version, layout
    return layout
