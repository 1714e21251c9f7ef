"""Greedy and beam search give the tokens that `transformers.generate` gives, fp32 on CPU, over a grid of settings.

The whole grid is `slow`; CI runs every 59th beam configuration of it. Both sides get the same prompts, stop ids and
settings; transformers gets the ids past the tokenizer's length as `suppress_tokens`, and pads with one of those where
there is one, so that its repetition penalty does not touch a real token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from random_models import random_model

from qftlab.decoding.beam import beam_search
from qftlab.decoding.engine import generate
from qftlab.maths.sampling import SamplingParams
from qftlab.model.loading import load_model
from qftlab.rows.tokenizer import load_tokenizer

MODELS = ("tiny", "llama 260k", "qwen2 tied", "qwen2 untied", "qwen3 tied", "qwen3 untied")
# One prompt; three of one length; a ragged batch.
BATCHES = (
    ("Once upon a time",),
    ("The cat sat", "One two three", "def f(x):"),
    ("7", "Tom had a red ball and he", "Compute 12 + 30 and"),
)
NEW_TOKENS = (10, 16, 13)  # a batch


@dataclass(frozen=True)
class Setting:
    """One configuration; `num_beams` 1 is greedy decoding."""

    model: str
    batch: int
    num_stop_ids: int
    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0


def beam_settings() -> list[Setting]:
    """Every combination; the number of results and the repetition penalty take turns."""
    axes = (range(len(BATCHES)), (1, 2), (2, 3, 4, 5), (-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never"))
    settings = [
        Setting(name, *rest, num_return_sequences=1 + i % rest[2], repetition_penalty=1.3 if i % 5 == 4 else 1.0)
        for name in MODELS
        for i, rest in enumerate(itertools.product(*axes))
    ]
    # The Llama has no id to pad with that is not a real token.
    return [replace(s, repetition_penalty=1.0) if s.model == "llama 260k" and s.batch else s for s in settings]


def greedy_settings() -> list[Setting]:
    """Each model on each batch, with no, one and two stop ids, penalised and not."""
    settings = [
        Setting(name, batch, count, 1, repetition_penalty=penalty)
        for name, batch, count in itertools.product(MODELS, range(len(BATCHES)), (0, 1, 2))
        for penalty in (1.0, 1.2)
    ]
    return [s for s in settings if s.repetition_penalty == 1 or s.model != "llama 260k" or not s.batch]


class Bench:
    """The models, each loaded once, and the two sides."""

    def __init__(self, real_data: Path | None) -> None:
        self.real_data, self.loaded, self.chosen = real_data, {}, {}

    def load(self, name: str):
        if name not in self.loaded:
            family, _, kind = name.partition(" ")
            folder = self.real_data / "tinylm" / "hf" if family == "llama" else "tiny"
            model = random_model(family, tie_word_embeddings=kind == "tied") if "qwen" in family else load_model(folder)
            model.set_attn_implementation("sdpa")
            model.generation_config.eos_token_id = None
            self.loaded[name] = model, load_tokenizer(folder)
        return self.loaded[name]

    def prompts(self, setting: Setting) -> list[list[int]]:
        return [self.load(setting.model)[1](text).input_ids for text in BATCHES[setting.batch]]

    def stop_ids(self, setting: Setting) -> list[int]:
        """Ids that the search meets early in one prompt and late in another, so that prompts end at different steps."""
        key = setting.model, setting.batch
        if key not in self.chosen:
            model, tokenizer = self.load(setting.model)
            free = beam_search(model, tokenizer, self.prompts(setting), num_beams=3, max_new_tokens=10,
                               stop_token_ids=(), num_return_sequences=2)  # fmt: skip
            early = free[0].token_ids[4]
            self.chosen[key] = [early, next(t for t in free[-1].token_ids[6:] if t != early)]
        return self.chosen[key][: setting.num_stop_ids]

    def ours(self, setting: Setting) -> list[list[int]]:
        model, tokenizer = self.load(setting.model)
        count, stop_ids = NEW_TOKENS[setting.batch], self.stop_ids(setting)
        if setting.num_beams == 1:
            params = SamplingParams(temperature=0.0, repetition_penalty=setting.repetition_penalty)
            done = generate(model, tokenizer, self.prompts(setting), max_new_tokens=count, params=params,
                            stop_token_ids=stop_ids)  # fmt: skip
        else:
            done = beam_search(
                model, tokenizer, self.prompts(setting), num_beams=setting.num_beams, max_new_tokens=count,
                length_penalty=setting.length_penalty, early_stopping=setting.early_stopping,
                num_return_sequences=setting.num_return_sequences, repetition_penalty=setting.repetition_penalty,
                stop_token_ids=stop_ids,
            )  # fmt: skip
        return [d.token_ids for d in done]

    def theirs(self, setting: Setting) -> list[list[int]]:
        model, tokenizer = self.load(setting.model)
        prompts, stop_ids, count = self.prompts(setting), self.stop_ids(setting), NEW_TOKENS[setting.batch]
        past = list(range(len(tokenizer), model.config.vocab_size)) or None
        pad, width = (past or [0])[0], max(map(len, prompts))
        beams = {} if setting.num_beams == 1 else {
            "length_penalty": setting.length_penalty, "early_stopping": setting.early_stopping,
            "num_return_sequences": setting.num_return_sequences,
        }  # fmt: skip
        rows = model.generate(
            torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=count, do_sample=False, num_beams=setting.num_beams, pad_token_id=pad,
            eos_token_id=stop_ids or None, suppress_tokens=past, repetition_penalty=setting.repetition_penalty, **beams,
        )  # fmt: skip
        return [trim(row, stop_ids, count) for row in rows[:, width:].tolist()]


def trim(row: list[int], stop_ids: list[int], count: int) -> list[int]:
    """A row of transformers' without what fills it up after its stop token."""
    ends = [i + 1 for i, token in enumerate(row) if token in stop_ids]
    assert ends or len(row) == count, "a row without a stop token is as long as allowed"
    return row[: ends[0]] if ends else row


