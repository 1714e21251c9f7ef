"""Exercises of notebook 03, the training loop: loss, weights of micro-batches, schedule, leaks, packing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from qftlab.rows.batches import first_fit_decreasing
from qftlab_course.exercises import Exercise, Suspect, integers, tensor


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    chosen = targets.clamp(min=0).unsqueeze(-1)
    return -logits.log_softmax(-1).gather(-1, chosen).squeeze(-1) * (targets != -100)


def _mean_over_trained(nll: Tensor, targets: Tensor) -> Tensor:
    return nll.sum() / (targets != -100).sum()


def _unshifted(logits, labels):
    return _mean_over_trained(_nll(logits, labels), labels)


def _shifted_back(logits, labels):
    return _mean_over_trained(_nll(logits[:, 1:], labels[:, :-1]), labels[:, :-1])


def _mean_of_rows(logits, labels):
    targets = labels[:, 1:]
    return (_nll(logits[:, :-1], targets).sum(1) / (targets != -100).sum(1)).mean()


def _draw_loss(rng: random.Random, size: int) -> tuple:
    rows, width, vocabulary = 1 + size // 3, 3 + size // 2, 4 + size // 2
    logits = tensor(rng, rows, width, vocabulary, scale=200.0 if size % 4 == 0 else 1.0)
    labels = torch.tensor([integers(rng, width, 0, vocabulary - 1) for _ in range(rows)])
    for row in range(rows):
        keep = rng.randrange(1, width - 1)  # not the last: a shift backwards must find it too
        for column in range(width):
            if column == 0 or (column != keep and rng.random() < 0.5):
                labels[row, column] = -100
    return logits, labels


def weights(token_counts: list[int]) -> list[float]:
    """Factors of the micro-batches' *mean* losses, such that the sum is the mean over all trained tokens."""
    return [count / sum(token_counts) for count in token_counts]


