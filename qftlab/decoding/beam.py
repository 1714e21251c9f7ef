"""Beam search from a transformers model: batched over prompts, with a cache, token for token what transformers returns.

A prompt is prefilled once and its cache then copied to its beams. Each step makes one forward pass of all beams, one
`topk` over the continuations of each prompt, and one reorder of the cache; a prompt that is done leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from qftlab.decoding.decoder import Decoder, decoder_for
from qftlab.decoding.engine import Prompt, check_prompts, continuation_text, default_stop_ids, encode_prompts, head_rows
from qftlab.maths.sampling import RowParams, SamplingParams, penalise
from qftlab.model.head import module_mode
from qftlab.settings import check_at_least

# How often the beams' common history is looked for: it only grows, so an old answer is still right.
ANCESTOR_STEPS = 8
LARGEST_PENALTY = 20  # a length to this power is still a float


@dataclass(frozen=True)
class BeamHypothesis:
    """One finished beam.

    `token_ids` holds the stop token where there is one; `text` ends before it and shows other special tokens. `score`
    is the sum of the tokens' log-probabilities (nats) ÷ (number of tokens ** length_penalty), the stop token counted
    and the prompt not. `finish_reason` is "stop" or "length".
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    score: float
    finish_reason: str


@dataclass(frozen=True)
class BeamStep:
    """What one step decided for one prompt, for pictures and tests.

    Args:
        step: 0 for the first new token.
        prompt: index in `prompts`.
        parents: of each candidate, the beam it continues, as rank after the step before (0 is the best beam); the
            candidates stand best first, max(2, 1 + number of stop ids) * num_beams of them.
        tokens: the id each candidate adds.
        logprobs: nats of that token.
        scores: nats of the whole candidate, no length penalty.
        is_finished: whether the candidate ended here and counts as a result; of those that end, only the first
            `num_beams` candidates do.
        kept: positions of the candidates that are the beams of the next step, best first; empty after the last step.
    """

    step: int
    prompt: int
    parents: list[int]
    tokens: list[int]
    logprobs: list[float]
    scores: list[float]
    is_finished: list[bool]
    kept: list[int]


@dataclass(frozen=True)
class _BeamOptions:
    num_beams: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool | str
    num_return_sequences: int
    repetition_penalty: float
    stop_ids: frozenset[int]
    vocab_limit: int
    num_rows: int  # of the head
    on_step: Callable[[BeamStep], None] | None

    def __post_init__(self) -> None:
        check_at_least(1, num_beams=self.num_beams, max_new_tokens=self.max_new_tokens)
        check_at_least(1, num_return_sequences=self.num_return_sequences)
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams, got {self.num_return_sequences} with "
                f"{self.num_beams} beams: raise num_beams"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping must be False, True or "never", got {self.early_stopping!r}')
        if not abs(self.length_penalty) <= LARGEST_PENALTY:
            raise ValueError(
                f"length_penalty must be from -{LARGEST_PENALTY} to {LARGEST_PENALTY}, got {self.length_penalty}"
            )
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}")
        if self.num_candidates > self.vocab_limit:
            raise ValueError(
                f"num_beams must be at most {self.vocab_limit * self.num_beams // self.num_candidates}, so that its "
                f"candidates fit the vocabulary of {self.vocab_limit} tokens, got {self.num_beams}"
            )

    @property
    def num_candidates(self) -> int:
        """So many that `num_beams` of them go on even if every beam's stop tokens are among them."""
        return max(2, 1 + len(self.stop_ids)) * self.num_beams

    def normalised(self, score: float, length: int) -> float:
        """A sum of log-probabilities as hypotheses are compared by."""
        return score / length**self.length_penalty


