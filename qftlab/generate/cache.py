"""The preallocated cache of keys and values that decoding reads and writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in one tensor; a row's tokens stand in its columns from 0, without padding.

    Args:
        store: (layers, 2, B, H_kv, L, d), keys at index 0 and values at 1. Begins as zeros: an unused column that holds
            a NaN would spoil attention even under a mask of −inf.
        lengths: tokens each row holds.
    """

    def __init__(self, store: Tensor, lengths: Sequence[int]) -> None:
        self.store, self.lengths = store, list(lengths)

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

    def narrow(self, count: int) -> KVCache:
        """The first `count` rows, sharing this cache's memory."""
        return KVCache(self.store[:, :, :count], self.lengths[:count])

    def expand(self, index: Sequence[int], capacity: int | None = None) -> KVCache:
        """A new cache whose row i is a copy of row `index[i]`: a prompt read once serves all its continuations."""
        layers, _, _, heads, old, head_dim = self.store.shape
        cache = KVCache.empty(layers, len(index), heads, capacity or old, head_dim, self.store)
        cache.copy_(self, index)
        return cache

    def copy_(self, other: KVCache, index: Sequence[int]) -> None:
        """Row i becomes a copy of row `index[i]` of another cache."""
        self.lengths = [other.lengths[i] for i in index]
        width, rows = max(self.lengths), torch.tensor(index, device=self.store.device)
        self.store[:, :, : len(index), :, :width] = other.store[..., :width, :].index_select(2, rows)

    def reorder_(self, index: Sequence[int], since: int = 0) -> None:
        """Row i becomes what row `index[i]` was.

        Args:
            index: B row numbers.
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
        return self.narrow(len(order)), order


def compact(rows: Sequence[int]) -> list[int]:
    """The same rows in an order that leaves as many as possible where they are: [0, 3, 4] becomes [0, 4, 3]."""
    stay = {row for row in rows if row < len(rows)}
    movers = [row for row in rows if row >= len(rows)]
    return [row if row in stay else movers.pop() for row in range(len(rows))]