def _draw_counts(rng: random.Random, size: int) -> tuple:
    counts = integers(rng, size, 1, 40)
    if size == 5:
        counts[rng.randrange(size)] = 0
    return (counts,)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """The rate of step 0 … total − 1: (step + 1) / warmup of the peak while step < warmup, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _schedule(fall, rise=lambda step, warmup: (step + 1) / warmup):
    return lambda step, total, warmup, peak: peak * (rise(step, warmup) if step < warmup else fall(step, total, warmup))


def _draw_schedule(rng: random.Random, size: int) -> tuple:
    total = 4 * size + 4
    warmup = (0, total // 4, 2)[size % 3]
    step = rng.randrange(warmup) if warmup and size % 2 else rng.randrange(warmup + 1, total)
    return step, total, warmup, rng.choice([1.0, 0.5, 2e-3])


def normal(prompt: str) -> str:
    """A prompt in lower case, with every run of white space as one space and none at its ends."""
    return " ".join(prompt.lower().split())


def leaks(train: list[str], test: list[str]) -> list[int]:
    """Indices, rising, of the test prompts that also occur in `train` once case and white space are evened out."""
    known = set(map(normal, train))
    return [i for i, prompt in enumerate(test) if normal(prompt) in known]


def _leaks_with(change):
    return lambda train, test: [i for i, p in enumerate(test) if change(p) in set(map(change, train))]


def _leaks_by_part(train, test):
    return [i for i, p in enumerate(test) if any(normal(p) in normal(q) or normal(q) in normal(p) for q in train)]


def _draw_prompts(rng: random.Random, size: int) -> tuple:
    words = ["add", "2", "sort", "spell"]

    def prompt() -> str:
        return " ".join(rng.choice(words) for _ in range(1 + size // 3))

    train = [prompt() for _ in range(1 + size // 2)]
    test = [prompt() for _ in range(1 + size // 3)]
    seen = "sort " + rng.choice(train)
    train.append(seen)
    # Two changes at a time, because which of the two is found tells what is not evened out.
    copies = ([seen, f"\t{seen}"], [seen.upper(), f" {seen}\n"], [seen.title() + " ", seen.replace(" ", "  ")])
    for copy in copies[size % 3]:
        test.insert(rng.randrange(len(test) + 1), copy)
    if size > 2:  # one inside the other, which is no leak
        nested = ["count to 2", "count to 20"]
        train.append(nested[size % 2])
        test.append(nested[1 - size % 2])
    return train, test


def rows(lengths: list[int], budget: int) -> list[list[int]]:
    """Lengths in rows of at most `budget` tokens: the longest first, each into the first row that has room."""
    return [[lengths[i] for i in row] for row in first_fit_decreasing(lengths, budget)]


def _fit(lengths: list[int], budget: int, choose: Callable = min, brim: int = 0) -> list[list[int]]:
    """Lengths as they come, each into the row that `choose` takes among the numbers of those with room."""
    found: list[list[int]] = []
    for length in lengths:
        free = [i for i, row in enumerate(found) if sum(row) + length + brim <= budget]
        if free:
            found[choose(free)].append(length)
        else:
            found.append([length])
    return found


def _next_fit(lengths, budget):
    found: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if found and sum(found[-1]) + length <= budget:
            found[-1].append(length)
        else:
            found.append([length])
    return found


def _draw_lengths(rng: random.Random, size: int) -> tuple:
    budget = 8 + size
    # Two pairs that fill a row to the brim; the 2 comes last, and its row is not the last one.
    lengths = [budget - 2, 2, budget // 2 + 1, budget - budget // 2 - 1, *integers(rng, size, 1, budget)]
    rng.shuffle(lengths)
    return lengths, budget


EXERCISES = (
    Exercise(
        id="03.1",
        title="Masked cross-entropy by hand",
        dots=3,
        minutes=12,
        reference="qftlab.maths.losses.masked_cross_entropy",
        draw=_draw_loss,
        instead="take log_softmax of the logits, pick the target of each trained position, and average",
        forbidden=(
            "torch.nn.functional.cross_entropy",
            "torch.nn.functional.nll_loss",
            "torch.nn.CrossEntropyLoss",
            "torch.nn.NLLLoss",
            "qftlab.maths.logprobs.token_logprobs",
            "transformers.loss.loss_utils.ForCausalLMLoss",
        ),
        suspects=(
            Suspect("nothing is shifted: logits at t predict the label at t + 1", like=_unshifted),
            Suspect("the shift goes the wrong way: drop the last logits and the first label", like=_shifted_back),
            Suspect(
                "infinity or NaN: exp of large logits overflows; use log_softmax", when=lambda a, g, w: _is_wild(g)
            ),
            Suspect(
                "the sum is divided by all positions; divide by the trained ones only",
                like=lambda x, y: _nll(x[:, :-1], y[:, 1:]).mean(),
            ),
            Suspect(
                "each row is averaged, then the rows; add up all tokens first, for long rows count more",
                like=_mean_of_rows,
            ),
            Suspect("this is the sum; divide by the trained tokens", like=lambda x, y: _nll(x[:, :-1], y[:, 1:]).sum()),
            Suspect(
                "−100 marks what is not trained and is no index: replace it by 0 first, and mask the result",
                when=lambda a, g, w: isinstance(g, IndexError | RuntimeError) and "out of" in str(g),
            ),
        ),
    ),
    Exercise(
        id="03.2",
        title="Weights of micro-batches in accumulation",
        dots=1,
        minutes=5,
        reference=weights,
        draw=_draw_counts,
        instead="divide the trained tokens of each micro-batch by those of the whole step",
        forbidden=("qftlab.train.loop.optimizer_step",),
        suspects=(
            Suspect(
                "every micro-batch weighs the same, so tokens of short ones count more; weigh by trained tokens",
                like=lambda counts: [1 / len(counts)] * len(counts),
            ),
            Suspect("these are the counts; divide by the tokens of the whole step", like=lambda counts: counts),
            Suspect(
                "weights fall with the token count; more tokens must weigh more",
                like=lambda counts: [1 / count for count in counts],
            ),
        ),
    ),
    Exercise(
        id="03.3",
        title="A learning rate with warm-up and cosine",
        dots=2,
        minutes=8,
        reference=learning_rate,
        draw=_draw_schedule,
        instead="write the two cases out: a straight line while step < warmup, then half a cosine",
        forbidden=(
            "qftlab.train.loop.learning_rate",
            "transformers.get_cosine_schedule_with_warmup",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
            "torch.optim.lr_scheduler.LambdaLR",
        ),
        atol=1e-9,
        rtol=1e-6,
        suspects=(
            Suspect(
                "the first step has rate 0 and is lost: use (step + 1) / warmup",
                like=_schedule(lambda s, t, w: _cosine((s - w) / (t - w)), rise=lambda s, w: s / w),
            ),
            Suspect("there is no warm-up", like=lambda s, t, w, peak: peak * _cosine(s / t)),
            Suspect(
                "the cosine starts at step 0; it must start where the warm-up ends",
                like=_schedule(lambda s, t, w: _cosine(s / t)),
            ),
            Suspect(
                "the cosine does not reach 0: it is total − warmup steps long",
                like=_schedule(lambda s, t, w: _cosine((s - w) / t)),
            ),
            Suspect(
                "this falls in a straight line, not along a cosine",
                like=_schedule(lambda s, t, w: 1 - (s - w) / (t - w)),
            ),
            Suspect(
                "math.cos takes radians: half a turn is math.pi there, not 180",
                like=_schedule(lambda s, t, w: _cosine(180 / math.pi * (s - w) / (t - w))),
            ),
            Suspect(
                "the cosine falls below 0; (1 + cos) / 2 stays between 0 and 1",
                like=_schedule(lambda s, t, w: math.cos(math.pi * (s - w) / (t - w))),
            ),
            Suspect(
                "warmup may be 0: test step < warmup before you divide by it",
                when=lambda a, g, w: isinstance(g, ZeroDivisionError),
            ),
            Suspect("close, and not equal: is π rounded? Use math.pi", when=lambda a, g, w: abs(g - w) < 2e-3 * a[3]),
        ),
    ),
    Exercise(
        id="03.4",
        title="A detector of leaked test prompts",
        dots=2,
        minutes=8,
        reference=leaks,
        draw=_draw_prompts,
        instead="bring both sides to one form, put the training side in a set, and look the test prompts up",
        suspects=(
            Suspect("only exact copies are found; even out case and white space first", like=_leaks_with(str)),
            Suspect("case is not evened out", like=_leaks_with(lambda p: " ".join(p.split()))),
            Suspect(
                "only the ends are stripped; runs of white space inside count as one space",
                like=_leaks_with(lambda p: p.strip().lower()),
            ),
            Suspect("white space is not evened out", like=_leaks_with(str.lower)),
            Suspect("a prompt inside a longer one is no leak; compare whole prompts", like=_leaks_by_part),
            Suspect("return the indices in `test`", when=lambda a, g, w: any(isinstance(x, str) for x in g)),
        ),
    ),
    Exercise(
        id="03.5",
        title="First-fit-decreasing",
        dots=2,
        minutes=8,
        reference=rows,
        draw=_draw_lengths,
        instead="sort the lengths, and look through the rows so far for the first with room",
        forbidden=("qftlab.rows.batches.first_fit_decreasing",),
        suspects=(
            Suspect("the lengths are taken as they come; take the longest first", like=_fit),
            Suspect("only the last row is tried; look through all rows, from the first", like=_next_fit),
            Suspect(
                "a row may be filled to the brim: it has room if sum(row) + length <= budget",
                like=lambda lengths, budget: _fit(sorted(lengths, reverse=True), budget, brim=1),
            ),
            Suspect(
                "this is the last row with room; take the first",
                like=lambda lengths, budget: _fit(sorted(lengths, reverse=True), budget, choose=max),
            ),
            Suspect("the shortest come first; take the longest first", like=lambda n, budget: _fit(sorted(n), budget)),
            Suspect("a row holds more than the budget", when=lambda a, g, w: any(sum(row) > a[1] for row in g)),
        ),
    ),
)


def _is_wild(value) -> bool:
    return isinstance(value, float | Tensor) and not bool(torch.as_tensor(value).isfinite().all())
