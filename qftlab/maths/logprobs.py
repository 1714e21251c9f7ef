"""Log-probabilities, entropy and cross-entropy, in nats and fp32: from logits, or straight from hidden states.

The logits of N tokens are N x V numbers: 2.5 GB for 4,096 tokens of Qwen2.5. `linear_cross_entropy` and
`linear_logprobs` never hold them. They take the head's factors, walk over the tokens chunk by chunk, and add up the
gradient of the head's weight in fp32. A loss whose upstream gradient is known beforehand has its gradient formed on the
way forward, while the chunk's probabilities are at hand; other losses compute each chunk again on the way back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)
# Numbers in a chunk of logits. CPU: about what a cache holds. CUDA: wide enough to keep the matrix units busy, and so
# that the weight's gradient is not read and written too often; the kernel works in place, torch needs fp32 copies.
CHUNK_NUMBERS = {"cpu": 2**20, "cuda": 2**26, "cuda with kernel": 2**28}
MIN_CHUNK = 128  # tokens: with fewer, reading the weight costs more than multiplying by it


@dataclass(frozen=True)
class HeadTerm:
    """A summand of the logits, x @ weight.T: on all columns, or on some of them.

    Args:
        x: (N, d) hidden states, or what a low-rank adapter makes of them.
        weight: (v, d), v being V unless columns are named.
        columns: (v,) int64 distinct token ids that this term changes; None for all V.
    """

    x: Tensor
    weight: Tensor
    columns: Tensor | None = None


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time on that device."""
    kind = "cuda with kernel" if device.type == "cuda" and _kernel() else device.type
    return max(MIN_CHUNK, CHUNK_NUMBERS.get(kind, CHUNK_NUMBERS["cpu"]) // vocab_size)


@cache
def _kernel() -> Callable | None:
    """Our own kernel for a chunk on CUDA; None without Triton."""
    try:
        from qftlab.maths.kernels import logit_grads_
    except ImportError:
        log.info("no Triton: the loss of a chunk takes several passes over its logits in place of two")
        return None
    return logit_grads_


@dataclass(frozen=True)
class HeadWalk:
    """What is no tensor to differentiate: how the terms are laid out, and how they are walked over."""

    columns: tuple[Tensor | None, ...]
    autocast: torch.dtype | None  # what autocast would make the operands; an autograd function has to do it by hand
    chunk: int
    temperature: float = 1.0
    has_gradient: bool = True

    @classmethod
    def of(cls, terms: Sequence[HeadTerm], chunk: int | None, temperature: float = 1.0) -> HeadWalk:
        """For these terms, here and now: under autocast or not, with gradients or without."""
        x = terms[0].x
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        size = chunk or chunk_tokens(len(terms[0].weight), x.device)
        return cls(tuple(t.columns for t in terms), dtype, size, temperature, torch.is_grad_enabled())

    @staticmethod
    def tensors(terms: Sequence[HeadTerm], bias: Tensor | None) -> list[Tensor | None]:
        """What may need a gradient: all x, then all weights, then the bias."""
        return [*(t.x for t in terms), *(t.weight for t in terms), bias]


class ChunkedHead:
    """The logits of one chunk after another, and the gradients of all tensors, added up over chunks.

    Args:
        needs: which tensors of `Plan.tensors` want a gradient.
    """

    def __init__(self, plan: HeadWalk, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        self.plan, self.needs, self.count = plan, needs, len(plan.columns)
        self.bias = tensors[-1]
        # A low-rank term may be kept in fp32 beside a head in bf16: each term multiplies in its own dtype.
        cast = [t.detach().to(plan.autocast or t.dtype) for t in tensors[:-1]]
        self.xs, self.weights = cast[: self.count], cast[self.count :]
        self.precise = torch.promote_types(cast[0].dtype, torch.float32)
        self.buffer: Tensor | None = None  # of logits: memory asked for once, not for each chunk
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        for i, (tensor, wanted) in enumerate(zip(tensors, needs, strict=True)):
            if wanted:  # hidden states get each row once; weights and bias are sums over chunks
                dtype = cast[i].dtype if i < self.count else torch.promote_types(tensor.dtype, torch.float32)
                self.gradients[i] = torch.zeros_like(tensor, dtype=dtype)

    def chunks(self) -> Iterator[slice]:
        """The tokens in order."""
        for start in range(0, len(self.xs[0]), self.plan.chunk):
            yield slice(start, start + self.plan.chunk)

    def logits(self, rows: slice) -> Tensor:
        """(n, V), not yet at the temperature; the caller may write into it, until the next call.

        In half precision only where nothing is added to the product: the rest is summed in fp32 or wider.
        """
        x, weight = self.xs[0][rows], self.weights[0]
        if self.buffer is None:
            self.buffer = x.new_empty(len(x), len(weight))
        out = torch.mm(x, weight.t(), out=self.buffer[: len(x)])
        for x, weight, columns in zip(self.xs[1:], self.weights[1:], self.plan.columns[1:], strict=True):
            out, added = out.to(self.precise), (x[rows] @ weight.t()).to(self.precise)
            out = out.add_(added) if columns is None else out.index_add_(1, columns, added)
        return out if self.bias is None else out.to(self.precise).add_(self.bias)

    def logprobs(self, rows: slice, labels: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p of a chunk's labels, (n,), and scale · d(−log p) / d logits, (n, V), where there are scales (n,)."""
        logits, temperature = self.logits(rows), self.plan.temperature
        if logits.is_cuda and logits.dtype != torch.float64 and (kernel := _kernel()) is not None:
            return kernel(logits, labels, scales, temperature), logits
        logits = logits.to(self.precise)
        if temperature != 1:
            logits /= temperature
        logits -= logits.amax(-1, keepdim=True)
        labels = labels.unsqueeze(-1)
        picked = logits.gather(-1, labels)
        sums = logits.exp_().sum(-1, keepdim=True)
        if scales is not None:  # d(−log p) / d logits = p − onehot(label)
            scales = scales.unsqueeze(-1) / temperature
            logits.mul_(scales / sums).scatter_add_(1, labels, -scales)
        return (picked - sums.log()).squeeze(-1), logits

    def entropies(self, rows: slice) -> Tensor:
        """(n,) at the temperature."""
        return entropy(self.logits(rows).to(self.precise) / self.plan.temperature)

    def add(self, rows: slice, logit_grads: Tensor) -> None:
        """Takes in d loss / d logits of a chunk, (n, V)."""
        if self.needs[-1]:
            self.gradients[-1] += logit_grads.sum(0, dtype=self.precise)
        for i, columns in enumerate(self.plan.columns):
            part = (logit_grads if columns is None else logit_grads[:, columns]).to(self.weights[i].dtype)
            if self.needs[i]:
                torch.mm(part, self.weights[i], out=self.gradients[i][rows])
            if self.needs[self.count + i]:
                _add_product_(self.gradients[self.count + i], part, self.xs[i][rows])


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, with an fp32 total of half-precision factors."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif total.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:  # torch has no half-precision product with an fp32 result on CPU
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


class SumNLL(torch.autograd.Function):
    """Σ −log p(label), its gradient formed in forward (as Liger's: Hsu et al. 2024, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, labels: Tensor, plan: HeadWalk, *tensors: Tensor | None) -> Tensor:
        """The sum, and every gradient of it, unscaled."""
        has_gradient = plan.has_gradient and any(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[2:] if has_gradient else [False] * len(tensors)
        with torch.autocast(labels.device.type, enabled=False):
            walk = ChunkedHead(plan, tensors, needs)
            logprobs = torch.empty(len(labels), dtype=walk.precise, device=labels.device)
            ones = torch.ones_like(logprobs) if has_gradient else None
            for rows in walk.chunks():
                logprobs[rows], logit_grads = walk.logprobs(rows, labels[rows], None if ones is None else ones[rows])
                if has_gradient:
                    walk.add(rows, logit_grads)
        ctx.gradients, ctx.dtypes = walk.gradients, [None if t is None else t.dtype for t in tensors]
        wide = torch.float64 if labels.device.type in ("cpu", "cuda") else walk.precise  # a long sum of small numbers
        return -logprobs.sum(dtype=wide).to(walk.precise)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        """The gradients formed in forward, scaled in place: no second copy of the weight's."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradient once, and it is used up: call it again")
        scaled = (None if g is None else g.mul_(upstream).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *scaled


class TokenLogprobs(torch.autograd.Function):
    """log p of each label, and entropies without gradient; chunks are computed again in backward."""

    @staticmethod
    def forward(ctx, labels: Tensor, plan: HeadWalk, with_entropy: bool, *tensors: Tensor | None):
        """Both (N,); the entropies hold nothing unless asked for."""
        with torch.autocast(labels.device.type, enabled=False):
            walk = ChunkedHead(plan, tensors, [False] * len(tensors))
            logprobs = torch.empty(len(labels), dtype=walk.precise, device=labels.device)
            entropies = torch.empty_like(logprobs)
            for rows in walk.chunks():
                logprobs[rows], _ = walk.logprobs(rows, labels[rows], None)
                if with_entropy:
                    entropies[rows] = walk.entropies(rows)
        ctx.plan = plan
        ctx.save_for_backward(labels, *tensors)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _):
        """Gradients for an upstream slope of each token, (N,)."""
        labels, *tensors = ctx.saved_tensors
        with torch.autocast(labels.device.type, enabled=False):
            walk = ChunkedHead(ctx.plan, tensors, ctx.needs_input_grad[3:])
            for rows in walk.chunks():
                _, logit_grads = walk.logprobs(rows, labels[rows], -upstream[rows])
                walk.add(rows, logit_grads)
        grads = (None if g is None else g.to(t.dtype) for g, t in zip(walk.gradients, tensors, strict=True))
        return None, None, None, *grads


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label given what precedes it.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, unshifted, −100 where not wanted.

    Returns:
        (B, T − 1) fp32, 0 where not wanted; column t belongs to the label at t + 1.

    Raises:
        ValueError: if the shapes disagree.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} like logits, got {tuple(labels.shape)}")
    targets = labels[:, 1:]
    scores = logits[:, :-1].float().log_softmax(-1)
    picked = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets == -100, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution, in nats: (…, V) → (…), fp32 or wider."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return torch.special.entr(logits.to(precise).softmax(-1)).sum(-1)


def linear_cross_entropy(
    terms: Sequence[HeadTerm], labels: Tensor, *, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Σ −log p(label) of tokens whose logits are the sum of `terms`, without ever holding those logits.

    Args:
        terms: the first covers all V columns; `[HeadTerm(hidden, weight)]` for a plain head.
        labels: (N,) int64 in [0, V): trained positions only.
        bias: (V,).
        chunk: tokens at a time, by default what suits the device.

    Returns:
        A scalar, fp32 (fp64 for fp64 terms), in nats. Its gradient equals that of cross-entropy on the whole logits; it
        is formed going forward, so it can be taken once.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check(terms, labels, bias, chunk)
    plan = HeadWalk.of(terms, chunk)
    return SumNLL.apply(labels, plan, *plan.tensors(terms, bias))


def linear_logprobs(
    terms: Sequence[HeadTerm],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p of each label at a temperature, for losses that weigh tokens differently (DPO, RLOO).

    Arguments as in `linear_cross_entropy`, and:
        temperature: divides the logits; above 0.
        with_entropy: whether to return the entropies as well, (N,) nats, without gradient.

    Returns:
        (N,) fp32 nats. Backward computes each chunk's logits a second time.

    Raises:
        ValueError: if the shapes disagree, or the temperature is not above 0.
    """
    _check(terms, labels, bias, chunk)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    plan = HeadWalk.of(terms, chunk, temperature)
    logprobs, entropies = TokenLogprobs.apply(labels, plan, with_entropy, *plan.tensors(terms, bias))
    return (logprobs, entropies) if with_entropy else logprobs


def module_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = MIN_CHUNK,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logprobs` for a head that can only be called: chunk by chunk, each computed again in backward.

    It costs a second pass of the head, and a weight that is trained gets its gradient in its own dtype.

    Args:
        head: (n, D) → (n, V), every row by itself.
        hidden: (N, D).
        labels, temperature, chunk, with_entropy: as in `linear_logprobs`.
    """

    def piece(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x).float() / temperature
        with torch.no_grad():
            spread = entropy(logits) if with_entropy else logits.new_empty(0)
        return logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1), spread

    pairs = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    pieces = [checkpoint(piece, x, y, use_reentrant=False) for x, y in pairs]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return (logprobs, entropies) if with_entropy else logprobs


def _check(terms: Sequence[HeadTerm], labels: Tensor, bias: Tensor | None, chunk: int | None) -> None:
    if not terms or terms[0].columns is not None:
        raise ValueError("terms must start with one on all columns: HeadTerm(hidden, weight)")
    vocab = len(terms[0].weight)
    for term in terms:
        height = vocab if term.columns is None else len(term.columns)
        if term.weight.shape != (height, term.x.shape[-1]) or term.x.shape[:-1] != labels.shape or labels.ndim != 1:
            raise ValueError(
                f"a term must be x (N, d) and weight ({height}, d) with N = {labels.numel()} labels, "
                f"got x {tuple(term.x.shape)}, weight {tuple(term.weight.shape)}, labels {tuple(labels.shape)}"
            )
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must be ({vocab},), got {tuple(bias.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
