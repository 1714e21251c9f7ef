"""What moves the weights: AdamW with its decay groups, the rate of a step, fp32 copies of bf16 weights, one step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qftlab.model.head import bump_weights_version_
from qftlab.settings import TrainConfig
from qftlab.train.distributed import Ranks, without_sync
from qftlab.train.step import Step, count_trained_tokens, to_device

log = logging.getLogger(__name__)
# What DDP and torch.compile put before parameter names.
WRAPPERS = ("module.", "_orig_mod.")
TOKEN_ROWS = "trainable_tokens_delta"  # peft's name for the rows of new tokens


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run, at least one."""
    return config.max_steps or max(1, math.ceil(config.epochs * steps_per_epoch - 1e-9))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of one optimizer step: a linear warm-up to `lr`, then the schedule.

    Args:
        config: gives peak, warm-up and schedule.
        step: from 0 to total - 1.
        total: optimizer steps of the run.

    Returns:
        After the warm-up as transformers' schedules; in it (step + 1) / warm-up, so that the first step moves.
    """
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def named_trainable(step: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by the names they have in the bare module, whatever wraps it.

    Raises:
        ValueError: if there is none.
    """
    named = {bare_name(name): p for name, p in step.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("a model must have a trainable parameter, got none: set requires_grad, or add an adapter")
    return named


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    for wrapper in WRAPPERS * 2:  # in either order
        name = name.removeprefix(wrapper)
    return name


def make_optimizer(step: nn.Module, config: TrainConfig, weights: dict[str, Tensor] | None = None) -> torch.optim.AdamW:
    """AdamW, fused where torch can, with weight decay on matrices only: not on norms, biases, embeddings, token rows.

    Args:
        step: the module that is trained.
        config: gives rate, decay and betas.
        weights: what is moved in place of the parameters of these names, such as `MasterWeights(step).named`.

    Raises:
        ValueError: if nothing is trainable.
    """
    embeddings = {id(m.weight) for m in step.modules() if isinstance(m, nn.Embedding)}
    trainable = named_trainable(step)
    weights = weights or trainable
    is_decayed = {n: p.ndim >= 2 and id(p) not in embeddings and TOKEN_ROWS not in n for n, p in trainable.items()}
    decayed, others = ([weights[name] for name in trainable if is_decayed[name] == kind] for kind in (True, False))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    is_fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in weights.values())
    if not is_fused:
        log.info("AdamW runs unfused: torch has no fused form for %s", next(iter(weights.values())).device.type)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=is_fused)


class MasterWeights:
    """fp32 copies of low-precision weights: gradients of all micro-batches add up in fp32, and AdamW moves the copies.

    bf16 has 8 bits of mantissa, so an update below 1/256 of a weight would be rounded away. Each gradient is moved to
    its copy as soon as the backward pass has made it.

    Args:
        step: the module whose trainable parameters are copied.

    Attributes:
        named: the copies by parameter name, for `make_optimizer`.
    """

    def __init__(self, step: nn.Module) -> None:
        self._parameters = named_trainable(step)
        self.named = {n: p.detach().float().clone().requires_grad_() for n, p in self._parameters.items()}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.named[n])) for n, p in self._parameters.items()
        ]

    @staticmethod
    def _collector(copy: Tensor):
        def collect(parameter: Tensor) -> None:
            gradient = parameter.grad.float()
            copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
            parameter.grad = None

        return collect

    @torch.no_grad()
    def write_(self) -> None:
        """Rounds the copies into the model's weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.named[name])

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


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
    world = Ranks.current()
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


def _non_finite(world: Ranks, losses: list[float], norm: float, micro_batches: list, number: int) -> NonFiniteLoss:
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
