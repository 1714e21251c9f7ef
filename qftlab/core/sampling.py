"""From logits to the next token: two samplers that agree with `filter_logits` and with each other, token for token.

`filter_logits` is the readable form, `sample` the fast one, `sample_rows` the one without branches for CUDA graphs.
Every mass is a sum of whole numbers (`draws.weigh`), so all pick the same token for the same u, and a row's token
does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qftlab.core.draws import draw, uniform, weigh
from qftlab.core.filters import (
    Params,
    RowParams,
    SamplingParams,
    Seen,
    check_seen,
    each_row,
    filter_logits,
    heat,
    kept,
    least_weight,
    penalise,
    possible_logits,
    refuse_hopeless,
    scale,
    spare_mass,
)

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
    refuse_hopeless(possible)
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
    return draw(weigh(scores).mul_(kept(scores, rows)), u)


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
    values = heat(values, rows)
    tokens = _draw_candidate(values, ids, rows, u)
    if values.shape[1] < size:
        short = (values[:, -1:] == values.gather(1, rows.top_k.unsqueeze(1) - 1)).squeeze(1)
        if short.any():
            rows = rows.at(short)
            tokens[short] = _draw_kept(heat(scores[short], rows), rows, u[short])
    return tokens


def _draw_candidate(values: Tensor, ids: Tensor, rows: RowParams, u: Tensor, others: Tensor | int = 0) -> Tensor:
    ids, order = ids.sort(dim=-1)
    values = values.gather(1, order)
    return ids.gather(1, draw(weigh(values).mul_(kept(values, rows, others)), u).unsqueeze(1)).squeeze(1)


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
    return _draw_likely(weigh(scale(possible, rows, seen)), rows, u)


def _draw_likely(weights: Tensor, rows: RowParams, u: Tensor) -> Tensor:
    """Min-p, the last filter, and the draw; writes to `weights`."""
    return draw(weights if rows.min_p is None else weights.mul_(weights >= least_weight(rows)), u)


def _within_top_p(possible: Tensor, rows: RowParams, u: Tensor, seen: Seen | None) -> Tensor:
    """Among a few candidates if the mass of all others may be cut; else by a histogram."""
    scores = scale(possible, rows, seen)
    weights = weigh(scores)
    if scores.shape[1] >= 2**15:
        values, ids = _largest(scores, 256)
        likely = weigh(values)
        total = weights.sum(-1, keepdim=True)
        others = total - likely.sum(-1, keepdim=True)
        # The least candidate may be one of a tie that reaches past them: it must be cut with the others.
        tied = likely.mul_(values == values[:, -1:]).sum(-1, keepdim=True)
        if (others + tied <= spare_mass(total, rows)).all():
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
    spare = spare_mass(total, rows)
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
