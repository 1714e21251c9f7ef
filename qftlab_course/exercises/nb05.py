"""Exercises of notebook 05, LoRA: the adapted layer, its count of numbers, rows that move alone, the merge."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qftlab_course.exercises import Exercise, Suspect, integers, tensor


def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """W x + (alpha / r) · B (A x) for each row of x (T, D_in); weight (D_out, D_in), a (r, D_in), b (D_out, r)."""
    return x @ weight.T + alpha / a.shape[0] * (x @ a.T) @ b.T


def _with_scale(scale):
    return lambda x, weight, a, b, alpha: x @ weight.T + scale(alpha, a.shape[0]) * (x @ a.T) @ b.T


def _draw_layer(rng: random.Random, size: int) -> tuple:
    width_in, width_out = 1 + size, 2 + size // 2
    rank = (2, 1, 3)[size % 3]
    alpha = float(rng.choice([4, 5, 8, 16]))
    shapes = [(1 + size // 3, width_in), (width_out, width_in), (rank, width_in), (width_out, rank)]
    return *(tensor(rng, *shape) for shape in shapes), alpha


def count(shapes: list[tuple[int, int]], rank: int, num_rows: int, width: int) -> int:
    """Trained numbers: `rank` adapters on matrices of shapes (D_out, D_in), and `num_rows` token rows of `width`."""
    return sum(rank * (d_out + d_in) for d_out, d_in in shapes) + num_rows * width


def _draw_shapes(rng: random.Random, size: int) -> tuple:
    pairs = zip(integers(rng, size, 2, 40), integers(rng, size, 2, 40), strict=True)
    return list(pairs), (1, 4, 8)[size % 3], (0, 2)[size % 2], rng.randint(2, 40)


def move_rows(table: Tensor, gradient: Tensor, ids: list[int], lr: float) -> Tensor:
    """The table (V, D) after a step of `lr` against the gradient, in the rows `ids` only; `table` itself stays."""
    moved = table.clone()
    moved[ids] -= lr * gradient[ids]
    return moved


def _draw_rows(rng: random.Random, size: int) -> tuple:
    rows, width = 2 + size, 1 + size // 2
    ids = rng.sample(range(rows), 1 + (size > 2))
    gradient = tensor(rng, rows, width)
    gradient[gradient == 0] = 1.0
    return tensor(rng, rows, width), gradient, ids, rng.choice([0.5, 0.25])


def merge(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The one matrix (D_out, D_in) that does what weight and adapter do together; `weight` itself stays."""
    return weight + alpha / a.shape[0] * b @ a


def _draw_merge(rng: random.Random, size: int) -> tuple:
    return _draw_layer(rng, size)[1:]


def _is_changed(args: tuple, got, wanted) -> bool:
    return isinstance(got, Tensor) and torch.equal(got, args[0])


def _is_shape_error(args: tuple, got, wanted) -> bool:
    return isinstance(got, RuntimeError) and ("shape" in str(got) or "size" in str(got))


