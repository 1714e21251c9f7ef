"""Exercises of notebook 02, chat and masking: what is trained, what a position predicts, and who sees whom."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qftlab_course.exercises import Exercise, Suspect, integers

END, NEWLINE, HEADER = 2, 3, 9  # ids of <|im_end|> and "\n" in the toy turns; a header is made of 9s
ROLES = ("system", "user", "assistant")
Turn = tuple[str, list[int], list[int]]


def loss_mask(turns: list[Turn]) -> list[bool]:
    """One flag per token of all turns: True for an assistant's content and the `<|im_end|>` after it, else False.

    A turn is (role, header ids, content ids), and renders as header, content, `<|im_end|>`, newline.
    """
    mask: list[bool] = []
    for role, header, content in turns:
        mask += [False] * len(header) + [role == "assistant"] * (len(content) + 1) + [False]
    return mask


def _mask_like(header=False, content=True, end=True, newline=False, roles=("assistant",), last_only=False):
    def mask(turns):
        flags = []
        last = max((i for i, turn in enumerate(turns) if turn[0] in roles), default=-1)
        for i, (role, head, body) in enumerate(turns):
            on = role in roles and (i == last or not last_only)
            flags += [on and header] * len(head) + [on and content] * len(body) + [on and end, on and newline]
        return flags

    return mask


def _every_end(turns):
    flags = []
    for role, head, body in turns:
        flags += [False] * len(head) + [role == "assistant"] * len(body) + [True, False]
    return flags


def _draw_turns(rng: random.Random, size: int) -> tuple:
    count = 1 + size // 2
    roles = [rng.choice(ROLES) for _ in range(count)]
    roles[rng.randrange(count)] = "assistant"
    if size >= 6:
        roles = (["user", "assistant"] * size)[:count]
    turns = [(role, [HEADER] * rng.randint(1, 2), integers(rng, rng.randint(1, 3), 10, 19)) for role in roles]
    return (turns,)


def targets(input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """What each position must predict, (T,) -> (T − 1,): the next id where that token is trained, else −100."""
    return torch.where(loss_mask[1:], input_ids[1:], -100)


def _draw_targets(rng: random.Random, size: int) -> tuple:
    ids = torch.tensor(rng.sample(range(10, 60), size + 1))
    mask = torch.tensor([rng.random() < 0.5 for _ in range(size + 1)])
    mask[-1] = True
    mask[0] = size % 2 == 1  # at size 1 a mask that is not shifted does no harm, which sets it apart
    return ids, mask


def pad_labels(rows: list[list[int]], pad_id: int) -> Tensor:
    """Labels (B, T) of rows padded on the right: the ids themselves, −100 on padding; a real `pad_id` stays trained."""
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])


def _padded(rows, pad_id, left=False):
    width = max(map(len, rows))
    gaps = [[pad_id] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])


def _masked_by_id(rows, pad_id):
    ids = _padded(rows, pad_id)
    return ids.masked_fill(ids == pad_id, -100)


def _draw_rows(rng: random.Random, size: int) -> tuple:
    pad_id = 0  # as in Qwen's base models, where the end of a document is also the padding
    lengths = [rng.randint(1, size) for _ in range(1 + size // 2)]
    rows = [integers(rng, length - 1, 5, 19) + [pad_id] for length in lengths]
    return rows, pad_id


def packed_mask(lengths: list[int]) -> Tensor:
    """Who may look at whom in one packed row, (T, T) bool: [query, key], causal, and within a document only."""
    return _same_document(lengths).tril()


def _same_document(lengths):
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return document[:, None] == document[None, :]


def _causal(lengths):
    return torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).tril()


def _draw_lengths(rng: random.Random, size: int) -> tuple:
    return ([rng.randint(1, 2) for _ in range(1 + size // 2)],) if size < 5 else (integers(rng, 3, 1, size - 2),)


EXERCISES = (
    Exercise(
        id="02.1",
        title="The loss mask of a conversation",
        dots=2,
        minutes=8,
        reference=loss_mask,
        draw=_draw_turns,
        instead="go through the turns and add one flag per token: header, content, end of turn, newline",
        forbidden=("qftlab.rows.chat.render_chat",),
        suspects=(
            Suspect(
                "the end of the turn is not trained: such a model never stops, it goes on to interview itself",
                like=_mask_like(end=False),
            ),
            Suspect(
                "the newline after <|im_end|> is trained; the model never has to write it",
                like=_mask_like(newline=True),
            ),
            Suspect("the header is trained; the prompt already holds it", like=_mask_like(header=True)),
            Suspect("header and newline are trained", like=_mask_like(header=True, newline=True)),
            Suspect("every turn is trained; only the assistant's are", like=_mask_like(roles=ROLES)),
            Suspect(
                "the end of every turn is trained; only the assistant's is: nobody asks the model to end a user's turn",
                like=_every_end,
            ),
            Suspect("only the last assistant turn is trained; train all of them", like=_mask_like(last_only=True)),
            Suspect("the flags are not one per token", when=lambda a, g, w: len(g) != len(w)),
        ),
    ),
    Exercise(
        id="02.2",
        title="Labels: every position predicts the next token",
        dots=1,
        minutes=5,
        reference=targets,
        draw=_draw_targets,
        instead="take the ids and the mask from position 1 on, and put -100 where the mask is False",
        suspects=(
            Suspect(
                "the mask is not shifted: it belongs to the token that is predicted, so take mask[1:] as well",
                like=lambda ids, mask: torch.where(mask[:-1], ids[1:], -100),
            ),
            Suspect(
                "nothing is shifted: position t would predict itself",
                like=lambda ids, mask: torch.where(mask[:-1], ids[:-1], -100),
            ),
            Suspect(
                "there are T labels: the last position has nothing to predict, leave it out",
                when=lambda a, g, w: len(g) == len(w) + 1,
            ),
            Suspect("untrained positions hold 0, which is a real token; use -100", like=lambda ids, m: ids[1:] * m[1:]),
            Suspect(
                "the mask is upside down: True means trained",
                like=lambda ids, mask: torch.where(mask[1:], -100, ids[1:]),
            ),
        ),
    ),
    Exercise(
        id="02.3",
        title="Padding when pad and end are the same token",
        dots=2,
        minutes=6,
        reference=pad_labels,
        draw=_draw_rows,
        instead="fill up with -100 by the length of each row",
        forbidden=("qftlab.rows.batches.pad",),
        suspects=(
            Suspect(
                "padding is found by its id, and so the real end of a row is masked too; go by the row's length",
                like=_masked_by_id,
            ),
            Suspect("the padding is trained: labels must be -100 there, not the id", like=_padded),
            Suspect(
                "padding stands on the left; these labels are padded on the right",
                like=lambda rows, pad: torch.tensor([[-100] * (max(map(len, rows)) - len(r)) + r for r in rows]),
            ),
        ),
    ),
    Exercise(
        id="02.4",
        title="The attention mask of a packed row",
        dots=3,
        minutes=10,
        reference=packed_mask,
        draw=_draw_lengths,
        instead="number the documents token by token, compare all pairs, and keep the lower triangle",
        forbidden=("qftlab.model.attention.packed_attention", "transformers.masking_utils.create_causal_mask"),
        suspects=(
            Suspect("documents see each other: a later one may not look into an earlier one", like=_causal),
            Suspect("tokens see the future: a query looks at itself and at what came before", like=_same_document),
            Suspect(
                "rows are keys here; the first index is the query, which looks back",
                like=lambda n: _same_document(n).triu(),
            ),
            Suspect("a token must see itself: keep the diagonal", like=lambda n: _same_document(n).tril(-1)),
            Suspect("True means may look; this is the opposite", like=lambda n: ~_same_document(n).tril()),
        ),
    ),
)
