"""The reference of preference training: its log-probabilities are computed once and kept in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qftlab.maths.losses import sum_by_document
from qftlab.model.loading import module_mode
from qftlab.rows.batches import pack, pad
from qftlab.rows.examples import Pair, documents
from qftlab.train.checkpoint import fingerprint
from qftlab.train.config import TrainConfig
from qftlab.train.distributed import World, autocast
from qftlab.train.step import Step, to_device

REFERENCE = "reference.safetensors"


class Reference:
    """The model that the policy is held to, as it is when it is asked: before the policy's first step.

    Args:
        model: the policy before its first step, or another model with its tokenizer.
        which: "start" (the model as it is), "base" (its adapters off), or "none".
        config: batch sizes, packing and precision.

    Raises:
        ValueError: for "base" without adapters.
    """

    def __init__(self, model: nn.Module, which: str, config: TrainConfig) -> None:
        if which == "base" and not hasattr(model, "disable_adapter"):
            raise ValueError("loss.reference must be start or none without adapters, got base: add some (lora.rank 16)")
        self.model, self.which, self.config = model, which, config

    @cached_property
    def digest(self) -> str:
        """The start of a sha256 of its weights (with adapters, where it has some) and of what it computes in."""
        digest = hashlib.sha256(f"{self.which} {self.config.precision == 'autocast'}".encode())
        if self.which != "none":
            for name, tensor in self.model.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def logprobs(self, pairs: Sequence[Pair], cache: Path | None = None) -> Tensor:
        """Of the chosen and rejected answers, (N, 2) fp32 in nats on the CPU; zeros for "none".

        Args:
            pairs: each process computes its share of them.
            cache: a file to read them from if it belongs to these pairs and this reference, else to write them to.
        """
        if self.which == "none":
            return torch.zeros(len(pairs), 2)
        world = World.current()
        key = f"{self.digest} {fingerprint(documents(pairs))}" if cache else ""
        found = world.gather(_read(cache, key) if world.is_main else None)[0]
        if found is None:
            found = torch.zeros(len(pairs), 2)
            for share in world.gather(self._share(pairs, world)):
                for numbers, values in share:
                    found[numbers] = values
            if cache and world.is_main:
                _write(cache, key, found)
        return found

    @torch.no_grad()
    def _share(self, pairs: Sequence[Pair], world: World) -> list[tuple[list[int], Tensor]]:
        """This process's part: every `size`-th group of pairs of like length."""
        step, device = Step(self.model), next(self.model.parameters()).device
        size = self.config.micro_batch_size or self.config.batch_size
        order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)
        groups = [order[i : i + size] for i in range(0, len(order), size)][world.rank :: world.size]
        share = []
        with module_mode(self.model, False), self._adapters_off(), autocast(self.config, device):
            for group in groups:
                examples = documents([pairs[i] for i in group])
                batch = to_device(pack(examples) if self.config.packing else pad(examples, 0), device)
                logprobs = step(**batch, want="logprobs")
                share.append((group, sum_by_document(logprobs, batch.get("cu_seq_lens_q")).view(-1, 2).float().cpu()))
        return share

    def _adapters_off(self) -> AbstractContextManager:
        return self.model.disable_adapter() if self.which == "base" else nullcontext()


def _read(path: Path | None, key: str) -> Tensor | None:
    """What the file holds, if it is whole and belongs to this key."""
    try:
        with safe_open(path or "", "pt") as file:
            return file.get_tensor("logprobs") if file.metadata() == {"key": key} else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, key: str, values: Tensor) -> None:
    """Written aside and renamed: a file of that name is whole."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.parent.mkdir(parents=True, exist_ok=True)
    save_file({"logprobs": values}, aside, metadata={"key": key})
    os.replace(aside, path)
