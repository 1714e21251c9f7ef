"""Exercises of notebook 08, RLOO: advantages, the clipped loss, k3, rejection sampling, and a verifier to repair."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qftlab.maths.verify import extract_answer, parse_expression
from qftlab_course.exercises import Exercise, Suspect, tensor

REWARDS = (0.0, 0.1, 1.0)


def _draw_rewards(rng: random.Random, size: int) -> tuple:
    # Square, wide and tall, so that no axis stands for the other; once a single prompt.
    prompts, answers = ((2, 2), (2, 3), (3, 3), (3, 2), (3, 4), (4, 3), (1, 4), (4, 5))[size - 1]
    rows = [[rng.choice(REWARDS) for _ in range(answers)] for _ in range(prompts)]
    rows[0][0], rows[0][1] = 1.0, 0.1
    if prompts == 1:
        return (torch.tensor(rows),)
    if size > 4:
        rows[-1] = [1.0] * answers  # all right: nothing to learn
    else:
        rows[-1][-2:] = [0.0, 0.0]  # another mean than above
    return (torch.tensor(rows),)


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """The clipped loss of each answer (N,): -min(ratio · A, clipped ratio · A)."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def _draw_ratios(rng: random.Random, size: int) -> tuple:
    # Every side of the clip with every sign of the advantage, from the third size on.
    shifts = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0, 0.05, -0.05, 0.0, 1.0][: 1 + size])
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0][: 1 + size])
    old = tensor(rng, 1 + size).abs().neg() - 1
    advantages = signs * (tensor(rng, 1 + size).abs() + 0.1)
    return old + shifts, old, advantages, (0.2, 0.1)[size % 2]


def _ratio_loss(choose):
    def loss(logprobs, old_logprobs, advantages, epsilon):
        ratio = (logprobs - old_logprobs).exp()
        return choose(ratio, ratio.clamp(1 - epsilon, 1 + epsilon), advantages)

    return loss


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy, reference) at each token (T,), from tokens that the policy sampled."""
    ratio = ref_logprobs - logprobs
    return ratio.exp() - 1 - ratio


def _draw_logprobs(rng: random.Random, size: int) -> tuple:
    return tensor(rng, size).abs().neg() - 0.2, tensor(rng, size).abs().neg() - 0.1


def select(prompts: list[str], answers: list[list[str]], rewards: list[list[float]], limit: int) -> list[tuple]:
    """(prompt, answer) of right answers: in order, none twice for a prompt, at most `limit` a prompt."""
    kept = []
    for prompt, texts, marks in zip(prompts, answers, rewards, strict=True):
        right = list(dict.fromkeys(text for text, mark in zip(texts, marks, strict=True) if mark == 1.0))
        kept += [(prompt, text) for text in right[:limit]]
    return kept


def _select_by(is_right=lambda mark: mark == 1, unique: bool = True, per_prompt: bool = True, limited: bool = True):
    def chosen(prompts, answers, rewards, limit):
        limit = limit if limited else None
        kept = []
        for prompt, texts, marks in zip(prompts, answers, rewards, strict=True):
            good = [text for text, mark in zip(texts, marks, strict=True) if is_right(mark)]
            good = list(dict.fromkeys(good)) if unique else good
            kept += [(prompt, text) for text in (good[:limit] if per_prompt else good)]
        return kept if per_prompt else kept[:limit]

    return chosen


def _select_unique_answers(prompts, answers, rewards, limit):
    """Forgets answers that were kept for another prompt."""
    kept, seen = [], set()
    for prompt, texts, marks in zip(prompts, answers, rewards, strict=True):
        fresh = [t for t, m in zip(texts, marks, strict=True) if m == 1.0 and t not in seen]
        fresh = list(dict.fromkeys(fresh))[:limit]
        seen.update(fresh)
        kept += [(prompt, text) for text in fresh]
    return kept


def _draw_samples(rng: random.Random, size: int) -> tuple:
    count, limit = 1 + size // 2, (3, 1, 2)[size % 3]
    prompts = [f"prompt {i}" for i in range(count)]
    answers = [[rng.choice("abcd") for _ in range(2 + size // 2)] for _ in prompts]
    marks = {letter: rng.choice(REWARDS) for letter in "abcd"}
    marks |= {"a": 1.0, "b": 0.1}  # the same text earns the same
    answers[0][:2] = ["a", "b"] if size < 2 else ["a", "a"]
    if size > 2:
        answers[-1][0] = "a"  # right again, for another prompt
        answers[-1][1], marks["c"] = "c", 1.0
    return prompts, answers, [[marks[text] for text in texts] for texts in answers], limit


def _value_only(text: str, numbers: list[int], target: int, uses=lambda used, numbers: True) -> float:
    """A verifier that checks the value, and of the numbers only what `uses` asks."""
    answer = extract_answer(text)
    expression = None if answer is None else parse_expression(answer)
    if expression is None:
        return 0.0
    return 1.0 if expression.value == target and uses(expression.numbers, numbers) else 0.1


def _uses(test):
    return lambda text, numbers, target: _value_only(text, numbers, target, test)


def _all_or_nothing(text: str, numbers: list[int], target: int) -> float:
    return float(_uses(lambda used, given: sorted(used) == sorted(given))(text, numbers, target) == 1)


def _evaluated(text: str, numbers: list[int], target: int) -> float:
    """Python's own reading of what stands between the tags: powers, signs and floor division are paid as well."""
    answer = extract_answer(text)
    try:
        value = eval(answer or "", {"__builtins__": {}}) if set(answer or "") <= set("0123456789+-*/() ") else None
    except (SyntaxError, ZeroDivisionError, TypeError):
        return 0.0
    digits = "".join(c if c.isdigit() else " " for c in answer or "").split()
    is_right = value == target and sorted(map(int, digits)) == sorted(numbers)
    return 0.0 if value is None else 1.0 if is_right else 0.1


