"""The record of a decoding run that pictures and tests read: what could have come, what was cut and by what, what came.

What a filter cuts is asked of `core.sampling.filter_logits` itself, with one filter more each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qftlab.decoding.beam import BeamStep
from qftlab.decoding.decoder import Decoder
from qftlab.maths.sampling import SamplingParams, filter_logits

Texts = Callable[[Sequence[int]], Sequence[str]]  # ids to what each of them says


@dataclass(frozen=True)
class Candidate:
    """A token that could come next.

    Attributes:
        token: its id.
        text: what it says.
        before: its probability as the model gives it.
        after: its probability after penalty, temperature and filters.
        cut: the filter that removed it, "top-k", "top-p", "min-p", "greedy" or "beam"; "" where none did.
    """

    token: int
    text: str
    before: float
    after: float
    cut: str = ""


@dataclass(frozen=True)
class Distribution:
    """What may come next.

    Attributes:
        candidates: the likeliest tokens, by the larger of their two probabilities.
        entropy: of the model's own distribution, in nats.
        entropy_after: of the one that is drawn from, in nats.
        kept_mass: what the kept tokens held of the probability after penalty and temperature, 0 to 1.
        num_kept: tokens that can still be drawn.
    """

    candidates: tuple[Candidate, ...]
    entropy: float
    entropy_after: float
    kept_mass: float
    num_kept: int


@dataclass(frozen=True)
class SampledStep:
    """One step: the distribution and what was taken from it, drawn or forced by hand."""

    distribution: Distribution
    chosen: Candidate
    is_forced: bool = False


@dataclass(frozen=True)
class Node:
    """A token in the tree of a run.

    Attributes:
        step: from 1; the text before it is the root.
        parent: index of the node before it among the trace's nodes; None below the root.
        token, text: its id, and what it says.
        logprob: of the token after its parent, in nats.
        score: what a step ranks it by: in a beam search the sum of log-probabilities from the root, in nats; in
            sampling its probability after the filters.
        status: "kept", "dropped" or "finished".
        is_best: whether it lies on the path that won.
        final: of a finished beam, its sum divided by length ** length_penalty, which decides who wins.
        note: the filter that cut it, or "forced".
    """

    step: int
    parent: int | None
    token: int
    text: str
    logprob: float
    score: float
    status: str
    is_best: bool = False
    final: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SampleTrace:
    """A sampled (or greedy, or forced) continuation of `prompt`, step by step."""

    kind: ClassVar[str] = "sample"
    prompt: str
    steps: tuple[SampledStep, ...]

    def nodes(self, alternatives: int = 4) -> tuple[Node, ...]:
        """The chosen path and, at each of its steps, the likeliest tokens that were not taken."""
        nodes: list[Node] = []
        parent = None
        for number, step in enumerate(self.steps, start=1):
            shown = [c for c in step.distribution.candidates if c.token != step.chosen.token][:alternatives]
            ranked = sorted([step.chosen, *shown], key=lambda c: -max(c.before, c.after))
            above, parent = parent, len(nodes) + ranked.index(step.chosen)
            for candidate in ranked:
                is_chosen = candidate is step.chosen
                note = ("forced" if step.is_forced else "") if is_chosen else candidate.cut
                logprob = math.log(candidate.before) if candidate.before > 0 else -math.inf
                nodes.append(Node(number, above, candidate.token, candidate.text, logprob, candidate.after,
                                  "kept" if is_chosen else "dropped", is_chosen, None, note))  # fmt: skip
        return tuple(nodes)

    def to_json(self) -> str:
        """The whole record as JSON; `read_trace` reads it back."""
        return json.dumps({"kind": self.kind, **asdict(self)})


@dataclass(frozen=True)
class BeamTrace:
    """A beam search after `prompt`: every candidate that was ranked, and the path that won."""

    kind: ClassVar[str] = "beam"
    prompt: str
    num_beams: int
    tree: tuple[Node, ...]

    def nodes(self) -> tuple[Node, ...]:
        """All candidates, step by step, best first."""
        return self.tree

    def best(self) -> tuple[Node, ...]:
        """The path that won or, of a search that is not over, leads; from its first token on."""
        return tuple(node for node in self.tree if node.is_best)

    def to_json(self) -> str:
        """The whole record as JSON; `read_trace` reads it back."""
        return json.dumps({"kind": self.kind, **asdict(self)})


def read_trace(text: str) -> SampleTrace | BeamTrace:
    """The trace that `to_json` wrote.

    Raises:
        ValueError: if the JSON is no trace.
    """
    data = json.loads(text)
    kind = data.pop("kind", None) if isinstance(data, dict) else None
    if kind == "beam":
        return BeamTrace(**{**data, "tree": tuple(Node(**node) for node in data["tree"])})
    if kind != "sample":
        raise ValueError(f"kind must be sample or beam, got {kind!r}: read what to_json wrote")
    steps = []
    for step in data["steps"]:
        seen = step["distribution"]
        seen["candidates"] = tuple(Candidate(**candidate) for candidate in seen["candidates"])
        steps.append(SampledStep(Distribution(**seen), Candidate(**step["chosen"]), step["is_forced"]))
    return SampleTrace(data["prompt"], tuple(steps))


def read_distribution(
    logits: Tensor, params: SamplingParams, texts: Texts, *,
    seen_ids: Tensor | None = None, vocab_limit: int | None = None, top: int = 12,
) -> Distribution:  # fmt: skip
    """The next-token distribution before and after the settings, and which filter cut which token.

    Args:
        logits: (V,) of the last position.
        params: the settings; temperature 0 keeps the likeliest token alone.
        texts: what ids say, such as `tokenizer.batch_decode`'s answer for each.
        seen_ids: 1-D ids the repetition penalty applies to.
        vocab_limit: ids from here on are impossible.
        top: candidates recorded.

    Raises:
        ValueError: as `filter_logits`: for a NaN, or a repetition penalty without `seen_ids`.
    """
    before, after, kept_mass, cuts = _probabilities(logits, params, seen_ids, vocab_limit)
    order = torch.maximum(before, after).sort(descending=True, stable=True).indices
    ids = order[: min(top, len(before) if vocab_limit is None else vocab_limit)].tolist()
    named = zip(ids, texts(ids), strict=True)
    candidates = tuple(Candidate(i, text, before[i].item(), after[i].item(), _cut(cuts, i)) for i, text in named)
    return Distribution(candidates, _entropy(before), _entropy(after), kept_mass, int((after > 0).sum()))


def choose(
    logits: Tensor, params: SamplingParams, token: int, texts: Texts, *, is_forced: bool = False,
    seen_ids: Tensor | None = None, vocab_limit: int | None = None, top: int = 12,
) -> SampledStep:  # fmt: skip
    """The record of taking `token`; the other arguments are those of `read_distribution`.

    Raises:
        ValueError: as `read_distribution`, and for an id that is no token.
    """
    limit = len(logits) if vocab_limit is None else vocab_limit
    if not 0 <= token < limit:
        raise ValueError(f"token must be an id from 0 to {limit - 1}, got {token}")
    seen = read_distribution(logits, params, texts, seen_ids=seen_ids, vocab_limit=vocab_limit, top=top)
    chosen = next((candidate for candidate in seen.candidates if candidate.token == token), None)
    if chosen is None:
        before, after, _, cuts = _probabilities(logits, params, seen_ids, vocab_limit)
        chosen = Candidate(token, texts([token])[0], before[token].item(), after[token].item(), _cut(cuts, token))
    return SampledStep(seen, chosen, is_forced)


def replay(
    decoder: Decoder, prompt_ids: Sequence[int], token_ids: Sequence[int], params: SamplingParams, texts: Texts, *,
    vocab_limit: int | None = None, top: int = 12,
) -> SampleTrace:  # fmt: skip
    """The trace of a continuation that is already there, such as a `Completion` of the engine.

    Args:
        decoder: of the model that wrote it.
        prompt_ids, token_ids: what was read and what was written.
        params: the settings it was written with.
        texts, vocab_limit, top: as in `read_distribution`.
    """
    cache = decoder.new_cache(1, len(prompt_ids) + len(token_ids))
    logits = decoder.prefill([prompt_ids], cache)
    steps, ids = [], list(prompt_ids)
    for token in token_ids:
        seen = torch.tensor(ids, device=logits.device)
        steps.append(choose(logits[0], params, token, texts, seen_ids=seen, vocab_limit=vocab_limit, top=top))
        ids.append(token)
        logits = decoder.step(seen.new_tensor([token]), cache)
    return SampleTrace("".join(texts(prompt_ids)), tuple(steps))


def beam_trace(
    steps: Sequence[BeamStep], prompt_ids: Sequence[int], texts: Texts, *,
    num_beams: int, length_penalty: float = 1.0, is_over: bool = True,
) -> BeamTrace:  # fmt: skip
    """The tree of one prompt's search, from what `beam_search(..., on_step=steps.append)` reported.

    Args:
        steps: the first steps of the search, or all of them.
        prompt_ids: what was read.
        texts: what ids say.
        num_beams, length_penalty: as they were in the search.
        is_over: whether only finished beams can win; otherwise the best so far leads, finished or not.

    Raises:
        ValueError: if the steps are of several prompts.
    """
    if len({step.prompt for step in steps}) > 1:
        raise ValueError(f"steps must be of one prompt, got those of {sorted({step.prompt for step in steps})}")
    nodes: list[Node] = []
    beams: list[int | None] = [None]  # node of each beam, best first
    rivals: list[tuple[float, int]] = []  # score that decides, node
    for step in steps:
        first, length = len(nodes), step.step + 1
        for place, token in enumerate(step.tokens):
            status = "finished" if step.is_finished[place] else "kept" if place in step.kept else "dropped"
            score = step.scores[place]
            final = score / length**length_penalty if status == "finished" else None
            nodes.append(Node(length, beams[step.parents[place]], token, texts([token])[0], step.logprobs[place],
                              score, status, final=final))  # fmt: skip
            if final is not None:
                rivals.append((final, first + place))
        beams = [first + place for place in step.kept]
    if not is_over and steps:
        rivals += [(nodes[i].score / nodes[i].step ** length_penalty, i) for i in beams]
    at = max(rivals, key=lambda pair: pair[0])[1] if rivals else None
    while at is not None:
        nodes[at] = replace(nodes[at], is_best=True)
        at = nodes[at].parent
    return BeamTrace("".join(texts(prompt_ids)), num_beams, tuple(nodes))


def as_beams_see(seen: Distribution, step: BeamStep, rank: int) -> Distribution:
    """What may come next after one beam, with the tokens that the search does not go on with marked as cut by "beam".

    Args:
        seen: the model's distribution after the beam.
        step: the search's next step.
        rank: of the beam, 0 for the best.
    """
    kept = {step.tokens[place] for place, parent in enumerate(step.parents)
            if parent == rank and (place in step.kept or step.is_finished[place])}  # fmt: skip
    marked = tuple(c if c.token in kept else replace(c, after=0.0, cut="beam") for c in seen.candidates)
    mass = sum(c.before for c in seen.candidates if c.token in kept)
    return replace(seen, candidates=marked, kept_mass=mass, num_kept=len(kept))


def _probabilities(
    logits: Tensor, params: SamplingParams, seen_ids: Tensor | None, vocab_limit: int | None
) -> tuple[Tensor, Tensor, float, list[tuple[str, Tensor]]]:
    """(V,) before, (V,) after, the kept mass, and for each filter in use (V,) whether it cut the token."""
    seen = None if seen_ids is None else [seen_ids]

    def scores(settings: SamplingParams) -> Tensor:
        return filter_logits(logits.unsqueeze(0), settings, seen_ids=seen, vocab_limit=vocab_limit)[0]

    before = scores(SamplingParams()).double().softmax(-1)
    settings = replace(params, top_k=0, top_p=1.0, min_p=0.0)
    current = scores(settings)
    tempered, cuts = current.double().softmax(-1), []
    for name, field in (("top-k", "top_k"), ("top-p", "top_p"), ("min-p", "min_p")):
        if getattr(params, field) != getattr(settings, field):
            settings = replace(settings, **{field: getattr(params, field)})
            current, last = scores(settings), current
            cuts.append((name, (current == -math.inf) & (last > -math.inf)))
    after = current.double().softmax(-1)
    if params.temperature == 0.0:
        last, after = current > -math.inf, torch.zeros_like(after)
        after[current.argmax()] = 1.0
        cuts.append(("greedy", last & (after == 0)))
    return before, after, tempered[after > 0].sum().item(), cuts


def _cut(cuts: list[tuple[str, Tensor]], token: int) -> str:
    return next((name for name, is_cut in cuts if is_cut[token]), "")


def _entropy(probs: Tensor) -> float:
    return torch.special.entr(probs).sum().item()
