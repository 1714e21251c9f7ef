"""What tells one run from another, and what its randomness is drawn from, by hand."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from random_models import random_model

from qftlab.rows.batches import Example
from qftlab.settings import TrainConfig
from qftlab.train.checkpoint import Checkpoints, fingerprint, frozen_fingerprint, refuse_difference
from qftlab.train.distributed import step_seed
from qftlab.train.loop import TrainResult
from qftlab.train.sft import fit_examples


def test_at_most_twenty_differences_are_named(tmp_path) -> None:
    def message(count: int) -> list[str]:
        with pytest.raises(ValueError, match="must belong to this run") as caught:
            refuse_difference({f"n{i}": 0 for i in range(count)}, {f"n{i}": 1 for i in range(count)}, tmp_path)
        return str(caught.value).split("\n")

    way_out = "resume with the settings of that run, or start a new one"
    assert message(1)[1:] == ["  n0: 0 in the checkpoint, 1 now", way_out]
    assert [len(message(n)) for n in (20, 21, 30)] == [22, 23, 23]
    assert message(21)[21] == "  and 1 more" and message(30)[21] == "  and 10 more"
    with pytest.raises(ValueError, match="b: unset in the checkpoint, 2 now"):
        refuse_difference({"a": [1]}, {"a": (1,), "b": 2}, tmp_path)


def test_the_best_step_is_the_first_of_the_lowest_finite_losses() -> None:
    result, best = TrainResult(), []
    for step, loss in [(0, math.inf), (1, math.nan), (2, 3.0), (3, 1.0), (4, 1.0), (5, -math.inf), (6, 0.5)]:
        result.add_held_out(step, loss)
        best.append(result.best_step)
    assert best == [None, None, 2, 3, 3, 3, 6]


def test_fingerprints_by_hand() -> None:
    first = Example([1, 2], [False, True])
    digest = hashlib.sha256(b"[[1, 2], [0, 1]]").hexdigest()[:16]
    assert fingerprint([first]) == f"1 (sha256 {digest})"
    assert fingerprint([first, first]).startswith("2 (sha256 ")
    module = torch.nn.Linear(200, 1)
    assert frozen_fingerprint(module) == "none"
    module.requires_grad_(False)
    before = frozen_fingerprint(module)
    assert before.startswith("2 tensors (sha256 ") and len(before) == len("2 tensors (sha256 )") + 16
    # Every third of 200 values is looked at: some 64 of each tensor.
    for place, is_seen in ((0, True), (1, False), (2, False), (3, True), (198, True)):
        kept = module.weight[0, place].item()
        module.weight[0, place] = kept + 1
        assert (frozen_fingerprint(module) != before) == is_seen, place
        module.weight[0, place] = kept


def test_seeds_are_seven_bytes_of_a_hash() -> None:
    """Recorded runs are repeated from them: another number is another run."""

    def by_hand(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:14], 16)

    assert step_seed("rollout", 3, 5) == by_hand("rollout 3 5 0")
    assert step_seed("step", 3, 5, 1) == by_hand("step 3 5 1")


def test_two_checkpoints_are_kept(tmp_path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-00000{step}").mkdir()
    (tmp_path / "step-12").mkdir()
    kept = Checkpoints(tmp_path)
    assert [p.name[-1] for p in kept.all()] == ["1", "2", "3"] and kept.last().name == "step-000003"
    assert kept.keep == 2 and Checkpoints(tmp_path / "none").last() is None


def test_every_step_can_be_saved_the_first_as_well(tmp_path) -> None:
    config = TrainConfig(batch_size=1, max_steps=3, save_every=1, keep=9)
    fit_examples(random_model(), [Example([1, 2, 3], [False, True, True])] * 3, config, checkpoints=tmp_path)
    assert [p.name[-1] for p in Checkpoints(tmp_path).all()] == ["1", "2", "3"]
