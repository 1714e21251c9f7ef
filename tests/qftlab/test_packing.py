"""Packing: how documents are fitted into rows, that packed equals padded equals one by one, and TRL's trajectory.

Tolerances: losses to 1e-6, gradients to 1e-5 of their largest entry: fp32 sums in another order.
"""

from __future__ import annotations

import inspect
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_model
from torch.nn.utils.rnn import pad_sequence

from qftlab.model import attention, cpu, cuda
from qftlab.rows.batches import Example, first_fit_decreasing, group_by_length, pack, pad
from qftlab.settings import TrainConfig
from qftlab.train import sft
from qftlab.train.step import Step, count_trained_tokens

LENGTHS = (5, 1, 17, 9, 9, 30, 2, 12)


def documents(lengths=LENGTHS, vocab: int = 1000, seed: int = 0) -> list[Example]:
    """Random documents whose second half is trained."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]
    return [Example(row, [i >= len(row) // 2 for i in range(len(row))]) for row in ids]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_first_fit_decreasing_by_hand() -> None:
    """Rows of 10. 7 opens a row, 6 another; 4 fits beside 6, 3 beside 7, and 2 needs a third."""
    assert first_fit_decreasing([3, 7, 2, 6, 4], 10) == [[1, 0], [3, 4], [2]]


def test_length_groups_by_hand() -> None:
    """9 and 8 fill a rectangle of 2 x 9; 5, 5 and 4 one of 3 x 5."""
    assert group_by_length([5, 9, 4, 8, 5], budget=18) == [[1, 3], [0, 4, 2]]
    assert group_by_length([5, 9, 4, 8, 5], rows=2) == [[1, 3], [0, 4], [2]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200))
def test_every_document_is_in_one_row_that_holds_it(lengths: list[int], budget: int) -> None:
    rows = first_fit_decreasing(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < size <= budget for size in sizes)
    # No two rows could be one: the second was opened only because the first had no room.
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    groups = group_by_length(lengths, budget=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= budget for group in groups)


@pytest.mark.parametrize("fit", [first_fit_decreasing, lambda lengths, budget: group_by_length(lengths, budget=budget)])
def test_a_document_longer_than_the_budget_is_refused(fit) -> None:
    with pytest.raises(ValueError, match="got 20 for 21 tokens: raise tokens_per_micro_batch"):
        fit([3, 21], 20)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_hold_the_step_within_the_budget(packing: bool) -> None:
    docs = documents()
    config = TrainConfig(batch_size=len(docs), packing=packing, tokens_per_micro_batch=32)
    parts = sft.ExampleSource(docs, config)(0, 0)
    assert len(parts) > 1 and sorted(i for part in parts for i in part.rows) == list(range(len(docs)))
    for part in parts:
        assert part.tensors["input_ids"].numel() <= 32
        alone = (count_trained_tokens(pack([docs[i]])) for i in part.rows)
        assert count_trained_tokens(part.tensors) == sum(alone)


# --- packed = padded = one by one -------------------------------------------------------------------------------------


def adapted(model):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def loss_and_gradients(step: Step, batches: list[dict], num_tokens: int) -> tuple[float, dict]:
    step.zero_grad()
    losses = [step(**batch, num_tokens=num_tokens) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(x.double().item() for x in losses), {
        n: p.grad.clone() for n, p in step.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_packed_equals_padded_equals_one_by_one(family: str, lora: bool) -> None:
    docs, model = documents(), random_model(family)
    step = Step(adapted(model) if lora else model)
    num_tokens = sum(count_trained_tokens(pack([d])) for d in docs)
    ways = {
        "one by one": [pack([d]) for d in docs if count_trained_tokens(pack([d]))],
        "padded": [pad(docs, pad_id=0)],
        "padded left": [pad(docs, pad_id=0, side="left")],
        "grouped": [pad([docs[i] for i in group], 0) for group in group_by_length(LENGTHS, budget=40)],
        "packed": [pack(docs)],
        "packed in rows": [pack([docs[i] for i in row]) for row in first_fit_decreasing(LENGTHS, 40)],
    }
    found = {name: loss_and_gradients(step, batches, num_tokens) for name, batches in ways.items()}
    loss, gradients = found.pop("one by one")
    assert gradients and all(g.abs().max() > 0 for g in gradients.values())
    for name, (other, theirs) in found.items():
        assert other == pytest.approx(loss, abs=1e-6), name
        for key, g in gradients.items():
            torch.testing.assert_close(
                theirs[key], g, rtol=1e-5, atol=1e-5 * g.abs().max().item(), msg=f"{name}: {key}"
            )


@pytest.mark.parametrize("packing", [True, False])
def test_a_token_budget_changes_nothing_in_training(packing: bool) -> None:
    """Three steps at another split of each step: losses to 1e-6, weights to 1e-5 (Adam's root, see test_train)."""
    docs, runs = documents(), []
    for budget in (None, 40):
        model = random_model()
        config = TrainConfig(lr=1e-3, batch_size=4, max_steps=3, packing=packing, tokens_per_micro_batch=budget)
        runs.append((sft.fit_examples(model, docs, config).losses, model.state_dict()))
    (a, ours), (b, theirs) = runs
    assert a == pytest.approx(b, abs=1e-6)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


# --- attention, block by block ----------------------------------------------------------------------------------------


def random_rows(tokens: int, heads: tuple[int, int], dtype=torch.float64) -> list[torch.Tensor]:
    """q, k, v as transformers hands them to attention, and a slope of the output."""
    g = torch.Generator().manual_seed(0)
    shapes = [(1, h, tokens, 8) for h in (heads[0], heads[1], heads[1])] + [(1, tokens, heads[0], 8)]
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def attended(bounds: torch.Tensor, q, k, v, slope, **options) -> list[torch.Tensor]:
    """Attention's output, and the gradients of all three."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = attention.packed_attention(torch.nn.Module(), *leaves, None, cu_seq_lens_q=bounds, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def test_queries_of_zero_average_the_values_of_their_document() -> None:
    """All weights alike: [1, 2 | 3, 4, 8] gives 1, 1.5 and 3, 3.5, 5; each value's slope is Σ 1/(keys seen)."""
    v = torch.tensor([1.0, 2, 3, 4, 8]).view(1, 1, 5, 1)
    bounds, zeros = torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(1, 1, 5, 1)
    out, _, _, dv = attended(bounds, zeros, zeros, v, torch.ones(1, 5, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1, 1.5, 3, 3.5, 5]))
    torch.testing.assert_close(dv.flatten(), torch.tensor([1.5, 0.5, 11 / 6, 5 / 6, 1 / 3]))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("is_shared", [False, True], ids=["apart", "shared"])
