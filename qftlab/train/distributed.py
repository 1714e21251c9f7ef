"""Several processes as one run, and what a step computes in: types, autocast, gradient checkpointing."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qftlab.settings import TrainConfig

log = logging.getLogger(__name__)


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device computes in bf16 by itself; a T4 only imitates it, slower than fp32."""
    is_cuda = torch.device(device).type == "cuda"
    return not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)


def training_dtype(name: str, device: torch.device | str) -> str:
    """The type that weights are loaded in to be trained on a device.

    Args:
        name: "float32", "bfloat16", "float16" or "auto", as asked.
        device: where they go.

    Returns:
        The same, or "float32" where that would go wrong (the log says why): float16 has too small a range (Qwen2's
        activations can overflow to nan, and small gradients vanish), and a GPU without bf16 only imitates it.
    """
    if name == "float16":
        log.warning("float16 is loaded as float32: Qwen2 can overflow in it, and small gradients vanish")
    elif name in ("bfloat16", "auto") and not has_bf16(device):
        log.warning("%s is loaded as float32: %s has no bf16 of its own", name, torch.cuda.get_device_name(device))
    else:
        return name
    return "float32"


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bf16 where the configuration asks for it and the device has it."""
    if config.precision != "autocast":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


@contextmanager
def prepared(step: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing and compilation inside, and the step as it was outside.

    Raises:
        ValueError: if the weights are float16, or the step holds no model that can checkpoint.
    """
    half = [name for name, p in step.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(f'trained weights must be float32 or bfloat16, got float16 ({half[0]}): dtype="float32"')
    device = next(step.parameters()).device
    if config.precision == "autocast" and not has_bf16(device):
        log.warning("autocast is off: %s has no bf16 of its own, fp32 it is", torch.cuda.get_device_name(device))
    model = next((m for m in step.modules() if hasattr(m, "gradient_checkpointing_enable")), None)
    if config.gradient_checkpointing and model is None:
        raise ValueError("gradient_checkpointing must be off, got a step without a transformers model")
    was_on = model is not None and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if config.gradient_checkpointing and not was_on:
        # The reentrant form needs inputs that require gradients, which a frozen embedding does not give.
        _switch(model, "enable", {"use_reentrant": False})
    if config.compile:
        step.compile(dynamic=True)  # rows differ in length from step to step
    try:
        yield
    finally:
        if config.gradient_checkpointing and not was_on:
            _switch(model, "disable")
        if config.compile:
            step._compiled_call_impl = None


def _switch(model: nn.Module, word: str, *arguments) -> None:
    """Checkpointing of a transformers model; newer releases call it activation checkpointing."""
    name = f"activation_checkpointing_{word}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{word}")(*arguments)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Of the process group that torch has started; a world of one without it."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, value) -> list:
        """This value of every process, in their order; any object that can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Numbers added up over the processes, in float64."""
        if self.size == 1:
            return list(values)
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return total.tolist()


def step_seed(what: str, seed: int, number: int, rank: int = 0) -> int:
    """What is drawn from in a process's step, such as dropout: the same in a resumed run, and for nothing else."""
    return int.from_bytes(hashlib.sha256(f"{what} {seed} {number} {rank}".encode()).digest()[:7], "big")


def per_process(config: TrainConfig) -> TrainConfig:
    """The settings of one of several processes: where nothing limits a micro-batch, they share a step's rows out."""
    size = Ranks.current().size
    if size == 1 or config.micro_batch_size or config.tokens_per_micro_batch:
        return config
    return replace(config, micro_batch_size=-(-config.batch_size // size))


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Joins the processes that torchrun or `accelerate launch` has started, and leaves them together.

    The first logs, the others only warn. On a CPU use torchrun: `accelerate launch` starts one process there.

    Args:
        device: "cuda" or "cpu".

    Yields:
        The device of this process; without a launcher `device` as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    ours = logging.getLogger("qftlab")
    level = ours.level
    if not Ranks.current().is_main:
        ours.setLevel(logging.WARNING)
    try:
        yield device
    finally:
        ours.setLevel(level)
    distributed.barrier()  # one that leaves early takes threads away from the others
    distributed.destroy_process_group()


def wrap(step: nn.Module, sharding: str, precision: str = "weights") -> nn.Module:
    """The step as several processes train it; one process gets it back as it is.

    Args:
        step: its parameters are equal in all processes.
        sharding: "ddp" (through accelerate) or "fsdp" (torch's `fully_shard`, by decoder layer, in place).
        precision: as in `TrainConfig`; under fsdp, "autocast" and "master" are fp32 shards that are gathered in bf16.
    """
    if Ranks.current().size == 1:
        return step
    if sharding == "fsdp":
        return _shard_(step, precision)
    from accelerate import Accelerator

    return Accelerator(cpu=next(step.parameters()).device.type == "cpu").prepare_model(step)


def _shard_(step: nn.Module, precision: str) -> nn.Module:
    policy = MixedPrecisionPolicy()
    if precision != "weights":
        step.float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    names = {name for m in step.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    blocks = [m for m in step.modules() if type(m).__name__ in names]
    if not blocks:
        log.info("%s names no blocks of its own: it is sharded as one piece", type(step).__name__)
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(step, mp_policy=policy)


def without_sync(step: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around all micro-batches but the last: DDP then adds gradients up locally and exchanges them once.

    A sharded step exchanges them every time, since keeping them whole would cost the memory that sharding saves.
    """
    return step.no_sync() if not is_last and hasattr(step, "no_sync") else nullcontext()


def reshard_(step: nn.Module) -> None:
    """Frees weights that a sharded step gathered for a forward pass without a backward pass, such as a held-out loss.

    They would go stale at the next change of the shards.
    """
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def rank_share(every: list, world: Ranks) -> list:
    """This process's share of a step's micro-batches: every `size`-th.

    All processes must run equally often, so one that has too few runs its last again (or the step's first), with
    weight 0.
    """
    if world.size == 1:
        return every
    mine = every[world.rank :: world.size]
    missing = -(-len(every) // world.size) - len(mine)
    return mine + [replace((mine or every)[-1 if mine else 0], weight=0.0)] * missing


def gathered(named: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Tensors with all their parts, on the CPU; all processes must call, and those that do not keep get nothing."""
    kept = {}
    for name, tensor in named.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            kept[name] = tensor.cpu().contiguous()
    return kept


def placed_like(whole: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor on the device of `pattern`, cut as it is where it is sharded."""
    whole = whole.to(pattern.device)
    if isinstance(pattern, DTensor):
        return distribute_tensor(whole, pattern.device_mesh, pattern.placements)
    return whole


def unsharded(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A model that can be saved: itself, or for a sharded one a whole copy in the first process.

    Args:
        model: after training; all processes must call.
        build: makes a model of the same shape, which gets the weights.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    is_main = Ranks.current().is_main
    state = gathered(model.state_dict(), is_main)
    if is_main:
        model = build()
        model.load_state_dict(state)
    return model
