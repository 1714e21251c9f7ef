"""Projections joined into one matrix, with adapters folded in: a snapshot that can be refreshed.

On the CPU, in fp32, the snapshot is also laid out as oneDNN wants it (and transposed for a single row): on a few rows
that product takes half the time of the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

TILED_FOR = 16  # rows that oneDNN's layout is chosen for; it serves any number


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
        self._row: Tensor | None = None
        self._tiled: Tensor | None = None
        if self._is_laid_out:
            self._lay_out()

    @property
    def _is_laid_out(self) -> bool:
        is_plain = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        return is_plain and torch.backends.mkldnn.is_available()

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*map(effective_linear, self.modules), strict=True)
        if all(b is None for b in biases):
            return torch.cat(weights), None
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return torch.cat(weights), torch.cat(filled)

    @torch.no_grad()
    def _lay_out(self) -> None:
        self._row = self.weight.t().contiguous()
        # torch has no public name for it; torch.compile reaches oneDNN through the same two operators.
        self._tiled = torch.ops.mkldnn._reorder_linear_weight(self.weight, TILED_FOR)

    @property
    def num_bytes(self) -> int:
        """Memory of the snapshot."""
        weights = self.weight.nbytes * (3 if self._is_laid_out else 1)
        return weights + (0 if self.bias is None else self.bias.nbytes)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Copies the modules' weights of now into the snapshot, which stays where it is in memory."""
        weight, bias = self._current()
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        if self._is_laid_out:
            self._lay_out()

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) → (N, out)."""
        if self._row is None:
            return F.linear(x, self.weight, self.bias)
        if len(x) > 1:
            return torch.ops.mkldnn._linear_pointwise(x, self._tiled, self.bias, "none", [], "")
        return x @ self._row if self.bias is None else torch.addmm(self.bias, x, self._row)


def effective_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias that a linear module amounts to, active LoRA adapters included.

    Raises:
        ValueError: for a module that has no plain weight to fold.
    """
    is_adapted = hasattr(module, "lora_A")
    base = module.get_base_layer() if is_adapted else module
    if type(base) is not nn.Linear or isinstance(base.weight, DTensor):
        raise ValueError(f"fuse must be off for weights that are no plain matrix, got {type(base).__name__}")
    weight = base.weight
    if is_adapted and not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_variant or module.lora_bias.get(name, False):
                raise ValueError(f"fuse must be off for adapters that are not plain LoRA, got adapter {name!r}")
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight, base.bias