def _draw_answer(rng: random.Random, size: int) -> tuple:
    a, b, c = rng.sample(range(2, 10), 3)
    given, target, right = [a, b, c], a + b * c, f"{a} + {b} * {c}"
    said, numbers, wanted = (
        (f"{target}", given, target),  # the shortcut
        (right, given, target),
        (f"{a} + {c}", given, a + c),  # one number left out
        (f"{right} + {target} - {target}", given, target),  # the given numbers, and what they should have made
        (f"{b} * {c} + {a} + {c} - {c}", given, target),  # a number three times
        (f"{b * c} + {a}", given, target),  # joined beforehand
        (f"{a} + {b} + {c}", given, target),  # a wrong value
        (f"{right} = {target}", given, target),  # no expression
        (f"{b} ** {c}", [b, c], b**c),  # a power
        (f"{right}</answer> <answer>{right}", given, target),  # two answers
        (f"{a} / ({b} - {b}) + {c}", given, target),  # a division by zero
        (f"-({b}) + {a} + {c}", given, a + c - b),  # a sign
        (f"{a} + {a} + {b}", [a, a, b], 2 * a + b),  # given twice, used twice
        (f"{a} + {b}", [a, b, b], a + b),  # given twice, used once
        (right, [a, b, c + 10], target),  # as many numbers as were given, and not those
        (f"{a} + {a} * {b}", [a, b, b], a + a * b),  # as many, and the same set, but another one twice
        ("", given, target),
        (None, given, target),
        (f"{b} * {c} + {a}", given, target),  # in another order
    )[size - 1]
    return f"so {right} = {target}" if said is None else f"<answer>{said}</answer>", numbers, wanted


def _is_error(args: tuple, got, wanted) -> bool:
    return isinstance(got, (AttributeError, TypeError)) and "None" in str(got)


