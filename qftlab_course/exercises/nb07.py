"""Exercises of notebook 07, DPO: the loss, smoothed labels, accuracy with ties, credit by token, the best of n."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F

from qftlab_course.check_compare import difference
from qftlab_course.check_guard import TimeLimitReached
from qftlab_course.exercises import Exercise, Suspect, tensor


def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """The DPO loss of each pair (B,), from log-probabilities of whole answers (B,) in nats."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def _loss_of(score):
    return lambda c, r, rc, rr, beta: -F.logsigmoid(score(c, r, rc, rr, beta))


def _draw_logprobs(rng: random.Random, size: int) -> tuple:
    both = [tensor(rng, size, scale=2.0) for _ in range(4)]
    beta = (1.0, 0.5, 0.1)[size % 3]
    if size == 5:  # a pair that the policy has wholly the wrong way round
        both[0][0], both[1][0] = -900.0, -3.0
    return *both, beta


def _is_infinite(args: tuple, got, wanted) -> bool:
    return isinstance(got, Tensor) and got.is_floating_point() and bool(got.isinf().any())


def _is_scalar(args: tuple, got, wanted) -> bool:
    return isinstance(got, Tensor) and got.ndim == 0


def _is_cut(args: tuple, got, wanted) -> bool:
    """Right values without a gradient, or NumPy asked for those of a tensor that has one."""
    if isinstance(got, RuntimeError):
        return "requires grad" in str(got)
    return not getattr(got, "requires_grad", False) and difference(got, wanted, 1e-4, 1e-4) is None


def smoothed(score: Tensor, epsilon: float) -> Tensor:
    """The loss of each pair (B,) whose label is the wrong way round with probability epsilon; score = beta · h."""
    return -(1 - epsilon) * F.logsigmoid(score) - epsilon * F.logsigmoid(-score)


def _draw_scores(rng: random.Random, size: int) -> tuple:
    score = tensor(rng, size, scale=3.0)
    if size == 5:
        score[0] = 200.0
    return score, (0.1, 0.25, 0.4)[size % 3]


def accuracy(margins: Tensor) -> float:
    """Share of the pairs whose margin (B,) is above 0; a tie counts half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


def _draw_margins(rng: random.Random, size: int) -> tuple:
    margins = tensor(rng, size)
    margins[margins == 0] = 1.0
    margins[1::2] = 0.0
    return (margins * (size != 4),)  # before the first step all pairs tie


def reward(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The implicit reward of each answer (B,): beta times the gain of its trained tokens; all (B, T), mask bool."""
    return beta * ((logprobs - ref_logprobs) * mask).sum(1)


