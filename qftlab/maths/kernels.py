"""Triton kernels of the loss. Importing this module needs Triton, which comes with torch for CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits a program holds at a time


@triton.jit
def _slopes_kernel(
    logits,
    labels,
    scales,
    logprobs,
    stride,
    width,
    inverse_temperature,
    HAS_SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: its largest logit and sum of exponentials in one pass, its logits' gradient in a second."""
    row = tl.program_id(0).to(tl.int64)
    start, label = logits + row * stride, tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for at in range(0, width, BLOCK):
        z = tl.load(start + at + columns, mask=at + columns < width, other=float("-inf"))
        z = z.to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    wanted = tl.load(start + label).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, wanted - top - tl.log(total))
    if HAS_SLOPES:
        scale = tl.load(scales + row) * inverse_temperature
        for at in range(0, width, BLOCK):
            here = at + columns < width
            z = tl.load(start + at + columns, mask=here, other=0.0).to(tl.float32) * inverse_temperature
            p = tl.exp(z - top) / total
            slope = scale * (p - (at + columns == label).to(tl.float32))
            tl.store(start + at + columns, slope.to(logits.dtype.element_ty), mask=here)


def logit_grads_(logits: Tensor, labels: Tensor, scales: Tensor | None, temperature: float) -> Tensor:
    """log p of each label, (n,) fp32; turns `logits` (n, V), of any floating type, into scale · d(−log p) / d logits.

    Args:
        logits: rows contiguous; with no scales they are left as they are.
        labels: (n,) int64.
        scales: (n,) fp32, or None for the log-probabilities alone.
        temperature: divides the logits, and so the gradients.
    """
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _slopes_kernel[(len(logits),)](
            logits, labels, labels if scales is None else scales, logprobs, logits.stride(0), logits.shape[1],
            1 / temperature, HAS_SLOPES=scales is not None, BLOCK=BLOCK, num_warps=16,
        )  # fmt: skip
    return logprobs
