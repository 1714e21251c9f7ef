"""Exercises of notebook 01, tokenizer extension: a merge step of BPE, a new row, a table that never shrinks."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qftlab_course.exercises import Exercise, Suspect, integers, tensor


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """One BPE merge: every occurrence of `pair`, left to right and without overlap, becomes one piece."""
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        is_pair = tuple(pieces[i : i + 2]) == tuple(pair)
        merged.append(pieces[i] + pieces[i + 1] if is_pair else pieces[i])
        i += 2 if is_pair else 1
    return merged


def _merge_first_only(pieces, pair):
    for i in range(len(pieces) - 1):
        if (pieces[i], pieces[i + 1]) == tuple(pair):
            return [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
    return pieces


def _merge_again_and_again(pieces, pair):
    merged, text = list(pieces), "".join(pair)
    i = 0
    while i < len(merged) - 1:
        if merged[i] + merged[i + 1] == text:
            merged[i : i + 2] = [text]
        else:
            i += 1
    return merged


def _merge_overlapping(pieces, pair):
    merged = []
    for i, piece in enumerate(pieces):
        is_pair = tuple(pieces[i : i + 2]) == tuple(pair)
        if is_pair:
            merged.append(piece + pieces[i + 1])
        elif not merged or tuple(pieces[max(i - 1, 0) : i + 1]) != tuple(pair):
            merged.append(piece)
    return merged


def _draw_merge(rng: random.Random, size: int) -> tuple:
    alphabet = ["a", "b", "ab"] if size % 2 else ["a", "b"]
    pieces = [rng.choice(alphabet) for _ in range(size + 1)]
    if size == 3:
        pieces, pair = ["a", "a", "a"], ("a", "a")
    elif size == 4:
        pieces, pair = ["a", "b", "a", "b"], ("a", "b")
    elif size == 5:
        blocks = rng.sample([["a", "ba"], ["ab", "a"], ["b"]], 3)
        pieces, pair = sum(blocks, []), ("a", "ba")
    else:
        pair = (rng.choice(alphabet), rng.choice(alphabet))
    return pieces, pair


def mean_row(table: Tensor, piece_ids: list[int]) -> Tensor:
    """The new embedding row (D,): the mean of the rows of `table` (V, D) that its old pieces had, repeats counted."""
    return table[torch.tensor(piece_ids)].mean(dim=0)


def _draw_row(rng: random.Random, size: int) -> tuple:
    rows = size + 1
    ids = integers(rng, size, 0, rows - 1)
    if size == 3:
        ids[1] = ids[0]
        ids[2] = (ids[0] + 1) % rows
    return tensor(rng, rows, 1 + size // 2), ids


def resize(table: Tensor, num_tokens: int) -> Tensor:
    """A table of max(rows, num_tokens) rows: the old rows unchanged, new ones zero; never fewer rows than before."""
    missing = max(num_tokens - table.shape[0], 0)
    return torch.cat([table, table.new_zeros(missing, table.shape[1])])


def _draw_resize(rng: random.Random, size: int) -> tuple:
    rows = size + 1
    return tensor(rng, rows, 1 + size % 3), rows + (2, -1, 0, 1)[size % 4]


EXERCISES = (
    Exercise(
        id="01.1",
        title="One merge step of byte-pair encoding",
        dots=2,
        minutes=8,
        reference=merge,
        draw=_draw_merge,
        instead="walk over the pieces with an index and compare neighbours with the pair",
        suspects=(
            Suspect("only the first occurrence is merged; go on to the end of the list", like=_merge_first_only),
            Suspect(
                "one piece is used by two merges; after a merge, step over both of its pieces", like=_merge_overlapping
            ),
            Suspect(
                "pieces are compared as joined text; 'a' + 'ba' and 'ab' + 'a' spell the same, but are other pairs",
                like=_merge_again_and_again,
            ),
            Suspect(
                "the pieces do not spell the same text as before", when=lambda a, g, w: "".join(g) != "".join(a[0])
            ),
        ),
    ),
    Exercise(
        id="01.2",
        title="A new row from the mean of its pieces",
        dots=1,
        minutes=5,
        reference=mean_row,
        draw=_draw_row,
        instead="pick the rows of the pieces with an index and average over them",
        forbidden=(
            "torch.nn.functional.embedding_bag",
            "torch.nn.EmbeddingBag",
            "qftlab.model.loading.extend_model",
        ),
        suspects=(
            Suspect("the rows are added; divide by how many there are", like=lambda t, ids: t[ids].sum(0)),
            Suspect(
                "a piece that occurs twice counts twice, and here it counts once: is there a set?",
                like=lambda t, ids: t[sorted(set(ids))].mean(0),
            ),
            Suspect(
                "this is the mean of the whole table; only the rows of the pieces count", like=lambda t, ids: t.mean(0)
            ),
            Suspect("the mean runs over the width; average over the pieces, dim=0", like=lambda t, ids: t[ids].mean(1)),
        ),
    ),
    Exercise(
        id="01.3",
        title="Resize an embedding table without shrinking it",
        dots=1,
        minutes=6,
        reference=resize,
        draw=_draw_resize,
        instead="put the old rows and as many zero rows as are missing one below the other",
        forbidden=(
            "transformers.PreTrainedModel.resize_token_embeddings",
            "qftlab.model.loading.extend_model",
        ),
        suspects=(
            Suspect(
                "the table shrank: real Qwen has 151,936 rows for 151,665 tokens, and the spare rows must stay",
                when=lambda a, g, w: hasattr(g, "shape") and g.shape[:1] < a[0].shape[:1],
            ),
            Suspect(
                "`num_tokens` is how many tokens there are in all, not how many to add",
                like=lambda t, n: torch.cat([t, t.new_zeros(n, t.shape[1])]),
            ),
            Suspect(
                "the old rows changed; copy them as they are",
                when=lambda a, g, w: g.shape == w.shape and not torch.equal(g[: len(a[0])], a[0]),
            ),
            Suspect("new rows must be zero", when=lambda a, g, w: g.shape == w.shape),
        ),
    ),
)