def _draw_tokens(rng: random.Random, size: int) -> tuple:
    shape = (1 + size // 3, 1 + size)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row in mask:
        start = rng.randint(0, shape[1] - 1)
        row[start : start + rng.randint(1, shape[1])] = True
    return tensor(rng, *shape), tensor(rng, *shape), mask, (1.0, 0.5, 0.1)[size % 3]


def best_of(scores: list[float], values: list[float], n: int) -> float:
    """The mean value of the best-scored of n answers, over all choices of n among them; equal scores, equal values."""
    ranked = [value for _, value in sorted(zip(scores, values, strict=True))]
    return sum(value * math.comb(i, n - 1) for i, value in enumerate(ranked)) / math.comb(len(ranked), n)


def _in_order(scores: list[float], values: list[float], n: int) -> float:
    return sum(v * math.comb(i, n - 1) for i, v in enumerate(values)) / math.comb(len(values), n)


def _by_score(scores: list[float], values: list[float], n: int) -> float:
    table = dict(zip(scores, values, strict=True))
    return _in_order(scores, [table[score] for score in sorted(table)], n)


def _draw_answers(rng: random.Random, size: int) -> tuple:
    """At sizes 3 and 6 an answer that was drawn twice; at size 8 too many choices to go through, and not yet so many
    that listing them fills the memory."""
    count, n = ((3, 2), (4, 1), (4, 2), (5, 5), (6, 3), (7, 4), (8, 4), (24, 12))[size - 1]
    scores = [float(x) for x in rng.sample(range(-20, 21), count)]
    values = [float(rng.randint(0, 9)) for _ in range(count)]
    if size in (3, 6):
        scores[-1], values[-1] = scores[0], values[0]
    return scores, values, n


EXERCISES = (
    Exercise(
        id="07.1",
        title="The DPO loss",
        dots=2,
        minutes=8,
        reference=loss,
        draw=_draw_logprobs,
        instead="take the two gains over the reference, their difference, and logsigmoid",
        is_trained=True,
        forbidden=("qftlab.maths.losses.dpo_loss", "torch.nn.functional.binary_cross_entropy_with_logits"),
        suspects=(
            Suspect("infinite: sigmoid underflows to 0 before the log; use F.logsigmoid", when=_is_infinite),
            Suspect("return the loss of each pair (B,), not their mean", when=_is_scalar),
            Suspect("a later cell trains through this loss: stay in torch, without item() or NumPy", when=_is_cut),
            Suspect(
                "the reference is missing: this is the policy's own margin",
                like=_loss_of(lambda c, r, rc, rr, beta: beta * (c - r)),
            ),
            Suspect(
                "chosen and rejected are the wrong way round",
                like=_loss_of(lambda c, r, rc, rr, beta: beta * ((r - rr) - (c - rc))),
            ),
            Suspect("beta is missing", like=_loss_of(lambda c, r, rc, rr, beta: (c - rc) - (r - rr))),
            Suspect(
                "beta divides; it multiplies",
                like=_loss_of(lambda c, r, rc, rr, beta: ((c - rc) - (r - rr)) / beta),
            ),
            Suspect(
                "the sign: a loss is minus the log",
                like=lambda c, r, rc, rr, beta: F.logsigmoid(beta * ((c - rc) - (r - rr))),
            ),
            Suspect(
                "the reference's margin is added; subtract it",
                like=_loss_of(lambda c, r, rc, rr, beta: beta * ((c - r) + (rc - rr))),
            ),
        ),
    ),
    Exercise(
        id="07.2",
        title="Labels that may be wrong",
        dots=2,
        minutes=6,
        reference=smoothed,
        draw=_draw_scores,
        instead="weigh the two losses, of the label and of its opposite",
        forbidden=("qftlab.maths.losses.dpo_loss", "torch.nn.functional.binary_cross_entropy_with_logits"),
        suspects=(
            Suspect("infinite: sigmoid underflows to 0 before the log; use F.logsigmoid", when=_is_infinite),
            Suspect("return the loss of each pair (B,), not their mean", when=_is_scalar),
            Suspect("the labels are not smoothed: this is plain DPO", like=lambda s, e: -F.logsigmoid(s)),
            Suspect(
                "the weights are the wrong way round: the label as given has 1 − epsilon",
                like=lambda s, e: -e * F.logsigmoid(s) - (1 - e) * F.logsigmoid(-s),
            ),
            Suspect(
                "the flipped label's loss is −log σ(−score), of the opposite score",
                like=lambda s, e: -(1 - e) * F.logsigmoid(s) + e * F.logsigmoid(-s),
            ),
            Suspect("the flipped half is missing", like=lambda s, e: -(1 - e) * F.logsigmoid(s)),
            Suspect(
                "smooth the two losses, not the probability inside the log",
                like=lambda s, e: -torch.log((1 - e) * s.sigmoid() + e * (-s).sigmoid()),
            ),
        ),
    ),
    Exercise(
        id="07.3",
        title="Preference accuracy, with ties",
        dots=1,
        minutes=4,
        reference=accuracy,
        draw=_draw_margins,
        instead="count margins above 0 as 1 and those equal to 0 as one half",
        forbidden=("qftlab.maths.losses.preference_accuracy",),
        suspects=(
            Suspect("a tie counts as wrong; it is worth one half", like=lambda m: (m > 0).float().mean().item()),
            Suspect("a tie counts as right; it is worth one half", like=lambda m: (m >= 0).float().mean().item()),
            Suspect(
                "ties are left out; each is worth one half",
                like=lambda m: (m > 0).sum().item() / max(1, (m != 0).sum().item()),
            ),
        ),
    ),
    Exercise(
        id="07.4",
        title="Credit, token by token",
        dots=1,
        minutes=5,
        reference=reward,
        draw=_draw_tokens,
        instead="subtract token by token, multiply by the mask and add up",
        suspects=(
            Suspect("prompt and padding count too: apply the mask", like=lambda p, r, m, b: b * (p - r).sum(1)),
            Suspect("beta is missing", like=lambda p, r, m, b: ((p - r) * m).sum(1)),
            Suspect(
                "this is a mean over tokens; DPO adds them up",
                like=lambda p, r, m, b: b * ((p - r) * m).sum(1) / m.sum(1),
            ),
            Suspect("the reference is missing", like=lambda p, r, m, b: b * (p * m).sum(1)),
            Suspect(
                "the reference comes first; the gain is policy minus reference",
                like=lambda p, r, m, b: b * ((r - p) * m).sum(1),
            ),
            Suspect("one number for each answer (B,): add up over tokens only", when=_is_scalar),
        ),
    ),
    Exercise(
        id="07.5",
        title="The best of n, without sampling again",
        dots=3,
        minutes=12,
        reference=best_of,
        draw=_draw_answers,
        instead="sort by score, and count in how many choices of n each answer is the best",
        seconds=2.0,
        suspects=(
            Suspect(
                "12 of 24 can be chosen in 2,704,156 ways, 16 of 32 in 601,080,390: count them, do not list them",
                when=lambda a, g, w: isinstance(g, TimeLimitReached),
            ),
            Suspect(
                "this is the best of all answers; n are drawn among them",
                like=lambda scores, values, n: values[scores.index(max(scores))],
            ),
            Suspect(
                "this takes the highest values; the *score* chooses, and the value is what one gets",
                like=lambda scores, values, n: _in_order(scores, sorted(values), n),
            ),
            Suspect(
                "this is the mean over the n best; only the best-scored of each choice counts",
                like=lambda scores, values, n: sum(v for _, v in sorted(zip(scores, values, strict=True))[-n:]) / n,
            ),
            Suspect("this is the mean of all answers: n changes nothing", like=lambda s, v, n: sum(v) / len(v)),
            Suspect(
                "the answers are drawn one by one and may come twice; here the n are different answers",
                like=lambda scores, values, n: (
                    sum(v * ((i + 1) ** n - i**n) for i, (_, v) in enumerate(sorted(zip(scores, values, strict=True))))
                    / len(values) ** n
                ),
            ),
            Suspect("the answers are ranked as they stand; sort them by score first", like=_in_order),
            Suspect("an answer that was drawn twice counts twice: a dict by score keeps it once", like=_by_score),
        ),
    ),
)
