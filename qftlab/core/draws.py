"""Reproducible draws: uniforms from a counter hash, and the inverse of a distribution in whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

ONE = 2**42  # the weight of a row's likeliest token; 2**21 such weights still fit into int64
CHUNK = 128


def uniform(seed: int, row_ids: Tensor, step: int | Tensor) -> Tensor:
    """One number in [0, 1) for each row: a hash of (seed, row, step), so that no row depends on its batch.

    Args:
        seed: of the whole run.
        row_ids: (B,) int64, what names a row.
        step: index of the token being drawn; or (S,) int64, many of them at once.

    Returns:
        (B,) fp64, 53 random bits each; (B, S) for many steps.

    Source: the splitmix64 finaliser (Steele, Lea and Flood 2014), chained over the three counters.
    """
    state = torch.full_like(row_ids, _wrap(seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019))
    state = _mix(state ^ _mix(row_ids + _wrap(0x9E3779B97F4A7C15)))
    if isinstance(step, Tensor):
        state = _mix(state.unsqueeze(1) + (step.to(state) + 1) * _wrap(0xD1342543DE82EF95))
    else:
        state = _mix(state + _wrap((step + 1) * 0xD1342543DE82EF95))
    return _shift(state, 11).double() * 2.0**-53


def _wrap(value: int) -> int:
    """A Python int as a signed 64-bit one."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def weigh(scores: Tensor) -> Tensor:
    """Unnormalised probabilities in whole numbers: exp(score − the row's greatest), in units of 2⁻⁴².

    Sums of whole numbers are exact, so they come out the same in any order: over a row or over its likeliest tokens,
    in any batch, in any kernel. That is what lets several samplers agree token for token.

    Args:
        scores: (B, V) fp32, V at most 2²¹; −inf is impossible.

    Returns:
        (B, V) int64. A token less than 2⁻⁴² as likely as the likeliest weighs nothing; what is lost is under V · 2⁻⁴².
    """
    return (scores - scores.amax(-1, keepdim=True)).exp_().mul_(float(ONE)).long()


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverts each row's cumulative distribution, in the order of ids: the first id whose sum of weights is above u.

    Args:
        weights: (B, V) int64, at least one above 0 in each row.
        u: (B,) fp64 in [0, 1), as a share of the row's sum.

    Returns:
        (B,) int64, ids of a weight above 0.
    """
    size = weights.shape[1]
    if size <= 4096:
        ends = weights.cumsum(-1)
        return torch.searchsorted(ends, _target(u, ends[:, -1:]), right=True).squeeze(1).clamp(max=size - 1)
    # Two levels, sums of chunks and then one chunk: a running sum over all of V is five times slower.
    whole = size // CHUNK * CHUNK
    chunks = weights[:, :whole].unflatten(1, (whole // CHUNK, CHUNK)).sum(-1)
    sums = torch.cat([chunks, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    ends = sums.cumsum(-1)
    target = _target(u, ends[:, -1:])
    chunk = torch.searchsorted(ends, target, right=True).clamp(max=sums.shape[1] - 1)
    rest = target - (ends - sums).gather(1, chunk)
    ids = chunk * CHUNK + torch.arange(CHUNK, device=weights.device)
    inside = torch.searchsorted(weights.gather(1, ids.clamp(max=size - 1)).cumsum(-1), rest, right=True)
    return (chunk * CHUNK + inside).squeeze(1).clamp(max=size - 1)


def _target(u: Tensor, total: Tensor) -> Tensor:
    """The share u (B,) of each row's total (B, 1), in whole numbers and below it."""
    return (u.double().unsqueeze(1) * total).long().minimum(total - 1)
