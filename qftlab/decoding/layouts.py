"""Which layout of its products a decoder is fastest with: measured on the processor at hand, once a process and shape.

Processors differ: oneDNN's order halves the time on some and is slower than the plain product on others. Layouts differ
in the last bits as well, so where sampled tokens are trained on, the choice belongs to the run (`train/rloo.py` keeps
it with each checkpoint). The environment variable `QFTLAB_LAYOUT` pins it: `plain` (nothing is copied; the same
everywhere), `joined`, `transposed`, `tiled`, or three of them with commas for 1, 2 to 15 and more rows.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import nn

from qftlab.decoding.decoder import DecoderLayer, linear_groups
from qftlab.decoding.fuse import MANY, Layout, Projections, check_foldable, is_plain_linear, layouts_of
from qftlab.model.head import causal_model

log = logging.getLogger(__name__)
ENVIRONMENT = "QFTLAB_LAYOUT"
MEASURED = ((1,), (2, 8), (16, 64))  # rows, for each class of `Layout`
REPEATS = 3  # of which the least time counts: cores are shared
GAIN = 0.03  # a layout that saves less than this share of plain's time is not worth a snapshot
ENOUGH_BYTES = 32 << 20  # of layers that are measured, one at least: weights come from where they do when decoding
HEAD_ROWS = 8192  # of the head that is measured
LONG_ENOUGH = 64  # steps from which on a snapshot pays: it takes about as long to make as 10 to 30 of them save
LARGEST = 1.5e9  # bytes of a snapshot that `generate` makes by itself
_found: dict[tuple, Layout] = {}  # by shape, for as long as the process lives


def pinned_layout() -> Layout | None:
    """The layout that `QFTLAB_LAYOUT` names, if it is set.

    Raises:
        ValueError: if it names none.
    """
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    try:
        return Layout.parse(text)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT}: {error}") from error


def choose_layout(model: nn.Module) -> Layout:
    """The layout a decoder of this model should have here; what `QFTLAB_LAYOUT` names where it is set.

    Args:
        model: as `Decoder` takes it.

    Returns:
        Plain for weights that cannot be folded (quantised, hooked, DoRA), with one log line; `joined` on a GPU; on the
        CPU the fastest one measured, which is remembered.

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
        return Layout()
    weight = inner.get_input_embeddings().weight
    if pin is not None or weight.device.type != "cpu":
        return pin or Layout.parse("joined")
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layers[0].named_parameters())
    key = (shapes, len(layers), tuple(head.weight.shape), torch.get_num_threads())
    if key not in _found:
        _found[key] = _measure(layers, head)
    return _found[key]


def layout_for(model: nn.Module, steps: int) -> Layout:
    """The layout that `generate` takes by itself, for a decoder that lives for so many steps.

    Raises:
        ValueError: as `choose_layout`.
    """
    if pinned_layout() is not None:
        return choose_layout(model)
    inner = causal_model(model)
    size = 3 * sum(p.nbytes for p in inner.parameters())  # at most three layouts besides the model's own
    if steps < LONG_ENOUGH or inner.device.type != "cpu" or size > LARGEST:
        return Layout()
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
def _measure(layers: Sequence[nn.Module], head: nn.Module) -> Layout:
    began = time.process_time()
    sides = {name: _Products(layers, head, name) for name in layouts_of(head.weight)}
    names, notes = [], []
    for numbers in MEASURED:
        seconds = {name: [float("inf")] * len(numbers) for name in sides}
        for _, (i, rows), (name, side) in product(range(REPEATS), enumerate(numbers), sides.items()):
            seconds[name][i] = min(seconds[name][i], side.seconds(rows))
        names.append(fastest(seconds))
        notes.append(f"{names[-1]} ({max(map(lambda a, b: a / b, seconds[names[-1]], seconds['plain'])):.2f})")
    log.info("decoder layout for 1, 2 to 15 and more rows: %s of plain's time; measured in %.0f CPU ms, %s pins it",
             ", ".join(notes), 1e3 * (time.process_time() - began), ENVIRONMENT)  # fmt: skip
    return Layout(*names)


class _Products:
    """The matrix products of some layers, and of a part of the head, in one layout."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module, name: str) -> None:
        self.name, layout = name, Layout.parse(name)
        count = max(1, ENOUGH_BYTES // sum(p.nbytes for p in layers[0].parameters()))
        self.layers, self.count = [DecoderLayer(layer, layout) for layer in layers[:count]], len(layers)
        vocabulary, width = head.weight.shape
        part = nn.Linear(width, min(vocabulary, HEAD_ROWS), bias=False, device="meta")
        part.weight = nn.Parameter(head.weight[:HEAD_ROWS], requires_grad=False)
        self.head = Projections((part,), layout if is_plain_linear(head) else Layout())
        self.heads = vocabulary / part.out_features

    def seconds(self, rows: int) -> float:
        """What the products of a step of `rows` rows take."""
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        weight, sizes = self.head.modules[0].weight, [part.modules[0].in_features for part in self.layers[0].parts]
        x, y, up, down = (weight.new_ones(rows, size) for size in sizes)
        layers = self.layers[:1] if rows >= MANY else self.layers  # with many rows it is not memory that takes the time
        start = clock()
        for layer in layers:
            layer.qkv(x), layer.output(y), layer.up.each(up), layer.down(down)
        middle = clock()
        self.head(x)
        return self.count / len(layers) * (middle - start) + self.heads * (clock() - middle)
