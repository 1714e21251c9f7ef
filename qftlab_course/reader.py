"""Reading one text that grows, goes back and branches, as someone does who decodes by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from qftlab.decoding.decoder import Decoder


class Reader:
    """Logits after any text of one prompt or another, read through one cache.

    A token more is one step of the decoder, going back costs nothing, and another text is read from its beginning. The
    logits are those of the weights as they were when a token was read.

    Args:
        model: a causal transformers model that `Decoder` knows.
    """

    def __init__(self, model) -> None:
        self.decoder = Decoder(model)
        self._ids: list[int] = []
        self._cache = None
        self._known: dict[int, Tensor] = {}  # number of ids read → (V,) logits

    def logits_after(self, ids: list[int]) -> Tensor:
        """(V,) logits, in the model's dtype, after `ids`, one at least."""
        shared = next((n for n, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b),
                      min(len(ids), len(self._ids)))  # fmt: skip
        if shared == len(ids) and shared in self._known:
            return self._known[shared]
        if self._cache is None or shared not in self._known or len(ids) > self._cache.capacity:
            self._cache = self.decoder.new_cache(1, 2 * len(ids) + 32)
            self._known = {len(ids): self.decoder.prefill([ids], self._cache)[0]}
        else:
            self._cache.lengths[0] = shared
            self._known = {count: logits for count, logits in self._known.items() if count <= shared}
            for count in range(shared, len(ids)):
                token = torch.tensor(ids[count : count + 1], device=self._known[shared].device)
                self._known[count + 1] = self.decoder.step(token, self._cache)[0]
        self._ids = list(ids)
        return self._known[len(ids)]
