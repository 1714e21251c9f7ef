"""One optimizer step: the gradients of its micro-batches add up, are clipped, and move the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qftlab.generate.decoder import bump_weights_version_
from qftlab.train.distributed import World, without_sync
from qftlab.train.step import Step, count_trained_tokens, to_device

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: its tensors, and the numbers of the rows they hold (for messages).

    `weight` is 1, or 0 where a process only keeps the others company: it then counts for nothing.
    """

    tensors: Batch
    rows: tuple[int, ...] = ()
    weight: float = 1.0


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of a step is nan or infinite; the weights are those before that step."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its loss (nats a token), its gradient norm before clipping, and the tokens it read."""

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int


def optimizer_step(
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    lr: float,
    max_grad_norm: float,
    *,
    count: Callable[[Batch], int] = count_trained_tokens,
    number: int = 1,
    context: AbstractContextManager | None = None,
) -> StepReport:
    """One optimizer step over all its micro-batches; how it is split, also among processes, changes nothing.

    Args:
        step: the module that gives the loss.
        optimizer: moves its parameters.
        micro_batches: what this process forwards, one after the other.
        lr: the learning rate of this step.
        max_grad_norm: the longest gradient let through; 0 leaves it.
        count: what `num_tokens` counts.
        number: of the step, for messages.
        context: entered around each forward pass, such as autocast.

    Raises:
        NonFiniteLoss: and the weights stay as they were.
        ValueError: if none of its tokens is trained.
    """
    world = World.current()
    real = [m for m in micro_batches if m.weight]
    counts = [sum(count(m.tensors) for m in real), sum(count_real_tokens(m.tensors) for m in real)]
    num_tokens, tokens = map(int, world.sum(counts))
    if num_tokens == 0:
        raise ValueError(f"step {number} must have a trained token, got none in rows {_names([m.rows for m in real])}")
    device = next(step.parameters()).device
    # A compiled step would be compiled anew for each number that is not a tensor.
    divisor = num_tokens if step._compiled_call_impl is None else torch.tensor(num_tokens, device=device)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for i, micro_batch in enumerate(micro_batches):
        with without_sync(step, is_last=i + 1 == len(micro_batches)):
            with context or nullcontext():
                loss = step(**to_device(micro_batch.tensors, device), num_tokens=divisor) * micro_batch.weight
            # Wrapped steps average gradients over processes; the loss needs their sum.
            (loss * world.size if world.size > 1 else loss).backward()
        losses.append(loss.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # The only wait for the device in a step.
    *values, norm = torch.stack([*losses, norm.to(losses[0])]).tolist()
    (total,) = world.sum([sum(values)])
    if not math.isfinite(total) or not math.isfinite(norm):
        raise _non_finite(world, values, norm, micro_batches, number)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for module in step.modules():
        if isinstance(module, Step):
            bump_weights_version_(module.model)
    return StepReport(total, norm, tokens, num_tokens)


def _non_finite(world: World, losses: list[float], norm: float, micro_batches: list, number: int) -> NonFiniteLoss:
    """The error that all processes raise, with the rows of all; collective."""
    bad = [(loss, m.rows) for m, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
    bad = [pair for part in world.gather(bad) for pair in part]
    what, value = ("loss", bad[0][0]) if bad else ("gradient norm", norm)
    suspects = [rows for _, rows in bad] or sum(world.gather([m.rows for m in micro_batches]), [])
    return NonFiniteLoss(
        f"{what} must be finite, got {value} at step {number} in rows {_names(suspects)}: look at these rows, or lower "
        "the learning rate; the weights are those before this step"
    )


def _names(parts: list[tuple[int, ...]]) -> str:
    rows = list(dict.fromkeys(row for part in parts for row in part))
    more = f" and {len(rows) - 20} more" if len(rows) > 20 else ""
    return ", ".join(map(str, rows[:20])) + more if rows else "(not numbered)"


def count_real_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding not counted."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
