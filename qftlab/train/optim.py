"""What moves the weights: AdamW with its decay groups, the learning rate of a step, and fp32 copies of bf16 weights."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from qftlab.train.config import TrainConfig

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
