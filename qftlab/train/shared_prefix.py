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

from qftlab.model.attention import keep_plan_
from qftlab.rows.batches import IGNORED, Example


def pack_answers(examples: Sequence[Example], prompts: Sequence[int], starts: Sequence[int]) -> dict[str, Tensor | int]:
    """One packed row of documents, neighbours with the same prompt sharing its tokens.

    Args:
        examples: whole documents, prompt and answer.
        prompts: the number of each document's prompt; neighbours of one number have the same prompt.
        starts: tokens of each document's prompt, at least 1.

    Returns:
        As `qftlab.rows.batches.pack`; a shared prompt counts to its first document. It must be attended to by
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
    keep_plan_(ends, [torch.tensor(document) for document in documents])
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "cu_seq_lens_q": ends,
            "position_ids": torch.tensor([positions]), "cu_seq_lens_k": ends,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip
