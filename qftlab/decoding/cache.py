"""The preallocated cache of keys and values that decoding reads and writes, and attention over a shared prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Prefix:
    """Prompts that rows continue, held once however many rows that are.

    Args:
        store: (layers, 2, P, H_kv, L, d) of the prompts.
        lengths: tokens of each prompt.
        owners: the prompt of each row.

    Attributes:
        table: (P, n) the rows of each prompt, filled up with 0; None where they are n neighbours each.
        back: (B,) where each row stands in it, flattened.
        mask: (P, 1, 1, L), −inf past a prompt's end; None where all are of one length.
    """

    def __init__(self, store: Tensor, lengths: Sequence[int], owners: Sequence[int]) -> None:
        used = sorted(set(owners))
        lengths, width = [lengths[i] for i in used], max(lengths[i] for i in used)
        if len(used) < store.shape[2]:
            store = store.index_select(2, torch.tensor(used, device=store.device))
        self.store, self.lengths = store[..., :width, :], lengths
        self.owners = [used.index(owner) for owner in owners]
        rows = [[row for row, owner in enumerate(self.owners) if owner == i] for i in range(len(used))]
        self.most = max(map(len, rows))
        self.table = self.back = self.mask = None
        if sum(rows, []) != list(range(self.most * len(used))):
            filled = [[*r, *[0] * (self.most - len(r))] for r in rows]
            places = [owner * self.most + rows[owner].index(row) for row, owner in enumerate(self.owners)]
            self.table, self.back = (torch.tensor(x, device=store.device) for x in (filled, places))
        if min(lengths) < width:
            past = torch.arange(width) >= torch.tensor(lengths).unsqueeze(1)
            self.mask = torch.zeros(past.shape, dtype=store.dtype).masked_fill_(past, -torch.inf)
            self.mask = self.mask[:, None, None].to(store.device)

    def select(self, rows: Sequence[int]) -> Prefix:
        """The prefix of some rows, in another order."""
        return Prefix(self.store, self.lengths, [self.owners[row] for row in rows])

    def group(self, x: Tensor) -> Tensor:
        """(B, ...) → (P, n, ...)."""
        return x.unflatten(0, (-1, self.most)) if self.table is None else x[self.table]

    def ungroup(self, x: Tensor) -> Tensor:
        """(P, n, ...) → (B, ...)."""
        x = x.flatten(0, 1)
        return x if self.back is None else x[self.back]


class KVCache:
    """Keys and values of every layer, in one tensor; a row's tokens stand in its columns from 0, without padding.

    Args:
        store: (layers, 2, B, H_kv, L, d), keys at index 0 and values at 1. Begins as zeros: an unused column that holds
            a NaN would spoil attention even under a mask of −inf.
        lengths: tokens each row holds here.
        prefix: what rows have before that, if it is held once for several of them.
    """

    def __init__(self, store: Tensor, lengths: Sequence[int], prefix: Prefix | None = None) -> None:
        self.store, self.lengths, self.prefix = store, list(lengths), prefix

    @classmethod
    def empty(cls, layers: int, batch_size: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> KVCache:
        """An empty cache with the dtype and device of `like`."""
        return cls(like.new_zeros(layers, 2, batch_size, heads, capacity, head_dim), [0] * batch_size)

    @property
    def batch_size(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Columns: the most tokens a row can hold."""
        return self.store.shape[4]

    @property
    def positions(self) -> list[int]:
        """Of each row's next token, counted from its first."""
        if self.prefix is None:
            return self.lengths
        return [self.prefix.lengths[o] + n for o, n in zip(self.prefix.owners, self.lengths, strict=True)]

    def share(self, owners: Sequence[int], capacity: int) -> KVCache:
        """An empty cache of rows that continue this one's: row i continues row `owners[i]`, which is not copied.

        The rows must stay equally long, as they are when each step gives every row a token.
        """
        layers, _, _, heads, _, head_dim = self.store.shape
        cache = KVCache.empty(layers, len(owners), heads, capacity, head_dim, self.store)
        cache.prefix = Prefix(self.store, self.lengths, owners)
        return cache

    def expand(self, index: Sequence[int], capacity: int | None = None) -> KVCache:
        """A new cache whose row i is a copy of row `index[i]`: a prompt read once serves all its continuations."""
        layers, _, _, heads, old, head_dim = self.store.shape
        cache = KVCache.empty(layers, len(index), heads, capacity or old, head_dim, self.store)
        cache.copy_(self, index)
        cache.prefix = self.prefix and self.prefix.select(index)
        return cache

    def copy_(self, other: KVCache, index: Sequence[int]) -> None:
        """Row i becomes a copy of row `index[i]` of another cache."""
        self.lengths = [other.lengths[i] for i in index]
        width, rows = max(self.lengths), torch.tensor(index, device=self.store.device)
        self.store[:, :, : len(index), :, :width] = other.store[..., :width, :].index_select(2, rows)

    def reorder_(self, index: Sequence[int], since: int = 0) -> None:
        """Row i becomes what row `index[i]` was.

        Args:
            index: B row numbers; with a prefix, each row stays with its prompt.
            since: columns before it are equal in every row that moves, and are left alone.
        """
        moved = [i for i, source in enumerate(index) if source != i]
        if not moved:
            return
        width = max(self.lengths)
        target = torch.tensor(moved, device=self.store.device)
        source = torch.tensor([index[i] for i in moved], device=self.store.device)
        kept = self.store[..., since:width, :].index_select(2, source)
        self.store[..., since:width, :].index_copy_(2, target, kept)
        self.lengths = [self.lengths[i] for i in index]

    def keep(self, rows: Sequence[int]) -> tuple[KVCache, list[int]]:
        """The cache of some rows only, in the same memory: the last kept rows move into the holes before them.

        Returns:
            The smaller cache, and the order in which it holds `rows`.
        """
        order = compact(rows)
        self.reorder_([*order, *range(len(order), self.batch_size)])
        prefix = self.prefix and self.prefix.select(order)
        return KVCache(self.store[:, :, : len(order)], self.lengths[: len(order)], prefix), order


def compact(rows: Sequence[int]) -> list[int]:
    """The same rows in an order that leaves as many as possible where they are: [0, 3, 4] becomes [0, 4, 3]."""
    stay = {row for row in rows if row < len(rows)}
    movers = [row for row in rows if row >= len(rows)]
    return [row if row in stay else movers.pop() for row in range(len(rows))]


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
