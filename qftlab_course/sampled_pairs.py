"""On-policy preference pairs: the model answers, a verifier scores, and a right answer is put against a wrong one."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qftlab.decoding.decoder import decoder_for
from qftlab.decoding.engine import Completion, generate
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.batches import Example
from qftlab.rows.examples import Pair
from qftlab.rows.schemas import row_to_prompt
from qftlab.settings import check_at_least
from qftlab.train.rollouts import Prompt, Reward, score_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledPairs:
    """Pairs that a model wrote itself, and what became of the prompts that gave none.

    Args:
        pairs: token for token what was sampled; `number` is that of the prompt's row, from 1.
        rows: the same as rows for a file: prompt, chosen, rejected, score_chosen, score_rejected.
        num_prompts: of how many.
        all_right, all_wrong: prompts whose answers all were right, or all wrong.
        unfinished: prompts whose right, or whose wrong answers all ran into the limit of tokens.
        accuracy: share of right answers among all.
        layout: of the decoder that sampled them; another differs in the last bits, and so now and then in a token.
    """

    pairs: list[Pair]
    rows: list[dict]
    num_prompts: int
    all_right: int
    all_wrong: int
    unfinished: int
    accuracy: float
    layout: str

    def summary(self) -> str:
        """One line for a log."""
        return (f"{len(self.pairs)} pairs from {self.num_prompts} prompts; {self.all_right} all right, "
                f"{self.all_wrong} all wrong, {self.unfinished} unfinished; {100 * self.accuracy:.0f} % of the answers "
                "right")  # fmt: skip


def sample_pairs(
    model,
    tokenizer,
    rows: Sequence[dict],
    reward: Reward,
    *,
    right: float = 1.0,
    num_generations: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    decoder=None,
) -> SampledPairs:
    """Samples answers to each prompt and pairs a right one with a wrong one; from its arguments and its layout alone.

    Args:
        model, tokenizer: as in `generate`.
        rows: of any layout, as RLOO takes them; what answers they have is not looked at.
        reward: scores an answer; it gets the prompt's messages, the sampled ids, their text and the row.
        right: the score from which an answer is right. Of the wrong ones the best-scored are taken, so that a pair
            differs in what is hard.
        num_generations: answers to each prompt, at least 2.
        max_new_tokens: of an answer; those that reach it unfinished are in no pair.
        temperature: of the sampling; filters are off.
        seed: of the sampling and of the choice among several.
        batch_size, decoder: as in `generate`.

    Raises:
        ValueError: for fewer than two answers a prompt, and as `generate`.
        RewardError: for a reward that fails or gives no number.
    """
    check_at_least(2, num_generations=num_generations)  # a pair needs two answers
    prompts = [row_to_prompt(row) for row in rows]
    steps = max_new_tokens * -(-len(rows) * num_generations // batch_size)
    decoder = decoder_for(model, steps, decoder)
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size,
                       params=SamplingParams(temperature=temperature), num_generations=num_generations,
                       decoder=decoder)  # fmt: skip
    asked = [Prompt(prompt, [], row, i) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1)]
    scores = score_all("reward", reward, [(asked[i // num_generations], c) for i, c in enumerate(answers)])
    every = list(zip(scores, answers, strict=True))
    scored = [every[i : i + num_generations] for i in range(0, len(every), num_generations)]
    found = _paired(prompts, scored, right, seed, decoder.layout)
    log.info("%s", found.summary())
    return found


def _paired(prompts: list, scored: list[list[tuple[float, Completion]]], right: float, seed: int, layout: str):
    """Scored answers to each prompt as `SampledPairs`."""
    pairs, kept, counts, num_right = [], [], {"all_right": 0, "all_wrong": 0, "unfinished": 0}, 0
    for i, (prompt, group) in enumerate(zip(prompts, scored, strict=True)):
        num_right += (good := sum(score >= right for score, _ in group))
        chosen, rejected = _choose(group, right, random.Random(f"pairs {seed} {i}"))
        if chosen and rejected:
            pairs.append(Pair(_example(chosen[1]), _example(rejected[1]), i + 1))
            kept.append({"prompt": prompt, "chosen": chosen[1].text, "rejected": rejected[1].text,
                         "score_chosen": chosen[0], "score_rejected": rejected[0]})  # fmt: skip
        else:
            counts["all_right" if good == len(group) else "unfinished" if good else "all_wrong"] += 1
    accuracy = num_right / max(1, sum(map(len, scored)))
    return SampledPairs(pairs, kept, len(prompts), **counts, accuracy=accuracy, layout=layout)


def _choose(scored: list[tuple[float, Completion]], right: float, chance: random.Random) -> tuple:
    """A finished right answer and one of the best-scored finished wrong ones; None where there is none."""
    finished = [pair for pair in scored if pair[1].finish_reason == "stop"]
    good = [pair for pair in finished if pair[0] >= right]
    bad = [pair for pair in finished if pair[0] < right]
    best = max((score for score, _ in bad), default=None)
    bad = [pair for pair in bad if pair[0] == best]
    return chance.choice(good) if good else None, chance.choice(bad) if bad else None


def _example(completion: Completion) -> Example:
    ids = [*completion.prompt_ids, *completion.token_ids]
    return Example(ids, [i >= len(completion.prompt_ids) for i in range(len(ids))])
