"""Checkpoints: a run killed at any moment loses nothing that was saved, and goes on to bit-identical weights.

A checkpoint is a folder `step-000120` of safetensors and JSON. It is written aside, flushed to the disk and renamed, so
what has its name is whole; older ones go only after that. It holds trainable weights, the optimizer's state, and the
counts of the run: batches and randomness are functions of (seed, epoch, step, rank), so there is no other state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qftlab.files import aside, not_written, remove, sha256
from qftlab.rows.batches import Example
from qftlab.settings import TrainConfig
from qftlab.train.distributed import Ranks, gathered, placed_like

log = logging.getLogger(__name__)
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
# Settings that a resumed run may change: they move memory, speed and files; the result only by rounding.
NEUTRAL = ("micro_batch_size", "tokens_per_micro_batch", "log_every", "save_every", "keep", "gradient_checkpointing",
           "compile", "sharding")  # fmt: skip


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: made when the first one is saved.
        identity: what a resumed run must share with the one that saved, as (nested) names and plain values.
        keep: how many of the newest stay; the one of the lowest held-out loss stays besides.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, object] | None = None, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.lock = FileLock(self.folder / ".lock")
        self.identity = json.loads(json.dumps(identity or {}, default=str))

    def all(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
        return sorted(found, key=step_of)

    def last(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return (self.all() or [None])[-1]

    def best(self) -> Path | None:
        """The checkpoint of the lowest held-out loss so far, if it was measured and that step was saved."""
        last = self.last()
        step = read_state(last)["result"].get("best_step") if last else None
        path = None if step is None else self._path(step)
        return path if path and path.is_dir() else None

    def prepare(self) -> None:
        """Makes the folder, takes it for this process and tidies it: a run fails before its first step.

        Whoever calls it calls `release` in the end, though it fails.

        Raises:
            OSError: if nothing can be written there, or another process writes there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"{self.folder} must be written by one run, got another process that has it: wait for that "
                          "run to end, or start a new one") from None  # fmt: skip
        except OSError as error:
            raise not_written(self.folder, error) from error
        self.prune()

    def release(self) -> None:
        """Gives the folder back that `prepare` took; once for each time."""
        if self.lock.lock_counter == 1:
            with suppress(OSError):  # Windows removes no open file
                remove(Path(self.lock.lock_file))
        self.lock.release()

    def save(
        self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, result: Mapping[str, object]
    ) -> Path:
        """Writes a checkpoint and then removes the ones that are no longer kept; all processes call, the first writes.

        Args:
            weights: by name, what the optimizer moves.
            optimizer: its state is kept by the same names.
            result: plain values, among them `steps` and `held_out` as in `TrainResult`.

        Raises:
            OSError: if it cannot be written (a full disk, a read-only folder); the checkpoints before it are intact.
        """
        world, path, problem = Ranks.current(), self._path(result["steps"]), None
        tensors = gathered(weights, world.is_main)
        moments = gathered(optimizer_state(weights, optimizer), world.is_main)
        if world.is_main:
            try:
                with aside(path) as place:
                    place.mkdir()
                    save_file(tensors, place / WEIGHTS)
                    save_file(moments, place / OPTIMIZER)
                    digests = {name: sha256(place / name) for name in (WEIGHTS, OPTIMIZER)}
                    record = {"identity": self.identity, "result": dict(result), "sha256": digests}
                    (place / STATE).write_text(json.dumps(record | {"digest": _digest(record)}), encoding="utf-8")
                self.prune()
            except OSError as error:
                problem = error
        problems = [p for p in world.gather(problem) if p]
        if problems:
            raise problems[0]
        return path

    def prune(self) -> None:
        """Removes what is no longer kept, and what processes that were killed have left half done.

        Raises:
            OSError: in one sentence, if it cannot be removed.
        """
        kept = {*self.all()[-self.keep :], self.best()}
        try:
            for old in self.all():
                if old not in kept:  # the name goes first: one that is half removed must not look like a checkpoint
                    os.rename(old, old.with_name(f".{old.name}-old"))
            for left in self.folder.glob(".step-*"):
                remove(left)
        except OSError as error:
            raise not_written(self.folder, error) from error

    def check(self, path: Path) -> dict:
        """The state of a checkpoint of this run.

        Raises:
            ValueError: with the difference, if it belongs to another configuration or other data.
        """
        state = read_state(path)
        refuse_difference(state["identity"], self.identity, path)
        return state

    def load_(self, path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> dict:
        """Reads a checkpoint into weights and optimizer; nothing is changed unless the whole of it fits.

        Args:
            path: of a checkpoint.
            weights: by name, filled in place.
            optimizer: gets the state it had; None leaves it.

        Returns:
            The `result` that was saved with it.

        Raises:
            ValueError: if the checkpoint is damaged, or belongs to another configuration, other data or another model.
        """
        state = self.check(path)
        for name, digest in state["sha256"].items():
            if not (path / name).is_file() or sha256(path / name) != digest:
                raise _damaged(path, f"{name} is missing or does not have the sha256 it was written with")
        with safe_open(path / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            refuse_difference(shapes, {name: tuple(w.shape) for name, w in weights.items()}, path)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(placed_like(file.get_tensor(name), weight))
        if optimizer is not None:
            _load_optimizer_(path / OPTIMIZER, weights, optimizer)
        return state["result"]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict:
    """The JSON part of a checkpoint: `identity`, `result` and `sha256`, which also binds it to its weights.

    Raises:
        ValueError: if it is damaged, was changed, or is of another step than its folder says.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        digest, steps = state.pop("digest"), state["result"]["steps"]
        _ = state["identity"], state["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{STATE} cannot be read ({type(error).__name__})") from error
    if digest != _digest(state) or steps != step_of(path):
        raise _damaged(path, f"{STATE} (step {steps}) is not as it was written")
    return state


def _digest(state: Mapping[str, object]) -> str:
    """Of a state without its digest: of every setting and count, and so of the weights by their sha256."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def optimizer_state(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer, as "exp_avg:name"."""
    return {
        f"{key}:{name}": value
        for name, weight in weights.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def _load_optimizer_(file: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            kind, _, name = key.partition(":")
            weight, value = weights[name], stored.get_tensor(key)
            # AdamW's count of steps is a number; its moments lie as the weight does.
            is_moment = value.shape == weight.shape and value.ndim
            optimizer.state[weight][kind] = placed_like(value, weight) if is_moment else value.to(weight.device)


def refuse_difference(saved: Mapping, ours: Mapping, path: Path) -> None:
    """Compares what a checkpoint belongs to with what it is loaded into.

    Raises:
        ValueError: with each differing name, the value in the checkpoint and the value now.
    """
    then, now = flatten(saved), flatten(json.loads(json.dumps(ours, default=str)))
    changed = [name for name in {**then, **now} if then.get(name, "unset") != now.get(name, "unset")]
    if changed:
        lines = [f"  {n}: {then.get(n, 'unset')} in the checkpoint, {now.get(n, 'unset')} now" for n in changed[:20]]
        more = [f"  and {len(changed) - 20} more"] if len(changed) > 20 else []
        raise ValueError(
            "\n".join([f"{path} must belong to this run, got another configuration or other data:", *lines, *more])
            + "\nresume with the settings of that run, or start a new one"
        )


def flatten(nested: Mapping, prefix: str = "") -> dict[str, object]:
    """{"train": {"lr": 1}} as {"train.lr": 1}; sequences become lists."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def training_identity(
    model: nn.Module, config: TrainConfig, examples: Sequence[Example], held_out: Sequence[Example] = ()
) -> dict:
    """What decides the result of fine-tuning: the settings that are not `NEUTRAL`, the documents, what is frozen."""
    settings = {name: value for name, value in asdict(config).items() if name not in NEUTRAL}
    return {"train": settings, "documents": fingerprint(examples), "held_out": fingerprint(held_out),
            "frozen weights": frozen_fingerprint(model)}  # fmt: skip


def frozen_fingerprint(model: nn.Module) -> str:
    """Of the weights that are not trained and so in no checkpoint: names, shapes and some 64 values of each tensor."""
    digest, count = hashlib.sha256(), 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            values = p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu()
            digest.update(f"{name} {tuple(p.shape)}".encode() + values.numpy().tobytes())
            count += 1
    return f"{count} tensors (sha256 {digest.hexdigest()[:16]})" if count else "none"


def fingerprint(examples: Sequence[Example]) -> str:
    """How many examples, and the start of the sha256 of their ids and masks in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, [int(kept) for kept in example.loss_mask]]).encode())
    return f"{len(examples)} (sha256 {digest.hexdigest()[:16]})"


def _damaged(path: Path, what: str) -> ValueError:
    others = [p for p in Checkpoints(path.parent).all() if p != path]
    way_out = f"to go on from {others[-1].name}" if others else "to start from the beginning"
    return ValueError(f"{path} must be a whole checkpoint, got one that is damaged: {what}; delete it {way_out}")
