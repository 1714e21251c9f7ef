"""Samplers: equal to transformers' filters, to each other token for token, and to the distribution they draw from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qftlab.maths.sampling import (
    RowParams,
    SamplingParams,
    draw,
    filter_logits,
    integer_weights,
    sample,
    sample_rows,
    uniform,
)

GREEDY = SamplingParams(temperature=0.0)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]) | st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 3000]),
    top_p=st.sampled_from([1.0, 1e-9]) | st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0.0, 0.9),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.4]),
)
kinds = st.sampled_from(["normal", "flat", "peaked", "ties", "holes", "bf16"])


def make_logits(kind: str, seed: int, rows: int, vocab: int) -> Tensor:
    """Logits of one shape of distribution; "holes" has −inf, "ties" and "bf16" many equal values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator)
    if kind == "holes":
        x[:, 1:].masked_fill_(torch.rand(rows, vocab - 1, generator=generator) < 0.7, -math.inf)
    scaled = {"flat": x * 0.01, "peaked": x * 8, "ties": (x * 2).round() / 2, "bf16": (x * 3).bfloat16()}
    return scaled.get(kind, x * 3)


def by_the_book(logits: Tensor, params: SamplingParams, u: Tensor, **options) -> Tensor:
    """The reference: filter, weigh, one running sum, its inverse; greedy takes no filter, as in transformers."""
    if params.temperature == 0:
        plain = SamplingParams(temperature=0.0, repetition_penalty=params.repetition_penalty)
        return filter_logits(logits, plain, **options).argmax(-1)
    scores = filter_logits(logits, params, **options)
    ends = integer_weights(scores).cumsum(-1)
    target = (u.unsqueeze(1) * ends[:, -1:]).long()
    return torch.searchsorted(ends, target, right=True).squeeze(1)


@settings(max_examples=200)
@given(any_params.filter(lambda p: p.temperature > 0), kinds, st.integers(0, 10_000), st.sampled_from([7, 50, 300]))
def test_distributions_equal_transformers(params, kind, seed, vocab):
    """To 1e-6. Two excuses, both top-p's: a token whose mass from below is within 1e-6 of what is cut, and which of
    several equal scores at the cut are kept (transformers sorts unstably; we keep the higher ids), never how many."""
    logits = make_logits(kind, seed, 2, vocab).float()
    prompt = torch.randint(0, vocab, (2, 8), generator=torch.Generator().manual_seed(seed))
    steps = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty), TemperatureLogitsWarper(params.temperature)]
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    before_top_p = LogitsProcessorList(steps)(prompt, logits.clone())
    steps += [TopPLogitsWarper(params.top_p), MinPLogitsWarper(params.min_p)]
    theirs = LogitsProcessorList(steps)(prompt, logits.clone()).softmax(-1)
    ours = filter_logits(logits, params, seen_ids=list(prompt)).softmax(-1)
    ascending, order = before_top_p.double().softmax(-1).sort(stable=True)
    mass = torch.zeros_like(ascending).scatter(1, order, ascending.cumsum(-1))
    for row in range(2):
        differ = (ours[row] > 0) != (theirs[row] > 0)
        if ((mass[row] - (1 - params.top_p)).abs() < 1e-6).any():
            continue
        assert before_top_p[row, differ].unique().numel() <= 1
        assert torch.allclose(ours[row, ~differ], theirs[row, ~differ], atol=1e-6)
        assert torch.allclose(ours[row].sort().values, theirs[row].sort().values, atol=1e-6)


@settings(max_examples=120, deadline=None)
@given(st.lists(any_params, min_size=4, max_size=4), kinds, st.integers(0, 10_000),
       st.sampled_from([(3, None), (50, 41), (2048, 2000), (5000, None), (40_000, 39_990)]))  # fmt: skip
