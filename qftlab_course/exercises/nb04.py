"""Exercises of notebook 04, decoding: entropy, top-p, the repetition penalty, stop strings, one step of beam search."""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor

from qftlab_course.exercises import Exercise, Suspect, integers, tensor
from qftlab_course.exercises.beams import BEAM_STEP

STOPS = ("\nUser:", "##", "<end>")


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature); logits (V,). A token of probability 0 adds nothing."""
    return _nats(logits / temperature)


def _nats(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum()


def _draw_entropy(rng: random.Random, size: int) -> tuple:
    logits = tensor(rng, size + 1, scale=300.0 if size % 4 == 0 else 1.5)
    if size == 6:
        logits[rng.randrange(size)] = -math.inf
    return logits, (2.0, 0.5, 4.0, 1.0)[size % 4] if size > 1 else 0.5


def top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (V,), −inf wherever the token is not in the smallest set of likeliest tokens whose mass reaches p."""
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = order[probs.cumsum(-1) - probs < p]
    return torch.full_like(logits, -math.inf).index_copy(0, kept, logits[kept])


def _top_p_with(crossing=True, descending=True, cut=-math.inf):
    def wrong(logits, p):
        probs, order = logits.softmax(-1).sort(descending=descending)
        mass = probs.cumsum(-1)
        kept = order[mass - probs < p if crossing else mass <= p]
        return torch.full_like(logits, cut).index_copy(0, kept, logits[kept])

    return wrong


def _unsorted(logits, p):
    probs, _ = logits.softmax(-1).sort(descending=True)
    return logits.masked_fill(probs.cumsum(-1) - probs >= p, -math.inf)


def _never_sorted(logits, p):
    probs = logits.softmax(-1)
    return logits.masked_fill(probs.cumsum(-1) - probs >= p, -math.inf)


def _draw_top_p(rng: random.Random, size: int) -> tuple:
    """Unsorted logits and a p that no cumulative mass comes near, so that rounding decides nothing."""
    while True:
        logits = tensor(rng, size + 2, scale=1.5)
        p = 1.0 if size == 8 else 0.15 if size in (1, 5) else rng.randint(30, 95) / 100
        mass = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
        is_distinct = len(set(logits.tolist())) == len(logits)
        if is_distinct and logits.argmax() > 0 and bool(((mass - p).abs() > 1e-3)[: -1 if p == 1 else None].all()):
            return logits, p


