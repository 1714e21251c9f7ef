"""Helpers of notebook 07: answers and verdicts, gains by token, an annotator who likes long answers, best of n."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qftlab.decoding.engine import generate
from qftlab.maths.sampling import SamplingParams
from qftlab.maths.verify import countdown_reward
from qftlab.model.head import module_mode
from qftlab.rows.batches import Example, pad
from qftlab.rows.schemas import row_to_messages
from qftlab.train.step import Step, to_device

Answer = tuple[list[dict], list[int], str, dict]  # prompt, completion ids, text, row: what a reward function takes


def answers_to(
    model, tokenizer, rows: Sequence[dict], *, number: int = 1, temperature: float = 0.0, seed: int = 0
) -> list[Answer]:
    """Countdown problems answered by a model: `number` answers to each row, one after the other.

    Args:
        model, tokenizer: as in `generate`.
        rows: problems with "numbers" and "target".
        number: of answers to each; more than one need a temperature.
        temperature: 0 is greedy.
        seed: of the sampling.
    """
    prompts = [row_to_messages(row)[:-1] for row in rows]
    found = generate(model, tokenizer, prompts, max_new_tokens=32, seed=seed, num_generations=number, batch_size=400,
                     params=SamplingParams(temperature=temperature))  # fmt: skip
    return [(prompts[i // number], c.token_ids, c.text, rows[i // number]) for i, c in enumerate(found)]


def is_right(answer: Answer) -> bool:
    """Whether the verifier finds a Countdown answer right."""
    _, _, text, row = answer
    return countdown_reward(text, row["numbers"], row["target"]) == 1


def share_right(answers: Sequence[Answer]) -> float:
    """The share of Countdown answers that are right, in [0, 1]."""
    return sum(map(is_right, answers)) / len(answers)


def has_product(text: str) -> bool:
    """Whether a Countdown answer multiplies or divides."""
    return "*" in text or "/" in text.replace("</", "")


def share_of_products(answers: Sequence[Answer]) -> float:
    """The share of answers that multiply or divide, in [0, 1]."""
    return sum(has_product(text) for _, _, text, _ in answers) / len(answers)


def share_ending(
    model, tokenizer, rows: Sequence[dict], ending: str, *, temperature: float = 0.0, seed: int = 0
) -> float:
    """The share of answers to the prompts of `rows` that have an ending, in [0, 1].

    Args:
        model, tokenizer: as in `generate`.
        rows: with "prompt", as `style_pairs` gives them.
        ending: the last characters that count.
        temperature: 0 is greedy.
        seed: of the sampling.
    """
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    params = SamplingParams(temperature=temperature)
    said = generate(model, tokenizer, prompts, max_new_tokens=48, seed=seed, params=params)
    return sum(answer.text.endswith(ending) for answer in said) / len(said)


@torch.no_grad()
def token_gains(policy, reference, example: Example) -> list[float | None]:
    """How much more likely the policy finds each trained token than the reference, in nats; None for the others.

    Times β, and added up, it is the answer's implicit reward.

    Args:
        policy, reference: models with one tokenizer.
        example: a prompt with its answer, as `encode_pairs` gives both of a pair.
    """
    found = []
    for model in (policy, reference):
        batch = to_device(pad([example], 0), next(model.parameters()).device)
        with module_mode(model, False):
            found.append(Step(model)(**batch, want="logprobs")[0].tolist())
    gains = [a - b for a, b in zip(*found, strict=True)]  # of the token at i + 1
    return [gain if is_trained else None for gain, is_trained in zip([0.0, *gains], example.loss_mask, strict=True)]


def careless(rows: Sequence[dict], share: float, seed: int = 0) -> list[dict]:
    """Preference rows as an annotator labels them who does not always check: now and then the longer answer wins.

    Args:
        rows: with "chosen" and "rejected", rightly labelled.
        share: of the rows in which the longer text is chosen, whichever is right; equally long ones stay.
        seed: decides which rows.

    Returns:
        New rows of "prompt", "chosen" and "rejected", without scores: they would tell.
    """
    chance, labelled = random.Random(f"careless {seed}"), []
    for row in rows:
        is_checked = chance.random() >= share
        is_kept = is_checked or len(row["chosen"]) >= len(row["rejected"])
        first, second = ("chosen", "rejected") if is_kept else ("rejected", "chosen")
        labelled.append({"prompt": row["prompt"], "chosen": row[first], "rejected": row[second]})
    return labelled


def standard(scores: Tensor) -> Tensor:
    """Scores in their standard deviations, around 0; a reward model's have no unit of their own."""
    return (scores - scores.mean()) / scores.std()


def by_length(scores: Tensor, answers: Sequence[Answer], lengths: Sequence[int]) -> dict[str, list[float]]:
    """What a reward model thinks of answers of each length, and how many of them are right.

    Args:
        scores: one for each answer, in any shape.
        answers: in the same order.
        lengths: in tokens; each must be that of some answer.

    Returns:
        "score", the mean in standard deviations, and "right", the share in [0, 1], for each length.
    """
    tokens = torch.tensor([len(ids) for _, ids, _, _ in answers])
    right = torch.tensor([float(is_right(answer)) for answer in answers])
    columns = {"score": standard(scores).flatten(), "right": right}
    return {name: [column[tokens == n].mean().item() for n in lengths] for name, column in columns.items()}


def best_of_curve(
    scores: Tensor, answers: Sequence[Answer], sizes: Sequence[int], best_of: Callable[[list, list, int], float]
) -> dict[str, list[float]]:
    """What best-of-n finds as n grows, by the judge's score and by the verifier.

    Args:
        scores: (P, G) of G answers to each of P prompts.
        answers: the P · G answers, prompt after prompt.
        sizes: the values of n, at most G.
        best_of: the mean value of the best-scored of n answers, from their scores, their values and n (exercise 07.5).

    Returns:
        "proxy", the mean score of the answer taken in standard deviations, and "truth", the share of right ones in
        [0, 1], for each n.
    """
    right = torch.tensor([float(is_right(answer)) for answer in answers]).view(scores.shape)

    def curve(values: Tensor) -> list[float]:
        both = list(zip(scores.tolist(), values.tolist(), strict=True))
        return [sum(best_of(s, v, n) for s, v in both) / len(both) for n in sizes]

    return {"proxy": curve(standard(scores)), "truth": curve(right)}


def spread(shares: Sequence[float], digits: int = 0) -> str:
    """Mean and standard deviation of some runs' shares, as words in per cent."""
    mean, deviation = (100 * measure(shares) for measure in (statistics.mean, statistics.stdev))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} %"