EXERCISES = (
    Exercise(
        id="05.1",
        title="A layer with an adapter",
        dots=2,
        minutes=8,
        reference=adapted,
        draw=_draw_layer,
        instead="multiply x by the transposed matrices and add the two results",
        forbidden=("peft.tuners.lora.layer.Linear.forward", "torch.nn.functional.linear", "torch.nn.Linear"),
        atol=1e-5,  # fp32: products near 60 may cancel
        suspects=(
            Suspect("the update is not scaled: multiply it by alpha / rank", like=_with_scale(lambda alpha, r: 1)),
            Suspect("the update is scaled by alpha; divide by the rank as well", like=_with_scale(lambda x, r: x)),
            Suspect("the scale is upside down: alpha / rank, not rank / alpha", like=_with_scale(lambda x, r: r / x)),
            Suspect(
                "this is the update alone; W x belongs to it",
                like=lambda x, w, a, b, alpha: alpha / a.shape[0] * x @ a.T @ b.T,
            ),
            Suspect("this is W x alone: the update is missing", like=lambda x, w, a, b, alpha: x @ w.T),
            Suspect(
                "the rank is the number of rows of a, its first axis",
                like=lambda x, w, a, b, alpha: x @ w.T + alpha / a.shape[1] * x @ a.T @ b.T,
            ),
            Suspect(
                "shapes do not meet: a row x of width D_in goes through a.T (D_in, r), then b.T (r, D_out)",
                when=_is_shape_error,
            ),
        ),
    ),
    Exercise(
        id="05.2",
        title="How many numbers are trained",
        dots=1,
        minutes=5,
        reference=count,
        draw=_draw_shapes,
        instead="add rank · (D_out + D_in) over the matrices, and the rows",
        forbidden=("qftlab.model.lora.count_parameters",),
        suspects=(
            Suspect(
                "this counts the matrices themselves: an adapter has rank · (D_out + D_in)",
                like=lambda shapes, rank, n, width: sum(o * i for o, i in shapes) + n * width,
            ),
            Suspect(
                "the token rows are missing: num_rows · width",
                like=lambda shapes, rank, n, width: sum(rank * (o + i) for o, i in shapes),
            ),
            Suspect(
                "only one of the two factors is counted: A has rank · D_in numbers, B has D_out · rank",
                like=lambda shapes, rank, n, width: sum(rank * i for o, i in shapes) + n * width,
            ),
            Suspect(
                "only one of the two factors is counted: A has rank · D_in numbers, B has D_out · rank",
                like=lambda shapes, rank, n, width: sum(rank * o for o, i in shapes) + n * width,
            ),
            Suspect(
                "the rank multiplies the token rows too; they are trained whole",
                like=lambda shapes, rank, n, width: sum(rank * (o + i) for o, i in shapes) + rank * n * width,
            ),
        ),
    ),
    Exercise(
        id="05.3",
        title="Move two rows and no others",
        dots=2,
        minutes=6,
        reference=move_rows,
        draw=_draw_rows,
        instead="copy the table and subtract lr · gradient in the rows of ids",
        suspects=(
            Suspect("every row moves; only those in ids may", like=lambda t, g, ids, lr: t - lr * g),
            Suspect(
                "the rows move up the gradient; subtract",
                like=lambda t, g, ids, lr: t.index_add(0, torch.tensor(ids), lr * g[ids]),
            ),
            Suspect(
                "the other rows move, and those in ids stay: the mask is inverted",
                like=lambda t, g, ids, lr: t - lr * g.index_fill(0, torch.tensor(ids), 0.0),
            ),
            Suspect("nothing has moved", when=_is_changed),
        ),
    ),
    Exercise(
        id="05.4",
        title="Merge an adapter into its matrix",
        dots=1,
        minutes=5,
        reference=merge,
        draw=_draw_merge,
        instead="multiply the two factors out and add them, scaled, to the weight",
        forbidden=("peft.tuners.lora.layer.Linear.get_delta_weight", "qftlab.model.lora.merge_adapters"),
        atol=1e-5,  # as in 05.1
        suspects=(
            Suspect("the update is not scaled: alpha / rank", like=lambda w, a, b, alpha: w + b @ a),
            Suspect("the update is scaled by alpha; divide by the rank as well", like=lambda w, a, b, x: w + x * b @ a),
            Suspect("nothing is merged: this is the weight as it was", when=_is_changed),
            Suspect(
                "the factors are the wrong way round: b (D_out, r) times a (r, D_in) has the shape of weight",
                like=lambda w, a, b, alpha: w + alpha / a.shape[0] * a @ b,
            ),
            Suspect(
                "shapes do not meet; are the factors the wrong way round? b (D_out, r) times a (r, D_in)",
                when=_is_shape_error,
            ),
        ),
    ),
)
