"""Losses, log-probabilities and sampling: a number worked by hand, an oracle, and an invariant for each."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from qftlab.maths.logprobs import entropy, token_logprobs
from qftlab.maths.losses import masked_cross_entropy
from qftlab.maths.sampling import SamplingParams, filter_logits, sample, uniform


def batch(seed: int = 0, rows: int = 3, width: int = 9, vocab: int = 50):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, vocab, generator=generator) * 3
    labels = torch.randint(0, vocab, (rows, width), generator=generator)
    labels[torch.rand(rows, width, generator=generator) < 0.4] = -100
    return logits, labels


def test_loss_by_hand():
    """Probabilities 1/2 and 1/4 for the two trained tokens: (ln 2 + ln 4) / 2."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]]))
    labels = torch.tensor([[-100, 0, 1]])
    assert masked_cross_entropy(logits, labels).item() == pytest.approx((math.log(2) + math.log(4)) / 2, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_transformers(seed):
    logits, labels = batch(seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a = masked_cross_entropy(ours, labels)
    b = ForCausalLMLoss(theirs, labels, vocab_size=logits.shape[-1])
    assert a.item() == pytest.approx(b.item(), abs=1e-6)
    a.backward(), b.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_loss_equals_float64_and_adds_up_over_parts():
    logits, labels = batch(7)
    wanted = -token_logprobs(logits.double(), labels).sum() / (labels[:, 1:] != -100).sum()
    assert masked_cross_entropy(logits, labels).item() == pytest.approx(wanted.item(), abs=1e-6)
    total = int((labels[:, 1:] != -100).sum())
    parts = sum(masked_cross_entropy(logits[i : i + 1], labels[i : i + 1], total) for i in range(len(logits)))
    assert parts.item() == pytest.approx(masked_cross_entropy(logits, labels).item(), abs=1e-6)


def test_loss_refuses_what_has_no_answer():
    logits, labels = batch()
    with pytest.raises(ValueError, match="at least one trained token"):
        masked_cross_entropy(logits, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="labels must be"):
        masked_cross_entropy(logits, labels[:, :-1])
    with pytest.raises(ValueError, match="labels must be"):
        token_logprobs(logits, labels[:-1])


def test_logprobs_by_hand_and_entropy():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
    assert token_logprobs(logits, torch.tensor([[0, 1]])).item() == pytest.approx(math.log(0.5), abs=1e-6)
    assert entropy(torch.zeros(4)).item() == pytest.approx(math.log(4), abs=1e-6)
    assert entropy(torch.tensor([0.0, -math.inf])).item() == 0.0


settings_strategy = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    repetition_penalty=st.floats(0.5, 2.0),
)


@given(settings_strategy, st.integers(0, 10_000))
def test_filters_equal_transformers(params, seed):
    """Same probabilities to 1e-6; top-p's borderline token is excused where the mass is within 1e-6 of p."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed)) * 3
    seen = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed + 1))
    steps = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty), TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    steps += [TopPLogitsWarper(params.top_p), MinPLogitsWarper(params.min_p)]
    theirs = LogitsProcessorList(steps)(seen, logits.clone()).softmax(-1)
    ours = filter_logits(logits, params, seen_ids=list(seen)).softmax(-1)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_filter_leaves_its_input_alone_and_forbids_ids_past_the_tokenizer():
    logits, _ = batch()
    before = logits.clone()
    out = filter_logits(logits[0], SamplingParams(top_k=3, repetition_penalty=1.5), seen_ids=[torch.tensor([1])] * 9,
                        vocab_limit=40)  # fmt: skip
    assert torch.equal(logits, before)
    assert torch.isinf(out[:, 40:]).all() and (out.isfinite().sum(-1) >= 3).all()


def test_top_k_keeps_ties():
    out = filter_logits(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), SamplingParams(top_k=1))
    assert out.isfinite().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 1.3), ("top_p", 0.0), ("temperature", -1), ("top_k", -2), ("min_p", 2), ("repetition_penalty", 0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        SamplingParams(**{name: value})


def test_uniform_equals_splitmix64_in_python_integers():
    """53 bits, bit for bit, for negative and huge counters as well."""
    whole = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        return x ^ (x >> 31)

    def wanted(seed: int, row: int, step: int) -> float:
        state = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & whole
        state = mix(state ^ mix((row + 0x9E3779B97F4A7C15) & whole))
        return (mix((state + (step + 1) * 0xD1342543DE82EF95) & whole) >> 11) * 2.0**-53

    rows = [0, 1, 5, 2**40, -3]
    for seed in (0, 1, -7, 2**70):
        for step in (0, 3, 10**6):
            assert uniform(seed, torch.tensor(rows), step).tolist() == [wanted(seed, row, step) for row in rows]


def test_uniform_is_uniform_and_independent_of_the_batch():
    rows = torch.arange(20_000)
    u = uniform(3, rows, 5)
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u.float(), 20, 0, 1)
    assert counts.std() < 3 * math.sqrt(1000)  # binomial: sd about 31
    assert torch.equal(uniform(3, rows[100:110], 5), u[100:110])
    assert not torch.equal(uniform(3, rows, 6), u) and not torch.equal(uniform(4, rows, 5), u)
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    steps = torch.corrcoef(torch.stack([u, uniform(3, rows, 6)]))[0, 1]
    assert abs(neighbours) < 0.03 and abs(steps) < 0.03  # 1 / sqrt(20,000) is 0.007


def test_sample_follows_the_distribution_and_its_edges():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2, 0.0]])).expand(20_000, 4)
    ids = sample(logits, SamplingParams(), uniform(0, torch.arange(20_000), 0))
    share = Counter(ids.tolist())
    assert [share[i] / 20_000 for i in range(4)] == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.015)
    edges = torch.tensor([0.0, 0.4999999, 0.5000001, 0.999999999])
    assert sample(logits[:4], SamplingParams(), edges).tolist() == [0, 0, 1, 2]
    assert sample(logits[:1], SamplingParams(temperature=0.0), edges[:1]).tolist() == [0]
