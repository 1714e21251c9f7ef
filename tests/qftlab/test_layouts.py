"""The layout of the decoder's products: measured, remembered, pinned, refused, and kept by a run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import random_model

from qftlab.decoding import layouts
from qftlab.decoding.beam import beam_search
from qftlab.decoding.decoder import Decoder, decoder_for
from qftlab.decoding.engine import generate
from qftlab.decoding.layouts import LAYOUTS, Folded, choose_layout, fastest, layout_for, parse_layout
from qftlab.model.loading import load_model
from qftlab.rows.countdown import fresh_problems
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import PolicyConfig, TrainConfig
from qftlab.train.rloo import fit_policy
from qftlab.train.rollouts import encode_prompts

ROUNDING = 1e-5  # other orders of summation, fp32, logits up to 10: as in test_decoder.py
MIXED = "transposed,joined,tiled"


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing pinned and nothing remembered: the tests say which layout they mean."""
    monkeypatch.delenv("QFTLAB_LAYOUT", raising=False)
    monkeypatch.setattr(layouts, "_found", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Products that take the seconds one says by (layout, rows), else 1; with them, what was timed."""
    seconds, timed = {}, []

    def take(side, rows: int) -> float:
        timed.append((side.name, rows))
        return seconds.get((side.name, rows), 1.0)

    monkeypatch.setattr(layouts._Products, "seconds", take)
    return seconds, timed


def test_the_fastest_never_loses_to_plain() -> None:
    """Tiled saves most at 8 rows but loses at 2; joined saves 10 and 20 %: its worst is the best worst."""
    assert fastest({"plain": [1.0, 2.0], "joined": [0.9, 1.6], "tiled": [1.2, 0.8]}) == "joined"
    assert fastest({"plain": [1.0, 2.0], "joined": [0.98, 1.9], "tiled": [1.2, 0.8]}) == "plain", "2 % is a tie"
    assert fastest({"plain": [1.0], "joined": [1.0], "transposed": [1.0]}) == "plain"
    assert fastest({"plain": [1.0], "transposed": [0.97], "tiled": [0.6]}) == "tiled"


def test_what_is_fastest_is_chosen_and_remembered(clock, caplog) -> None:
    seconds, timed = clock
    seconds |= {("transposed", 1): 0.5, ("tiled", 1): 0.7, ("joined", 2): 0.9, ("joined", 8): 0.9, ("tiled", 8): 0.1}
    seconds |= {("tiled", 16): 0.8, ("tiled", 64): 0.6, ("joined", 64): 0.5}
    model = random_model()
    with caplog.at_level("INFO"):
        assert choose_layout(model) == MIXED
        assert {rows for _, rows in timed} == {1, 2, 8, 16, 64} and {name for name, _ in timed} == set(LAYOUTS)
        timed.clear()
        assert choose_layout(random_model(initializer_range=0.1)) == MIXED and not timed, "once a shape"
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith(
        "decoder layout for 1, 2 to 15 and more rows: transposed (0.50), joined (0.90), tiled (0.80)"
    )
    choose_layout(random_model(num_hidden_layers=1))
    assert timed, "another shape is measured"


def test_noise_does_not_choose(clock) -> None:
    """Of the repeats the least counts: a stall in one of them, as on shared cores, changes nothing."""
    seconds, timed = clock
    seconds[("tiled", 1)] = 0.9
    inner, stalled = layouts._Products.seconds, []

    def stall(side, rows: int) -> float:
        is_first = (side.name, rows) not in stalled
        stalled.append((side.name, rows))
        return inner(side, rows) * (50 if is_first else 1)

    layouts._Products.seconds = stall  # `clock` gives it back
    assert choose_layout(random_model()) == "tiled,plain,plain"


def test_really_measured_it_is_a_layout_of_these_weights() -> None:
    """The real timer on the real model; which wins is the processor's business."""
    assert set(parse_layout(choose_layout(load_model("tiny")))) <= set(LAYOUTS)
    half = random_model().to(torch.bfloat16)
    assert "tiled" not in choose_layout(half), "oneDNN's order is for fp32"


@pytest.mark.parametrize("name", [*LAYOUTS, MIXED])
def test_the_pin_decides(name: str, monkeypatch, clock) -> None:
    monkeypatch.setenv("QFTLAB_LAYOUT", name)
    model = random_model()
    assert choose_layout(model) == layout_for(model) == name
    assert decoder_for(model, 1).layout == decoder_for(model, 10**6).layout == name
    assert not clock[1], "what is pinned is not measured"


@pytest.mark.parametrize(
    "text, message",
    [
        ("fast", "QFTLAB_LAYOUT: a layout must be one of plain, joined, transposed, tiled, got 'fast'"),
        ("plain,tiled", r"QFTLAB_LAYOUT: a layout must be one name or three .* got 'plain,tiled'"),
        ("plain,,tiled", "got ''"),
    ],
)
def test_an_unknown_pin_is_refused(text: str, message: str, monkeypatch) -> None:
    monkeypatch.setenv("QFTLAB_LAYOUT", text)
    with pytest.raises(ValueError, match=message):
        generate(random_model(), load_tokenizer("tiny"), [[5]], max_new_tokens=1)


def hooked():
    model = random_model()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def adapted(**settings):
    return get_peft_model(random_model(), LoraConfig(r=2, target_modules=["q_proj"], **settings))


@pytest.mark.parametrize("make, why", [(hooked, "modules with hooks"), (lambda: adapted(use_dora=True), "plain LoRA")])
def test_weights_that_cannot_be_folded_stay_plain(make, why: str, clock, caplog, monkeypatch) -> None:
    """And what a hook does is seen by the decoder, pinned or not."""
    model, ids = make(), torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=why):
        Decoder(model, layout="joined")
    for pin in ("", "tiled"):
        monkeypatch.setenv("QFTLAB_LAYOUT", pin)
        with caplog.at_level("INFO"):
            assert choose_layout(model) == "plain" and not clock[1]
        assert "unfused" in caplog.messages[-1] and why in caplog.messages[-1]
    decoder = Decoder(model, layout=choose_layout(model))
    with torch.no_grad():
        want = model(ids).logits[0, -1]
    assert (decoder.prefill(ids.tolist(), decoder.new_cache(1, 4))[0] - want).abs().max() < ROUNDING


