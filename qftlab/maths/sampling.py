"""From logits to the next token: two samplers that agree with `filter_logits` and with each other, token for token.

`filter_logits` is the readable form, `sample` the fast one, `sample_rows` the one without branches for CUDA graphs.
Uniforms come from a counter hash, and every mass is a sum of whole numbers, so all pick the same token for the same u,
and a row's token does not depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qftlab.settings import SamplingParams

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


def integer_weights(scores: Tensor) -> Tensor:
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


Seen = Sequence[Tensor] | Tensor
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
    check_finite(possible)
    scores = scale(possible, rows, seen_ids)
    out = torch.full(logits.shape, -math.inf, device=logits.device)
    out[:, : scores.shape[1]] = scores.masked_fill(~keep_mask(scores, rows), -math.inf)
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


def check_finite(possible: Tensor) -> None:
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
    return apply_temperature(penalise(possible, rows, seen), rows)


def apply_temperature(scores: Tensor, rows: RowParams) -> Tensor:
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


def keep_mask(scores: Tensor, rows: RowParams, others: Tensor | int = 0) -> Tensor:
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
        mass = integer_weights(scores).masked_fill_(~keep, 0).gather(1, order).cumsum(-1) + others
        cut = mass <= removable_mass(mass[:, -1:], rows)
        keep = keep & ~torch.zeros_like(cut).scatter(1, order, cut)
    return keep if rows.min_p is None else keep & (integer_weights(scores) >= least_weight(rows))


def removable_mass(total: Tensor, rows: RowParams) -> Tensor:
    """The mass top-p may cut from each row, (B, 1), or −1 where it is off; never the whole."""
    spare = ((1 - rows.top_p.unsqueeze(1)) * total).long().minimum(total - 1)
    return spare.masked_fill(rows.top_p.unsqueeze(1) == 1, -1)


def least_weight(rows: RowParams) -> Tensor:
    """The least weight min-p keeps, (B, 1)."""
    return (rows.min_p.unsqueeze(1) * ONE).long()


__all__ = ["RowParams", "SamplingParams", "filter_logits", "sample", "sample_rows", "uniform"]

BLOCK = 2**19  # scores that a sampler which reads all of them takes at a time: larger temporaries cost page faults


def sample(
    logits: Tensor, params: Params, u: Tensor, *, seen_ids: Seen | None = None, vocab_limit: int | None = None
) -> Tensor:
    """Draws the next token of each row by inverting its cumulative distribution at `u`; greedy at temperature 0.

    The tokens are those of `filter_logits` and an inverse over ids in ascending order, at a tenth of the time: top-k
    works on the likeliest tokens only, top-p on those or, where the mass is spread, on a histogram of which one bin
    is sorted.

    Args:
        logits: (B, V).
        params: the settings, one for all rows or one for each.
        u: (B,) in [0, 1), from `uniform`; unused where greedy.
        seen_ids, vocab_limit: as in `filter_logits`.

    Returns:
        (B,) int64.

    Raises:
        ValueError: as `filter_logits`.
    """
    possible = possible_logits(logits, vocab_limit)
    if u.shape != logits.shape[:1]:
        raise ValueError(f"u must be ({len(logits)},), one number for each row of logits, got {tuple(u.shape)}")
    settings, size = each_row(params, len(logits)), possible.shape[1]
    check_seen(seen_ids, possible)
    check_finite(possible)
    groups: dict[Callable, list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault(_sampler(setting, size), []).append(row)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for sampler, members in groups.items():
        whole = logits.is_cuda or sampler in (_greedy, _among_likeliest)
        step = len(members) if whole else max(1, BLOCK // size)
        for part in (members[i : i + step] for i in range(0, len(members), step)):
            rows = RowParams.of([settings[row] for row in part], len(part), logits.device)
            # Neighbours are a slice, which copies nothing.
            at = slice(part[0], part[-1] + 1) if part[-1] - part[0] < len(part) else part
            seen = [seen_ids[row] for row in part] if isinstance(seen_ids, Sequence) else seen_ids
            tokens[at] = sampler(possible[at], rows, u[at], seen[at] if isinstance(seen, Tensor) else seen)
    return tokens


def sample_rows(
    logits: Tensor, rows: RowParams, u: Tensor, *, seen: Tensor | None = None, vocab_limit: int | None = None
) -> Tensor:
    """`sample` without branches on data: nothing is read back and no shape depends on a value, as CUDA graphs need.

    It sorts whole rows if any top-k or top-p is set (so no number of candidates can fall short), and does not sort
    otherwise: which fields of `rows` are None is part of the graph.

    Args:
        logits: (B, V).
        rows: the settings; a captured graph follows new values copied into its tensors.
        u: (B,) fp64 in [0, 1).
        seen: (B, V) bool, where the repetition penalty applies.
        vocab_limit: as in `filter_logits`.

    Returns:
        (B,) int64, token for token `sample`'s; −1 for a row with nan or inf or nothing finite, which cannot raise here.
    """
    scores = scale(possible_logits(logits, vocab_limit), rows, seen)
    tokens = _draw_kept(scores, rows, u)
    tokens = torch.where(rows.temperature == 0, scores.argmax(-1), tokens)
    return tokens.masked_fill(~scores.amax(-1).isfinite(), -1)


def _draw_kept(scores: Tensor, rows: RowParams, u: Tensor) -> Tensor:
    # In place, a product is several times faster than a masked fill.
    return draw(integer_weights(scores).mul_(keep_mask(scores, rows)), u)


def _sampler(setting: SamplingParams, size: int) -> Callable:
    if setting.temperature == 0:
        return _greedy
    if 0 < setting.top_k < size:
        return _among_likeliest if setting.top_k <= 2048 else _draw_whole
    return _among_all if setting.top_p == 1 else _within_top_p


def _greedy(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    scores = possible if rows.repetition_penalty is None else penalise(possible, rows, seen)
    return scores.argmax(-1)


def _draw_whole(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    return _draw_kept(scale(possible, rows, seen), rows, u)


def _among_likeliest(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    """Top-k first: the rest happens among the candidates, except in rows whose ties may reach past them."""
    scores, size = penalise(possible, rows, seen), possible.shape[1]
    values, ids = _largest(scores, min(int(rows.top_k.max()) + 16, size))
    values = apply_temperature(values, rows)
    tokens = _draw_candidate(values, ids, rows, u)
    if values.shape[1] < size:
        short = (values[:, -1:] == values.gather(1, rows.top_k.unsqueeze(1) - 1)).squeeze(1)
        if short.any():
            rows = rows.at(short)
            tokens[short] = _draw_kept(apply_temperature(scores[short], rows), rows, u[short])
    return tokens


def _draw_candidate(values: Tensor, ids: Tensor, rows: RowParams, u: Tensor, others: Tensor | int = 0) -> Tensor:
    ids, order = ids.sort(dim=-1)
    values = values.gather(1, order)
    return ids.gather(1, draw(integer_weights(values).mul_(keep_mask(values, rows, others)), u).unsqueeze(1)).squeeze(1)


def _largest(scores: Tensor, count: int, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """`topk` that reads most scores once: the `count` chunks with the greatest maxima hold the `count` greatest."""
    size = scores.shape[1]
    whole = size // chunk * chunk
    if count * chunk * 4 > size:
        return tuple(scores.topk(count, dim=-1))
    maxima = scores[:, :whole].unflatten(1, (whole // chunk, chunk)).amax(-1)
    starts = maxima.topk(count, dim=-1, sorted=False).indices * chunk
    ids = (starts.unsqueeze(2) + torch.arange(chunk, device=scores.device)).flatten(1)
    ids = torch.cat([ids, torch.arange(whole, size, device=scores.device).expand(len(ids), -1)], dim=1)
    values, at = scores.gather(1, ids).topk(count, dim=-1)
    return values, ids.gather(1, at)


def _among_all(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    return _draw_likely(integer_weights(scale(possible, rows, seen)), rows, u)


def _draw_likely(weights: Tensor, rows: RowParams, u: Tensor) -> Tensor:
    """Min-p, the last filter, and the draw; writes to `weights`."""
    return draw(weights if rows.min_p is None else weights.mul_(weights >= least_weight(rows)), u)


def _within_top_p(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    """Among a few candidates if the mass of all others may be cut; else by a histogram."""
    scores = scale(possible, rows, seen)
    weights = integer_weights(scores)
    if scores.shape[1] >= 2**15:
        values, ids = _largest(scores, 256)
        likely = integer_weights(values)
        total = weights.sum(-1, keepdim=True)
        others = total - likely.sum(-1, keepdim=True)
        # The least candidate may be one of a tie that reaches past them: it must be cut with the others.
        tied = likely.mul_(values == values[:, -1:]).sum(-1, keepdim=True)
        if (others + tied <= removable_mass(total, rows)).all():
            return _draw_candidate(values, ids, rows, u, others)
    return _draw_likely(weights.mul_(_nucleus(scores, weights, rows)), rows, u)


def _nucleus(scores: Tensor, weights: Tensor, rows: RowParams) -> Tensor:
    """What top-p keeps, (B, V) bool: a histogram of mass over score finds the bin of the cut; only that is sorted."""
    # Bin 0 holds the likeliest; the last begins 32 nats below, where weights are 0.
    width = 128 if scores.shape[1] > 8192 else 8
    bins = (scores - scores.amax(-1, keepdim=True)).mul_(-width).clamp_(max=32 * width - 1).long()
    mass = weights.new_zeros(len(scores), 32 * width).scatter_add_(1, bins, weights)
    ends = mass.cumsum(-1)
    total = ends[:, -1:]
    spare = removable_mass(total, rows)
    # The least likely bin that, with all bins below it, is more than may be cut.
    edge = (total - ends + mass > spare).sum(-1, keepdim=True) - 1
    row, column = (bins == edge).nonzero(as_tuple=True)
    order = scores[row, column].argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, column = row[order], column[order]
    running = weights[row, column].cumsum(0)
    first = torch.searchsorted(row, torch.arange(len(scores), device=row.device))
    before = running[first] - weights[row[first], column[first]]
    below = (total - ends).gather(1, edge).squeeze(1) - before
    keep = bins < edge
    keep[row, column] = running + below[row] > spare.squeeze(1)[row]
    return keep
