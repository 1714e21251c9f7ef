"""What only makes a GPU fast: torch's attention for rows of many documents, and steps recorded as CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scale: float) -> Tensor:
    """(T, H, d) from q, k, v of (T, H or H_kv, d), by FlashAttention's kernel for rows of many documents."""
    names = inspect.signature(varlen_attn).parameters
    if "enable_gqa" not in names and (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if "scale" not in names:
        q = q * (scale * q.shape[-1] ** 0.5)
    bounds = cu_seq_lens.to(q.device, torch.int32)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **varlen_options(names, scale))


def varlen_options(names: Collection[str], scale: float) -> dict:
    """Causal attention in the words of the installed `varlen_attn`, which changed them between torch 2.10 and 2.13.

    Args:
        names: of its parameters.
        scale: of the scores.
    """
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return {**causal, **{n: x for n, x in (("scale", scale), ("enable_gqa", True)) if n in names}}


def why_not_varlen(dtype: torch.dtype, width: int, dropout: float, device: torch.device) -> str | None:
    """What keeps the kernel from being used, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes half precision, and this is {dtype}"
    if dropout:
        return "it knows no dropout"
    if width > 256 or width % 8:
        return f"a head must be a multiple of 8 and at most 256 wide, and this is {width}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


class CudaGraphs:
    """Records steps as CUDA graphs, which replay without the launches' cost; all share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay
