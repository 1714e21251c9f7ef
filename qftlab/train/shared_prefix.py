"""Packed answers to one prompt that share its tokens: the prompt is computed once for all of them.

A packed row holds the prompt without its last token, and then for each answer that last token (which predicts the
answer's first) and the answer. Attention gathers each answer's document, prompt included, from where its tokens stand.
That is what the packed attention of the CPU does anyway; the kernel that CUDA uses wants documents in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qftlab.data.batching import IGNORED, Example
from qftlab.model.attention import MAX_WASTE


def pack_answers(examples: Sequence[Example], prompts: Sequence[int], starts: Sequence[int]) -> dict[str, Tensor | int]:
    """One packed row of documents, neighbours with the same prompt sharing its tokens.

    Args:
        examples: whole documents, prompt and answer.
        prompts: the number of each document's prompt; neighbours of one number have the same prompt.
        starts: tokens of each document's prompt, at least 1.

    Returns:
        As `qftlab.data.batching.pack`; a shared prompt counts to its first document. It must be attended to by
        `packed_attention` without CUDA's kernel.
    """
    ids, labels, positions, bounds, documents = [], [], [], [0], []
    for _, members in groupby(range(len(examples)), key=prompts.__getitem__):
        members = list(members)
        shared = starts[members[0]] - 1
        prefix = list(range(len(ids), len(ids) + shared))
        ids += examples[members[0]].input_ids[:shared]
        labels += [IGNORED] * shared
        positions += range(shared)
        for i in members:
            own = examples[i].input_ids[shared:]
            documents.append(prefix + list(range(len(ids), len(ids) + len(own))))
            ids += own
            labels += examples[i].labels()[shared:]
            positions += range(shared, shared + len(own))
            bounds.append(len(ids))
    longest = max(map(len, documents))
    ends = torch.tensor(bounds, dtype=torch.int32)
    ends._packed_plan = attention_plan(documents, len(ids))
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "cu_seq_lens_q": ends,
            "position_ids": torch.tensor([positions]), "cu_seq_lens_k": ends,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def attention_plan(documents: Sequence[Sequence[int]], count: int) -> tuple[list[Tensor], Tensor]:
    """What `packed_attention` keeps on `cu_seq_lens_q`: tables of documents of like length, and the way back.

    Args:
        documents: where each document's tokens stand in the row.
        count: tokens of the row.

    Returns:
        (n, t) int64 tables of positions, −1 where padded; and (T,) where in the joined pieces each token is first.
    """
    documents = sorted(map(torch.tensor, documents), key=len)
    tables, group = [], []
    for i, document in enumerate(documents):
        group.append(document)
        longest = len(documents[i + 1]) if i + 1 < len(documents) else 0
        if not longest or sum(map(len, group)) < (1 - MAX_WASTE) * longest * len(group):
            tables.append(pad_sequence(group, batch_first=True, padding_value=-1))
            group = []
    back = [-1] * count
    for place, token in reversed(list(enumerate(torch.cat([t[t >= 0] for t in tables]).tolist()))):
        back[token] = place
    return tables, torch.tensor(back)