EXERCISES = (
    Exercise(
        id="08.1",
        title="Leave one out",
        dots=2,
        minutes=8,
        reference="qftlab.maths.losses.leave_one_out_advantages",
        draw=_draw_rewards,
        instead="take each reward minus the mean of the others in its row",
        suspects=(
            Suspect(
                "the mean is that of all answers; leave the answer itself out of it",
                like=lambda r: r - r.mean(-1, keepdim=True),
            ),
            Suspect("the mean goes over all prompts: each row has its own", like=lambda r: r - r.mean()),
            Suspect(
                "the others are all answers of the batch; only those to the same prompt count, a row",
                like=lambda r: r - (r.sum() - r) / (r.numel() - 1),
            ),
            Suspect("the mean goes down the prompts: answers to one prompt are a row", like=lambda r: r - r.mean(0)),
            Suspect(
                "sums of rows (P,) are laid along the answers: keep their axis with keepdim=True",
                like=lambda r: r - (r.sum(-1) - r) / (r.shape[-1] - 1),
            ),
            Suspect(
                "means of rows (P,) are laid along the answers: keep their axis with keepdim=True",
                like=lambda r: r - r.mean(-1),
            ),
            Suspect(
                "divided by the number of prompts; the others in a row are G - 1, and G is shape[1]",
                like=lambda r: r - (r.sum(-1, keepdim=True) - r) / (r.shape[0] - 1),
            ),
            Suspect(
                "the sum of the others is divided by G; there are G - 1 of them",
                like=lambda r: r - (r.sum(-1, keepdim=True) - r) / r.shape[-1],
            ),
            Suspect(
                "divided by the spread, as GRPO does; leave-one-out does not",
                like=lambda r: (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4),
            ),
            Suspect(
                "the sign is turned: a reward above that of its siblings is an advantage",
                like=lambda r: (r.sum(-1, keepdim=True) - r) / (r.shape[-1] - 1) - r,
            ),
        ),
    ),
    Exercise(
        id="08.2",
        title="The clipped loss",
        dots=2,
        minutes=8,
        reference=clipped,
        draw=_draw_ratios,
        instead="take the smaller of ratio · A and clipped ratio · A, and turn the sign",
        forbidden=("qftlab.maths.losses.clipped_policy_loss",),
        suspects=(
            Suspect("the ratio is not clipped", like=_ratio_loss(lambda ratio, cut, a: -ratio * a)),
            Suspect(
                "always clipped: where that would earn more, the unclipped product counts (take the smaller one)",
                like=_ratio_loss(lambda ratio, cut, a: -cut * a),
            ),
            Suspect(
                "the larger product is taken; the smaller one is the cautious one",
                like=_ratio_loss(lambda ratio, cut, a: -torch.maximum(ratio * a, cut * a)),
            ),
            Suspect(
                "the sign is turned: an optimizer makes losses small",
                like=_ratio_loss(lambda ratio, cut, a: torch.minimum(ratio * a, cut * a)),
            ),
            Suspect(
                "the smaller ratio is taken; compare the products, as A may be negative",
                like=_ratio_loss(lambda ratio, cut, a: -torch.minimum(ratio, cut) * a),
            ),
            Suspect(
                "log-probabilities are subtracted and then need exp to be a ratio",
                like=lambda p, old, a, e: -torch.minimum((p - old) * a, (p - old).clamp(1 - e, 1 + e) * a),
            ),
            Suspect(
                "the mean over the batch is taken; return a loss for each answer",
                like=_ratio_loss(lambda ratio, cut, a: -torch.minimum(ratio * a, cut * a).mean()),
            ),
        ),
    ),
    Exercise(
        id="08.3",
        title="k3, a distance that is never negative",
        dots=1,
        minutes=5,
        reference=k3,
        draw=_draw_logprobs,
        instead="compute exp(r) - 1 - r with r = reference minus policy",
        forbidden=("qftlab.maths.losses.kl_estimate", "torch.nn.functional.kl_div"),
        suspects=(
            Suspect("r is turned round: reference minus policy", like=lambda p, ref: (p - ref).exp() - 1 - p + ref),
            Suspect("this is k1, which may be negative", like=lambda p, ref: p - ref),
            Suspect("this is k2, half the square", like=lambda p, ref: (p - ref) ** 2 / 2),
            Suspect("the 1 is missing: two equal models must give 0", like=lambda p, ref: (ref - p).exp() - ref + p),
            Suspect(
                "the mean is taken; return an estimate for each token",
                like=lambda p, ref: ((ref - p).exp() - 1 - ref + p).mean(),
            ),
        ),
    ),
    Exercise(
        id="08.4",
        title="Rejection sampling: choose what to train on",
        dots=2,
        minutes=8,
        reference=select,
        draw=_draw_samples,
        instead="walk over the prompts and keep what earned 1",
        suspects=(
            Suspect("answers that earned 0.1 are kept: they are wrong", like=_select_by(lambda mark: mark > 0)),
            Suspect("an answer is kept twice for one prompt", like=_select_by(unique=False)),
            Suspect("the limit holds for each prompt", like=_select_by(per_prompt=False)),
            Suspect(
                "an answer is dropped because another prompt had it too: only within a prompt it counts as double",
                like=_select_unique_answers,
            ),
            Suspect("`limit` is not kept to", like=_select_by(limited=False)),
            Suspect("right answers are missing: is anything kept at all?", when=lambda args, got, wanted: got == []),
        ),
    ),
    Exercise(
        id="08.5",
        title="Repair the verifier",
        dots=3,
        minutes=10,
        reference="qftlab.maths.verify.countdown_reward",
        draw=_draw_answer,
        instead="parse the answer with parse_expression and compare its numbers with those given",
        sizes=19,
        suspects=(
            Suspect("the shortcut is still paid: which numbers does the expression use?", like=_value_only),
            Suspect(
                "a set forgets how often a number occurs: compare sorted lists",
                like=_uses(lambda used, given: set(used) == set(given)),
            ),
            Suspect(
                "it is enough that no other numbers occur; each given number must be used, exactly once",
                like=_uses(lambda used, given: set(used) <= set(given)),
            ),
            Suspect(
                "it is enough that each number occurs; none may be used twice, and no other",
                like=_uses(lambda used, given: set(given) <= set(used)),
            ),
            Suspect(
                "how many numbers are used is counted, not which",
                like=_uses(lambda used, given: len(used) == len(given)),
            ),
            Suspect(
                "as many numbers and the same set: one of them may still stand in for another; compare sorted lists",
                like=_uses(lambda used, given: len(used) == len(given) and set(used) == set(given)),
            ),
            Suspect(
                "the order is compared: the numbers may be used in any",
                like=_uses(lambda used, given: list(used) == given),
            ),
            Suspect(
                "no answer earns 1: the numbers of an expression are a tuple, which no list is equal to; sort both",
                like=_uses(lambda used, given: used == given),
            ),
            Suspect("an answer that parses but is wrong earns 0.1", like=_all_or_nothing),
            Suspect("eval pays for what the rules do not allow; parse_expression does not", like=_evaluated),
            Suspect(
                "extract_answer and parse_expression give None where there is nothing to read: ask", when=_is_error
            ),
        ),
    ),
)