def test_fast_slow_branchless_alone_and_batched_pick_the_same_token(params, kind, seed, size):
    vocab, limit = size
    logits = make_logits(kind, seed, 4, vocab)
    u = uniform(seed, torch.arange(4), 7)
    u[seed % 4] = [0.0, 1 - 2**-53, 0.5][seed % 3]
    seen = [torch.randint(0, vocab, (6,), generator=torch.Generator().manual_seed(seed + row)) for row in range(4)]
    mask = torch.stack([torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True) for ids in seen])
    wanted = torch.cat([
        by_the_book(logits[i : i + 1], params[i], u[i : i + 1], seen_ids=seen[i : i + 1], vocab_limit=limit)
        for i in range(4)
    ])  # fmt: skip
    assert torch.equal(sample(logits, params, u, seen_ids=seen, vocab_limit=limit), wanted)
    assert torch.equal(sample(logits, params, u, seen_ids=mask, vocab_limit=limit), wanted)
    assert torch.equal(sample_rows(logits, RowParams.of(params, 4), u, seen=mask, vocab_limit=limit), wanted)
    for i in range(4):
        one = slice(i, i + 1)
        assert sample(logits[one], params[i], u[one], seen_ids=mask[one], vocab_limit=limit) == wanted[i]
    everywhere = sample(logits, params[0], u, seen_ids=seen, vocab_limit=limit)
    assert torch.equal(everywhere, by_the_book(logits, params[0], u, seen_ids=seen, vocab_limit=limit))
    assert (wanted < (limit or vocab)).all()


@pytest.mark.parametrize("kind", ["flat", "ties", "peaked", "equal"])
@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 0.3, "min_p": 0.1}, {"top_k": 50}, {"top_k": 50, "top_p": 0.8}]
)
def test_a_real_vocabulary_where_candidates_suffice_and_where_not(kind, options):
    """151,936 logits: "equal" and "ties" put more tied tokens at the cut than there are candidates."""
    logits = torch.zeros(6, 151_936) if kind == "equal" else make_logits(kind, 1, 6, 151_936)
    params, u = SamplingParams(temperature=0.7, **options), uniform(5, torch.arange(6), 0)
    wanted = by_the_book(logits, params, u, vocab_limit=151_665)
    assert torch.equal(sample(logits, params, u, vocab_limit=151_665), wanted)
    assert torch.equal(sample_rows(logits, RowParams.of(params, 6), u, vocab_limit=151_665), wanted)


@pytest.mark.parametrize(("rows", "vocab", "scale"), [(64, 2048, 1.0), (8, 151_936, 0.1), (8, 151_936, 4.0)])
def test_draws_invert_the_float64_distribution(rows, vocab, scale):
    """u lies in the drawn token's interval to 1e-6: fp32 logits minus their maximum are off by up to 2^-24 relative
    to a few tens, hence weights by about 1e-6 of themselves; the sums themselves are exact."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * scale
    ends = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    for step in range(5):
        u = uniform(1, torch.arange(rows), step)
        ids = sample(logits, SamplingParams(temperature=0.7), u).unsqueeze(1)
        upper = ends.gather(1, ids).squeeze(1)
        lower = ends.gather(1, (ids - 1).clamp(min=0)).squeeze(1) * (ids.squeeze(1) > 0)
        assert (lower - 1e-6 <= u).all() and (u <= upper + 1e-6).all()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.7, top_k=12), SamplingParams(top_p=0.8),
     SamplingParams(min_p=0.2), SamplingParams(temperature=1.5, top_k=25, top_p=0.9, min_p=0.02)],
)  # fmt: skip
def test_chi_square_of_draws(params):
    """40,000 draws against the filtered softmax; the statistic of n cells is about n ± sqrt(2 n)."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2)) * 1.5
    expected = 40_000 * filter_logits(logits, params).double().softmax(-1)[0]
    ids = sample(logits.expand(40_000, -1), params, uniform(11, torch.arange(40_000), 3))
    counts = torch.bincount(ids, minlength=30).double()
    assert (counts[expected == 0] == 0).all()
    likely = expected >= 5
    cells = int(likely.sum())
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < cells + 4 * math.sqrt(2 * cells)


