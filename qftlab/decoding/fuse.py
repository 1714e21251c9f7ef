"""Linear modules of one input, in the layout that is asked for: as they are, or folded into a snapshot that is faster.

Four layouts give the same products up to rounding: `plain` calls every module by itself; `joined` is one `F.linear` for
all of them, adapters folded in; `transposed` is `x @ W.t()` with the transposed weight in memory; `tiled` is oneDNN's
own order of the weight (fp32 on the CPU). Which is the fastest depends on the processor, the sizes and the number of
rows: `layouts.py` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

LAYOUTS = ("plain", "joined", "transposed", "tiled")
FEW, MANY = 2, 16  # a product has few rows from 2 on, many from 16 on
TILED_FOR = 64  # rows that oneDNN's order is made for; it serves any number


@dataclass(frozen=True)
class Layout:
    """The names of the layouts that products of one row, of 2 to 15 and of more rows are made in."""

    one: str = "plain"
    few: str = "plain"
    many: str = "plain"

    def __post_init__(self) -> None:
        if unknown := [name for name in astuple(self) if name not in LAYOUTS]:
            raise ValueError(f"a layout must be one of {', '.join(LAYOUTS)}, got {unknown[0]!r}")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that `str` spells: one name for any number of rows, or three with commas between them.

        Raises:
            ValueError: for a name that is none of `LAYOUTS`, or another number of names.
        """
        names = text.split(",")
        if len(names) not in (1, 3):
            raise ValueError(f"a layout must be one name or three (for 1, 2 to 15 and more rows), got {text!r}")
        return cls(*(names * 3 if len(names) == 1 else names))

    def __str__(self) -> str:
        names = astuple(self)
        return names[0] if len(set(names)) == 1 else ",".join(names)

    def at(self, rows: int) -> str:
        """The name of the layout for so many rows."""
        return self.one if rows < FEW else self.few if rows < MANY else self.many

    @property
    def is_plain(self) -> bool:
        """Whether nothing is copied: then there is no snapshot that could grow old."""
        return set(astuple(self)) == {"plain"}


class Projections:
    """Several linear modules of one input.

    Args:
        modules: linear modules of any kind; unless the layout is plain, `nn.Linear`s or peft LoRA layers over them.
        layout: of their products.

    Raises:
        ValueError: for a module that cannot be folded, in a layout that is not plain.
    """

    def __init__(self, modules: Sequence[nn.Module], layout: Layout) -> None:
        self.modules, self.layout = tuple(modules), layout
        self._plain = tuple(map(_projection, modules))
        self.forms: dict[str, Tensor] = {}
        self.bias: Tensor | None = None
        names = set(astuple(layout)) - {"plain"}
        if len(self.modules) == 1 and is_plain_linear(modules[0]):
            names -= {"joined"}  # that is the module itself
        if names:
            weight, self.bias = self._current()
            self.sizes = [module.out_features for module in self.modules]
            self.forms = {name: _form(name, weight) for name in sorted(names)}

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*map(effective_linear, self.modules), strict=True)
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if all(b is None for b in biases):
            return weight, None
        return weight, torch.cat([w.new_zeros(len(w)) if b is None else b
                                  for w, b in zip(weights, biases, strict=True)])  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Memory of the snapshot."""
        kept = [*self.forms.values(), *([] if self.bias is None else [self.bias])]
        return sum(tensor.nbytes for tensor in kept)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Copies the modules' weights of now into the snapshot; on a GPU it stays where it is in memory."""
        if not self.forms:
            return
        weight, bias = self._current()
        if bias is not None:
            self.bias.copy_(bias)
        for name, form in self.forms.items():
            if name == "tiled":
                self.forms[name] = _form(name, weight)
            else:
                form.copy_(weight if name == "joined" else weight.t())

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) → (N, sum of all out)."""
        name = self.layout.at(len(x))
        if name in self.forms:
            return self._product(name, x)
        return self._plain[0](x) if len(self._plain) == 1 else torch.cat([part(x) for part in self._plain], dim=-1)

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """(N, in) → (N, out) of each module."""
        name = self.layout.at(len(x))
        if name in self.forms:
            return self._product(name, x).split(self.sizes, dim=-1)
        return [part(x) for part in self._plain]

    def _product(self, name: str, x: Tensor) -> Tensor:
        weight = self.forms[name]
        if name == "joined":
            return F.linear(x, weight, self.bias)
        if name == "tiled":
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return x @ weight if self.bias is None else torch.addmm(self.bias, x, weight)


@torch.no_grad()
def _form(name: str, weight: Tensor) -> Tensor:
    """A weight (out, in) in a layout, in memory of its own."""
    if name == "tiled":
        if "tiled" not in layouts_of(weight):
            raise ValueError(f"layout tiled must have float32 weights on a CPU with oneDNN, got {weight.dtype} on "
                             f"{weight.device.type}: take another, such as joined")  # fmt: skip
        # torch has no public name for it; torch.compile reaches oneDNN through the same two operators.
        return torch.ops.mkldnn._reorder_linear_weight(weight, TILED_FOR)
    return weight.clone() if name == "joined" else weight.t().contiguous()


def layouts_of(weight: Tensor) -> tuple[str, ...]:
    """The layouts that there are for a weight's type and device."""
    has_tiles = torch.backends.mkldnn.is_available() and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return LAYOUTS if has_tiles else LAYOUTS[:3]


def effective_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias that a linear module amounts to, active LoRA adapters included.

    Raises:
        ValueError: as `check_foldable`.
    """
    check_foldable(module)
    if not hasattr(module, "lora_A"):
        return module.weight, module.bias
    base = module.get_base_layer()
    return sum((module.get_delta_weight(name) for name in _active(module)), base.weight), base.bias


def _active(module: nn.Module) -> list[str]:
    is_off = module.merged or module.disable_adapters
    return [] if is_off else [name for name in module.active_adapters if name in module.lora_A]


def check_foldable(module: nn.Module) -> None:
    """Refuses what is more than a matrix and a bias: quantised or sharded weights, DoRA, hooks.

    Raises:
        ValueError: naming what it is.
    """
    is_adapted = hasattr(module, "lora_A")
    base = module.get_base_layer() if is_adapted else module
    if type(base) is not nn.Linear or isinstance(base.weight, DTensor):
        raise ValueError(f"layout must be plain for weights that are no plain matrix, got {type(base).__name__}")
    if any(map(_is_hooked, module.modules())):
        raise ValueError(f"layout must be plain for modules with hooks, got one on {type(module).__name__}")
    for name in _active(module) if is_adapted else ():
        if name in module.lora_variant or module.lora_bias.get(name, False):
            raise ValueError(f"layout must be plain for adapters that are not plain LoRA, got adapter {name!r}")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is `F.linear` and nothing else."""
    return type(module) is nn.Linear and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _projection(module: nn.Module):
    """The module, or the product it amounts to: a plain one needs no call of a module."""
    return partial(F.linear, weight=module.weight, bias=module.bias) if is_plain_linear(module) else module
