"""Several processes train one model: who they are, what each forwards, and how the step is wrapped or sharded.

The loop is the same for one process and for many. Every process gets the whole step's micro-batches from the source,
forwards its share of them, and divides by the token count of all shares: the sum of the gradients is the one that a
single process would have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
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
    if not World.current().is_main:
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

    Raises:
        ImportError: for ddp without accelerate.
    """
    if World.current().size == 1:
        return step
    if sharding == "fsdp":
        return _shard_(step, precision)
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("sharding ddp needs accelerate, which is not installed: pip install accelerate") from error
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


@dataclass(frozen=True)
class Share:
    """A source that gives one process its share of each step: every `size`-th micro-batch.

    All processes must run equally often, so one that has too few runs its last again (or the step's first), with
    weight 0.
    """

    source: Callable
    world: World

    @property
    def steps_per_epoch(self) -> int:
        """As the source's."""
        return self.source.steps_per_epoch

    def __call__(self, epoch: int, step: int) -> list:
        """This process's micro-batches of one optimizer step."""
        every = self.source(epoch, step)
        if self.world.size == 1:
            return every
        mine = every[self.world.rank :: self.world.size]
        missing = -(-len(every) // self.world.size) - len(mine)
        return mine + [replace((mine or every)[-1 if mine else 0], weight=0.0)] * missing


def whole(named: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Tensors with all their parts, on the CPU; all processes must call, and those that do not keep get nothing."""
    kept = {}
    for name, tensor in named.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            kept[name] = tensor.cpu().contiguous()
    return kept


def like(whole: Tensor, pattern: Tensor) -> Tensor:
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
    is_main = World.current().is_main
    state = whole(model.state_dict(), is_main)
    if is_main:
        model = build()
        model.load_state_dict(state)
    return model
