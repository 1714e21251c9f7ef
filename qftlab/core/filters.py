"""What the next token may be: sampling settings, and penalties and filters in transformers' order, readably."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from qftlab.core.draws import ONE, weigh

Seen = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 is greedy; between 0 and 1e-6 fp32 could overflow.
        top_k: keep the k most likely tokens, ties with the last kept; 0, and k at or over the vocabulary, keep all.
        top_p: keep the smallest set of likely tokens whose mass reaches p, higher ids of a tie first; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all, 1 the likeliest and its ties.
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 does nothing.

    Raises:
        ValueError: if a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (lambda x: x == 0 or 1e-6 <= x < math.inf, "0, or finite and 1e-6 or more", Real),
            "top_k": (lambda x: x >= 0, "a whole number, 0 or more", Integral),
            "top_p": (lambda x: 0 < x <= 1, "in (0, 1]", Real),
            "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]", Real),
            "repetition_penalty": (lambda x: 0 < x < math.inf, "finite and above 0", Real),
        }
        for name, (holds, rule, kind) in rules.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value!r}")


Params = SamplingParams | Sequence[SamplingParams]


@dataclass(frozen=True)
class RowParams:
    """The settings of every row as tensors; None where no row uses a setting, which then costs nothing.

    Args:
        temperature: (B,) fp32.
        top_k: (B,) int64.
        top_p: (B,) fp64.
        min_p: (B,) fp64.
        repetition_penalty: (B,) fp32.
    """

    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    repetition_penalty: Tensor | None = None

    @classmethod
    def of(cls, params: Params, batch_size: int, device: torch.device | str = "cpu") -> RowParams:
        """Tensors of one setting for all rows, or of one for each.

        Args:
            params: one, or `batch_size` of them.
            batch_size: rows.
            device: of the tensors.

        Raises:
            ValueError: if there are more or fewer settings than rows.
        """
        rows = each_row(params, batch_size)

        def column(name: str, off: float | None, dtype: torch.dtype) -> Tensor | None:
            values = [getattr(row, name) for row in rows]
            return torch.tensor(values, dtype=dtype, device=device) if set(values) != {off} else None

        return cls(
            column("temperature", None, torch.float32),
            column("top_k", 0, torch.int64),
            column("top_p", 1, torch.float64),
            column("min_p", 0, torch.float64),
            column("repetition_penalty", 1, torch.float32),
        )

    def at(self, index: Tensor) -> RowParams:
        """The settings of some rows; `index` is of ids (N,) int64 or a mask (B,) bool."""
        return RowParams(*(None if column is None else column[index] for column in vars(self).values()))


def filter_logits(
    logits: Tensor, params: Params, *, seen_ids: Seen | None = None, vocab_limit: int | None = None
) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, min-p, in this order, on fp32.

    Args:
        logits: (B, V).
        params: the settings, one for all rows or one for each; temperature 0 is left to the caller's argmax.
        seen_ids: what the penalty applies to: per row a 1-D tensor of ids, or a (B, V) bool mask.
        vocab_limit: ids from here on are impossible (rows past the tokenizer's length); V or more allows all.

    Returns:
        (B, V) fp32, −inf where cut.

    Raises:
        ValueError: if a repetition penalty comes without `seen_ids`, if a row holds nan or inf or nothing finite, or
            if shapes or the limit are wrong.

    Source: transformers' logits processors and warpers, equal to 1e-6; where equal scores stand at top-p's edge they
    keep as many, in the order of an unstable sort.
    """
    possible = possible_logits(logits, vocab_limit)
    rows = RowParams.of(params, len(logits), logits.device)
    refuse_hopeless(possible)
    scores = scale(possible, rows, seen_ids)
    out = torch.full(logits.shape, -math.inf, device=logits.device)
    out[:, : scores.shape[1]] = scores.masked_fill(~kept(scores, rows), -math.inf)
    return out


def each_row(params: Params, batch_size: int) -> Sequence[SamplingParams]:
    """One setting for each row; raises ValueError if a sequence has another length."""
    if isinstance(params, SamplingParams):
        return [params] * batch_size
    if len(params) != batch_size:
        raise ValueError(f"params must be one SamplingParams or {batch_size}, one for each row, got {len(params)}")
    return params