def test_draw_by_hand():
    """Weights 2, 0, 1, 1 of 4: ends 2, 2, 3, 4; the zero is never drawn."""
    weights = torch.tensor([[2, 0, 1, 1]]).expand(5, 4)
    u = torch.tensor([0.0, 0.49, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, u).tolist() == [0, 0, 2, 3, 3]
    # The same four weights, far apart in a row of two levels.
    far = torch.zeros(5, 9000, dtype=torch.int64)
    far[:, [100, 5000, 8999]] = torch.tensor([2, 1, 1])
    assert draw(far, u).tolist() == [100, 100, 5000, 8999, 8999]


def test_top_p_by_hand_with_a_tie_at_the_cut():
    """A half, then four eighths: 0.7 needs two of the four, and the higher ids are kept."""
    logits = torch.log(torch.tensor([[0.125, 0.125, 0.5, 0.125, 0.125]]))
    kept = filter_logits(logits, SamplingParams(top_p=0.7)).isfinite()
    assert kept.tolist() == [[False, False, True, True, True]]


def test_uniform_of_many_steps_is_that_of_each():
    rows, steps = torch.tensor([0, 7, 2**40]), torch.tensor([0, 1, 500, 10**6])
    many = uniform(9, rows, steps)
    assert many.shape == (3, 4)
    for column, step in enumerate(steps.tolist()):
        assert torch.equal(many[:, column], uniform(9, rows, step))


def test_branchless_sampling_reads_nothing_back_and_follows_its_tensors():
    """On the meta device there is no data: any read of a value or shape that depends on one raises."""
    every = SamplingParams(0.7, 40, 0.9, 0.01, 1.2)
    meta = torch.empty(3, 500, device="meta")
    out = sample_rows(meta, RowParams.of(every, 3, "meta"), torch.empty(3, dtype=torch.float64, device="meta"),
                      seen=torch.empty(3, 500, dtype=torch.bool, device="meta"), vocab_limit=490)  # fmt: skip
    assert out.shape == (3,) and out.dtype == torch.int64
    logits, u = make_logits("normal", 3, 3, 500), uniform(0, torch.arange(3), 0)
    rows = RowParams.of([SamplingParams(top_k=3, top_p=0.5), SamplingParams(), GREEDY], 3)
    later = [SamplingParams(temperature=2.0, top_k=20), GREEDY, SamplingParams(top_p=0.95)]
    for name, column in vars(RowParams.of(later, 3)).items():
        if column is not None:
            getattr(rows, name).copy_(column)
    assert torch.equal(sample_rows(logits, rows, u), sample(logits, later, u))
    assert RowParams.of(GREEDY, 2).top_p is None and RowParams.of(every, 2).top_p.tolist() == [0.9, 0.9]


def test_greedy_takes_the_first_of_a_tie_and_other_rows_may_sample():
    logits = torch.tensor([[0.0, 2.0, 2.0, 9.0]]).repeat(3, 1)
    params = [GREEDY, SamplingParams(top_k=1), SamplingParams()]
    u = torch.tensor([0.9, 0.75, 0.0], dtype=torch.float64)
    assert sample(logits, params, u, vocab_limit=3).tolist() == [1, 2, 0]
    assert sample(logits, GREEDY, u).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.5),
     [GREEDY, SamplingParams(), GREEDY, SamplingParams(top_k=2)]],
)  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_refused(params, bad):
    logits, u = torch.zeros(4, 6), torch.full((4,), 0.5, dtype=torch.float64)
    logits[1, 2] = bad
    logits[3] = -math.inf
    with pytest.raises(ValueError, match=r"logits must be finite or -inf, .* rows \[1, 3\] are not"):
        sample(logits, params, u)
    with pytest.raises(ValueError, match=r"rows \[1, 3\] are not"):
        filter_logits(logits, params)
    tokens = sample_rows(logits, RowParams.of(params, 4), u)
    assert (tokens == -1).tolist() == [False, True, False, True]
    # What stands past the tokenizer's ids does not matter.
    logits[3] = 0.0
    assert (sample(logits, params, u, vocab_limit=2) < 2).all()