def test_generate_takes_it_where_it_pays(clock, monkeypatch) -> None:
    """64 steps or more, and a snapshot that is not too large; beam search likewise."""
    clock[0].update({("joined", rows): 0.5 for rows in (1, 2, 8, 16, 64)})
    model, tokenizer, made = random_model(), load_tokenizer("tiny"), []
    monkeypatch.setattr(Decoder, "check_version", lambda self: made.append(self.layout))
    for count, limit, wanted in ((1, 63, "plain"), (1, 64, "joined"), (4, 16, "joined"), (3, 16, "plain")):
        generate(model, tokenizer, [[5]] * count, max_new_tokens=limit, batch_size=1, stop_token_ids=())
        assert {made.pop() for _ in range(len(made))} == {wanted}
        beam_search(model, tokenizer, [[5]] * count, max_new_tokens=limit, batch_size=1, num_beams=2)
        assert {made.pop() for _ in range(len(made))} == {wanted}
    monkeypatch.setattr(layouts, "LARGEST", 1000)
    assert layout_for(model) == "plain"


@pytest.mark.parametrize("name", [None, "joined", "transposed", "tiled"])
def test_tokens_are_those_of_the_plain_layout(name: str | None, monkeypatch) -> None:
    """Greedy, fp32, `tiny`, batches of 1, 5 and 20; logits within the rounding of another order of summation."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    prompts = [p.ids for p in encode_prompts(tokenizer, fresh_problems(20, 0))]
    layout = choose_layout(model) if name is None else name
    for count in (1, 5, 20):
        found = []
        for pin in ("plain", layout):
            monkeypatch.setenv("QFTLAB_LAYOUT", pin)
            found.append([c.token_ids for c in generate(model, tokenizer, prompts[:count], max_new_tokens=40)])
        assert found[0] == found[1]
        ids = [list(range(5 + i, 25 + i)) for i in range(count)]
        logits = [d.prefill(ids, d.new_cache(count, 20)) for d in (Decoder(model), Decoder(model, layout=layout))]
        # Four layers of four products and the head, one after the other: each rounds by a unit of the largest number.
        unit = torch.finfo(torch.float32).eps * logits[0].abs().max()
        assert (logits[0] - logits[1]).abs().max() < 17 * unit


# Where sampling feeds training


def reward(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    return (sum(ids) % 7) / 7


def run(folder: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
    """RLOO from the same random weights to so many steps of 6."""
    model, tokenizer = random_model(), load_tokenizer("tiny")
    config = TrainConfig(
        lr=3e-3, max_steps=6, batch_size=3, save_every=2, warmup_ratio=0.0, schedule="constant", keep=9
    )
    stop = {}
    if steps < 6:  # as Ctrl-C would: the run is saved and ends

        def stop_at(record: dict) -> None:
            if record["step"] == steps:
                raise KeyboardInterrupt

        stop = {"on_log": stop_at}
    fit_policy(model, tokenizer, fresh_problems(18, 0), reward, config,
               PolicyConfig(num_generations=4, max_new_tokens=24), checkpoints=folder, resume=resume,
               **stop)  # fmt: skip
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def recorded(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["identity"]["layout"] for path in folder.glob("step-*/state.json")}


def test_a_resumed_run_goes_on_in_its_own_layout(tmp_path, monkeypatch) -> None:
    """Begun where tiled is the choice, resumed where plain is pinned: the weights of the run that nobody stopped.

    What layouts differ by is made large here, so that another one is seen in 18 prompts.
    """
    product = Folded._product
    monkeypatch.setattr(Folded, "_product", lambda self, name, x: 1.01 * product(self, name, x))
    monkeypatch.setenv("QFTLAB_LAYOUT", "tiled")
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "stopped", 4)
    monkeypatch.setenv("QFTLAB_LAYOUT", "plain")
    resumed, other = run(tmp_path / "stopped", 6, resume=True), run(tmp_path / "other", 6)
    assert recorded(tmp_path / "stopped") == {"tiled"} and recorded(tmp_path / "other") == {"plain"}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], other[name]) for name in whole), "the layout is seen in the weights"