def possible_logits(logits: Tensor, vocab_limit: int | None) -> Tensor:
    """The columns of ids that exist, (B, V'), a view; raises ValueError if the shape or the limit is wrong."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, V) with V above 0, got {tuple(logits.shape)}")
    if vocab_limit is not None and vocab_limit < 1:
        raise ValueError(f"vocab_limit must be 1 or more, got {vocab_limit}; None allows every id")
    return logits[:, :vocab_limit]


def refuse_hopeless(possible: Tensor) -> None:
    """Raises ValueError naming the rows that hold nan or inf or nothing finite; a maximum tells all three."""
    finite = possible.amax(-1).isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"logits must be finite or -inf, with something finite in each row; rows {bad} are not")


def check_seen(seen: Seen | None, scores: Tensor) -> None:
    """Raises ValueError unless there is a row for each row of the scores (B, V') and, in a mask, V' columns."""
    columns_fit = not isinstance(seen, Tensor) or seen.shape[1:] >= scores.shape[1:]
    if seen is None or (len(seen) == len(scores) and columns_fit):
        return
    shape = tuple(seen.shape) if isinstance(seen, Tensor) else f"{len(seen)} rows"
    raise ValueError(f"seen_ids must be {len(scores)} tensors of ids or a (B, V) bool mask, got {shape}")


def scale(possible: Tensor, rows: RowParams, seen: Seen | None) -> Tensor:
    """Scores (B, V') fp32 after penalty and temperature."""
    return heat(penalise(possible, rows, seen), rows)


def heat(scores: Tensor, rows: RowParams) -> Tensor:
    """Scores divided by each row's temperature, by 1 where it is 0."""
    return scores / rows.temperature.masked_fill(rows.temperature == 0, 1.0).unsqueeze(1)


def penalise(possible: Tensor, rows: RowParams, seen: Seen | None) -> Tensor:
    """fp32 scores (B, V') after the repetition penalty; raises ValueError if `seen` is missing or of a wrong shape."""
    scores = possible.float()
    if rows.repetition_penalty is None:
        return scores
    if seen is None:
        raise ValueError("repetition_penalty needs seen_ids, the ids already in each row")
    check_seen(seen, scores)
    if not isinstance(seen, Tensor):
        seen = _mask(seen, scores)
    penalty = rows.repetition_penalty.unsqueeze(1)
    changed = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen[:, : scores.shape[1]], changed, scores)


def _mask(seen: Sequence[Tensor], scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row, ids in enumerate(seen):
        mask[row, ids[ids < scores.shape[1]].to(scores.device)] = True
    return mask


def kept(scores: Tensor, rows: RowParams, others: Tensor | int = 0) -> Tensor:
    """Which of the scores the filters keep.

    Args:
        scores: (B, N) fp32 in the order of ids.
        rows: the settings.
        others: (B, 1) int64, mass of less likely tokens that are not among the scores.

    Returns:
        (B, N) bool.
    """
    keep, size = torch.ones_like(scores, dtype=torch.bool), scores.shape[1]
    if rows.top_k is not None or rows.top_p is not None:
        # Equal scores stand in the order of ids: at its edge top-p keeps the higher ids, in every batch and sampler.
        ascending, order = scores.sort(dim=-1, stable=True)
    if rows.top_k is not None:
        k = torch.where(rows.top_k == 0, size, rows.top_k.clamp(max=size))
        keep = scores >= ascending.gather(1, (size - k).unsqueeze(1))
    if rows.top_p is not None:
        mass = weigh(scores).masked_fill_(~keep, 0).gather(1, order).cumsum(-1) + others
        cut = mass <= spare_mass(mass[:, -1:], rows)
        keep = keep & ~torch.zeros_like(cut).scatter(1, order, cut)
    return keep if rows.min_p is None else keep & (weigh(scores) >= least_weight(rows))


def spare_mass(total: Tensor, rows: RowParams) -> Tensor:
    """The mass top-p may cut from each row, (B, 1), or −1 where it is off; never the whole."""
    spare = ((1 - rows.top_p.unsqueeze(1)) * total).long().minimum(total - 1)
    return spare.masked_fill(rows.top_p.unsqueeze(1) == 1, -1)


def least_weight(rows: RowParams) -> Tensor:
    """The least weight min-p keeps, (B, 1)."""
    return (rows.min_p.unsqueeze(1) * ONE).long()
