"""Examples → batches: packed into rows without padding, or padded to rectangles; and the order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qftlab.settings import TrainConfig

if TYPE_CHECKING:  # what reads rows alone starts at once
    import torch
    from torch import Tensor

IGNORED = -100  # transformers' label for "not trained"
# Documents are grouped with others of about their length: a group is closed when padding it would waste this share.
MAX_WASTE = 0.3


class Example:
    """One document as the model sees it, in four bytes and a bit a token.

    Args:
        input_ids: token ids, (T,).
        loss_mask: True where the token is trained (it is *predicted*, from the tokens before it), (T,).
    """

    __slots__ = ("bits", "ids")  # int32 (T,), and the mask packed as numpy's `packbits` does

    def __init__(self, input_ids: Sequence[int], loss_mask: Sequence[bool]) -> None:
        if len(input_ids) != len(loss_mask):
            raise ValueError(f"loss_mask must have {len(input_ids)} entries, got {len(loss_mask)}")
        self.ids = np.asarray(input_ids, dtype=np.int32)
        self.bits = np.packbits(np.asarray(loss_mask, dtype=bool))

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and self.input_ids == other.input_ids and self.loss_mask == other.loss_mask

    def __repr__(self) -> str:
        return f"Example(input_ids={self.input_ids}, loss_mask={self.loss_mask})"

    @property
    def input_ids(self) -> list[int]:
        """Token ids, (T,), as a new list."""
        return self.ids.tolist()

    @property
    def mask(self) -> np.ndarray:
        """True where the token is trained, (T,)."""
        return np.unpackbits(self.bits, count=len(self.ids)).view(bool)

    @property
    def loss_mask(self) -> list[bool]:
        """`mask` as a new list."""
        return self.mask.tolist()

    def labels(self) -> list[int]:
        """Ids where trained, −100 elsewhere; always −100 at the first token, which nothing predicts."""
        labels = np.where(self.mask, self.ids, IGNORED)
        labels[:1] = IGNORED
        return labels.tolist()

    @property
    def num_trained(self) -> int:
        """How many tokens are trained."""
        return int(self.mask.sum())


def count_trained(examples: Sequence[Example]) -> int:
    """How many tokens of these examples are trained."""
    return sum(int(example.mask[1:].sum()) for example in examples)


def _refuse_empty(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("examples must hold at least one example, got none")


def pack(examples: Sequence[Example]) -> dict[str, Tensor | int]:
    """One row of documents, one after the other, for the attention named "packed".

    Returns:
        `input_ids`, `labels`, `position_ids` (1, T), positions restarting at each document; `cu_seq_lens_q` and
        `cu_seq_lens_k` (N + 1,) int32; `max_length_q` and `max_length_k`.
    """
    import torch

    _refuse_empty(examples)
    lengths = list(map(len, examples))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.from_numpy(np.concatenate([e.ids for e in examples])).long().unsqueeze(0),
        "labels": torch.tensor([[label for e in examples for label in e.labels()]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pad(examples: Sequence[Example], pad_id: int, *, side: str = "right") -> dict[str, Tensor]:
    """A rectangle of documents; padding is known by length, never by id, so `pad_id` may equal eos.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`, `labels`, each (B, T).

    Raises:
        ValueError: for a side that is neither "left" nor "right".
    """
    import torch

    _refuse_empty(examples)
    if side not in ("left", "right"):
        raise ValueError(f'side must be "left" or "right", got {side!r}')
    width = max(map(len, examples))

    def fill(values: list[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(values))
        return gap + values if side == "left" else values + gap

    mask = torch.tensor([fill([1] * len(e), 0) for e in examples])
    return {
        "input_ids": torch.tensor([fill(e.input_ids, pad_id) for e in examples]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.tensor([fill(e.labels(), IGNORED) for e in examples]),
    }


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Documents into rows of at most `budget` tokens: the longest first, each into the first row that has room.

    Args:
        lengths: in tokens.
        budget: tokens of a row.

    Returns:
        The numbers of each row's documents; at most 11/9 as many rows as the best packing, and 2/3 (Dósa 2007).

    Raises:
        ValueError: if a document is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(lengths, budget):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def group_by_length(lengths: Sequence[int], *, budget: int | None = None, rows: int | None = None) -> list[list[int]]:
    """Documents into rectangles of their like, for padded batches: the longest first.

    Args:
        lengths: in tokens.
        budget: the most tokens of a rectangle, padding counted.
        rows: the most documents in one.

    Raises:
        ValueError: if a document is longer than the budget.
    """
    groups: list[list[int]] = []
    for i in _longest_first(lengths, budget):
        last = groups[-1] if groups else []
        is_full = rows is not None and len(last) >= rows
        if not last or is_full or (budget is not None and (len(last) + 1) * lengths[last[0]] > budget):
            groups.append(last := [])
        last.append(i)
    return groups


def _longest_first(lengths: Sequence[int], budget: int | None) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and budget is not None and lengths[order[0]] > budget:
        raise ValueError(
            f"the token budget of a micro-batch must be at least the longest document, got {budget} for "
            f"{lengths[order[0]]} tokens: raise tokens_per_micro_batch, or leave long rows out by max_length"
        )
    return order


def split_step(lengths: Sequence[int], config: TrainConfig, each: int = 1) -> list[list[int]]:
    """What an optimizer step is made of by number, split into micro-batches: packed rows, or rectangles of like length.

    Args:
        lengths: in tokens, of documents; or of groups that stay together: packed, of all in one, else of its longest.
        config: packing, `tokens_per_micro_batch` (padding counted) and `micro_batch_size` (in groups).
        each: documents of a group, which are as many rows of a rectangle.

    Raises:
        ValueError: if a document is longer than the budget.
    """
    budget, rows = config.tokens_per_micro_batch, config.micro_batch_size
    if not config.packing:
        return group_by_length(lengths, budget=budget and budget // each, rows=rows)
    if budget is not None:
        return first_fit_decreasing(lengths, budget)
    size = rows or len(lengths)
    return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]


def batches(count: int, *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of an epoch over `count` examples: index lists, each example once.

    Of its arguments alone: a resumed run asks for it again, and nothing about it is saved.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = list(range(count))
    random.Random(f"batches {seed} {epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


@dataclass(frozen=True)
class PackedLayout:
    """How the documents of a packed row are laid out as rectangles, each of documents of about one length.

    Args:
        shapes: (documents, tokens) of each rectangle.
        places: (P,) the token of each place of all rectangles, token 0 where padded.
        back: (T,) the first place of each token.
        is_shared: whether a token stands at several places.
    """

    shapes: tuple[tuple[int, int], ...]
    places: Tensor
    back: Tensor
    is_shared: bool

    def rectangles(self, x: Tensor) -> list[Tensor]:
        """(T, H, d) → each (n, t, H, d)."""
        return self._cut(x[self.places])

    def spread(self, gradient: Tensor) -> list[Tensor]:
        """`rectangles` with zeros where a token is padding, or stands once more."""
        places = gradient.new_zeros(len(self.places), *gradient.shape[1:])
        places[self.back] = gradient
        return self._cut(places)

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Rectangles → (T, H, d), each token from its first place."""
        return self._placed(pieces)[self.back]

    def summed(self, pieces: Sequence[Tensor]) -> Tensor:
        """Rectangles with zeros where padded → (T, H, d), each token the sum over its places."""
        if not self.is_shared:
            return self.joined(pieces)
        places = self._placed(pieces)
        return places.new_zeros(len(self.back), *places.shape[1:]).index_add_(0, self.places, places)

    def _placed(self, pieces: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat([piece.flatten(0, 1) for piece in pieces])

    def _cut(self, places: Tensor) -> list[Tensor]:
        pieces = places.split([n * t for n, t in self.shapes])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def packed_layout(documents: Sequence[Tensor], device: torch.device | str = "cpu") -> PackedLayout:
    """Groups documents of about one length.

    Args:
        documents: where each document's tokens stand in the row, int64; documents may share tokens.
        device: of the layout.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    documents, tables, group, used = sorted(documents, key=len), [], [], 0
    for i, document in enumerate(documents):
        group.append(document)
        used += len(document)
        longest = len(documents[i + 1]) if i + 1 < len(documents) else 0
        if not longest or used < (1 - MAX_WASTE) * longest * len(group):
            tables.append(pad_sequence(group, batch_first=True, padding_value=-1))
            group, used = [], 0
    places = torch.cat([table.flatten() for table in tables])
    (real,) = torch.nonzero(places >= 0, as_tuple=True)
    tokens = places[real]
    back = torch.full((int(tokens.max()) + 1,), len(places)).scatter_reduce(0, tokens, real, "amin")
    shapes = tuple(tuple(table.shape) for table in tables)
    return PackedLayout(shapes, places.clamp(min=0).to(device), back.to(device), is_shared=len(back) < len(tokens))