def penalise(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Logits (V,) with the tokens in `seen` less likely: positive ones divided by the penalty, the others times it."""
    out = logits.clone()
    for token in set(seen):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


def _penalise_by(change, each=False, everything=False):
    def wrong(logits, seen, penalty):
        out = logits.clone()
        for token in range(len(logits)) if everything else seen if each else set(seen):
            out[token] = change(out[token], penalty)
        return out

    return wrong


def _both_ways(x, penalty):
    return x / penalty if x > 0 else x * penalty


def _draw_penalty(rng: random.Random, size: int) -> tuple:
    """Both signs among the seen, and from size 3 on a token that was seen twice."""
    logits = tensor(rng, size + 2, scale=2.0).abs() + 0.1
    flipped = rng.sample(range(size + 2), (size + 2) // 2)
    logits[flipped] *= -1
    seen = [flipped[0]] if size % 2 else [next(i for i in range(size + 2) if i not in flipped)]
    seen += integers(rng, size // 3, 0, size + 1)
    return logits, seen + seen[: size // 3], (1.3, 2.0, 1.1)[size % 3]


def until_stop(pieces: list[str], stops: list[str]) -> tuple[str, int]:
    """The text before the first stop string, and how many pieces had to be read to see it whole.

    Without a stop, all of the text and all of the pieces. Where one piece completes several, the earliest in the text
    counts.
    """
    text = ""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        found = [at for at in map(text.find, stops) if at >= 0]
        if found:
            return text[: min(found)], count
    return text, len(pieces)


def _stop_in_one_piece(pieces, stops):
    for count, piece in enumerate(pieces, start=1):
        found = [at for at in map(piece.find, stops) if at >= 0]
        if found:
            return "".join(pieces[: count - 1]) + piece[: min(found)], count
    return "".join(pieces), len(pieces)


def _stop_is_a_piece(pieces, stops):
    for count, piece in enumerate(pieces, start=1):
        if piece in stops:
            return "".join(pieces[: count - 1]), count
    return "".join(pieces), len(pieces)


def _read_to_stop(pieces, stops, is_stopped=lambda text, stop: stop in text):
    """The text read until it has a stop, or all of it; where the first stop in it begins; and the number of pieces."""
    read = list(itertools.accumulate(pieces))
    text = next((text for text in read if any(is_stopped(text, stop) for stop in stops)), read[-1])
    found = [text.find(stop) for stop in stops if is_stopped(text, stop)]
    return text, min(found, default=len(text)), read.index(text) + 1


def _stop_at_the_end(pieces, stops):
    text, at, count = _read_to_stop(pieces, stops, is_stopped=str.endswith)
    return text[:at], count


def _stop_kept(pieces, stops):
    text, at, count = _read_to_stop(pieces, stops)
    return text[:at] + next((stop for stop in stops if text.startswith(stop, at)), ""), count


def _stop_by_list_order(pieces, stops):
    text, _, count = _read_to_stop(pieces, stops)
    return next((text[: text.find(stop)] for stop in stops if stop in text), text), count


def _stop_by_whole_pieces(pieces, stops):
    text, at, count = _read_to_stop(pieces, stops)
    return (text if at == len(text) else "".join(pieces[: count - 1])), count


def _stop_reading_on(pieces, stops):
    text, at, _ = _read_to_stop(pieces, stops)
    return text[:at], len(pieces)


def _draw_pieces(rng: random.Random, size: int) -> tuple:
    """Each kind at its own size: within a piece, across a border, two in one piece, none, an end inside one, one early.

    In this order no two mistakes begin to go wrong in the same way.
    """

    def words(low: int, high: int) -> str:
        return "".join(rng.choice("abc ") for _ in range(rng.randint(low, high)))

    stops = list(STOPS[: 1 + size // 3])
    rng.shuffle(stops)
    stop = stops[-1]
    if size == 4:
        return [words(1, 3) for _ in range(4)], stops
    if size in (3, 6):  # one piece completes two, and the later one stands first in the list
        return [words(1, 2), words(1, 2) + stop + words(1, 2) + stops[0] + words(0, 1), words(1, 2)], stops
    cut = rng.randrange(1, len(stop))
    pieces = [words(1, 2) + stop[:cut], stop[cut:] + words(1, 2) * (size == 5)]
    if size == 1:
        pieces = [words(1, 2) + stop]
    if size >= 7:  # whole in one piece, and a second one later on
        pieces = [words(1, 2), words(1, 2) + stop + words(1, 2), words(1, 2), stop]
    return [words(1, 2) for _ in range(size // 2)] + pieces + [words(1, 2)], stops


EXERCISES = (
    Exercise(
        id="04.1",
        title="Entropy at a temperature",
        dots=1,
        minutes=6,
        reference=entropy,
        draw=_draw_entropy,
        instead="divide the logits by the temperature, take log_softmax, and add up -p log p",
        forbidden=("qftlab.maths.logprobs.entropy", "torch.distributions.Categorical"),
        atol=1e-4,
        suspects=(
            Suspect(
                "NaN: where p is 0, log p is minus infinity and their product NaN; such a token must add 0",
                when=lambda a, g, w: bool(torch.as_tensor(g).isnan().any()),
            ),
            Suspect("these are bits, not nats; take the natural log", like=lambda x, t: _nats(x / t) / math.log(2)),
            Suspect("the temperature is not used", like=lambda x, t: _nats(x)),
            Suspect("the logits are multiplied by the temperature; divide", like=lambda x, t: _nats(x * t)),
            Suspect("the sign is flipped: entropy is never negative", like=lambda x, t: -_nats(x / t)),
        ),
    ),
    Exercise(
        id="04.2",
        title="The top-p filter",
        dots=2,
        minutes=10,
        reference=top_p,
        draw=_draw_top_p,
        instead="sort the probabilities, add them up, and put what you keep back in its place",
        forbidden=("qftlab.maths.sampling.filter_logits", "transformers.TopPLogitsWarper"),
        suspects=(
            Suspect("the token that crosses p is cut; it belongs to the set", like=_top_p_with(crossing=False)),
            Suspect("decided in sorted order, applied to unsorted logits; put it back in its place", like=_unsorted),
            Suspect("the mass is added up in the vocabulary's order; sort first", like=_never_sorted),
            Suspect("the least likely tokens are kept: sort with descending=True", like=_top_p_with(descending=False)),
            Suspect("cut tokens must be -inf: a logit of 0 is a likely token", like=_top_p_with(cut=0.0)),
            Suspect("return logits, not probabilities", like=lambda x, p: _top_p_with()(x, p).softmax(-1)),
        ),
    ),
    Exercise(
        id="04.3",
        title="The repetition penalty",
        dots=1,
        minutes=6,
        reference=penalise,
        draw=_draw_penalty,
        instead="copy the logits, and divide or multiply those of the tokens seen, by their sign",
        forbidden=("qftlab.maths.sampling.filter_logits", "transformers.RepetitionPenaltyLogitsProcessor"),
        suspects=(
            Suspect(
                "negative logits are divided too, which makes those tokens more likely; multiply them",
                like=_penalise_by(lambda x, penalty: x / penalty),
            ),
            Suspect(
                "negative logits are left alone; multiply them by the penalty",
                like=_penalise_by(lambda x, penalty: x / penalty if x > 0 else x),
            ),
            Suspect("a token seen twice is punished twice; once is enough", like=_penalise_by(_both_ways, each=True)),
            Suspect("every token is punished, seen or not", like=_penalise_by(_both_ways, everything=True)),
        ),
    ),
    Exercise(
        id="04.4",
        title="Stop strings across token borders",
        dots=2,
        minutes=8,
        reference=until_stop,
        draw=_draw_pieces,
        instead="add piece after piece to one text and search that",
        forbidden=("qftlab.decoding.engine.generate", "transformers.StopStringCriteria"),
        suspects=(
            Suspect("each piece is searched alone; a stop string may lie across several", like=_stop_in_one_piece),
            Suspect("pieces are compared whole; a stop may begin or end inside one", like=_stop_is_a_piece),
            Suspect("the text need not end with the stop: the last piece may go on behind it", like=_stop_at_the_end),
            Suspect("the stop string itself is still in the text", like=_stop_kept),
            Suspect("of two stops take the one that is first in the text, not in the list", like=_stop_by_list_order),
            Suspect("all pieces are read; stop reading as soon as a stop string is whole", like=_stop_reading_on),
            Suspect("the last piece is dropped whole; keep what stands before the stop", like=_stop_by_whole_pieces),
            Suspect("return both, the text and the count", when=lambda a, g, w: isinstance(g, str)),
        ),
    ),
    BEAM_STEP,
)
