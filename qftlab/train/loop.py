"""One training loop for all stages: accumulate, clip, schedule, log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from qftlab.train.config import TrainConfig
from qftlab.train.step import count_trained_tokens, module_mode, to_device

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: its tensors, and the numbers of the rows they hold (for messages)."""

    tensors: Batch
    rows: tuple[int, ...] = ()


class Source(Protocol):
    """Where batches come from. The batch of a step depends on (seed, epoch, step) alone, so a run can be resumed."""

    steps_per_epoch: int

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step, `step` counted within the epoch."""
        ...


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of a step is nan or infinite; the weights are those before that step."""


@dataclass
class TrainResult:
    """What a run gave.

    `losses` are nats per trained token, one for each finished optimizer step; `held_out` pairs (step, loss).
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its loss (nats a token), its gradient norm before clipping, and the tokens it read."""

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int


def train(
    step: nn.Module,
    source: Source,
    config: TrainConfig,
    *,
    count: Callable[[Batch], int] = count_trained_tokens,
    held_out: Callable[[], float] | None = None,
    on_log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> TrainResult:
    """Trains the trainable parameters of `step` in place.

    Args:
        step: called as `step(**tensors, num_tokens=n)`, gives the loss; such as `Step(model)`.
        source: gives the micro-batches of each optimizer step.
        config: rates, counts and seed.
        count: what `num_tokens` counts in a micro-batch; summed over the whole step before its first forward pass.
        held_out: measures the held-out loss (nats a token).
        on_log: gets the metrics of every optimizer step as a dict: step, epoch, loss (nats a token), lr, grad_norm,
            tokens and trained_tokens so far, seconds of process CPU time; and {step, held_out_loss} where measured.
        progress: whether to draw a `tqdm.auto` bar.

    Returns:
        Losses and counts. After Ctrl-C the result so far, with `interrupted` set.

    Raises:
        NonFiniteLoss: naming step and rows, before the weights have taken any harm.
        ValueError: if nothing is trainable, or a step has no trained token.
    """
    run = _Run(step, source, config, count, held_out, on_log)
    with module_mode(step, True), torch.random.fork_rng(), _bar(run.total, progress) as advance:
        torch.manual_seed(config.seed)
        try:
            run.all_steps(advance)
        except KeyboardInterrupt:
            run.result.interrupted = True
            log.warning("interrupted after %d of %d steps; the weights so far are kept", run.result.steps, run.total)
        finally:
            run.optimizer.zero_grad(set_to_none=True)
    return run.result


class _Run:
    """A run of `train` under way: what it was given, its optimizer, and the result so far."""

    def __init__(self, step, source, config, count, held_out, on_log) -> None:
        self.step, self.source, self.config, self.count = step, source, config, count
        self.held_out, self.on_log = held_out, on_log
        self.optimizer = make_optimizer(step, config)
        self.total = total_steps(config, source.steps_per_epoch)
        self.result, self.clock = TrainResult(), time.process_time()

    def all_steps(self, advance: Callable[[float], None]) -> None:
        """Every optimizer step, with the held-out loss before, between and after."""
        every = self.config.eval_every
        self.measure()
        for number in range(self.total):
            advance(self.one_step(number))
            if every and (number + 1) % every == 0 and number + 1 < self.total:
                self.measure()
        self.measure()

    def one_step(self, number: int) -> float:
        """Optimizer step `number`, counted from 0; returns its loss."""
        epoch, within = divmod(number, self.source.steps_per_epoch)
        lr = learning_rate(self.config, number, self.total)
        report = optimizer_step(self.step, self.optimizer, self.source(epoch, within), lr, self.config.max_grad_norm,
                                count=self.count, number=number + 1)  # fmt: skip
        r = self.result
        r.steps, r.seconds = number + 1, time.process_time() - self.clock
        r.losses.append(report.loss)
        r.tokens += report.tokens
        r.trained_tokens += report.trained_tokens
        self.note({"step": r.steps, "epoch": epoch, "loss": report.loss, "lr": lr, "grad_norm": report.grad_norm,
                   "tokens": r.tokens, "trained_tokens": r.trained_tokens, "seconds": round(r.seconds, 3)})  # fmt: skip
        if r.steps % self.config.log_every == 0 or r.steps == self.total:
            log.info("step %d/%d: loss %.3f, lr %.2e, %.0f tokens a second of CPU time", r.steps, self.total,
                     report.loss, lr, r.tokens / max(r.seconds, 1e-9))  # fmt: skip
        return report.loss

    def measure(self) -> None:
        """Takes and notes the held-out loss, if there is one to take."""
        if self.held_out is not None:
            loss = self.held_out()
            self.result.held_out.append((self.result.steps, loss))
            self.note({"step": self.result.steps, "held_out_loss": loss})
            log.info("step %d/%d: held-out loss %.3f", self.result.steps, self.total, loss)

    def note(self, record: dict) -> None:
        """Hands metrics to the caller."""
        if self.on_log is not None:
            self.on_log(record)


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run, at least one."""
    return config.max_steps or max(1, math.ceil(config.epochs * steps_per_epoch - 1e-9))


def optimizer_step(
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    lr: float,
    max_grad_norm: float,
    *,
    count: Callable[[Batch], int] = count_trained_tokens,
    number: int = 1,
) -> StepReport:
    """One optimizer step over all its micro-batches; how the step is split changes nothing.

    Args:
        step: the module that gives the loss.
        optimizer: moves its parameters.
        micro_batches: what is forwarded, one after the other.
        lr: the learning rate of this step.
        max_grad_norm: the longest gradient let through; 0 leaves it.
        count: what `num_tokens` counts.
        number: of the step, for messages.

    Raises:
        NonFiniteLoss: and the weights stay as they were.
        ValueError: if none of its tokens is trained.
    """
    num_tokens = sum(count(m.tensors) for m in micro_batches)
    if num_tokens == 0:
        raise ValueError(f"step {number} must have a trained token, got none in rows {_names(micro_batches)}")
    device = next(step.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for micro_batch in micro_batches:
        loss = step(**to_device(micro_batch.tensors, device), num_tokens=num_tokens)
        loss.backward()
        losses.append(loss.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    # The only wait for the device in a step.
    *values, norm = torch.stack([*losses, norm.to(losses[0])]).tolist()
    _refuse_non_finite(values, norm, micro_batches, number)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    tokens = sum(count_real_tokens(m.tensors) for m in micro_batches)
    return StepReport(sum(values), norm, tokens, num_tokens)


def _refuse_non_finite(losses: list[float], norm: float, micro_batches: list[MicroBatch], number: int) -> None:
    bad = [m for m, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        what, value = "loss", next(x for x in losses if not math.isfinite(x))
    elif not math.isfinite(norm):
        what, value, bad = "gradient norm", norm, micro_batches
    else:
        return
    raise NonFiniteLoss(
        f"{what} must be finite, got {value} at step {number} in rows {_names(bad)}: look at these rows, or lower the "
        "learning rate; the weights are those before this step"
    )


def _names(micro_batches: list[MicroBatch]) -> str:
    rows = [row for m in micro_batches for row in m.rows]
    more = f" and {len(rows) - 20} more" if len(rows) > 20 else ""
    return ", ".join(map(str, rows[:20])) + more if rows else "(not numbered)"


def count_real_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding not counted."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


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


def make_optimizer(step: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, fused where torch can, with weight decay on matrices only.

    Raises:
        ValueError: if nothing is trainable.
    """
    embeddings = {id(m.weight) for m in step.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in step.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("a model must have a trainable parameter, got none: set requires_grad, or add an adapter")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    is_fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
    if not is_fused:
        log.info("AdamW runs unfused: torch has no fused form for %s", trainable[0].device.type)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=is_fused)


@contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Callable[[float], None]]:
    if not is_shown:
        yield lambda loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="step") as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update()

        yield advance