def test_blocks_equal_torchs_attention(heads: tuple[int, int], is_shared: bool, monkeypatch) -> None:
    """Output and gradients to 1e-12 in fp64, at lengths on both sides of a block's end; "shared" documents have their
    first 70 tokens in common."""
    ends = torch.tensor([0, 1, 64, 129, 330, 335])
    documents = [torch.arange(a, b) for a, b in pairwise(ends.tolist())]
    if is_shared:
        documents[2:] = [documents[3][:70], *(torch.cat([documents[3][:70], d[-5:]]) for d in documents[2:])]
        documents[0] = torch.arange(335)  # every token stands somewhere
    assert {len(d) for d in documents} & {63, 64, 65, 70, 75} and any(len(d) > 2 * cpu.QUERIES for d in documents)
    places, found = pad_sequence(documents, batch_first=True, padding_value=-1), []
    for longest in (1024, 0):
        monkeypatch.setattr(attention, "LONGEST_BLOCKED", longest)
        bounds = ends.int()
        found.append(attended(bounds, *random_rows(335, heads), documents=places))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_is_not_attended_block_by_block_is_said_once(caplog) -> None:
    attention._say_once.cache_clear()
    bounds = torch.tensor([0, 1025], dtype=torch.int32)
    with caplog.at_level(logging.INFO, "qftlab.model.attention"):
        for _ in range(2):
            attended(bounds, *random_rows(1025, (1, 1)))
            attended(torch.tensor([0, 9], dtype=torch.int32), *random_rows(9, (1, 1), torch.bfloat16))
    assert caplog.text.count("a document has 1025 tokens, more than 1024") == 1
    assert caplog.text.count("it takes whole precision") == 1


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_twenty_steps_equal_trl(family: str, tmp_path) -> None:
    """The trajectory of TRL's SFTTrainer on the same batches: twenty losses to 1e-5. Ours are packed, TRL's padded.

    Warm-up is off and the rate constant, so that both take the same steps; the batches are those of our order.
    """
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    from qftlab.rows.batches import batches
    from qftlab.rows.tokenizer import load_tokenizer

    docs = documents([3 + 7 * i % 40 for i in range(16)]) * 5
    ours, theirs = (random_model(family) for _ in range(2))
    config = TrainConfig(lr=1e-3, epochs=1, batch_size=4, warmup_ratio=0, schedule="constant", weight_decay=0.0)
    order = [i for group in batches(80, batch_size=4, seed=0, epoch=0) for i in group]
    settings = TRLConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-3,
        per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, lr_scheduler_type="constant",
        weight_decay=0.0, adam_beta2=config.beta2, max_grad_norm=1.0, report_to=[], save_strategy="no", max_length=None,
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": docs[i].input_ids, "labels": docs[i].labels()} for i in order])
    trainer = SFTTrainer(theirs, args=settings, train_dataset=data, processing_class=load_tokenizer("tiny"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1  # it does move
    assert sft.fit_examples(ours, docs, config).losses == pytest.approx(losses, abs=1e-5)


# --- the kernel of CUDA -----------------------------------------------------------------------------------------------


def test_varlen_is_called_in_the_words_of_each_torch() -> None:
    """2.10 has `is_causal` alone; later versions a window of (−1, 0); the newest also say `enable_gqa`."""
    assert cuda.varlen_options(["query", "max_k", "is_causal", "return_aux"], 0.1) == {"is_causal": True}
    middle = ["query", "max_k", "return_aux", "scale", "window_size"]
    assert cuda.varlen_options(middle, 0.1) == {"window_size": (-1, 0), "scale": 0.1}
    installed = inspect.signature(cuda.varlen_attn).parameters
    options = cuda.varlen_options(installed, 0.1)
    assert set(options) <= set(installed) and options.get("is_causal") or options["window_size"] == (-1, 0)


def test_what_the_kernel_does_not_take() -> None:
    cpu = torch.device("cpu")
    assert "half precision" in cuda.why_not_varlen(torch.float32, 64, 0.0, cpu)
    assert "no dropout" in cuda.why_not_varlen(torch.bfloat16, 64, 0.1, cpu)
    assert "multiple of 8" in cuda.why_not_varlen(torch.bfloat16, 20, 0.0, cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_varlen_equals_documents_one_by_one_on_cuda(family: str) -> None:
    """bf16 on both sides; each may be off the fp32 gradient by bf16's rounding, and ours not much more than sdpa's."""
    docs, model = documents((40, 7, 300, 128, 1, 65)), random_model(family, head_dim=16, max_position_embeddings=512)
    exact = loss_and_gradients(Step(model), [pack(docs)], 100)
    half = Step(model.cuda().bfloat16())
    on_cuda = [
        {k: v.cuda() if torch.is_tensor(v) else v for k, v in pack(d).items()} for d in (docs, *([d] for d in docs))
    ]
    packed = loss_and_gradients(half, on_cuda[:1], 100)
    alone = loss_and_gradients(half, on_cuda[1:], 100)
    assert packed[0] == pytest.approx(exact[0], rel=0.01)
    for name, g in exact[1].items():
        ours, theirs = ((side[1][name].float().cpu() - g).norm() / g.norm() for side in (packed, alone))
        assert ours < 1.5 * theirs + 0.01, name


@pytest.mark.gpu
def test_fp32_on_cuda_goes_document_by_document_and_says_so(caplog) -> None:
    attention._say_once.cache_clear()
    docs, model = documents(), random_model()
    expected = loss_and_gradients(Step(model), [pack(docs)], 10)[0]
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in pack(docs).items()}
    with caplog.at_level(logging.INFO, "qftlab.model.attention"):
        assert Step(model.cuda())(**batch, num_tokens=10).item() == pytest.approx(expected, rel=1e-4)
    assert caplog.text.count("not by the faster one: it takes half precision") == 1


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([10, 9, 10], ((3, 10),)),
        ([10, 7], ((2, 10),)),  # three of twenty places would be padding
        ([10, 6], ((1, 6), (1, 10))),  # four of ten in the first row are more than three tenths
        ([1, 2, 20, 19, 2], ((1, 1), (2, 2), (2, 20))),
    ],
)
def test_documents_share_a_rectangle_until_too_much_of_it_is_padding(lengths, shapes) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    places = [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    layout = attention.packed_layout(places)
    assert layout.shapes == shapes and not layout.is_shared
    assert sorted(layout.places[layout.back].tolist()) == list(range(sum(lengths)))


def varlen_of(torch_2_10: bool):
    """torch's kernel for rows of many documents, written out, with the parameters of one of its versions."""

    def by_document(q, k, v, bounds, **options) -> torch.Tensor:
        attend, outs = torch.nn.functional.scaled_dot_product_attention, []
        for first, last in pairwise(bounds.tolist()):
            document = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, t, d)
            outs.append(attend(*document, is_causal=True, **options)[0].transpose(0, 1))
        return torch.cat(outs)

    def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False) -> torch.Tensor:
        assert is_causal and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == 7
        return by_document(q, k, v, cu_seq_q)

    def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == 7
        return by_document(q, k, v, cu_seq_q, scale=scale, enable_gqa=enable_gqa)

    return old if torch_2_10 else new


@pytest.mark.parametrize("torch_2_10", [True, False])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_the_kernel_of_each_torch_gives_attention_by_document(torch_2_10: bool, heads: int, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "varlen_attn", varlen_of(torch_2_10))
    torch.manual_seed(0)
    q, k, v = (torch.randn(13, n, 8) for n in (4, heads, heads))
    layout = attention.packed_layout([torch.arange(5), torch.arange(5, 12), torch.arange(12, 13)])
    want = attention._by_document(q, k, v, layout, 0.3, 0.0, None)
    got = cuda.varlen(q, k, v, torch.tensor([0, 5, 12, 13]), 7, 0.3)
    assert torch.allclose(got, want, atol=1e-6), "another order of summation in fp32"


def test_the_kernel_wants_ampere_and_heads_of_up_to_256(monkeypatch) -> None:
    def reason(capability: tuple[int, int], width: int = 64) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return cuda.why_not_varlen(torch.bfloat16, width, 0.0, torch.device("cpu"))

    assert "older than Ampere" in reason((7, 5)) and reason((8, 0)) is reason((9, 0)) is reason((8, 0), 256) is None
    assert "at most 256 wide, and this is 264" in reason((9, 0), 264)
