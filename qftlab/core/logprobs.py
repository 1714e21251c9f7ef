"""Log-probabilities, entropy and cross-entropy, in nats and fp32: from logits, or straight from hidden states.

The logits of N tokens are N x V numbers: 2.5 GB for 4,096 tokens of Qwen2.5. `linear_cross_entropy` and
`linear_logprobs` never hold them. They take the head's factors, walk over the tokens chunk by chunk, and add up the
gradient of the head's weight in fp32. A loss whose upstream gradient is known beforehand has its gradient formed on the
way forward, while the chunk's probabilities are at hand; other losses compute each chunk again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qftlab.core.chunks import MIN_CHUNK, Plan, SumNLL, Term, TokenLogprobs


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
    terms: Sequence[Term], labels: Tensor, *, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Σ −log p(label) of tokens whose logits are the sum of `terms`, without ever holding those logits.

    Args:
        terms: the first covers all V columns; `[Term(hidden, weight)]` for a plain head.
        labels: (N,) int64 in [0, V): trained positions only.
        bias: (V,).
        chunk: tokens at a time, by default what suits the device.

    Returns:
        A scalar, fp32 (fp64 for fp64 terms), in nats. Its gradient equals that of cross-entropy on the whole logits; it
        is formed going forward, so it can be taken once. On CUDA a plain head goes through Liger's kernel where Liger
        is installed.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check(terms, labels, bias, chunk)
    is_plain = len(terms) == 1 and labels.is_cuda and chunk is None and labels.numel()
    if is_plain and (kernel := _liger()) is not None:
        return kernel(terms[0].weight, terms[0].x, labels, bias)
    plan = Plan.of(terms, chunk)
    return SumNLL.apply(labels, plan, *plan.tensors(terms, bias))


def linear_logprobs(
    terms: Sequence[Term],
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
    plan = Plan.of(terms, chunk, temperature)
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


def _check(terms: Sequence[Term], labels: Tensor, bias: Tensor | None, chunk: int | None) -> None:
    if not terms or terms[0].columns is not None:
        raise ValueError("terms must start with one on all columns: Term(hidden, weight)")
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


@cache
def _liger() -> Callable | None:
    """Liger's fused head and cross-entropy, its weight gradient added up in fp32; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