def test_ids_past_the_tokenizer_are_never_sampled():
    logits = torch.zeros(500, 40)
    logits[:, 30:] = 50.0
    u = uniform(0, torch.arange(500), 0)
    for params in (GREEDY, *(SamplingParams(**x) for x in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 1}))):
        assert sample(logits, params, u, vocab_limit=30).max() < 30
        assert filter_logits(logits, params, vocab_limit=30)[:, 30:].isneginf().all()
    assert torch.equal(sample(logits, SamplingParams(), u, vocab_limit=99), sample(logits, SamplingParams(), u))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("top_p", 0, "in (0, 1]"), ("top_p", 1.3, "in (0, 1]"), ("top_p", math.nan, "in (0, 1]"),
        ("temperature", -1, "0, or finite and 1e-6 or more"), ("temperature", math.inf, "0, or finite"),
        ("temperature", 1e-9, "0, or finite"), ("temperature", "hot", "0, or finite"),
        ("top_k", -1, "a whole number, 0 or more"), ("top_k", True, "a whole number"), ("top_k", 5.0, "a whole number"),
        ("min_p", 1.1, "in [0, 1]"), ("min_p", None, "in [0, 1]"),
        ("repetition_penalty", 0, "finite and above 0"), ("repetition_penalty", math.inf, "finite and above 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value, rule):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert f"{name} must be {rule}" in str(error.value) and f"got {value!r}" in str(error.value)


def test_unknown_options_and_wrong_shapes_are_refused():
    logits, u = torch.zeros(2, 5), torch.zeros(2, dtype=torch.float64)
    penalty = SamplingParams(repetition_penalty=1.2)
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)
    for wrong, call in {
        "vocab_limit must be 1 or more, got 0": lambda: sample(logits, GREEDY, u, vocab_limit=0),
        "params must be one SamplingParams or 2, one for each row, got 3": lambda: sample(logits, [GREEDY] * 3, u),
        "u must be (2,), one number for each row of logits, got (3,)": lambda: sample(logits, GREEDY, torch.zeros(3)),
        "logits must be (B, V) with V above 0, got (5,)": lambda: sample(logits[0], GREEDY, u),
        "repetition_penalty needs seen_ids": lambda: sample(logits, penalty, u),
        "seen_ids must be 2 tensors of ids or a (B, V) bool mask, got 1 rows": lambda: sample(
            logits, penalty, u, seen_ids=[torch.tensor([1])]
        ),
        "seen_ids must be 2 tensors of ids or a (B, V) bool mask, got (2, 4)": lambda: sample(
            logits, penalty, u, seen_ids=torch.zeros(2, 4, dtype=torch.bool)
        ),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert wrong in str(error.value)


def test_settings_at_their_edges_mean_what_they_say():
    logits = torch.tensor([[0.0, 1.0, 3.0, 3.0]])
    finite = {
        SamplingParams(top_k=99): [True] * 4,
        SamplingParams(min_p=1): [False, False, True, True],
        SamplingParams(top_p=1e-9): [False, False, False, True],
        SamplingParams(top_p=1.0): [True] * 4,
    }
    for params, wanted in finite.items():
        assert filter_logits(logits, params).isfinite()[0].tolist() == wanted


def test_sampling_leaves_its_arguments_alone():
    logits, u = make_logits("normal", 0, 2, 50), uniform(0, torch.arange(2), 0)
    before = logits.clone()
    for params in (GREEDY, SamplingParams(), SamplingParams(0.7, 5, 0.9, 0.1, 1.3)):
        sample(logits, params, u, seen_ids=[torch.tensor([1])] * 2)
        filter_logits(logits, params, seen_ids=[torch.tensor([1])] * 2)
        sample_rows(logits, RowParams.of(params, 2), u, seen=torch.ones(2, 50, dtype=torch.bool))
    assert torch.equal(logits, before)


def test_min_p_of_1_leaves_the_likeliest_and_its_ties() -> None:
    """Also where every row asks for it: 0 is what leaves a setting out, not what all rows have in common."""
    logits = torch.tensor([[1.0, 3.0, 2.9], [2.0, 0.0, 2.0]])
    kept = filter_logits(logits, SamplingParams(min_p=1.0)).isfinite()
    assert kept.tolist() == [[False, True, False], [True, False, True]]
    for u, want in ((0.0, [1, 0]), (0.49, [1, 0]), (0.51, [1, 2]), (0.99, [1, 2])):
        drawn = torch.full((2,), u, dtype=torch.float64)
        rows = RowParams.of(SamplingParams(min_p=1.0), 2)
        assert sample(logits, SamplingParams(min_p=1.0), drawn).tolist() == want
        assert sample_rows(logits, rows, drawn).tolist() == want
