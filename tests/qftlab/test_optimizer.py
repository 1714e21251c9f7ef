"""What moves the weights, by hand: how many steps and at which rate, and fp32 copies that add up gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from qftlab.settings import TrainConfig
from qftlab.train.optimizer import (
    MasterWeights,
    MicroBatch,
    count_real_tokens,
    learning_rate,
    make_optimizer,
    optimizer_step,
    total_steps,
)


class Sum(torch.nn.Module):
    """A loss whose gradient is its input: weight · x / num_tokens, in the weight's type."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1, dtype=dtype))

    def forward(self, x: torch.Tensor, num_tokens: int, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        return (self.weight * x.to(self.weight.dtype)).sum() / num_tokens


def batch(value: float) -> MicroBatch:
    return MicroBatch({"x": torch.tensor([value]), "input_ids": torch.zeros(1, 3)}, (1,))


def test_steps_of_a_run_by_hand() -> None:
    steps = {(epochs, size): total_steps(TrainConfig(epochs=epochs), size)
             for epochs, size in ((1, 10), (0.5, 3), (0.1, 3), (1.1, 10), (3, 7))}  # fmt: skip
    # 1.1 * 10 is 11.000000000000002 in floating point: no twelfth step.
    assert list(steps.values()) == [10, 2, 1, 11, 21]
    assert total_steps(TrainConfig(epochs=5, max_steps=2), 10) == 2


def test_rates_of_a_run_by_hand() -> None:
    def rates(schedule: str, warmup: float, total: int) -> list[float]:
        config = TrainConfig(lr=8.0, schedule=schedule, warmup_ratio=warmup)
        return [learning_rate(config, step, total) for step in range(total)]

    assert rates("linear", 0.5, 8) == [2, 4, 6, 8, 8, 6, 4, 2]
    assert rates("constant", 0.25, 4) == [8, 8, 8, 8] and rates("linear", 0, 4) == [8, 6, 4, 2]
    assert rates("cosine", 0, 4) == pytest.approx([8, 4 + 8**0.5, 4, 4 - 8**0.5])
    assert learning_rate(TrainConfig(lr=8.0, warmup_ratio=0.9), 0, 1) == 8  # all of it is warm-up


def test_master_weights_add_up_the_gradients_of_all_micro_batches_in_fp32() -> None:
    """1 + 2^-9 + 2^-9 is 1 in bf16, added one by one, and 1 + 2^-8 in fp32."""
    module = Sum(torch.bfloat16)
    master = MasterWeights(module)
    for value in (1.0, 2**-9, 2**-9):
        module(torch.tensor([value]), 1).backward()
        assert module.weight.grad is None
    copy = master.named["weight"]
    assert copy.dtype == torch.float32 and copy.grad.dtype == torch.float32 and copy.grad.item() == 1 + 2**-8
    master.remove()


def test_a_step_with_master_weights_begins_with_no_gradient() -> None:
    """Clipping off: the norm of a step is the length of its own gradient, and of nothing before it."""
    module = Sum(torch.bfloat16)
    master = MasterWeights(module)
    optimizer = make_optimizer(module, TrainConfig(weight_decay=0.0), master.named)
    for first, second in ((3.0, 5.0), (1.0, -3.0)):
        report = optimizer_step(module, optimizer, [batch(first), batch(second)], 0.5, 0, count=lambda b: 1)
        assert (report.grad_norm, report.loss) == (abs(first + second) / 2, pytest.approx((first + second) / 2))
        assert (report.tokens, report.trained_tokens) == (6, 2)
        before = master.named["weight"].item()
    # The loss is that of bf16 weights, which nobody has written yet; AdamW's first step is as long as its rate.
    assert module.weight.item() == 1 and before < 0.75
    master.write_()
    assert module.weight.item() == pytest.approx(before, abs=2**-8)


def test_gradients_are_exchanged_at_the_last_micro_batch_only() -> None:
    """Of DDP that is the one whose passes are outside `no_sync`."""

    class Wrapped(Sum):
        exchanges, is_quiet = (), False

        @contextmanager
        def no_sync(self):
            self.is_quiet = True
            yield
            self.is_quiet = False

        def forward(self, **inputs) -> torch.Tensor:
            self.exchanges += (not self.is_quiet,)
            return super().forward(**inputs)

    module = Wrapped()
    optimizer_step(module, make_optimizer(module, TrainConfig()), [batch(1.0)] * 3, 0.1, 1.0, count=lambda b: 1)
    assert module.exchanges == (False, False, True)


def test_real_tokens_are_those_the_mask_names() -> None:
    ids = torch.zeros(2, 3)
    assert count_real_tokens({"input_ids": ids}) == 6
    assert count_real_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == 3


@pytest.mark.parametrize("count, said", [(20, "19, 20:"), (21, "19, 20 and 1 more:")])
def test_a_step_that_is_no_number_names_twenty_rows(count: int, said: str) -> None:
    module = Sum()
    optimizer = make_optimizer(module, TrainConfig())
    bad = MicroBatch({"x": torch.tensor([float("nan")]), "input_ids": torch.zeros(1, 3)}, tuple(range(1, count + 1)))
    with pytest.raises(ArithmeticError, match=f"loss must be finite, got nan at step 7 in rows 1, 2, .*{said}"):
        optimizer_step(module, optimizer, [batch(1.0), bad], 0.1, 1.0, count=lambda b: 1, number=7)
    with pytest.raises(ArithmeticError, match="gradient norm must be finite, got inf at step 1 in rows 1:"):
        huge = MicroBatch({"x": torch.tensor([3e38, 3e38]), "input_ids": torch.zeros(1, 3)}, (1,))
        module.weight.data.zero_()
        optimizer_step(module, optimizer, [huge], 0.1, 1.0, count=lambda b: 1)
    assert module.weight.item() == 0
