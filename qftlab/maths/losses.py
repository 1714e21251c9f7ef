"""Losses in nats: of tokens, of preference pairs, and of sampled answers with their advantages and KL estimates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qftlab.settings import check_choice


def masked_cross_entropy(logits: Tensor, labels: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
    """Summed surprise of the trained tokens, divided by their number; position t is predicted from t − 1.

    Args:
        logits: (B, T, V), any float type; the sum is taken in fp32.
        labels: (B, T) int64, unshifted, −100 where not trained.
        num_tokens: the divisor, if this is a part of a larger step: the trained tokens of the *whole* step.

    Returns:
        A scalar, in nats per token.

    Raises:
        ValueError: if the shapes disagree, or nothing is trained and no `num_tokens` is given.

    Source: transformers' `ForCausalLMLoss`, with which it agrees to 1e-6 in fp32.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} like logits, got {tuple(labels.shape)}")
    targets = labels[:, 1:].reshape(-1)
    if num_tokens is None:
        num_tokens = int((targets != -100).sum())
        if not num_tokens:
            raise ValueError("labels must hold at least one trained token after the first position, got only -100")
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum") / num_tokens


def sum_by_document(values: Tensor, bounds: Tensor | None = None) -> Tensor:
    """Token values added up to one number a document.

    Args:
        values: (B, T − 1), column t for the token at t + 1, as `token_logprobs` gives them; 0 where not wanted.
        bounds: (N + 1,) the `cu_seq_lens_q` of a packed row (B is then 1); None where every row is a document.

    Returns:
        (N,), or (B,) without bounds.
    """
    if bounds is None:
        return values.sum(1)
    positions = torch.arange(1, values.shape[1] + 1, device=values.device)
    documents = torch.searchsorted(bounds[1:].to(positions), positions, right=True)
    width = int((bounds[1:] - bounds[:-1]).max())
    # A row for each document and then one sum: added up one by one, a thousand tokens would lose the third decimal.
    grid = values.new_zeros(len(bounds) - 1, width)
    return grid.index_put((documents, positions - bounds[documents]), values[0]).sum(1)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    tokens: tuple[Tensor, Tensor] | None = None,
    nll_weight: float = 0.0,
    mean_chosen_tokens: float | Tensor | None = None,
) -> Tensor:
    """The loss of each preference pair; their mean is the batch's.

    With h = log π(chosen)/π_ref(chosen) − log π(rejected)/π_ref(rejected):
    sigmoid is −(1 − ε)·log σ(βh) − ε·log σ(−βh); ipo is (h′ − 1/(2β))², where h′ is made of per-token means.

    Args:
        chosen, rejected: (B,) the policy's log-probabilities of the answers, summed over tokens, in nats.
        ref_chosen, ref_rejected: (B,) the reference's.
        beta: how strongly the policy is held to the reference.
        loss_type: "sigmoid" or "ipo".
        label_smoothing: ε, the share of labels taken to be flipped; sigmoid only (TRL's `sigmoid` ignores it).
        reference_free: whether π_ref is taken as uniform; no reference is then given.
        tokens: (B,) each, the lengths of the chosen and rejected answers; for ipo and the NLL term.
        nll_weight: of the mean surprise (nats a token) of the chosen answers, which is added.
        mean_chosen_tokens: tokens of a chosen answer on average over the whole step, if this is a part of it.

    Returns:
        (B,) nats (ipo: nats² a token²).

    Raises:
        ValueError: for shapes that differ, an unknown loss_type, a number out of range, a reference that is missing or
            given beside reference_free, or lengths that are missing.

    Source: Rafailov et al. 2023, eq. 7, and their repository for ε; Azar et al. 2023, eq. 17, with TRL's per-token
        means; NLL as TRL's "sft". Agrees with TRL 1.16 to 1e-5.
    """
    check_choice(("sigmoid", "ipo"), loss_type=loss_type)
    _check_pairs(chosen, rejected, (ref_chosen, ref_rejected), reference_free)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type == "ipo"):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 with ipo, got {label_smoothing} ({loss_type})")
    if tokens is None and (loss_type == "ipo" or nll_weight):
        raise ValueError("tokens must be given for ipo and for nll_weight, got None: the lengths of both answers")
    up, down = (chosen, rejected) if reference_free else (chosen - ref_chosen, rejected - ref_rejected)
    if loss_type == "ipo":
        losses = (up / tokens[0] - down / tokens[1] - 1 / (2 * beta)) ** 2
    else:
        score = beta * (up - down)
        losses = -(1 - label_smoothing) * F.logsigmoid(score) - label_smoothing * F.logsigmoid(-score)
    if nll_weight:
        mean = tokens[0].float().mean() if mean_chosen_tokens is None else mean_chosen_tokens
        losses = losses - nll_weight * chosen / mean
    return losses


