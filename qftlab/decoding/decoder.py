"""One readable, cached, gradient-free pass over a transformers model's own weights: Qwen2, Qwen3 and Llama.

It enters the modules below a layer (so adapters, new-token rows and quantised weights work as they are) but not the
layers themselves: keys and values go to a preallocated cache, grouped queries read them without repeating them, and
only the last position reaches the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from qftlab.decoding.cache import KVCache, attend_shared
from qftlab.model import head as parts
from qftlab.model.head import PIN, Projections, causal_model, is_plain_linear, linear_groups, weights_version

# Rotary embeddings whose angles depend on how long the text already is cannot be tabulated.
MOVING_ROPES = ("dynamic", "longrope")
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
PREFILL_TOKENS = 16_384  # read in one pass; more prompts than that take several
LONG_ENOUGH = 64  # steps from which on a snapshot pays: it takes about as long to make as 10 to 30 of them save


def decoder_for(model: nn.Module, steps: int, decoder: Decoder | None = None) -> Decoder:
    """The decoder given, or one in the layout that pays on this machine if it lives for so many steps; plain for a few.

    Raises:
        ValueError: as `Decoder`, if `QFTLAB_LAYOUT` names no layout, or for a decoder of another model.
    """
    if decoder is not None and decoder.model is not causal_model(model):
        raise ValueError("decoder must be of the model that it is given with, got one of another: Decoder(model)")
    if decoder is not None:
        return decoder
    pin = os.environ.get(PIN)
    if pin == "plain" or (not pin and steps < LONG_ENOUGH):
        return Decoder(model)
    from qftlab.decoding.layouts import layout_for

    return Decoder(model, layout=layout_for(model))


def best_layout(model: nn.Module) -> str:
    """The layout of a decoder that lives long, as `choose_layout` finds it; nothing is measured where plain is pinned.

    Raises:
        ValueError: as `choose_layout`.
    """
    if os.environ.get(PIN) == "plain":
        return "plain"
    from qftlab.decoding.layouts import choose_layout

    return choose_layout(model)


class Decoder:
    """Decodes with a model's weights; nothing is copied as long as the layout is plain.

    Args:
        model: a causal transformers model of a family named in `model.head.FAMILIES`, or one wrapped by peft.
        layout: of the products, as `layouts.py` writes it; any but `plain` is a snapshot of `snapshot_bytes`, adapters
            folded in, to be refreshed after every update of the weights. `choose_layout` finds the fastest.
        recorder: turns a step that works on tensors at fixed places into what replays it; by default CUDA graphs on
            CUDA, and every step run as it is elsewhere.

    Raises:
        ValueError: for another family, sharded weights, or a layout that the weights cannot take; for hooks or patched
            forwards on what is not called here (layers, attention, norms; embedding and matrices are).
    """

    def __init__(self, model: nn.Module, *, layout: str = "plain", recorder: Recorder | None = None) -> None:
        self.model = causal_model(model)
        self.config = self.model.config
        _check_supported(model, self.config)
        body = self.model.get_decoder()
        self.rotary, self.last_norm = body.rotary_emb, body.norm
        self.layout = layout = "plain" if set(layout.split(",")) == {"plain"} else layout
        self.layers = [DecoderLayer(layer, layout) for layer in body.layers]
        self.scale = body.layers[0].self_attn.scaling
        self.embed, head = self.model.get_input_embeddings(), parts.language_head(self.model)
        self.vocabulary = head.weight.shape[0]
        self.head = projections((head,), layout if is_plain_linear(head) else "plain")
        self.version = weights_version(model)
        if recorder is None and self.weight.device.type == "cuda":
            from qftlab.model.cuda import CudaGraphs

            recorder = CudaGraphs()
        # A step that is replayed would run no hooks.
        self.recorder = None if any(map(parts.put_around, self.model.modules())) else recorder
        self.spare = None  # the tensors of the last batch, for the next one
        self._angles: tuple[Tensor, Tensor] | None = None
        called = [self.embed, *(x.activation for x in self.layers), *(m for part in self._parts for m in part.modules)]
        inside = {id(m) for each in called for m in each.modules()}
        passed = [(name, m) for name, m in self.model.named_modules() if id(m) not in inside]
        parts.check_bare(passed, ("transformers.", "torch.nn.modules.module"))  # the latter for lists
        self._made_of = _made_of(self.model)

    @property
    def weight(self) -> Tensor:
        """A weight of the model, for its dtype and device."""
        return self.last_norm.weight

    @property
    def snapshot_bytes(self) -> int:
        """Memory of the snapshot; 0 without one."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def _parts(self) -> list[Projections]:
        return [self.head, *(part for layer in self.layers for part in layer.parts)]

    @torch.no_grad()
    def refresh_(self) -> None:
        """Brings the snapshot up to the model's weights, in place; without one there is nothing to do."""
        for part in self._parts:
            part.refresh_()
        self.version = weights_version(self.model)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of `batch_size` rows of `capacity` tokens."""
        heads, head_dim = self.layers[0].kv_heads, self.layers[0].head_dim
        return KVCache.empty(len(self.layers), batch_size, heads, capacity, head_dim, self.weight)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Reads whole prompts into the first rows of an empty cache.

        Args:
            prompts: ids of each prompt, one at least.
            cache: of at least as many rows and columns.

        Returns:
            (P, V) logits after the last token of each prompt, in the model's dtype.

        Raises:
            RuntimeError: if the snapshot is older than the weights.
            ValueError: if the model has got other modules, weights or hooks since this was made of it.
        """
        self.check_version()
        if self._made_of != _made_of(self.model):
            raise ValueError("decoder must be of the model as it is, got one of before it was changed: Decoder(model)")
        logits, rows = [], max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for start in range(0, len(prompts), rows):
            logits.append(self._prefill(prompts[start : start + rows], cache, start))
        cache.lengths[: len(prompts)] = map(len, prompts)
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache, first: int) -> Tensor:
        device, width = self.weight.device, max(map(len, prompts))
        # Padding stands on the right, where causal attention never looks: no mask. Its keys are overwritten or masked.
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)  # (P, T)
        rows = slice(first, first + len(prompts))
        cos, sin = (table[:width].repeat(len(prompts), 1).unsqueeze(1) for table in self.rope(cache.capacity))

        def attend(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
            keys, values = cache.store[number]
            q, k, v = (x.unflatten(0, ids.shape).transpose(1, 2) for x in (q, k, v))  # (P, H, T, d)
            keys[rows, :, :width], values[rows, :, :width] = k, v
            if k.shape[1] != q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=width > 1, scale=self.scale)
            return out.transpose(1, 2).flatten(0, 1).flatten(1)  # (P·T, H·d)

        hidden = self._layers(self.embed(ids.flatten()), cos, sin, attend)
        last = torch.tensor([i * width + len(p) - 1 for i, p in enumerate(prompts)], device=device)
        return self._logits(hidden[last])

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Reads one more token a row.

        Args:
            tokens: (B,) int64, one for each row of the cache.
            cache: gets their keys and values; its lengths grow by one.

        Returns:
            (B, V) logits after them, in the model's dtype.

        Raises:
            ValueError: if the cache is full.
            RuntimeError: if the snapshot is older than the weights.
        """
        self.check_version()
        lengths, width = cache.lengths, max(cache.lengths) + 1
        if width > cache.capacity:
            raise ValueError(f"cache must have room for another token, got {cache.capacity} columns, all in use")
        if min(lengths) == width - 1:  # no row is shorter: no mask, and one slice is written
            positions = cache.positions
            cos, sin = self.rope(max(positions) + 1)
            if min(positions) == max(positions):
                cos, sin = cos[positions[0]], sin[positions[0]]
            else:
                index = torch.tensor(positions, device=tokens.device)
                cos, sin = cos[index].unsqueeze(1), sin[index].unsqueeze(1)
            logits = self._step(tokens, cache, slice(width - 1, width), None, cos, sin, width)
        elif cache.prefix is not None:
            raise ValueError(f"rows with a shared prefix must be equally long, got lengths {sorted(set(lengths))}")
        else:
            positions = torch.tensor(lengths, device=tokens.device)
            logits = self.step_at(tokens, positions, cache, width)
        cache.lengths = [n + 1 for n in lengths]
        return logits

    @torch.no_grad()
    def step_at(self, tokens: Tensor, positions: Tensor, cache: KVCache, width: int) -> Tensor:
        """`step` with the rows' lengths as a tensor (B,) and a fixed width: what a CUDA graph can record.

        It neither checks nor advances the cache's lengths.
        """
        cos, sin = (table[positions].unsqueeze(1) for table in self.rope(cache.capacity))
        hidden_columns = torch.arange(width, device=tokens.device) > positions.unsqueeze(1)  # (B, L)
        mask = torch.zeros(hidden_columns.shape, dtype=self.weight.dtype, device=tokens.device)
        mask = mask.masked_fill_(hidden_columns, -torch.inf)[:, None, None]  # (B, 1, 1, L)
        return self._step(tokens, cache, positions, mask, cos, sin, width)

    def _step(self, tokens, cache: KVCache, at: slice | Tensor, mask, cos, sin, width: int) -> Tensor:
        rows = slice(None) if isinstance(at, slice) else torch.arange(len(tokens), device=tokens.device)

        def attend(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
            keys, values = cache.store[number]
            if isinstance(at, slice):
                keys[:, :, at], values[:, :, at] = k.unsqueeze(2), v.unsqueeze(2)
            else:
                keys[rows, :, at], values[rows, :, at] = k, v
            # The queries that share a key head take the place of query positions: keys are never repeated.
            q = q.unflatten(1, (k.shape[1], -1))  # (B, H_kv, H / H_kv, d)
            if cache.prefix is not None:
                new = keys[:, :, :width], values[:, :, :width]
                return attend_shared(q, *new, *cache.prefix.store[number], cache.prefix, self.scale).flatten(1)
            out = F.scaled_dot_product_attention(
                q, keys[:, :, :width], values[:, :, :width], attn_mask=mask, scale=self.scale
            )
            return out.flatten(1)  # (B, H·d)

        return self._logits(self._layers(self.embed(tokens), cos, sin, attend))

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """The residual stream through every layer: (N, D) → (N, D), one line of it a token."""
        for number, layer in enumerate(self.layers):
            q, k, v = layer.queries_keys_values(_norm(x, layer.norm), cos, sin)
            x = layer.output(attend(q, k, v, number)).add_(x)
            x = layer.mlp(_norm(x, layer.mlp_norm)).add_(x)
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(_norm(hidden, self.last_norm))

    def rope(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of every position, (L, d) each: rotating is then x·cos + roll(x)·sin."""
        weight = self.weight
        if self._angles is None or len(self._angles[0]) < capacity or self._angles[0].dtype != weight.dtype:
            size = 1 << max(7, (capacity - 1).bit_length())  # doubled, not made anew at every token
            positions = torch.arange(size, device=weight.device).unsqueeze(0)
            cos, sin = (x[0] for x in self.rotary(weight, positions))
            half = sin.shape[-1] // 2
            self._angles = cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        return self._angles

    def check_version(self) -> None:
        """Refuses to go on with a snapshot that is older than the weights.

        Raises:
            RuntimeError: naming both versions.
        """
        if self.layout != "plain" and self.version != weights_version(self.model):
            raise RuntimeError(
                f"the snapshot must be as new as the weights, got version {self.version} of "
                f"{weights_version(self.model)}: call refresh_() after each update"
            )