def compare(bench: Bench, settings: list[Setting]) -> None:
    """Runs both sides; every token of every result must agree, and stop tokens must matter."""
    stopped, differing = 0, []
    for setting in settings:
        ours, theirs = bench.ours(setting), bench.theirs(setting)
        stopped += any(row[-1] in bench.stop_ids(setting) for row in ours)
        if ours != theirs:
            differing.append((setting, ours, theirs))
    assert not differing, f"{len(differing)} of {len(settings)} settings differ, the first: {differing[0]}"
    wanted = sum(s.num_stop_ids > 0 for s in settings)
    assert stopped >= wanted / 2, f"stop tokens ended something in {stopped} settings only, of {wanted} that have one"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_grid_is_token_identical(name: str, request: pytest.FixtureRequest) -> None:
    bench = Bench(request.getfixturevalue("real_data") if name == "llama 260k" else None)
    compare(bench, [s for s in [*beam_settings(), *greedy_settings()] if s.model == name])


def test_a_small_grid_is_token_identical() -> None:
    """Without the Llama, which is no part of the repository."""
    beams, greedy = beam_settings()[::59], greedy_settings()[::11]
    settings = [s for s in [*beams, *greedy] if s.model != "llama 260k"]
    assert len(settings) >= 35 and {s.num_beams for s in settings} == {1, 2, 3, 4, 5}
    compare(Bench(None), settings)


def test_the_grid_is_as_large_as_promised() -> None:
    whole = [*beam_settings(), *greedy_settings()]
    assert len(whole) == len(set(whole)) >= 2_000
    assert {s.early_stopping for s in whole} == {False, True, "never"} and {s.num_stop_ids for s in whole} == {0, 1, 2}
