"""The chunked head against the whole one: values, gradients, memory.

Tolerances: fp64 to 1e-12; fp32 sums in another order to 1e-6 of losses of order 1, and 1e-5 relative of gradients.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import random_model
from torch import Tensor, nn
from torch.nn import functional as F

from qftlab.maths import logprobs
from qftlab.maths.logprobs import (
    HeadTerm,
    chunk_tokens,
    entropy,
    linear_cross_entropy,
    linear_logprobs,
    module_logprobs,
    token_logprobs,
)
from qftlab.model.head import causal_model, head_terms
from qftlab.rows.batches import Example, pack
from qftlab.train.step import Step, count_trained_tokens

V, D, N = 40, 8, 23


def tensors(*shapes: tuple, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def labels(n: int = N, vocab: int = V) -> Tensor:
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(1))


def grads(value: Tensor, inputs: list[Tensor], keep: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, retain_graph=keep))


def assert_all_close(ours, theirs, **tolerance) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    """Hidden (1, 0) and (0, 1); rows (ln 3, 0) and (0, 0): logits (ln 3, 0) → ¾, ¼; and (0, 0) → ½, ½.

    Labels 0 and 1 cost −ln ¾ − ln ½. d/dlogits = (¾ − 1, ¼) and (½, ½ − 1), so the weight's gradient, slopes times
    hidden, has rows (−¼, ½) and (¼, −½), and the first hidden state's is −¼·(ln 3, 0) + ¼·(0, 0).
    """
    hidden = torch.eye(2, requires_grad=True)
    weight = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy([HeadTerm(hidden, weight)], torch.tensor([0, 1]), chunk=1)
    assert loss.item() == pytest.approx(-math.log(0.75) - math.log(0.5), abs=1e-6)
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.25, 0.5], [0.25, -0.5]]))
    torch.testing.assert_close(hidden.grad[0], torch.tensor([-0.25 * math.log(3), 0.0]))


def test_a_long_sum_loses_no_small_number() -> None:
    """2^24 + 1023 ln 2 = 16,777,925.09; fp32 has only even numbers there, and to its 2^24 adds no ln 2."""
    hidden = torch.zeros(1024, 1)
    hidden[0] = 2**24
    loss = linear_cross_entropy([HeadTerm(hidden, torch.tensor([[0.0], [1.0]]))], torch.zeros(1024, dtype=torch.int64))
    assert loss.item() == 16_777_926


def test_temperature_and_entropy_by_hand() -> None:
    """Logits (2 ln 3, 0) at temperature 2 are (ln 3, 0): p = ¾, ¼; H = ¾ ln 4/3 + ¼ ln 4."""
    weight = torch.tensor([[2 * math.log(3)], [0.0]])
    terms, target = [HeadTerm(torch.ones(1, 1), weight)], torch.tensor([1])
    logprob, spread = linear_logprobs(terms, target, temperature=2.0, with_entropy=True)
    assert logprob.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert spread.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-6)


# --- against the whole logits -----------------------------------------------------------------------------------------


def whole_logits(x, w, bias, low, up, change, columns) -> Tensor:
    logits = x @ w.t() + low @ up.t() + bias
    return logits.index_add(1, columns, x @ change.t())


@pytest.mark.parametrize("chunk", [1, 5, N, 100])
def test_terms_equal_the_whole_head(chunk: int) -> None:
    inputs = tensors((N, D), (V, D), (V,), (N, 2), (V, 2), (3, D))
    x, w, bias, low, up, change = inputs
    columns, y = torch.tensor([7, 0, 39]), labels()
    terms = [HeadTerm(x, w), HeadTerm(low, up), HeadTerm(x, change, columns)]
    logits = whole_logits(x, w, bias, low, up, change, columns)
    whole = F.cross_entropy(logits, y, reduction="sum")
    loss = linear_cross_entropy(terms, y, bias=bias, chunk=chunk)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    assert_all_close(grads(loss / 7, inputs), grads(whole / 7, inputs), rtol=1e-12, atol=1e-12)

    integer_weights = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for temperature in (1.0, 0.7):
        scaled = whole_logits(x, w, bias, low, up, change, columns) / temperature
        expected = scaled.log_softmax(-1).gather(1, y[:, None])[:, 0]
        options = {"bias": bias, "temperature": temperature, "chunk": chunk, "with_entropy": True}
        found, spread = linear_logprobs(terms, y, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            spread, torch.distributions.Categorical(logits=scaled).entropy(), rtol=1e-9, atol=1e-9
        )
        assert not spread.requires_grad
        theirs = grads((expected * integer_weights).sum(), inputs)
        assert_all_close(grads((found * integer_weights).sum(), inputs), theirs, rtol=1e-12, atol=1e-12)


def test_log_probabilities_pass_gradcheck() -> None:
    """Numerical derivatives, for any upstream gradient of each token."""
    x, w, bias = tensors((4, 3), (5, 3), (5,))

    def function(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return linear_logprobs([HeadTerm(x, w)], labels(4, 5), bias=bias, temperature=1.3, chunk=3)

    assert torch.autograd.gradcheck(function, (x, w, bias))


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 45), st.integers(0, 3), st.booleans())
def test_any_shape_and_scale_equals_torch(n: int, vocab: int, chunk: int, seed: int, wild: bool) -> None:
    """Logits of hundreds, as an untrained temperature gives, overflow a softmax that does not shift."""
    x, w = tensors((n, D), (vocab, D), dtype=torch.float32, seed=seed)
    x, y = x * (300 if wild else 1), labels(n, vocab)
    loss = linear_cross_entropy([HeadTerm(x, w)], y, chunk=chunk)
    whole = F.cross_entropy(x @ w.t(), y, reduction="sum")
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
    assert_all_close(grads(loss, [x, w]), grads(whole, [x, w]), rtol=1e-4, atol=1e-4 * (300 if wild else 1))


def test_only_what_is_trained_gets_a_gradient() -> None:
    x, w = tensors((N, D), (V, D))
    frozen = linear_cross_entropy([HeadTerm(x, w.detach())], labels())
    assert_all_close(grads(frozen, [x]), grads(F.cross_entropy(x @ w.detach().t(), labels(), reduction="sum"), [x]))
    with torch.no_grad():
        assert not linear_cross_entropy([HeadTerm(x, w)], labels()).requires_grad


def test_no_tokens_cost_nothing() -> None:
    x, w = tensors((0, D), (V, D))
    loss = linear_cross_entropy([HeadTerm(x, w)], labels(0))
    assert loss.item() == 0 and grads(loss, [w])[0].abs().sum() == 0
    assert linear_logprobs([HeadTerm(x, w)], labels(0)).shape == (0,)


def test_a_second_backward_says_so() -> None:
    x, w = tensors((N, D), (V, D))
    loss = linear_cross_entropy([HeadTerm(x, w)], labels())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradient once"):
        loss.backward()


def test_nonsense_is_refused() -> None:
    x, w, bias = tensors((N, D), (V, D), (V,))
    with pytest.raises(ValueError, match=r"a term must be x \(N, d\) and weight \(40, d\) with N = 22 labels"):
        linear_cross_entropy([HeadTerm(x, w)], labels(22))
    with pytest.raises(ValueError, match="terms must start with one on all columns"):
        linear_cross_entropy([HeadTerm(x, w[:2], torch.tensor([0, 1]))], labels())
    with pytest.raises(ValueError, match=r"bias must be \(40,\), got \(39,\)"):
        linear_cross_entropy([HeadTerm(x, w)], labels(), bias=bias[1:])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        linear_cross_entropy([HeadTerm(x, w)], labels(), chunk=0)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        linear_logprobs([HeadTerm(x, w)], labels(), temperature=0)


# --- precision --------------------------------------------------------------------------------------------------------


def test_the_head_gradient_of_bf16_is_summed_in_fp32() -> None:
    """2,048 equal tokens with one wanted row: in bf16 a running sum stops at 256 times its summand.

    The exact gradient comes from the same bf16 factors in fp64; ours may differ by bf16's rounding (2^-8) of the
    result and of the probabilities. Summing in bf16, token by token, is shown to be far off on the same numbers.
    """
    n = 2048
    x, w = torch.ones(n, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    y = torch.zeros(n, dtype=torch.int64)
    linear_cross_entropy([HeadTerm(x, w)], y, chunk=1).backward()
    assert w.grad.dtype == torch.bfloat16
    exact = torch.tensor([-0.75, 0.25, 0.25, 0.25], dtype=torch.float64)[:, None].expand(4, 2) * n
    torch.testing.assert_close(w.grad.double(), exact, rtol=2**-7, atol=0)
    running = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(n):
        running = running + torch.tensor(0.25, dtype=torch.bfloat16)
    assert running < 0.25 * n / 4


@pytest.mark.parametrize("kind", ["loss", "logprobs"])
def test_bf16_is_as_near_to_fp64_as_the_whole_head(kind: str) -> None:
    x, w = tensors((200, 64), (300, 64))
    y = labels(200, 300)
    exact = grads(F.cross_entropy(x @ w.t(), y, reduction="sum"), [x, w])
    halves = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    terms = [HeadTerm(*halves)]
    ours = linear_cross_entropy(terms, y, chunk=16) if kind == "loss" else -linear_logprobs(terms, y, chunk=16).sum()
    whole = F.cross_entropy((halves[0] @ halves[1].t()).float(), y, reduction="sum")
    for a, b, c in zip(grads(ours, halves), grads(whole, halves), exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().mean() <= 1.1 * (b - c).abs().mean()


def test_autocast_multiplies_in_bf16_and_keeps_fp32_gradients() -> None:
    x, w = tensors((50, 16), (30, 16), dtype=torch.float32)
    y = labels(50, 30)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy([HeadTerm(x, w)], y)
        theirs = F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")
        lps = linear_logprobs([HeadTerm(x, w)], y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-lps.sum(), theirs, rtol=1e-5, atol=1e-5)
    found, expected = grads(ours, [x, w]), grads(theirs, [x, w])
    assert all(g.dtype == torch.float32 for g in found)
    # bf16 keeps 8 bits; sums of 50 rounded products of order 1.
    assert_all_close(found, expected, rtol=2**-6, atol=2**-5)


# --- the heads of models ----------------------------------------------------------------------------------------------


def adapted(kind: str) -> nn.Module:
    """Random models with each kind of head; adapters are random, so that they change the logits."""
    from peft import LoraConfig, get_peft_model

    is_tied = kind.startswith("tied")
    model = random_model("qwen2" if is_tied else "qwen3", tie_word_embeddings=is_tied)
    if kind in ("tied", "untied"):
        return model
    lora = {"r": 4, "init_lora_weights": False}
    settings = {
        "untied lora head": {"target_modules": ["q_proj", "lm_head"], **lora},
        "untied dora head": {"target_modules": ["lm_head"], "use_dora": True, **lora},
        "tied rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1000], **lora},
        "untied rows": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
            **lora,
        },
    }[kind]  # fmt: skip
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


HEADS = ["tied", "untied", "untied lora head", "tied rows", "untied rows", "untied dora head"]


def batch() -> dict:
    g = torch.Generator().manual_seed(0)
    docs = [torch.randint(0, 1000, (n,), generator=g).tolist() for n in (5, 17, 30, 9)]
    docs[1][3:6] = [5, 9, 1000]
    return pack([Example(ids, [i > 2 for i in range(len(ids))]) for ids in docs])


@pytest.mark.parametrize("kind", HEADS)
def test_step_equals_the_model_s_own_head(kind: str) -> None:
    model, inputs = adapted(kind), batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    step, y = Step(model), inputs["labels"]
    num_tokens = count_trained_tokens(inputs)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    expected = token_logprobs(logits, y)
    loss, found = step(**inputs, num_tokens=num_tokens), step(**inputs, want="logprobs", temperature=1.0)
    assert loss.item() == pytest.approx(-expected.double().sum().item() / num_tokens, abs=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    theirs = grads(-expected.sum() / num_tokens, trained)
    for ours in (grads(loss, trained), grads(-found.sum() / num_tokens, trained)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("kind", HEADS)
def test_which_heads_are_written_as_products(kind: str, caplog) -> None:
    """DoRA scales whole columns, so its head is called, and the log says so, once."""
    model, inputs = adapted(kind), batch()
    head = causal_model(model).get_output_embeddings()
    is_called = kind == "untied dora head"
    assert (head_terms(head, torch.randn(3, 32)) is None) == is_called
    step = Step(model)
    with caplog.at_level(logging.INFO, "qftlab.train.step"):
        for _ in range(2):
            step(**inputs, num_tokens=1)
    assert caplog.text.count("is no sum of matrix products") == int(is_called)


def test_the_base_weight_of_a_lora_head_is_not_its_head() -> None:
    """What `.weight` of peft's layer gives, and why it must not be used: logits are off by 1 and more."""
    head = causal_model(adapted("untied lora head")).get_output_embeddings()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    terms, _ = head_terms(head, x)
    torch.testing.assert_close(sum(t.x @ t.weight.t() for t in terms), head(x), rtol=0, atol=1e-5)
    assert (F.linear(x, head.weight) - head(x)).abs().max() > 1


