"""Layouts of the decoder's products: weights folded into a snapshot, and which of them is the fastest here.

Four layouts give the same products up to rounding: `plain` calls every module by itself; `joined` is one `F.linear` for
all modules of one input, adapters folded in; `transposed` is `x @ W.t()` with the transposed weight in memory; `tiled`
is oneDNN's own order of the weight (fp32 on the CPU). A layout is written as one of these names, or as three with
commas between them, for products of 1, 2 to 15 and more rows.

Processors differ: oneDNN's order halves the time on some and is slower than the plain product on others. So it is
measured, once a process and shape. Layouts differ in the last bits as well, so where sampled tokens are trained on, the
choice belongs to the run (`train/rloo.py` keeps it with each checkpoint). `QFTLAB_LAYOUT` pins it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from qftlab.model.head import PIN, Projections, causal_model, is_plain_linear, linear_groups, put_around

log = logging.getLogger(__name__)
LAYOUTS = ("plain", "joined", "transposed", "tiled")
FEW, MANY = 2, 16  # a product has few rows from 2 on, many from 16 on
TILED_FOR = 64  # rows that oneDNN's order is made for; it serves any number
MEASURED = ((1,), (2, 8), (16, 64))  # rows, for each part of a layout
REPEATS = 3  # of which the least time counts: cores are shared
GAIN = 0.03  # a layout that saves less than this share of plain's time is not worth a snapshot
ENOUGH_BYTES = 32 << 20  # of layers that are measured, one at least: weights come from where they do when decoding
HEAD_ROWS = 8192  # of the head that is measured
LARGEST = 1.5e9  # bytes of a snapshot that `generate` makes by itself
_found: dict[tuple, str] = {}  # by shape, for as long as the process lives


def parse_layout(text: str, where: str = "") -> tuple[str, ...]:
    """The names in a layout: for one row, for 2 to 15 and for more; one name stands for all three.

    Args:
        text: the layout.
        where: it stands, for the error.

    Raises:
        ValueError: for a name that is none of `LAYOUTS`, or another number of names.
    """
    names = text.split(",")
    if len(names) not in (1, 3):
        raise ValueError(f"{where}a layout must be one name or three (for 1, 2 to 15 and more rows), got {text!r}")
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise ValueError(f"{where}a layout must be one of {', '.join(LAYOUTS)}, got {unknown[0]!r}")
    return tuple(names * 3 if len(names) == 1 else names)


def layout_text(names: Sequence[str]) -> str:
    """A layout as it is written: one name where all are the same."""
    return names[0] if len(set(names)) == 1 else ",".join(names)


class Folded(Projections):
    """Linear modules of one input, folded into a snapshot in a layout.

    Args:
        modules: `nn.Linear`s, or peft LoRA layers over them.
        layout: of their products, as `parse_layout` reads it.

    Raises:
        ValueError: for a module that cannot be folded, or a layout that its weights cannot take.
    """

    def __init__(self, modules: Sequence[nn.Module], layout: str) -> None:
        super().__init__(modules)
        self.names = parse_layout(layout)
        self.forms: dict[str, Tensor] = {}
        self.bias: Tensor | None = None
        names = set(self.names) - {"plain"}
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
        name = self._name(x)
        return self._product(name, x) if name in self.forms else super().__call__(x)

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """(N, in) → (N, out) of each module."""
        name = self._name(x)
        return self._product(name, x).split(self.sizes, dim=-1) if name in self.forms else super().each(x)

    def _name(self, x: Tensor) -> str:
        return self.names[0 if len(x) < FEW else 1 if len(x) < MANY else 2]

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
    if any(map(put_around, module.modules())):
        raise ValueError(f"layout must be plain for modules with hooks, got one on {type(module).__name__}")
    for name in _active(module) if is_adapted else ():
        if name in module.lora_variant or module.lora_bias.get(name, False):
            raise ValueError(f"layout must be plain for adapters that are not plain LoRA, got adapter {name!r}")


def pinned_layout() -> str | None:
    """The layout that `QFTLAB_LAYOUT` names, if it is set.

    Raises:
        ValueError: if it names none.
    """
    text = os.environ.get(PIN)
    return layout_text(parse_layout(text, f"{PIN}: ")) if text else None


def choose_layout(model: nn.Module) -> str:
    """The layout a decoder of this model should have here, however long it lives; `layout_for` is for one text.

    Args:
        model: as `Decoder` takes it.

    Returns:
        Plain for weights that cannot be folded (quantised, hooked, DoRA), with one log line; else what `QFTLAB_LAYOUT`
        names, where it is set; else `joined` on a GPU, and on the CPU the fastest one measured, which is remembered.

    Raises:
        ValueError: if `QFTLAB_LAYOUT` names no layout, or one that these weights cannot have.
    """
    pin, inner = pinned_layout(), causal_model(model)
    layers, head = inner.get_decoder().layers, inner.get_output_embeddings()
    try:
        for module in (m for layer in layers for group in linear_groups(layer) for m in group):
            check_foldable(module)
    except ValueError as error:
        log.info("decoding with the weights as they are, unfused: %s", error)
        return "plain"
    weight = inner.get_input_embeddings().weight
    if pin is not None or weight.device.type != "cpu":
        return pin or "joined"
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layers[0].named_parameters())
    key = (shapes, len(layers), tuple(head.weight.shape), torch.get_num_threads())
    if key not in _found:
        _found[key] = _measure(layers, head)
    return _found[key]


def layout_for(model: nn.Module) -> str:
    """The layout that `generate` takes by itself for a long text: plain where a snapshot would be large.

    Raises:
        ValueError: as `choose_layout`.
    """
    inner = causal_model(model)
    size = 3 * sum(p.nbytes for p in inner.parameters())  # at most three layouts besides the model's own
    if pinned_layout() is None and (inner.device.type != "cpu" or size > LARGEST):
        return "plain"
    return choose_layout(model)


def fastest(seconds: Mapping[str, Sequence[float]]) -> str:
    """The layout that at its worst still saves the largest share of plain's time.

    Args:
        seconds: of each layout, one figure for each number of rows that was measured.

    Returns:
        `plain` unless another saves `GAIN` at every number of rows: what is chosen never loses to it.
    """
    worst = {name: max(map(lambda a, b: a / b, times, seconds["plain"])) for name, times in seconds.items()}
    best = min(worst, key=worst.get)
    return best if worst[best] <= 1 - GAIN else "plain"


@torch.no_grad()
def _measure(layers: Sequence[nn.Module], head: nn.Module) -> str:
    began = time.process_time()
    sides = {name: _Products(layers, head, name) for name in layouts_of(head.weight)}
    names, notes = [], []
    for numbers in MEASURED:
        seconds = {name: [float("inf")] * len(numbers) for name in sides}
        for _, (i, rows), (name, side) in product(range(REPEATS), enumerate(numbers), sides.items()):
            seconds[name][i] = min(seconds[name][i], side.seconds(rows))
        names.append(fastest(seconds))
        notes.append(f"{names[-1]} ({max(map(lambda a, b: a / b, seconds[names[-1]], seconds['plain'])):.2f})")
    spent = 1e3 * (time.process_time() - began)
    said = "decoder layout for 1, 2 to 15 and more rows: %s of plain's time; measured in %.0f CPU ms, %s pins it"
    log.info(said, ", ".join(notes), spent, PIN)
    return layout_text(names)


class _Products:
    """The matrix products of some layers, and of a part of the head, in one layout."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module, name: str) -> None:
        self.name = name
        count = max(1, ENOUGH_BYTES // sum(p.nbytes for p in layers[0].parameters()))
        self.layers = [[Folded(group, name) for group in linear_groups(layer)] for layer in layers[:count]]
        self.count = len(layers)
        vocabulary, width = head.weight.shape
        part = nn.Linear(width, min(vocabulary, HEAD_ROWS), bias=False, device="meta")
        part.weight = nn.Parameter(head.weight[:HEAD_ROWS], requires_grad=False)
        self.head = Folded((part,), name if is_plain_linear(head) else "plain")
        self.heads = vocabulary / part.out_features

    def seconds(self, rows: int) -> float:
        """What the products of a step of `rows` rows take."""
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        weight, sizes = self.head.modules[0].weight, [part.modules[0].in_features for part in self.layers[0]]
        x, y, up, down = (weight.new_ones(rows, size) for size in sizes)
        layers = self.layers[:1] if rows >= MANY else self.layers  # with many rows it is not memory that takes the time
        start = clock()
        for qkv, output, gate_up, last in layers:
            qkv(x), output(y), gate_up.each(up), last(down)
        middle = clock()
        self.head(x)
        return self.count / len(layers) * (middle - start) + self.heads * (clock() - middle)
