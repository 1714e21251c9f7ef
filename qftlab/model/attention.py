"""Packed attention for transformers models: documents of one row never see each other, and no padding is computed.

Registered with transformers under the name "packed". A batch that carries `cu_seq_lens_q` (the cumulative document
lengths, the keyword transformers hands to FlashAttention) is attended document by document: by torch's `varlen_attn` on
CUDA, otherwise on groups of documents of about one length, in blocks (`model/cpu.py`) on the CPU and else by
`scaled_dot_product_attention`. A batch without it takes transformers' own `sdpa` path, so one loaded model serves
training, scoring and generation.

Sliding windows are kept to; whatever else a model says to its attention is refused, not passed by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qftlab.model.head import causal_model
from qftlab.rows.batches import PackedLayout, packed_layout

log = logging.getLogger(__name__)
NAME = "packed"
# Families whose packed rows give what their documents give one by one: of docs/models.md, which a test writes.
PACKABLE = (
    "arcee cwm ernie4_5 exaone4 gemma gemma3_text glm glm4 glm4_moe gpt2 gpt_neox granite helium llama ministral3 "
    "mistral mixtral nemotron olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm"
).split()
UNHEEDED = ("s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices")  # what models ask of attention
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
    is_other = kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs
    marker.window = "unknown" if is_other else kwargs.get("local_size")
    return marker


def check_rows(model, batch: Mapping) -> None:
    """Refuses a packed row where a model would not keep its documents apart.

    Raises:
        ValueError: naming the model's family.
    """
    config = causal_model(model).config
    if "cu_seq_lens_q" in batch and (config.model_type not in PACKABLE or not getattr(config, "is_causal", True)):
        raise ValueError(f"packing must be false for {config.model_type}, got a packed row: docs/models.md says why")


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
            some (`qftlab.model.cpu.pack_answers`); `scaling`, `dropout`, `sliding_window` as in transformers.

    Returns:
        (1, T, H, d) and None (no attention weights).

    Raises:
        ValueError: if a packed batch has more than one row, or carries a cache; if the model asks its attention for
            something that would be left out.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    found, window = [name for name in UNHEEDED if kwargs.get(name) is not None], kwargs.get("sliding_window")
    masked = window if attention_mask is None else getattr(attention_mask, "window", "unknown")
    if found or (cu_seq_lens is not None and masked != window):
        found = ", ".join(found) or "a mask of its own"
        raise ValueError(f"packed attention knows no {found}, got {type(module).__name__} with it: load it eager")
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
    windowed = window and window < (kwargs.get("max_length_q") or query.shape[2]) and f"each token sees {window} only"
    if q.is_cuda:
        from qftlab.model.cuda import varlen, why_not_varlen

        if (reason := windowed or why_not_varlen(q.dtype, q.shape[-1], dropout, q.device)) is None:
            longest = kwargs.get("max_length_q") or int(cu_seq_lens.diff().max())
            return varlen(q, k, v, cu_seq_lens, int(longest), scale).unsqueeze(0), None
        _say_once(reason)
    layout = _layout(cu_seq_lens, kwargs.get("documents"), q.device)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        if (reason := windowed or _why_not_blocked(q.dtype, dropout, layout)) is None:
            from qftlab.model.cpu import BlockedAttention

            return BlockedAttention.apply(q, k, v, layout, scale).unsqueeze(0), None
        _say_once(reason)
    return _by_document(q, k, v, layout, scale, dropout, window).unsqueeze(0), None


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, dropout: float, window: int | None
) -> Tensor:
    """(T, H, d) from q, k, v of (T, H or H_kv, d): one group of documents after the other."""
    groups, outs = q.shape[1] // k.shape[1], []
    for pieces in zip(*map(layout.rectangles, (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(1, 2) for x in pieces)  # (n, H, t, d)
        if groups > 1:
            ks, vs = (x.repeat_interleave(groups, dim=1) for x in (ks, vs))
        # Right padding under a causal mask: a real query never looks at a padded key, so only a window needs a mask.
        t = qs.shape[2]
        mask = qs.new_ones(t, t, dtype=torch.bool).tril().triu(1 - window) if window and window < t else None
        y = F.scaled_dot_product_attention(qs, ks, vs, mask, dropout, mask is None, scale=scale)
        outs.append(y.transpose(1, 2))
    return layout.joined(outs)


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
def _say_once(reason: str) -> None:
    log.info("packed attention runs by torch's kernel for rectangles, not by the faster one: %s", reason)


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
