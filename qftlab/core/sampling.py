"""From logits to the next token: penalties and filters in transformers' order, and reproducible draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most likely tokens, ties with the last kept; 0 keeps all.
        top_p: keep the smallest set of likely tokens whose mass reaches p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 does nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "finite and 0 or more"),
            "top_k": (self.top_k >= 0 and int(self.top_k) == self.top_k, "a whole number, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


def filter_logits(
    logits: Tensor, params: SamplingParams, *, seen_ids: Sequence[Tensor] | None = None, vocab_limit: int | None = None
) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, min-p, in this order, on fp32.

    Args:
        logits: (B, V).
        params: the settings; temperature 0 is left to the caller's argmax.
        seen_ids: per row the ids the penalty applies to, 1-D int64.
        vocab_limit: ids from here on are impossible (rows past the tokenizer's length).

    Returns:
        (B, V) fp32, −inf where cut.

    Raises:
        ValueError: if a repetition penalty comes without `seen_ids`.

    Source: transformers' logits processors and warpers, equal to 1e-6.
    """
    scores = logits.float()
    if vocab_limit is not None and vocab_limit < scores.shape[-1]:
        scores = scores.clone()
        scores[:, vocab_limit:] = -math.inf
    if params.repetition_penalty != 1.0:
        if seen_ids is None:
            raise ValueError("repetition_penalty needs seen_ids, the ids already in each row")
        scores = _penalise(scores, params.repetition_penalty, seen_ids)
    if params.temperature not in (0.0, 1.0):
        scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        last = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < last, -math.inf)
    if params.top_p < 1.0:
        scores = _cut_top_p(scores, params.top_p)
    if params.min_p > 0.0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -math.inf)
    return scores


def _penalise(scores: Tensor, penalty: float, seen_ids: Sequence[Tensor]) -> Tensor:
    scores = scores.clone()
    for row, ids in enumerate(seen_ids):
        seen = scores[row, ids]
        scores[row, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores


def _cut_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(descending=False, dim=-1)
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    cut[:, -1] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -math.inf)


def uniform(seed: int, row_ids: Tensor, step: int) -> Tensor:
    """One number in [0, 1) for each row: a hash of (seed, row, step), so that no row depends on its batch.

    Args:
        seed: of the whole run.
        row_ids: (B,) int64, what names a row.
        step: index of the token being drawn.

    Returns:
        (B,) fp64, 53 random bits each.

    Source: the splitmix64 finaliser (Steele, Lea and Flood 2014), chained over the three counters.
    """
    state = torch.full_like(row_ids, _wrap(seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019))
    state = _mix(state ^ _mix(row_ids + _wrap(0x9E3779B97F4A7C15)))
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


def sample(
    logits: Tensor,
    params: SamplingParams,
    u: Tensor,
    *,
    seen_ids: Sequence[Tensor] | None = None,
    vocab_limit: int | None = None,
) -> Tensor:
    """Draws the next token of each row by inverting the cumulative distribution at `u`; greedy at temperature 0.

    Args:
        logits: (B, V).
        params: the settings.
        u: (B,) in [0, 1), from `uniform`; unused when greedy.
        seen_ids, vocab_limit: as in `filter_logits`.

    Returns:
        (B,) int64.
    """
    scores = filter_logits(logits, params, seen_ids=seen_ids, vocab_limit=vocab_limit)
    if params.temperature == 0.0:
        return scores.argmax(-1)
    mass = scores.double().softmax(-1).cumsum(-1)
    ids = torch.searchsorted(mass, (u.to(mass) * mass[:, -1]).unsqueeze(1), right=True).squeeze(1)
    # Rounding may leave u at the very end of the mass: the last token that has any.
    last = (scores > -math.inf).long().cumsum(-1).argmax(-1)
    return torch.minimum(ids, last)