@pytest.mark.parametrize("kind", ["untied lora head", "tied rows", "untied rows"])
def test_switched_off_adapters_leave_the_base_head(kind: str) -> None:
    model, inputs = adapted(kind), batch()
    with model.disable_adapter(), torch.no_grad():
        found = Step(model)(**inputs, want="logprobs")
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    torch.testing.assert_close(found, token_logprobs(logits, inputs["labels"]), rtol=0, atol=1e-5)


def test_a_hooked_head_is_called() -> None:
    """Sharding and offloading work by hooks, which reading the weight would pass by."""
    model, calls = random_model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    plain = Step(random_model())(**batch(), num_tokens=3)
    torch.testing.assert_close(Step(model)(**batch(), num_tokens=3), plain, rtol=1e-6, atol=0)
    assert calls


def test_temperature_and_entropy_of_a_step() -> None:
    inputs = batch()
    for kind in ("tied", "untied dora head"):
        model = adapted(kind)
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits.detach() / 0.5
        keep = inputs["labels"][:, 1:] != -100
        lps, spread = Step(model)(**inputs, want="logprobs+entropy", temperature=0.5)
        torch.testing.assert_close(lps.detach(), token_logprobs(logits, inputs["labels"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(spread, entropy(logits)[:, :-1] * keep, rtol=1e-4, atol=1e-5)
        assert lps.requires_grad and not spread.requires_grad


def test_a_step_asked_for_nonsense() -> None:
    step, inputs = Step(random_model()), batch()
    with pytest.raises(ValueError, match="want must be one of loss, logprobs, logprobs.entropy, got 'logits'"):
        step(**inputs, want="logits")
    with pytest.raises(ValueError, match="a loss must have num_tokens and temperature 1, got None and 1"):
        step(**inputs)
    with pytest.raises(ValueError, match="a loss must have num_tokens and temperature 1, got 3 and 0.5"):
        step(**inputs, num_tokens=3, temperature=0.5)


def test_called_heads_keep_their_dropout_in_both_passes() -> None:
    """A chunk is computed again in backward: another draw there would give the gradient of another loss."""
    x, w = tensors((12, D), (V, D))
    head = lambda h: F.dropout(h, 0.5, training=True) @ w.t()  # noqa: E731
    torch.manual_seed(0)
    loss = module_logprobs(head, x, labels(12), chunk=12).sum()
    torch.manual_seed(0)
    whole = head(x).log_softmax(-1).gather(1, labels(12)[:, None]).sum()
    torch.testing.assert_close(loss, whole.to(loss.dtype), rtol=1e-5, atol=1e-5)
    assert_all_close(grads(loss, [x, w]), grads(whole, [x, w]), rtol=1e-5, atol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from pathlib import Path
from torch.nn import functional as F
from qftlab.maths.logprobs import HeadTerm
from qftlab.maths.logprobs import linear_cross_entropy, linear_logprobs
kind, n, vocab, width = sys.argv[1], *map(int, sys.argv[2:])
x, w = (torch.empty(rows, width).normal_().requires_grad_() for rows in (n, vocab))
y = torch.arange(n) % vocab
for t in (x, w):  # what is returned is in memory before the measurement begins
    t.grad = torch.ones_like(t)
def peak():
    status = Path("/proc/self/status")  # getrusage's figure would start at that of the process that started this one
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(x, w, y):
    if kind == "whole":
        return F.cross_entropy((x @ w.t()).float(), y, reduction="sum")
    return linear_cross_entropy([HeadTerm(x, w)], y) if kind == "loss" else -linear_logprobs([HeadTerm(x, w)], y).sum()
small = [torch.randn(4, 8).requires_grad_(), torch.randn(16, 8).requires_grad_()]
torch.autograd.grad(run(*small, torch.zeros(4, dtype=torch.int64)), small)  # libraries are loaded
before = peak()
for t in (x, w):
    t.grad = None  # given back, and taken again for the gradient that is returned
run(x, w, y).backward()
print(peak() - before)
"""


def peak_bytes(kind: str, *sizes: int) -> int:
    """Peak resident memory of a process above inputs, weights and returned gradients."""
    pytest.importorskip("resource")
    words = [sys.executable, "-c", PEAK, kind, *map(str, sizes)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


SIZES = [
    pytest.param((2048, 32768, 64), id="a small head"),
    pytest.param((4096, 151_936, 896), id="Qwen2.5-0.5B", marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.parametrize("sizes", SIZES)
def test_peak_memory_is_a_tenth_of_the_whole_form_s(sizes: tuple[int, int, int]) -> None:
    whole = peak_bytes("whole", *sizes)
    assert whole > 2 * 4 * sizes[0] * sizes[1]  # logits and their gradient at least: the measurement sees them
    for kind in ("loss", "logprobs"):
        assert peak_bytes(kind, *sizes) < whole / 10


def test_chunks_shrink_as_the_vocabulary_grows() -> None:
    cpu = torch.device("cpu")
    assert chunk_tokens(2_048, cpu) == 512 and chunk_tokens(151_936, cpu) == 128
    assert chunk_tokens(151_936, torch.device("cuda")) * 151_936 <= 2**28  # 0.54 GB of bf16


# --- on a GPU ---------------------------------------------------------------------------------------------------------

KERNEL = """
import torch
import qftlab.maths.kernels as kernels
kernels.BLOCK = 64  # so that a row takes several
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
    logits, labels, scales = (5 * torch.randn(5, 200)).to(dtype), torch.randint(0, 200, (5,)), torch.randn(5)
    whole = logits.float().requires_grad_()
    expected = (whole / 0.7).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (slopes,) = torch.autograd.grad((-expected * scales).sum(), whole)
    untouched = logits.clone()
    found = kernels.slopes_(untouched, labels, None, 0.7)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-5)
    assert torch.equal(untouched, logits)
    torch.testing.assert_close(kernels.slopes_(logits, labels, scales, 0.7), found, rtol=0, atol=0)
    torch.testing.assert_close(logits.float(), slopes, rtol=tolerance, atol=tolerance)
print("equal")
"""


def test_the_kernel_in_triton_s_interpreter() -> None:
    """The arithmetic of the CUDA kernel, without a GPU; torch for CPU comes without Triton, so this may be skipped."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["our kernel", "torch"])
def test_on_cuda_in_bf16(way: str, monkeypatch) -> None:
    """With and without Triton, against fp64 on the same bf16 numbers."""
    pytest.importorskip("triton")
    if way == "torch":
        monkeypatch.setattr(logprobs, "_kernel", lambda: None)
    x, w = (t.detach().cuda().bfloat16().requires_grad_() for t in tensors((700, 128), (5000, 128)))
    y = labels(700, 5000).cuda()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    whole = F.cross_entropy(exact[0] @ exact[1].t(), y, reduction="sum")
    heads = [HeadTerm(x, w)]
    for loss in (linear_cross_entropy(heads, y, chunk=128), -linear_logprobs(heads, y, chunk=128).sum()):
        assert loss.item() == pytest.approx(whole.item(), rel=1e-3)
        for a, b in zip(grads(loss / 700, [x, w]), grads(whole / 700, exact, keep=True), strict=True):
            assert (a.double() - b).norm() < 0.01 * b.norm()
