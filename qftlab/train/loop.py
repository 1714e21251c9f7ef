"""One training loop for all stages: accumulate, clip, schedule, log, save, resume; in one process or many."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from qftlab.model.head import module_mode
from qftlab.settings import TrainConfig
from qftlab.train.checkpoint import Checkpoints
from qftlab.train.distributed import Ranks, autocast, prepared, rank_share, reshard_, step_seed
from qftlab.train.meter import speed_line, speed_of
from qftlab.train.optimizer import (
    Batch,
    MasterWeights,
    MicroBatch,
    NonFiniteLoss,
    learning_rate,
    make_optimizer,
    named_trainable,
    optimizer_step,
    total_steps,
)
from qftlab.train.step import count_trained_tokens

__all__ = ["Source", "TrainResult", "says_loss", "train"]
log = logging.getLogger(__name__)


class Source(Protocol):
    """Where batches come from. The batch of a step depends on (seed, epoch, step) alone, so a run can be resumed."""

    steps_per_epoch: int

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step, `step` counted within the epoch."""
        ...


@dataclass
class TrainResult:
    """What a run gave, what came before a resume included.

    `losses` are nats per trained token, one for each finished optimizer step; `held_out` pairs (step, loss), and
    `best_step` is that of the lowest, the first of equals.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stopped_early: bool = False

    def add_held_out(self, step: int, loss: float) -> None:
        """Notes a held-out loss; one that is no number is never the best."""
        self.held_out.append((step, loss))
        finite = [(loss, step) for step, loss in self.held_out if loss - loss == 0]
        self.best_step = min(finite)[1] if finite else None


def says_loss(record: dict) -> str:
    """What the log says of a record: its loss."""
    is_held_out = "held_out_loss" in record
    return f"held-out loss {record['held_out_loss']:.3f}" if is_held_out else f"loss {record['loss']:.3f}"


def train(
    step: nn.Module,
    source: Source,
    config: TrainConfig,
    *,
    count: Callable[[Batch], int] = count_trained_tokens,
    unit: str = "trained_tokens",
    take: Callable[[], dict] = dict,
    held_out: Callable[[], float | tuple[float, dict]] | None = None,
    on_log: Callable[[dict], None] | None = None,
    headline: Callable[[dict], str] = says_loss,
    progress: bool = False,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    saves_on: tuple[type[Exception], ...] = (),
    rate: Callable[[TrainConfig, int, int], float] = learning_rate,
) -> TrainResult:
    """Trains the trainable parameters of `step` in place.

    Args:
        step: called as `step(**tensors, num_tokens=n)`, gives the loss; such as `Step(model)`, or what
            `qftlab.train.distributed.wrap` makes of it where several processes train.
        source: gives the micro-batches of each optimizer step; the same in all processes.
        config: rates, counts and seed.
        count: what `num_tokens` counts in a micro-batch; summed over the whole step, in all processes, before its
            first forward pass.
        unit: the name of what `count` counts, in the records.
        take: gives further figures of the step that has just been made.
        held_out: measures the held-out loss (nats a token), and further figures if it likes.
        on_log: gets the record of every optimizer step as a dict: step, epoch, loss (nats a token), lr, grad_norm,
            tokens and `unit` so far, seconds of process CPU time so far, tokens_per_second of wall time, peak_gb of
            memory, mfu where the device's peak is known, and what `take` gives; and {step, held_out_loss} with its
            figures where measured.
        headline: what the log and the bar say of a record.
        progress: whether to draw a `tqdm.auto` bar.
        checkpoints: where to save: every `save_every` steps, at the end, at each new lowest held-out loss (all unless
            `save_every` is 0), and when the run is stopped: by Ctrl-C, SIGTERM, a loss that is no number, `saves_on`.
        resume: whether to go on from the last of `checkpoints`, if there is one.
        saves_on: what `source` raises in all processes at once; the steps before it are saved.
        rate: gives the learning rate of a step, as `learning_rate` does from (config, step, all steps).

    Returns:
        Losses and counts. After Ctrl-C the result so far, with `interrupted` set. After an early stop with
        `stopped_early` set; the weights are then those of the lowest held-out loss where checkpoints are kept, else
        the last.

    Raises:
        NonFiniteLoss: naming step and rows, before the weights have taken any harm.
        SystemExit: with code 143 after SIGTERM, once the steps so far are saved.
        ValueError: if nothing is trainable, a step has no trained token, the last checkpoint is damaged or belongs to
            another run, or there are checkpoints and `resume` is false.
        OSError: if a checkpoint cannot be written.
    """
    with module_mode(step, True), torch.random.fork_rng(), prepared(step, config), _Signals() as signals:
        run = _Run(step, source, config, count, held_out, on_log, checkpoints, signals)
        run.unit, run.take, run.headline, run.rate = unit, take, headline, rate
        try:
            run.restore(resume)
            is_shown = progress and run.world.is_main
            with tqdm(total=run.total, initial=run.result.steps, unit="step", disable=not is_shown) as bar:
                run.all_steps(bar)
        except KeyboardInterrupt:
            run.interrupt()
        except (NonFiniteLoss, *saves_on) as error:
            if run.has_sound_weights():
                run.save_whole()
            log.error("stopped before step %d: %s", run.result.steps + 1, error)
            raise
        finally:
            run.close()
    if signals.asked == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    return run.result


class _Run:
    """A run of `train` under way: what it was given, its optimizer, and the result so far."""

    def __init__(self, step, source, config, count, held_out, on_log, checkpoints, signals) -> None:
        self.signals = signals
        self.step, self.config, self.count, self.world = step, config, count, Ranks.current()
        self.source, self.held_out, self.checkpoints = source, held_out, checkpoints
        self.on_log = on_log if self.world.is_main else None
        self.weights, self.master = named_trainable(step), None
        if config.precision == "master" and any(w.dtype != torch.float32 for w in self.weights.values()):
            if self.world.size > 1:
                raise ValueError('precision must be "autocast" or "weights" under ddp, got "master": or sharding fsdp')
            self.master = MasterWeights(step)
            self.weights = self.master.named
        self.optimizer = make_optimizer(step, config, self.weights)
        self.total = total_steps(config, source.steps_per_epoch)
        self.result, self.clock = TrainResult(), time.process_time()
        self.saved, self.is_between_steps = -1, True

    def restore(self, resume: bool) -> None:
        """Takes up the last checkpoint, or refuses to write among those of another run."""
        last = self.checkpoints.last() if self.checkpoints else None
        if last and not resume:
            raise ValueError(f"{last.parent} must hold no checkpoint, got {last.name}: resume, or take another folder")
        if self.checkpoints and self.world.is_main:
            self.checkpoints.prepare()
        if resume and last is None:
            log.info("there is no checkpoint to resume from: the run starts at its first step")
        if last:
            self.load(last)
            self.saved = self.result.steps
            self.clock -= self.result.seconds
            log.info("resumed from %s", last)

    def load(self, path) -> None:
        """Weights, optimizer and result of a checkpoint."""
        state = self.checkpoints.load_(path, self.weights, self.optimizer)
        if self.master:
            self.master.write_()
        self.result = TrainResult(**{**state, "held_out": [tuple(pair) for pair in state["held_out"]]})

    def all_steps(self, bar) -> None:
        """Every optimizer step, with held-out losses and checkpoints before, between and after."""
        r = self.result
        while True:
            self.measure()
            if self.is_due():
                self.save()
            if r.steps >= self.total or self.has_lost_patience():
                break
            if self.world.sum([bool(self.signals.asked)])[0]:
                raise KeyboardInterrupt
            bar.set_postfix_str(self.one_step(r.steps), refresh=False)
            bar.update()
        if r.steps < self.total:
            self.stop_early()

    def one_step(self, number: int) -> str:
        """Optimizer step `number`, counted from 0; returns what there is to say of it."""
        epoch, within = divmod(number, self.source.steps_per_epoch)
        lr = self.rate(self.config, number, self.total)
        micro_batches = rank_share(self.source(epoch, within), self.world)
        device = next(self.step.parameters()).device
        torch.manual_seed(step_seed("step", self.config.seed, number, self.world.rank))
        start, self.is_between_steps = time.perf_counter(), False
        report = optimizer_step(self.step, self.optimizer, micro_batches, lr, self.config.max_grad_norm,
                                count=self.count, number=number + 1, context=autocast(self.config, device))  # fmt: skip
        if self.master:
            self.master.write_()
        r = self.result
        r.steps, r.seconds = number + 1, time.process_time() - self.clock
        r.losses.append(report.loss)
        r.tokens += report.tokens
        r.trained_tokens += report.trained_tokens
        self.is_between_steps = True
        seconds, read = time.perf_counter() - start, [m.tensors for m in micro_batches]
        speed = speed_of(self.step, seconds, report.tokens, report.trained_tokens, read)
        of_step = {"step": r.steps, "epoch": epoch, "loss": report.loss, "lr": lr, "grad_norm": report.grad_norm}
        so_far = {"tokens": r.tokens, self.unit: r.trained_tokens, "seconds": round(r.seconds, 3)}
        said = self.note(of_step | so_far | speed | self.take())
        if r.steps % self.config.log_every == 0 or r.steps == self.total:
            log.info("step %d/%d: %s, lr %.2e, %s", r.steps, self.total, said, lr, speed_line(speed))
        return said

    def measure(self) -> None:
        """Takes and notes the held-out loss at the start, every `eval_every` steps and at the end, if there is one."""
        r, every = self.result, self.config.eval_every
        is_due = r.steps in (0, self.total) or (every and r.steps % every == 0)
        if self.held_out is None or not is_due or (r.held_out and r.held_out[-1][0] == r.steps):
            return
        with autocast(self.config, next(self.step.parameters()).device):
            found = self.held_out()
        reshard_(self.step)
        loss, figures = found if isinstance(found, tuple) else (found, {})
        r.add_held_out(r.steps, loss)
        said = self.note({"step": r.steps, "held_out_loss": loss, **figures})
        log.info("step %d/%d: %s", r.steps, self.total, said)

    def is_due(self) -> bool:
        """Whether this step is to be saved."""
        r, every = self.result, self.config.save_every
        if self.checkpoints is None or not every or r.steps == self.saved:
            return False
        is_best = r.best_step == r.steps and (r.steps > 0 or self.config.patience > 0)
        return is_best or (r.steps > 0 and (r.steps % every == 0 or r.steps == self.total))

    def save(self) -> None:
        """Writes a checkpoint; what is asked meanwhile waits until it is written."""
        self.signals.saving = True
        try:
            path = self.checkpoints.save(self.weights, self.optimizer, asdict(self.result))
        finally:
            self.signals.saving = False
        self.saved = self.result.steps
        log.info("saved %s", path)

    def has_lost_patience(self) -> bool:
        """Whether the last `patience` held-out losses brought no new lowest one."""
        steps, best = [step for step, _ in self.result.held_out], self.result.best_step
        return 0 < self.config.patience < len(steps) - (steps.index(best) if best is not None else 0)

    def stop_early(self) -> None:
        """Notes the stop, and puts the best weights back where they were saved."""
        r = self.result
        patience = self.config.patience
        log.info("step %d/%d: stopped, %d held-out losses without a new lowest", r.steps, self.total, patience)
        best = self.checkpoints.best() if self.checkpoints else None
        if best:
            self.load(best)
            self.result = r
        r.stopped_early = True

    def save_whole(self) -> bool:
        """Saves the steps so far if the weights are theirs; returns whether they are."""
        is_whole = self.is_between_steps or self.is_unmoved()
        if self.checkpoints and is_whole and self.result.steps > max(self.saved, 0):
            self.save()
        return is_whole

    def interrupt(self) -> None:
        """Saves the steps that are whole, unless a second Ctrl-C came while the weights were moving."""
        r, is_whole = self.result, self.save_whole()
        r.interrupted = True
        lost = f"stopped while the weights moved: resume goes on from step {max(self.saved, 0)}"
        kept = "the weights so far are kept" if is_whole else lost
        log.warning("interrupted after %d of %d steps; %s", r.steps, self.total, kept)

    def has_sound_weights(self) -> bool:
        """Whether every weight is a number: where one is not, the checkpoint before is the better one."""
        local = (w.to_local() if hasattr(w, "to_local") else w for w in self.weights.values())
        return not self.world.sum([sum(not bool(w.isfinite().all()) for w in local)])[0]

    def is_unmoved(self) -> bool:
        """Whether the optimizer has not begun the next update; AdamW counts a step before it moves anything."""
        counts = {int(state["step"]) for state in self.optimizer.state.values()}
        return self.world.size == 1 and counts <= {self.result.steps}

    def note(self, record: dict) -> str:
        """Hands a record to the caller, and returns what there is to say of it."""
        if self.on_log is not None:
            self.on_log(record)
        return self.headline(record)

    def close(self) -> None:
        """Frees gradients and the folder of checkpoints, and takes the hooks off."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.checkpoints:
            self.checkpoints.release()
        if self.master:
            self.master.remove()


class _Signals:
    """Ctrl-C and SIGTERM while a run is under way: the first is only noted, so that a step is finished first.

    A second Ctrl-C acts at once, except where a checkpoint is being written. Handlers that somebody else has set stay.
    """

    def __init__(self) -> None:
        self.asked, self.saving = 0, False  # the number of the first signal; a write must not be lost
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: default for number, default in ours.items() if signal.getsignal(number) is default}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *failure) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT and not self.saving:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        what = "a checkpoint is being written" if self.saving else "finishing this step (Ctrl-C again stops at once)"
        log.warning("interrupted: %s", what)
