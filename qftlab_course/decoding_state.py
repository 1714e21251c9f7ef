"""What the decoding lab does, without its widgets: a text that grows token by token and can always go back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qftlab.decoding.beam import BeamStep, beam_search
from qftlab.decoding.engine import default_stop_ids, encode_prompts, head_rows
from qftlab.maths.sampling import SamplingParams, sample, uniform
from qftlab_course.decoding import texts_of
from qftlab_course.reader import Reader
from qftlab_course.trace import (
    BeamTrace,
    Distribution,
    SampledStep,
    SampleTrace,
    as_beams_see,
    beam_trace,
    choose,
    read_distribution,
)


@dataclass(frozen=True)
class BeamParams:
    """The settings of the Beam tab; `beam_search` checks them."""

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False


PRESETS: dict[str, SamplingParams | BeamParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.5),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.9),
    "min-p": SamplingParams(min_p=0.1),
    # The generation_config.json of Qwen2.5-0.5B-Instruct.
    "Qwen2.5": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),
    "beam": BeamParams(),
}


class DecodingState:
    """One prompt, the text after it, and the settings. Everything that fails raises before anything is changed.

    Attributes:
        prompt: the text as typed.
        steps: what was taken so far, token by token.
        shown: in beam mode, steps of the search after `steps` that are shown.
        params, beams: the settings of the two tabs.
        mode: "sample" or "beam".
        seed: of the draws: with it `run` writes what `generate(..., seed=seed)` writes.
        max_new_tokens: the most tokens that one `run` adds to the text, and one search to what was taken before it.
    """

    def __init__(self, model, tokenizer, prompt: str, *, preset: str = "plain", chat: bool = False, seed: int = 0,
                 max_new_tokens: int = 64) -> None:  # fmt: skip
        """Reads the prompt.

        Args:
            model, tokenizer: a causal transformers model that `generate.decoder` knows, and its tokenizer.
            prompt: raw text, or with `chat` what the user says.
            preset: one of `PRESETS`.
            chat: render the prompt as a user turn.
            seed, max_new_tokens: as the attributes.

        Raises:
            ValueError: for an empty prompt, one that fills the context, or an unknown preset.
        """
        self._model, self._tokenizer, self.chat = model, tokenizer, chat
        self._texts = texts_of(tokenizer)
        self._reader = Reader(model)
        self._stop_ids = frozenset(default_stop_ids(model, tokenizer))
        self._limit = min(len(tokenizer), head_rows(model))
        self._context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        self._past: list[tuple] = []
        self._search: tuple | None = None  # key, steps: the beam search last made
        self.params, self.beams, self.mode = SamplingParams(), BeamParams(), "sample"
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.steps: tuple[SampledStep, ...] = ()
        self.shown = 0
        self.prompt, self.prompt_ids = prompt, self._encoded(prompt)
        self.choose_preset(preset)

    @property
    def token_ids(self) -> list[int]:
        """The text after the prompt: what was taken, and in beam mode the best path shown."""
        return [step.chosen.token for step in self.steps] + [node.token for node in self._path()]

    def texts(self) -> list[str]:
        """What the tokens after the prompt say."""
        return self._texts(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether the text ends in a stop token."""
        ids = self.token_ids
        return bool(ids) and ids[-1] in self._stop_ids

    def distribution(self) -> Distribution | None:
        """What may come next, under the settings; in beam mode what the search goes on with. None at the end."""
        if self.is_finished:
            return None
        ids = self.prompt_ids + self.token_ids
        params = self.params if self.mode == "sample" else SamplingParams()
        seen = read_distribution(self._reader.logits_after(ids), params, self._texts, **self._about(ids))
        return seen if self.mode == "sample" else self._as_beams_see_it(seen)

    def trace(self) -> SampleTrace | BeamTrace:
        """The record of what is shown."""
        if self.mode == "sample" or not self.shown:
            return SampleTrace("".join(self._texts(self.prompt_ids)), self.steps)
        return self._beam_trace()

    def set_prompt(self, prompt: str) -> None:
        """Starts from another prompt.

        Raises:
            ValueError: for an empty prompt, or one that fills the context; the old one then stands.
        """
        ids = self._encoded(prompt)
        self._remember()
        self.prompt, self.prompt_ids, self.steps, self.shown = prompt, ids, (), 0

    def choose_preset(self, name: str) -> None:
        """Takes the settings of a preset; the text stays.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        settings = PRESETS[name]
        self.set_mode("beam" if isinstance(settings, BeamParams) else "sample")
        if self.mode == "beam":
            self.set_beams(**vars(settings))
        else:
            self.params = settings

    @property
    def preset(self) -> str | None:
        """The preset whose settings are in force; None where they are nobody's."""
        settings = self.beams if self.mode == "beam" else self.params
        return next((name for name, preset in PRESETS.items() if preset == settings), None)

    def set_mode(self, mode: str) -> None:
        """Samples or searches; the text stays."""
        if mode != self.mode:
            self.steps, self.shown = self._committed(), 0
            self.mode = mode

    def set_params(self, **changes) -> None:
        """Changes sampling settings.

        Raises:
            ValueError: for a value out of range; nothing is then changed.
        """
        self.params = replace(self.params, **changes)

    def set_beams(self, **changes) -> None:
        """Changes settings of the search, which then begins anew after the tokens taken; it shows as many steps.

        Raises:
            ValueError: for a value out of range; nothing is then changed.
        """
        wanted = replace(self.beams, **changes)
        shown = min(self.shown, len(self._searched(wanted)))  # which refuses what cannot be
        self.beams, self.shown = wanted, shown

    def set_length(self, max_new_tokens: int) -> None:
        """Changes `max_new_tokens`.

        Raises:
            ValueError: if it is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"new tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        if self.shown:
            self.shown = min(self.shown, len(self._searched(self.beams)))

    def step(self) -> None:
        """Draws a token, or shows another step of the search; one that is over begins anew after its best path.

        Raises:
            ValueError: if the text has ended or fills the context.
        """
        self._check_open()
        if self.mode == "beam":
            is_over = self.shown and self.shown == len(self._searched(self.beams))
            steps, shown = (self._committed(), 1) if is_over else (self.steps, self.shown + 1)
            self._remember()
            self.steps, self.shown = steps, shown
        else:
            taken = self._drawn()
            self._remember()
            self.steps += (taken,)

    def run(self) -> Iterator[None]:
        """Goes on to a stop token, or by `max_new_tokens`, pausing after each; one `undo` takes all of it back.

        Raises:
            ValueError: if the text has ended or fills the context.
        """
        self._check_open()
        if self.mode == "beam":
            self.step()
            self.shown = len(self._searched(self.beams))
            yield
            return
        self._remember()
        for _ in range(self._room()):
            self.steps += (self._drawn(),)
            yield
            if self.is_finished:
                return

    def force(self, token: int) -> None:
        """Appends a token by hand; in beam mode the search then begins after it.

        Raises:
            ValueError: if the text has ended or fills the context, or there is no such token.
        """
        self._check_open()
        steps = self._committed()
        taken = self._taken([step.chosen.token for step in steps], token, is_forced=True)
        self._remember()
        self.steps, self.shown = (*steps, taken), 0

    def rewind(self, count: int) -> None:
        """Keeps the first `count` tokens of the text.

        Raises:
            ValueError: if there are fewer.
        """
        if not 0 <= count <= len(self.token_ids):
            raise ValueError(f"count must be from 0 to {len(self.token_ids)}, the tokens there are, got {count}")
        steps = self._committed()[:count]
        self._remember()
        self.steps, self.shown = steps, 0

    def undo(self) -> None:
        """Takes back the last change of prompt or text.

        Raises:
            ValueError: if there is none.
        """
        if not self._past:
            raise ValueError("there is nothing to undo")
        self.prompt, self.prompt_ids, self.steps, self.shown, mode = self._past.pop()
        if self.shown:
            self.mode = mode
            self.shown = min(self.shown, len(self._searched(self.beams)))

    def reset(self) -> None:
        """Empties the text; settings stay. The model is read anew, in case it was trained meanwhile."""
        if self.token_ids:
            self._remember()
        self.steps, self.shown, self._search = (), 0, None
        self._reader = Reader(self._model)

    def _remember(self) -> None:
        self._past.append((self.prompt, self.prompt_ids, self.steps, self.shown, self.mode))

    def _encoded(self, prompt: str) -> list[int]:
        given = [{"role": "user", "content": prompt}] if self.chat else prompt
        if not prompt:
            raise ValueError("the prompt must hold some text, got none")
        ids = encode_prompts(self._tokenizer, [given])[0]
        self._check_room(ids, 1)
        return ids

    def _check_room(self, ids: Sequence[int], new: int) -> None:
        if len(ids) + new > self._context:
            raise ValueError(f"prompt and new tokens must fit the context of {self._context} tokens, got {len(ids)} + "
                             f"{new}: shorten the prompt, or ask for fewer new tokens")  # fmt: skip

    def _check_open(self) -> None:
        if self.is_finished:
            raise ValueError(f"the text has ended with {self.texts()[-1]}: undo, rewind or reset to go on")
        self._check_room(self.prompt_ids, len(self.token_ids) + 1)

    def _room(self) -> int:
        """Tokens that a run or a search may add after those taken: `max_new_tokens`, less where the context is full."""
        return min(self.max_new_tokens, self._context - len(self._ids_taken()))

    def _about(self, ids: list[int]) -> dict:
        return {"seen_ids": torch.tensor(ids, device=self._model.device), "vocab_limit": self._limit}

    def _drawn(self) -> SampledStep:
        ids = self.prompt_ids + self.token_ids
        logits = self._reader.logits_after(ids)
        u = uniform(self.seed, torch.zeros(1, dtype=torch.int64, device=logits.device), len(self.steps))
        about = self._about(ids)
        given = {**about, "seen_ids": [about["seen_ids"]]}
        token = sample(logits.unsqueeze(0), self.params, u, **given).item()
        return choose(logits, self.params, token, self._texts, **about)

    def _taken(self, before: list[int], token: int, *, is_forced: bool) -> SampledStep:
        ids = self.prompt_ids + before
        params = self.params if self.mode == "sample" else SamplingParams()
        logits = self._reader.logits_after(ids)
        return choose(logits, params, token, self._texts, is_forced=is_forced, **self._about(ids))

    def _committed(self) -> tuple[SampledStep, ...]:
        """The steps with the best path of the search taken as if it had been chosen token by token."""
        steps = list(self.steps)
        for node in self._path():
            steps.append(self._taken([step.chosen.token for step in steps], node.token, is_forced=False))
        return tuple(steps)

    def _searched(self, beams: BeamParams) -> list[BeamStep]:
        ids, length = self._ids_taken(), self._room()
        key = (tuple(ids), beams, length)
        if length and (self._search is None or self._search[0] != key):
            steps: list[BeamStep] = []
            beam_search(self._model, self._tokenizer, [ids], max_new_tokens=length,
                        decoder=self._reader.decoder, on_step=steps.append, **vars(beams))  # fmt: skip
            self._search = key, steps
        return self._search[1] if length else []

    def _ids_taken(self) -> list[int]:
        return self.prompt_ids + [step.chosen.token for step in self.steps]

    def _beam_trace(self) -> BeamTrace:
        searched = self._searched(self.beams)
        return beam_trace(searched[: self.shown], self._ids_taken(), self._texts, num_beams=self.beams.num_beams,
                          length_penalty=self.beams.length_penalty, is_over=self.shown == len(searched))  # fmt: skip

    def _path(self) -> tuple:
        return self._beam_trace().best() if self.mode == "beam" and self.shown else ()

    def _as_beams_see_it(self, plain: Distribution) -> Distribution:
        """Marks the tokens that the next step of the search drops after the path shown."""
        searched = self._searched(self.beams)
        if self.shown == len(searched):
            return plain
        rank = 0
        if self.shown:
            last, nodes = searched[self.shown - 1], self._beam_trace()
            first = len(nodes.tree) - len(last.tokens)
            rank = next((r for r, place in enumerate(last.kept) if nodes.tree[first + place].is_best), -1)
        return as_beams_see(plain, searched[self.shown], rank)
