"""Projections joined into one matrix, with adapters folded in: a snapshot that can be refreshed in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F


class Fused:
    """Several linear modules of one input as a single product.

    Args:
        modules: `nn.Linear`s or peft LoRA layers over them.

    Raises:
        ValueError: for a module that has no plain weight to fold (quantised, sharded, DoRA).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.weight, self.bias = self._current()

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*map(effective_linear, self.modules), strict=True)
        if all(b is None for b in biases):
            return torch.cat(weights), None
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return torch.cat(weights), torch.cat(filled)

    @property
    def num_bytes(self) -> int:
        """Memory of the snapshot."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def refresh_(self) -> None:
        """Copies the modules' weights of now into the snapshot, which stays where it is in memory."""
        weight, bias = self._current()
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def effective_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias that a linear module amounts to, active LoRA adapters included.

    Raises:
        ValueError: for a module that has no plain weight to fold.
    """
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if type(base) is not nn.Linear or isinstance(base.weight, DTensor):
        raise ValueError(f"fuse must be off for weights that are no plain matrix, got {type(base).__name__}")
    weight = base.weight
    if isinstance(module, LoraLayer) and not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_variant or module.lora_bias.get(name, False):
                raise ValueError(f"fuse must be off for adapters that are not plain LoRA, got adapter {name!r}")
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight, base.bias