def _check_pairs(chosen: Tensor, rejected: Tensor, references: tuple, reference_free: bool) -> None:
    if any((r is None) != reference_free for r in references):
        raise ValueError(
            f"ref_chosen and ref_rejected must both be given, or neither and reference_free=True, got {reference_free}"
        )
    shapes = [tuple(t.shape) for t in (chosen, rejected, *references) if t is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"the log-probabilities of pairs must have one shape (B,), got {shapes}")


def preference_accuracy(margins: Tensor) -> Tensor:
    """Share of pairs that are ranked rightly: margin above 0; a tie counts ½. A scalar; margins (B,) in nats."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Each reward minus the mean of its siblings': A_i = R_i − mean(R_j, j ≠ i) = G/(G − 1)·(R_i − mean R).

    Args:
        rewards: (..., G) of the G answers to one prompt, in the last dimension.

    Returns:
        The same shape; each group sums to 0, and one whose rewards are all equal is 0.

    Raises:
        ValueError: for fewer than two answers.

    Source: Kool et al. 2019; Ahmadian et al. 2024, eq. 4.
    """
    size = rewards.shape[-1]
    if size < 2:
        raise ValueError(f"a group must have at least 2 answers to leave one out, got {size}: raise num_generations")
    # As differences, so that equal rewards give exactly 0.
    return (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sum(-1) / (size - 1)


def penalised_advantages(rewards: Tensor, kl: Tensor | float, beta: float, size: int) -> Tensor:
    """Leave-one-out advantages of R − β·KL, the KL penalty counted as a part of each answer's reward.

    Args:
        rewards: (N,) of groups of `size` answers side by side.
        kl: (N,) log π_old − log π_ref of each answer, in nats; any number where β is 0.
        beta: weight of the penalty.
        size: answers to a prompt.

    Returns:
        (N,).

    Source: Ahmadian et al. 2024, eq. 1 with eq. 4; the placement TRL's RLOOTrainer has too.
    """
    return leave_one_out_advantages((rewards - beta * kl).view(-1, size)).flatten()


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """The clipped policy gradient of whole answers: −min(ρA, clip(ρ, 1 − ε, 1 + ε)·A), ρ = exp(log π − log π_old).

    Args:
        logprobs: (N,) of each answer under the policy, summed over its tokens, at the sampling temperature, in nats.
        old_logprobs: (N,) the same when it was sampled.
        advantages: (N,).
        epsilon: how far the ratio may move before it earns nothing more.

    Returns:
        (N,) losses; their mean is the batch's. `is_clipped` tells whose gradient is 0.

    Raises:
        ValueError: for shapes that differ, or an epsilon outside (0, 1).

    Source: Schulman et al. 2017, eq. 7, with one ratio an answer as in TRL's RLOO.
    """
    if not logprobs.shape == old_logprobs.shape == advantages.shape:
        shapes = [tuple(t.shape) for t in (logprobs, old_logprobs, advantages)]
        raise ValueError(f"logprobs, old_logprobs and advantages must have one shape (N,), got {shapes}")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def is_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """(N,) bool: whether an answer's ratio left 1 ± ε where its advantage pushes; see `clipped_policy_loss`."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio > 1 + epsilon) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """KL(π‖π_ref) estimated from samples of π, token by token or answer by answer.

    With r = log π_ref − log π: k1 = −r (no bias, may be negative), k2 = r²/2 (biased, small variance),
    k3 = exp(r) − 1 − r (no bias, never negative).

    Args:
        logprobs: of what was sampled, under π, in nats.
        ref_logprobs: the same under π_ref.
        kind: "k1", "k2" or "k3".

    Returns:
        The same shape, in nats; the mean over samples is the estimate.

    Raises:
        ValueError: for another kind.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    check_choice(("k1", "k2", "k3"), kind=kind)
    ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -ratio
    return ratio.square() / 2 if kind == "k2" else ratio.expm1() - ratio