class DecoderLayer:
    """The parts of one decoder layer, with its products in a layout."""

    def __init__(self, layer: nn.Module, layout: str) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_dim = attention.head_dim
        self.kv_heads = attention.config.num_key_value_heads
        self.heads = attention.config.num_attention_heads
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.activation = mlp.act_fn
        self.parts = [projections(group, layout) for group in linear_groups(layer)]
        self.qkv, self.output, self.up, self.down = self.parts

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) → (N, H, d), (N, H_kv, d), (N, H_kv, d), queries and keys rotated."""
        joined = self.qkv(x).unflatten(1, (-1, self.head_dim))  # (N, H + 2·H_kv, d)
        qk, v = joined[:, : -self.kv_heads], joined[:, -self.kv_heads :]
        if self.q_norm is not None:
            qk = torch.cat([_norm(qk[:, : self.heads], self.q_norm), _norm(qk[:, self.heads :], self.k_norm)], dim=1)
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def mlp(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D)."""
        gate, up = self.up.each(x)
        return self.down(self.activation(gate).mul_(up))


def projections(modules: Sequence[nn.Module], layout: str) -> Projections:
    """Linear modules of one input, as they are or folded into a snapshot.

    Raises:
        ValueError: for an unknown layout, or modules that cannot be folded.
    """
    if layout == "plain":
        return Projections(modules)
    from qftlab.decoding.layouts import Folded

    return Folded(modules, layout)


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _made_of(model: nn.Module) -> list[tuple]:
    """Each module with what is put around it, and its weights by id."""
    return [(m, parts.put_around(m), *map(id, m._parameters.values())) for m in model.modules()]


def _check_supported(model: nn.Module, config) -> None:
    kind, rope = getattr(config, "model_type", "?"), getattr(config, "rope_parameters", None) or {}
    if kind not in parts.FAMILIES:
        families = ", ".join(parts.FAMILIES)
        raise ValueError(f"model must be one of {families}, got {kind!r}: use transformers' own generate")
    if rope.get("rope_type") in MOVING_ROPES or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rope_type must be fixed over the whole head, got {rope}: use transformers' own generate")
    if getattr(config, "use_sliding_window", False):
        raise ValueError("use_sliding_window must be false, got true: use transformers' own generate")
    if not getattr(config, "is_causal", True):
        raise ValueError("is_causal must be true, got false: use transformers' own generate")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("weights must be whole on each process to decode, got sharded ones: gather them first")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("a model must be on one device to decode, got several: load it without a device map")
