"""How a step is split into micro-batches: within the rows and tokens that a forward pass may have, and no smaller."""

from __future__ import annotations

import pytest
import torch

from qftlab.rows.batches import Example
from qftlab.rows.examples import Pair
from qftlab.settings import TrainConfig
from qftlab.train.dpo import PairSource
from qftlab.train.sft import ExampleSource


def example(length: int) -> Example:
    return Example([7] * length, [False] + [True] * (length - 1))


def pairs(*lengths: tuple[int, int]) -> list[Pair]:
    return [Pair(example(a), example(b), number) for number, (a, b) in enumerate(lengths, 1)]


PAIRS = pairs((2, 3), (9, 4), (5, 5), (3, 2), (4, 9), (6, 3))


def split_pairs(**options) -> list[list[int]]:
    source = PairSource(PAIRS, torch.arange(12.0).view(6, 2), TrainConfig(batch_size=6, **options))
    parts = source.split(range(6))
    for part in parts:
        assert torch.equal(part.tensors["numbers"], torch.tensor(part.rows))
        assert torch.equal(part.tensors["reference"], torch.tensor([[2.0 * n - 2, 2.0 * n - 1] for n in part.rows]))
        assert part.tensors["mean_chosen_tokens"].item() == pytest.approx((1 + 8 + 4 + 2 + 3 + 5) / 6)
    return [list(part.rows) for part in parts]


def test_pairs_by_hand() -> None:
    assert split_pairs() == [[1, 2, 3, 4, 5, 6]]
    assert split_pairs(micro_batch_size=4) == [[1, 2, 3, 4], [5, 6]]
    # Packed: 13 and 5 tokens, 13 and 5, and 10 and 9 fill rows of 19.
    assert split_pairs(tokens_per_micro_batch=19) == [[2, 1], [5, 4], [3, 6]]
    # Padded: a pair is two rows of its longer answer's width; 38 tokens are 2 x 19: two pairs of width 9 or three of 6.
    assert split_pairs(tokens_per_micro_batch=38, packing=False) == [[2, 5], [6, 3, 1], [4]]
    assert split_pairs(micro_batch_size=2, packing=False) == [[2, 5], [6, 3], [1, 4]]


def test_examples_by_hand() -> None:
    examples = [example(n) for n in (2, 9, 5, 3, 8, 6)]

    def split(**options) -> list[list[int]]:
        source = ExampleSource(examples, TrainConfig(batch_size=6, **options))
        return [list(part.rows) for part in source.split(range(6))]

    assert split() == [[0, 1, 2, 3, 4, 5]] and split(micro_batch_size=4) == [[0, 1, 2, 3], [4, 5]]
    assert split(tokens_per_micro_batch=11) == [[1, 0], [4, 3], [5, 2]]
    assert split(tokens_per_micro_batch=18, packing=False) == [[1, 4], [5, 2, 3], [0]]
    assert split(micro_batch_size=2, packing=False) == [[1, 4], [5, 2], [3, 0]]


def test_steps_of_an_epoch_and_their_rows() -> None:
    source = PairSource(PAIRS, torch.zeros(6, 2), TrainConfig(batch_size=4, seed=2))
    assert source.steps_per_epoch == 2
    rows = [[row for part in source(1, step) for row in part.rows] for step in range(2)]
    assert list(map(len, rows)) == [4, 2] and sorted(sum(rows, [])) == [1, 2, 3, 4, 5, 6]
    assert ExampleSource([example(3)] * 5, TrainConfig(batch_size=5)).steps_per_epoch == 1