class _Search:
    """One prompt's beams. They stand in rows of its block of the cache, which are not in order of score."""

    def __init__(self, prompt: int, prompt_ids: list[int], plan: _BeamOptions) -> None:
        self.prompt, self.prompt_ids, self.plan = prompt, prompt_ids, plan
        self.beams: list[list[int]] = [[]]  # per row: the beam's new tokens
        self.scores = [0.0]  # per row: sum of its log-probabilities
        self.sources = [0]  # per row: the row it went on from
        self.order = [0]  # rows, best beam first
        self.finished: list[tuple[float, list[int]]] = []  # best first, normalised
        self.is_done = False

    def take(self, scores: list[float], places: list[int], length: int) -> None:
        """Takes the best continuations, best first, as `row * num_rows + token`; each has `length` new tokens."""
        plan, num_beams = self.plan, self.plan.num_beams
        is_last = length == plan.max_new_tokens
        ended, kept = [], []
        for i, place in enumerate(places):
            if is_last or place % plan.num_rows in plan.stop_ids:
                if i < num_beams:
                    ended.append(i)
            elif len(kept) < num_beams:
                kept.append(i)
        pairs = [divmod(place, plan.num_rows) for place in places]
        if plan.on_step is not None:
            self._report(scores, pairs, ended, kept, length - 1)
        if ended:
            new = [(plan.normalised(scores[i], length), [*self.beams[pairs[i][0]], pairs[i][1]]) for i in ended]
            self.finished = sorted(self.finished + new, key=lambda pair: -pair[0])[:num_beams]
        self.is_done = is_last or self._cannot_improve(scores[kept[0]], length)
        if not self.is_done:
            self._go_on([(scores[i], *pairs[i]) for i in kept])

    def _cannot_improve(self, best: float, length: int) -> bool:
        plan = self.plan
        if len(self.finished) < plan.num_beams:
            return False
        if plan.early_stopping is True or plan.num_beams == 1:
            return True
        if plan.early_stopping == "never" and plan.length_penalty > 0:
            length = plan.max_new_tokens
        return plan.normalised(best, length) <= self.finished[-1][0]

    def _go_on(self, kept: list[tuple[float, int, int]]) -> None:
        """Gives each beam a row: its parent's for the parent's best child, so that few rows of the cache are copied."""
        free = set(range(len(kept))).difference(row for _, row, _ in kept)
        beams, self.order = self.beams, []
        self.beams, self.scores, self.sources = [[]] * len(kept), [0.0] * len(kept), [0] * len(kept)
        for score, parent, token in kept:
            row = free.pop() if parent in self.order else parent
            self.order.append(row)
            self.beams[row], self.scores[row], self.sources[row] = [*beams[parent], token], score, parent

    def _report(self, scores: list[float], pairs: list, ended: list[int], kept: list[int], step: int) -> None:
        parents, tokens = [self.order.index(row) for row, _ in pairs], [token for _, token in pairs]
        logprobs = [score - self.scores[row] for score, (row, _) in zip(scores, pairs, strict=True)]
        is_finished = [i in ended for i in range(len(pairs))]
        self.plan.on_step(BeamStep(step, self.prompt, parents, tokens, logprobs, scores, is_finished, kept))

    def hypotheses(self, tokenizer) -> list[BeamHypothesis]:
        """The results as callers see them, best first."""
        return [self._hypothesis(tokenizer, *pair) for pair in self.finished[: self.plan.num_return_sequences]]

    def _hypothesis(self, tokenizer, score: float, ids: list[int]) -> BeamHypothesis:
        is_stop = ids[-1] in self.plan.stop_ids
        text = continuation_text(tokenizer, self.prompt_ids, ids[:-1] if is_stop else ids)
        return BeamHypothesis(self.prompt_ids, ids, text, score, "stop" if is_stop else "length")


