"""The losses of preference and policy training, worked by hand and against TRL 1.16 and float64."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_model
from torch.nn import functional as F
from torch.testing import assert_close

from qftlab.maths.losses import (
    clipped_policy_loss,
    dpo_loss,
    is_clipped,
    kl_estimate,
    leave_one_out_advantages,
    preference_accuracy,
    sum_by_document,
)
from qftlab.rows.batches import Example, pack, pad
from qftlab.train.step import Step


def tensors(*rows) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(row, dtype=torch.float32) for row in rows)


def test_dpo_by_hand() -> None:
    """β = 0.1; chosen −10 against −12 (gain 2), rejected −20 against −17 (gain −3): h = 5, βh = 0.5.

    −log σ(0.5) = log(1 + e^−0.5) = 0.474077; −log σ(−0.5) = 0.974077. ε = 0.1: 0.9·0.474077 + 0.1·0.974077 = 0.524077.
    ipo with 4 and 6 tokens: 2/4 + 3/6 = 1; (1 − 1/0.2)² = 16. NLL of 10 nats over 4 tokens is 2.5.
    """
    pair = tensors([-10], [-20], [-12], [-17])
    tokens = tensors([4], [6])
    assert dpo_loss(*pair).item() == pytest.approx(0.474077, abs=1e-6)
    assert dpo_loss(*pair, label_smoothing=0.1).item() == pytest.approx(0.524077, abs=1e-6)
    assert dpo_loss(*pair, loss_type="ipo", tokens=tokens).item() == pytest.approx(16, abs=1e-5)
    assert dpo_loss(*pair, nll_weight=2, tokens=tokens).item() == pytest.approx(0.474077 + 5, abs=1e-5)
    # Without a reference h = −10 + 20 = 10: −log σ(1) = 0.313262.
    assert dpo_loss(*pair[:2], reference_free=True).item() == pytest.approx(0.313262, abs=1e-6)


def test_policy_equal_to_reference_is_log_two() -> None:
    chosen, rejected = tensors([-3.25, -80], [-7.5, -2])
    assert_close(dpo_loss(chosen, rejected, chosen, rejected), torch.full((2,), math.log(2)), atol=1e-6, rtol=0)


def test_the_gradient_of_dpo_is_beta_times_the_chance_of_being_wrong() -> None:
    """d/d chosen = −β·σ(−βh), and the opposite for rejected: at h = 5 and β = 0.1 it is 0.1·0.377541."""
    chosen, rejected, *reference = (t.requires_grad_() for t in tensors([-10], [-20], [-12], [-17]))
    dpo_loss(chosen, rejected, *reference).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.0377541, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.0377541, abs=1e-7)


def test_nll_of_micro_batches_adds_up_to_the_batch() -> None:
    """Answers of 4 and 12 tokens: the mean is over 16 tokens, not over two answers."""
    chosen, rejected, lengths = tensors([-8, -48], [-9, -9], [4, 12])
    kept = {"beta": 1.0, "reference_free": True, "nll_weight": 1.0}
    plain = dpo_loss(chosen, rejected, beta=1.0, reference_free=True)
    whole = dpo_loss(chosen, rejected, **kept, tokens=(lengths, lengths))
    assert (whole - plain).mean().item() == pytest.approx(56 / 16, abs=1e-5)
    parts = [dpo_loss(chosen[i : i + 1], rejected[i : i + 1], **kept, tokens=(lengths[i : i + 1],) * 2,
                      mean_chosen_tokens=8.0) for i in range(2)]  # fmt: skip
    assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("options, message", [
    ({"beta": 0}, "beta must be positive, got 0"),
    ({"loss_type": "hinge"}, "loss_type must be one of sigmoid, ipo, got 'hinge'"),
    ({"label_smoothing": 0.5}, "label_smoothing must be in"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"}, "0 with ipo"),
    ({"loss_type": "ipo"}, "tokens must be given"),
    ({"nll_weight": 1.0}, "tokens must be given"),
    ({"reference_free": True}, "neither and reference_free=True"),
])  # fmt: skip
def test_dpo_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*tensors([-1], [-2], [-1], [-2]), **options)


def test_dpo_refuses_a_missing_reference_and_other_shapes() -> None:
    one, two = tensors([-1], [-1, -2])
    with pytest.raises(ValueError, match="must both be given"):
        dpo_loss(one, one)
    with pytest.raises(ValueError, match="must both be given"):
        dpo_loss(one, one, one, None)
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(one, two, one, one)


def trl_dpo(pairs, ref, loss_type: str, beta: float, lengths, weights=None) -> float:
    """TRL's `_compute_loss` itself, fed with token log-probabilities in place of a model."""
    from trl import DPOTrainer

    chosen, rejected = lengths
    width = int(max(chosen.max(), rejected.max())) + 1
    counts = torch.cat([chosen, rejected]).long()
    mask = (torch.arange(width) >= 1) & (torch.arange(width) <= counts[:, None])
    # Each answer's sum spread evenly over its tokens.
    spread = (torch.cat(pairs) / counts)[:, None] * mask[:, 1:]
    ones = torch.ones_like(spread)
    outputs = SimpleNamespace(log_probs=spread, entropy=ones, mean_logits=ones, is_top1=ones.bool())
    kinds = [loss_type] if weights is None else [loss_type, "sft"]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=kinds, loss_weights=weights or [1.0], beta=beta,
        label_smoothing=0.0, use_weighting=False, _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
    )  # fmt: skip
    inputs = {"input_ids": torch.ones_like(mask, dtype=torch.long), "completion_mask": mask.long(),
              "attention_mask": torch.ones_like(mask, dtype=torch.long),
              "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_dpo_equals_trl(loss_type: str, beta: float, seed: int) -> None:
    """1e-5 relative: both add fp32 numbers of some tens of nats, in another order."""
    torch.manual_seed(seed)
    policy = -40 * torch.rand(2, 8)
    ref = policy + torch.randn(2, 8)
    lengths = torch.randint(1, 30, (2, 8)).float()
    ours = dpo_loss(*policy, *ref, beta=beta, loss_type=loss_type, tokens=tuple(lengths)).mean().item()
    assert ours == pytest.approx(trl_dpo(tuple(policy), ref, loss_type, beta, lengths), rel=1e-5, abs=1e-5)
    with_nll = dpo_loss(*policy, *ref, beta=beta, loss_type=loss_type, tokens=tuple(lengths), nll_weight=0.5)
    theirs = trl_dpo(tuple(policy), ref, loss_type, beta, lengths, weights=[1.0, 0.5])
    assert with_nll.mean().item() == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_preference_accuracy_counts_ties_half() -> None:
    assert preference_accuracy(torch.tensor([2.0, -1.0, 0.0, 0.5])).item() == 0.625


def test_leave_one_out_by_hand() -> None:
    """Rewards 1, 0, 0.1, 0.1: the first stands against (0 + 0.1 + 0.1)/3, the second against 1.2/3, …"""
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]))
    expected = [[1 - 0.2 / 3, -0.4, 0.1 - 1.1 / 3, 0.1 - 1.1 / 3], [0.0] * 4]
    assert_close(advantages, torch.tensor(expected), atol=1e-6, rtol=0)
    assert advantages[1].tolist() == [0.0] * 4, "exactly, so that an all-equal group can be told"
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages(torch.ones(3, 1))


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9))
def test_leave_one_out_is_a_stretched_deviation_and_sums_to_zero(rewards: list[float]) -> None:
    r = torch.tensor(rewards, dtype=torch.float64)
    advantages = leave_one_out_advantages(r)
    assert_close(advantages, len(r) / (len(r) - 1) * (r - r.mean()), atol=1e-9, rtol=0)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-9)
    theirs = r - (r.sum() - r) / (len(r) - 1)  # as TRL's RLOOTrainer writes it
    assert_close(advantages, theirs, atol=1e-9, rtol=0)


