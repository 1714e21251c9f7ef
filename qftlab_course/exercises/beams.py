"""Exercise 04.5, one step of beam search: what it gives, and what usually goes wrong with it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qftlab_course.exercises import Exercise, Suspect, tensor

Beam = tuple[int, int, float]


def beam_step(scores: Tensor, logprobs: Tensor, eos_id: int) -> tuple[list[Beam], list[Beam]]:
    """One step of beam search: (running, finished), each a list of (parent, token, score), best first.

    scores (K,) are the log-probabilities of the K beams, logprobs (K, V) those of each next token, all in nats. Of the
    2K best continuations the first K that do not end run on; an end counts only if it is among the K best of all.
    """
    beams, vocabulary = logprobs.shape
    best = (scores[:, None] + logprobs).flatten().topk(2 * beams)
    candidates = [(i // vocabulary, i % vocabulary, s) for s, i in zip(*map(Tensor.tolist, best), strict=True)]
    running = [c for c in candidates if c[1] != eos_id][:beams]
    return running, [c for c in candidates[:beams] if c[1] == eos_id]


def _ranked(scores, logprobs, count):
    values, places = (scores[:, None] + logprobs).flatten().topk(count)
    return [(int(i) // logprobs.shape[1], int(i) % logprobs.shape[1], float(v))
            for v, i in zip(values, places, strict=True)]  # fmt: skip


def _beam_step_with(candidates=2, ending=1, start=True, stops=True):
    def wrong(scores, logprobs, eos_id):
        beams = len(scores)
        ranked = _ranked(scores if start else scores * 0, logprobs, candidates * beams)
        ended = [c for c in ranked[: ending * beams] if c[1] == eos_id]
        return [c for c in ranked if not stops or c[1] != eos_id][:beams], ended

    return wrong


def _own_score_only(scores, logprobs, eos_id):
    """Ranked by the sums, but told with the last token's log-probability."""
    chosen = _beam_step_with()(scores, logprobs, eos_id)
    return tuple([(i, t, float(logprobs[i, t])) for i, t, _ in part] for part in chosen)


def _added_too_late(scores, logprobs, eos_id):
    """Ranked by the last token alone; the beams' scores are added to what was chosen."""
    chosen = _beam_step_with(start=False)(scores, logprobs, eos_id)
    return tuple([(i, t, float(scores[i] + logprobs[i, t])) for i, t, _ in part] for part in chosen)


def _each_alone(scores, logprobs, eos_id):
    best = logprobs.argmax(-1).tolist()
    ranked = sorted(((i, t, float(scores[i] + logprobs[i, t])) for i, t in enumerate(best)), key=lambda c: -c[2])
    return [c for c in ranked if c[1] != eos_id], [c for c in ranked if c[1] == eos_id]


def _places(both: tuple[list[Beam], list[Beam]]) -> list[tuple[int, int]]:
    return [(parent, token) for part in both for parent, token, _ in part]


def _draw_beams(rng: random.Random, size: int) -> tuple:
    """Beams whose candidates are 0.01 nats apart and whose own scores change the order.

    At even sizes an end is the best of all, at odd ones the best end comes too late to count. At size 7 all beams but
    one are as good as impossible, as before the first token: their probability is 0 in any precision.
    """
    beams, vocabulary = 2 + (size - 1) // 3, 3 + size // 3
    eos_id = rng.randrange(vocabulary)
    while True:
        scores = torch.tensor(sorted((-rng.randint(0, 250) / 100 for _ in range(beams)), reverse=True))
        scores[1:] -= 1000.0 if size == 7 else 0.0
        logits = tensor(rng, beams, vocabulary, scale=1.5)
        logits[:, eos_id] = -3.0
        logits[rng.randrange(beams), eos_id] = 4.0 if size % 2 == 0 else 0.0
        logprobs = (logits.log_softmax(-1) * 100).round() / 100
        every = (scores[:, None] + logprobs).flatten().sort(descending=True).values
        place = int((every > (scores + logprobs[:, eos_id]).max() + 1e-4).sum())
        wanted = place == 0 if size % 2 == 0 else beams <= place < 2 * beams
        wanted &= _places(beam_step(scores, logprobs, eos_id)) != _places(beam_step(scores * 0, logprobs, eos_id))
        if wanted and bool((every[:-1] - every[1:] > 0.005).all()):
            return scores, logprobs, eos_id


BEAM_STEP = Exercise(
    id="04.5",
    title="One step of beam search",
    dots=3,
    minutes=15,
    reference=beam_step,
    draw=_draw_beams,
    instead="add scores and log-probabilities, flatten, take the best 2K, and sort them into two lists",
    forbidden=("qftlab.decoding.beam.beam_search",),
    suspects=(
        Suspect("only K candidates: a beam that ends is not replaced; take 2K", like=_beam_step_with(candidates=1)),
        Suspect("the beams' own scores are left out: add scores[:, None]", like=_beam_step_with(start=False)),
        Suspect(
            "the scores returned are those of the last tokens alone; return the sums with their beams' scores",
            like=_own_score_only,
        ),
        Suspect("ranked without the beams' own scores: add scores[:, None] before topk", like=_added_too_late),
        Suspect("an end outside the K best candidates must not count", like=_beam_step_with(ending=2)),
        Suspect("a beam that has ended runs on; leave it out of `running`", like=_beam_step_with(stops=False)),
        Suspect("each beam keeps its own best token; take the K best of all continuations", like=_each_alone),
        Suspect(
            "the token is an index into one row: index % V, and the parent index // V",
            when=lambda a, g, w: any(t >= a[1].shape[1] for part in g for _, t, _ in part),
        ),
        Suspect(
            "scores (K,) do not line up with logprobs (K, V): scores[:, None] puts one beside each row",
            when=lambda a, g, w: isinstance(g, RuntimeError) and "must match" in str(g),
        ),
    ),
)