def beam_search(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    repetition_penalty: float = 1.0,
    stop_token_ids: Sequence[int] | None = None,
    thinking: bool | None = None,
    decoder: Decoder | None = None,
    batch_size: int = 64,
    on_step: Callable[[BeamStep], None] | None = None,
) -> list[BeamHypothesis]:
    """Finds likely completions of every prompt, going on with the `num_beams` likeliest at each token.

    Args:
        model, tokenizer, prompts: as in `generate`.
        num_beams: hypotheses kept a prompt; 1 is greedy decoding.
        max_new_tokens: the most tokens a completion may have.
        length_penalty: power of the length that a sum of log-probabilities is divided by: 0 is the plain sum, above 0
            favours long completions, below 0 short ones.
        early_stopping: when a prompt with `num_beams` finished hypotheses is done. True: at once. False: when the best
            running beam, were it to end now, would not beat the worst of them. "never": when it would not even with the
            length that suits it best.
        num_return_sequences: hypotheses returned a prompt.
        repetition_penalty: multiplies the log-probabilities of tokens that stand in the prompt or the beam, as in
            transformers, so that below 1 it favours them too; with one beam it acts on logits, as greedy decoding's
            does. 1 is off.
        stop_token_ids: tokens that end a completion; by default `default_stop_ids(model, tokenizer)`.
        thinking: as in `generate`.
        decoder: as in `generate`.
        batch_size: beams decoded together, of one prompt at least.
        on_step: called with what each step decided for each prompt.

    Returns:
        `len(prompts) * num_return_sequences` hypotheses, those of one prompt side by side and best first, in the order
        of `prompts`.

    Raises:
        TypeError: for a prompt of another kind, or prompts that are not a list.
        ValueError: for an option out of range, an empty prompt, a prompt that with its new tokens is longer than the
            model's context, or logits that are not numbers.

    Source: transformers' `generate(num_beams=…)`, token for token; the early-stopping rules are its heuristics.
    """
    check_at_least(1, batch_size=batch_size)
    num_rows = head_rows(model)
    stop_ids = default_stop_ids(model, tokenizer) if stop_token_ids is None else stop_token_ids
    plan = _BeamOptions(num_beams, max_new_tokens, length_penalty, early_stopping, num_return_sequences,
                        repetition_penalty, frozenset(stop_ids), min(len(tokenizer), num_rows), num_rows,
                        on_step)  # fmt: skip
    encoded = encode_prompts(tokenizer, prompts, thinking)
    check_prompts(encoded, model, max_new_tokens)
    searches = [_Search(i, ids, plan) for i, ids in enumerate(encoded)]
    by_length = sorted(searches, key=lambda search: len(search.prompt_ids))
    size = max(1, batch_size // num_beams)
    with module_mode(model, False):
        steps = max_new_tokens * -(-len(by_length) // size)
        decoder = decoder_for(model, steps, decoder)
        for start in range(0, len(by_length), size):
            _decode(decoder, by_length[start : start + size], plan)
    return [hypothesis for search in searches for hypothesis in search.hypotheses(tokenizer)]


def _decode(decoder: Decoder, running: list[_Search], plan: _BeamOptions) -> None:
    """Runs a batch of searches to their end."""
    cache = decoder.new_cache(len(running), max(len(s.prompt_ids) for s in running))
    logits = decoder.prefill([s.prompt_ids for s in running], cache)  # (P, V)
    seen = _seen(logits, running) if plan.repetition_penalty != 1 else None  # (rows, V)
    since, width = 0, 1
    for length in range(1, plan.max_new_tokens + 1):
        _select(logits, seen, running, plan, length)
        index = [width * i + row for i, s in enumerate(running) if not s.is_done for row in s.sources]
        is_new_batch = any(s.is_done for s in running)
        running, width = [s for s in running if not s.is_done], plan.num_beams
        if not running:
            break
        if length == 1:
            cache = cache.share(index, plan.max_new_tokens)  # the prompt is held once for all its beams
        elif is_new_batch:
            cache = cache.expand(index)
        else:
            cache.reorder_(index, since)
        tokens = torch.tensor([ids[-1] for s in running for ids in s.beams], device=logits.device)
        if seen is not None:
            seen = seen[index].scatter_(1, tokens.unsqueeze(1), True)
        if length % ANCESTOR_STEPS == 0:
            since = min(len(commonprefix(s.beams)) for s in running)
        logits = decoder.step(tokens, cache)  # (P * num_beams, V)


def _select(logits: Tensor, seen: Tensor | None, running: list[_Search], plan: _BeamOptions, length: int) -> None:
    """Scores all continuations and hands each search its best ones."""
    logits, is_greedy = logits.float(), plan.num_beams == 1
    if is_greedy and seen is not None:
        settings = SamplingParams(temperature=0.0, repetition_penalty=plan.repetition_penalty)
        logits = penalise(logits, RowParams.of(settings, len(logits), logits.device), seen)
    scores = logits.log_softmax(-1)
    if not is_greedy and seen is not None:
        scores = torch.where(seen, scores * plan.repetition_penalty, scores)
    scores[:, plan.vocab_limit :] = -math.inf
    scores += torch.tensor([score for s in running for score in s.scores], device=scores.device).unsqueeze(1)
    scores = scores.view(len(running), -1)
    if is_greedy:  # by the logits: a long sum rounds the difference of two tokens away
        first = logits[:, : plan.vocab_limit].argmax(-1, keepdim=True)
        others = scores.scatter(1, first, -math.inf).topk(plan.num_candidates - 1).indices
        places = torch.cat([first, others], dim=1)
    else:
        places = scores.topk(plan.num_candidates).indices  # (P, K)
    values, places = scores.gather(1, places).tolist(), places.tolist()
    bad = [s.prompt for s, row in zip(running, values, strict=True) if row[0] != row[0]]  # nan comes first
    if bad:
        raise ValueError(f"logits must be numbers, got nan after prompts {bad}: check the weights and their dtype")
    for search, row, place in zip(running, values, places, strict=True):
        search.take(row, place, length)


def _seen(logits: Tensor, running: list[_Search]) -> Tensor:
    """(P, V) bool: the ids that stand in each prompt."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, search in zip(seen, running, strict=True):
        row[search.prompt_ids] = True
    return seen