def test_clipped_policy_loss_by_hand() -> None:
    """Ratios 1, 1.5, 1.5, 0.5, 0.5 with ε = 0.2: a gain ends at 1.2, a loss does not; below 0.8 vice versa."""
    ratio, advantages = tensors([1, 1.5, 1.5, 0.5, 0.5], [2, 1, -1, 1, -1])
    old = torch.zeros(5)
    new = ratio.log().requires_grad_()
    losses = clipped_policy_loss(new, old, advantages)
    assert_close(losses, torch.tensor([-2, -1.2, 1.5, -0.5, 0.8]), atol=1e-6, rtol=0)
    losses.sum().backward()
    assert_close(new.grad, torch.tensor([-2, 0, 1.5, -0.5, 0]), atol=1e-6, rtol=0)
    assert is_clipped(new, old, advantages).tolist() == [False, True, False, False, True]
    with pytest.raises(ValueError, match="one shape"):
        clipped_policy_loss(new, old, advantages[:2])
    with pytest.raises(ValueError, match=r"epsilon must be in \(0, 1\), got 1"):
        clipped_policy_loss(new, old, advantages, epsilon=1)


def test_kl_estimates_by_hand_and_their_means() -> None:
    """log π − log π_ref = 0.5: k1 = 0.5, k2 = 0.125, k3 = e^−0.5 − 1 + 0.5 = 0.106531."""
    new, ref = tensors([-1.0], [-1.5])
    values = [kl_estimate(new, ref, kind).item() for kind in ("k1", "k2", "k3")]
    assert values == pytest.approx([0.5, 0.125, 0.106531], abs=1e-6)
    torch.manual_seed(0)
    p, q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):  # without bias: the mean over all outcomes is the divergence itself
        assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), exact)
    assert kl_estimate(p, q, "k3").min() >= 0
    near = (p + 0.01 * (q - p)).log_softmax(-1)  # k2 is right to first order in how far they are apart
    small = (p.exp() * (p - near)).sum().item()
    assert (p.exp() * kl_estimate(p, near, "k2")).sum().item() == pytest.approx(small, rel=0.05)
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3"):
        kl_estimate(new, ref, "k4")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_answers_packed_and_padded_equal_float64(temperature: float) -> None:
    """Sums over five documents against whole logits in float64, to 1e-6 of themselves: a few of fp32's last places."""
    torch.manual_seed(1)
    lengths = [3, 9, 2, 17, 6]
    examples = [Example(torch.randint(3, 1024, (n,)).tolist(), [i >= n // 2 for i in range(n)]) for n in lengths]
    model = random_model()
    step = Step(model)
    packed, padded = pack(examples), pad(examples, pad_id=0)
    by_row = [sum_by_document(step(**b, want="logprobs", temperature=temperature), b.get("cu_seq_lens_q"))
              for b in (packed, padded)]  # fmt: skip
    double = random_model().double()
    for i, example in enumerate(examples):
        logits = double(torch.tensor([example.input_ids])).logits[0] / temperature
        labels = torch.tensor(example.labels())
        kept = labels[1:] != -100
        wanted = F.log_softmax(logits[:-1], -1)[kept].gather(1, labels[1:][kept, None]).sum()
        for values in by_row:
            assert values[i].item() == pytest.approx(wanted.item(), rel=1e-6)
