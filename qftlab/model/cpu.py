"""What only makes a laptop fast: blocked attention of documents, and packed answers that share their prompt.

torch's fused kernel for the CPU multiplies small tiles and computes the weights a second time in backward. Here a block
of queries meets all keys up to its own end in one batched product, and the weights are kept: T²/2 numbers a head and
document, which is why long documents are left to the kernel.

A packed row of answers holds the prompt without its last token, and then for each answer that last token (which
predicts the answer's first) and the answer. Attention gathers each answer's document, prompt included, from where its
tokens stand. The kernel that CUDA uses wants documents in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from qftlab.rows.batches import Example, PackedLayout, pack

QUERIES = 64  # of a block: with more, too many products fall above the diagonal; with fewer, they are too small


class BlockedAttention(torch.autograd.Function):
    """(T, H, d) from q (T, H, d), k and v (T, H_kv, d), a layout, and the scale of the scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float) -> Tensor:
        """Keeps the weights of each block where there will be a backward."""
        heads, outs, kept = k.shape[1], [], []
        for (n, t), *pieces in zip(layout.shapes, *map(layout.rectangles, (q, k, v)), strict=True):
            qs, ks, vs = (_folded(x, heads) for x in pieces)
            out = torch.empty_like(qs)
            weights = []
            for rows, end in _blocks(t, qs.shape[1] // t):
                w = _weights(qs[:, rows], ks[:, :end], scale)
                out[:, rows] = torch.bmm(w, vs[:, :end])
                weights += [w] if any(ctx.needs_input_grad) else []
            kept += [qs, ks, vs, out, *weights] if weights else []
            outs.append(_unfolded(out, n, t, heads))
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.heads = layout, scale, heads
        return layout.joined(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        """With P the weights and dP = dO Vᵀ, the scores' gradient is P (dP − Σ dO · O) (Dao et al. 2022, B.2)."""
        layout, heads, kept, found = ctx.layout, ctx.heads, iter(ctx.saved_tensors), []
        for (n, t), piece in zip(layout.shapes, layout.spread(upstream), strict=True):
            qs, ks, vs, out = (next(kept) for _ in range(4))
            score_grads = _folded(piece, heads)
            dq, dk, dv = torch.empty_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
            means = (score_grads * out).sum(-1, keepdim=True)
            for rows, end in _blocks(t, qs.shape[1] // t):
                w, ds = next(kept), torch.bmm(score_grads[:, rows], vs[:, :end].transpose(1, 2))
                ds.sub_(means[:, rows]).mul_(w).mul_(ctx.scale)
                dq[:, rows] = torch.bmm(ds, ks[:, :end])
                dk[:, :end].baddbmm_(ds.transpose(1, 2), qs[:, rows])
                dv[:, :end].baddbmm_(w.transpose(1, 2), score_grads[:, rows])
            found.append([_unfolded(x, n, t, heads) for x in (dq, dk, dv)])
        dq, dk, dv = zip(*found, strict=True)
        return layout.joined(dq), layout.summed(dk), layout.summed(dv), None, None


def _folded(x: Tensor, heads: int) -> Tensor:
    """(n, t, H, d) → (n · heads, t · H / heads, d): the queries that share a key head become rows of one matrix."""
    n, t, _, d = x.shape
    return x.reshape(n, t, heads, -1).transpose(1, 2).reshape(n * heads, -1, d)


def _unfolded(x: Tensor, n: int, t: int, heads: int) -> Tensor:
    """`_folded` undone."""
    return x.view(n, heads, t, -1).transpose(1, 2).reshape(n, t, -1, x.shape[-1])


def _blocks(t: int, groups: int) -> Iterator[tuple[slice, int]]:
    """The folded rows of each block of queries, and where the last key that they see ends."""
    for start in range(0, t, QUERIES):
        end = min(t, start + QUERIES)
        yield slice(start * groups, end * groups), end


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax of the scaled scores of a block of folded queries, whose last token stands at the last key."""
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    end = k.shape[1]
    tokens = (end - 1) % QUERIES + 1
    future = scores.new_full((tokens, tokens), -torch.inf).triu_(1)
    scores.view(len(q), tokens, -1, end)[..., end - tokens :] += future.unsqueeze(1)
    return scores.softmax(-1)


def pack_answers(examples: Sequence[Example], prompts: Sequence[int], starts: Sequence[int]) -> dict[str, Tensor | int]:
    """One packed row of documents, neighbours with the same prompt sharing its tokens.

    Args:
        examples: whole documents, prompt and answer.
        prompts: the number of each document's prompt; neighbours of one number have the same prompt.
        starts: tokens of each document's prompt, at least 1.

    Returns:
        As `qftlab.rows.batches.pack`, and `documents` (N, L) int64: where each document's tokens stand, padded with −1.
        A shared prompt counts to its first document. `packed_attention` must attend to it, without CUDA's kernel.
    """
    parts, positions, documents = [], [], []
    for _, members in groupby(range(len(examples)), key=prompts.__getitem__):
        begin, skipped = len(positions), 0
        for i in members:
            example, length = examples[i], len(examples[i])
            parts.append(Example(example.ids[skipped:], example.mask[skipped:]))
            own = range(len(positions), len(positions) + length - skipped)
            documents.append([*range(begin, begin + skipped), *own])
            positions += range(skipped, length)
            skipped = starts[i] - 1
    longest = max(map(len, documents))
    row = pack(parts) | {"position_ids": torch.tensor([positions]), "max_length_q": longest, "max_length_k": longest}
    return row | {"documents": pad_sequence(list(map(torch.tensor, documents)), True, padding_value=-1)}
