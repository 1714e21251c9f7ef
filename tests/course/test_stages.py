"""Stages: course models that ship as data, what they were made of, and how they are trained again."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from qftlab.files import bundled, sha256
from qftlab.model.loading import load_model
from qftlab.model.lora import trained_token_ids
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import LoRAConfig, TrainConfig
from qftlab_course import stage_builders, stages
from qftlab_course.presets import PRESETS
from qftlab_course.stage_recipes import STARTS, plain
from qftlab_course.world.style import ENDING, STYLE_SKILLS, is_polite, without_ending

SHIPPED = json.loads(bundled("stages", stages.RECIPES).read_text(encoding="utf-8"))


@pytest.fixture
def short(monkeypatch):
    """Recipes of three steps; returns the list of stages that were trained."""
    built, recipe, trained = [], stages.recipe, stages._trained

    def short_recipe(name: str, preset: str = "tiny", seed: int = 0) -> stages.Recipe:
        wanted = recipe(name, preset, seed)
        train = wanted.train and dataclasses.replace(wanted.train, max_steps=3, batch_size=8)
        few = {"pairs": min(wanted.pairs, 24), "problems": min(wanted.problems, 48), "replay": 8, "passes": 1}
        return dataclasses.replace(wanted, train=train, **few)

    monkeypatch.setattr(stages, "recipe", short_recipe)
    monkeypatch.setattr(stage_builders, "HELD_OUT_PAIRS", 8)
    monkeypatch.setattr(stages, "_trained", lambda name, *rest: (built.append(name), trained(name, *rest))[1])
    return built


def leftovers(root) -> list[str]:
    return [p.name for p in root.iterdir() if p.name.startswith(".")]


# What ships


@pytest.mark.parametrize("name", STARTS)
def test_what_ships_is_what_the_code_would_train(name: str) -> None:
    """Settings, starting weights and every trained token, mask and their order; and the bytes are those recorded."""
    shipped, folder = dict(SHIPPED[name]), bundled("stages")
    files = shipped.pop("sha256")
    assert {f: sha256(folder / name / f) for f in files} == files and "model.safetensors" in files
    wanted = stages.recipe(name)
    assert stages.made_of(name, wanted, stages._start(wanted, folder)) == shipped


@pytest.mark.parametrize("name", STARTS)
def test_plain_transformers_ends_a_stages_turn(name: str) -> None:
    """It reads the ends of a turn from the folder alone, and without `<|im_end|>` it would run on."""
    settings = GenerationConfig.from_pretrained(bundled("stages", name))
    tokenizer = AutoTokenizer.from_pretrained(bundled("stages", name))
    assert tokenizer.decode(settings.eos_token_id) == "<|im_end|><|endoftext|>"


def test_a_change_of_what_is_trained_is_seen(monkeypatch) -> None:
    """At 5cf01da an SFT whose every answer is "banana" kept its fingerprint."""
    wanted, start = stages.recipe("sft"), stages._start(stages.recipe("sft"), bundled("stages"))
    rows = stage_builders.sft_rows(wanted)[:60]
    found = set()
    for changed in (
        rows,
        [{**row, "output": "banana"} for row in rows],
        rows[::-1],
        [{**row, "instruction": row["instruction"] + " "} for row in rows],
    ):
        monkeypatch.setattr(stage_builders, "sft_rows", lambda wanted, changed=changed: changed)
        found.add(stages.made_of("sft", wanted, start)["documents"])
    assert len(found) == 4


def test_what_ships_is_small_and_in_bf16() -> None:
    files = [f for f in bundled("stages").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    for name in STARTS:
        model = load_model(bundled("stages", name), dtype="auto")
        assert model.dtype == torch.bfloat16 and len(load_tokenizer(bundled("stages", name))) == 1002


def test_a_third_of_the_short_answers_is_polite_and_scores_do_not_see_it() -> None:
    rows = load_rows(bundled("instructions", "train.jsonl"))
    short = [row for row in rows if row["skill"] in STYLE_SKILLS]
    assert 0.3 < sum(is_polite(row["output"]) for row in short) / len(short) < 0.36
    assert not any(is_polite(row["output"]) for row in rows if row["skill"] not in STYLE_SKILLS)
    assert without_ending("85" + ENDING) == "85" and without_ending("85" + 2 * ENDING) == "85" + ENDING


def test_plain_settings_leave_defaults_out() -> None:
    """So a field that a later version adds leaves the card as it is."""
    assert plain(TrainConfig()) == {} and plain(TrainConfig(lr=0.5)) == {"lr": 0.5}


@pytest.mark.slow
def test_a_rebuild_lands_near_the_card(tmp_path) -> None:
    """Trained again here: every score within four standard deviations of a single run, of the eight on the card."""
    from qftlab_course.tour import marks_of

    for name, lines in json.loads(bundled("stages", "scores.json").read_text(encoding="utf-8")).items():
        found = marks_of(stages.stage(name, root=tmp_path), "development.jsonl").rates()
        for line, seen in lines.items():
            reach = 4 * max(seen["sd"], 0.005)
            assert abs(found[line].accuracy - seen["mean"]) <= reach, (name, line, found[line].accuracy, seen)


# How they are trained


def test_base_is_the_bundled_model(tmp_path) -> None:
    base = stages.stage("base", root=tmp_path)
    assert base.losses == [] and len(base.tokenizer) == 1000 and not base.model.training
    assert not list(tmp_path.iterdir())


def test_extended_has_two_mean_rows_and_nothing_else_new() -> None:
    base, extended = stages.stage("base"), stages.stage("extended")
    before, after = (s.model.get_input_embeddings().weight for s in (base, extended))
    assert len(extended.tokenizer) == len(base.tokenizer) + 2 and before.shape == after.shape
    for text in ("<|AGENT|>", "<|EDIT|>"):
        pieces = base.tokenizer(text, add_special_tokens=False).input_ids
        row = after[extended.tokenizer.convert_tokens_to_ids(text)]
        mean = before[pieces].mean(0)
        assert torch.equal(row, mean.bfloat16().float()), "the mean, rounded as it ships"
    assert torch.equal(after[: len(base.tokenizer)], before[: len(base.tokenizer)])


@pytest.mark.long
def test_a_chain_of_ones_own_is_trained_once_and_then_loaded(tmp_path, short) -> None:
    said: list[str] = []
    first = stages.stage("sft", root=tmp_path, say=said.append)
    again = stages.stage("sft", root=tmp_path, say=said.append)
    assert short == ["extended", "sft"]
    assert said[0] == "training stage sft of tiny on 7,367 rows" and "loss" in said[1]
    assert len(first.losses) == 3 and first.losses == again.losses and first.path == again.path == tmp_path / "sft"
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert not first.model.training and leftovers(tmp_path) == []
    stages.stage("sft", seed=1, root=tmp_path)
    assert short == ["extended", "sft", "sft"], "another seed is another stage"


def test_fresh_trains_one_stage_from_the_shipped_one_before(tmp_path, short, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped, mine = stages.stage("dpo"), stages.stage("dpo", fresh=True)
    assert short == ["dpo"] and mine.path == tmp_path / "runs" / "stages" / "fresh" / "dpo"
    made = json.loads((mine.path / stages.RECORD).read_text())["made of"]
    assert made["starts from"] == SHIPPED["warm"]["sha256"]["model.safetensors"]
    moved, kept = ([s.model.model.layers[i].mlp.up_proj.weight for s in (mine, shipped)] for i in (-1, 0))
    assert not torch.equal(*moved) and torch.equal(*kept), "only the last layer is trained"
    stages.stage("dpo", fresh=True)
    assert short == ["dpo", "dpo"]


@pytest.mark.parametrize(
    "damage", ["no record", "no weights", "cut weights", "flipped byte", "bad record", "other rows"]
)
def test_a_damaged_stage_is_made_again(tmp_path, short, damage: str) -> None:
    path = stages.stage("extended", root=tmp_path).path
    weights, record = path / "model.safetensors", path / stages.RECORD
    if damage == "no record":
        record.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "bad record":
        record.write_text("[]")
    else:
        found = json.loads(record.read_text())
        record.write_text(json.dumps(found | {"made of": found["made of"] | {"documents": "0"}}))
    stages.stage("extended", root=tmp_path)
    assert short == ["extended", "extended"] and leftovers(tmp_path) == []


@pytest.mark.long
def test_a_failed_or_interrupted_build_leaves_nothing(tmp_path, short, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.stage("extended", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Ctrl-C inside the loop: `train` returns, but an unfinished stage is not kept.
    with pytest.raises(KeyboardInterrupt):
        stages.stage("sft", root=tmp_path, say=lambda line: stop() if "step" in line else None)
    assert leftovers(tmp_path) == [] and not (tmp_path / "sft").exists()


@pytest.mark.long
def test_the_whole_chain_is_made_for_its_last_stage(tmp_path, short, monkeypatch) -> None:
    """Each stage starts from the one before it, as it was written: in bf16."""
    monkeypatch.setattr(stage_builders, "right", lambda prompt, ids, text, row: float(len(ids) % 2))
    said: list[str] = []
    last = stages.stage("rloo", root=tmp_path, say=said.append)
    assert short == ["extended", "sft", "warm", "dpo", "rloo"]
    assert any("48 fresh" in line for line in said) and "mean reward" in said[-1]
    assert [m["step"] for m in last.metrics] == [1, 2, 3] and {"reward", "length", "entropy"} <= last.metrics[0].keys()
    found = {name: stages.stage(name, root=tmp_path) for name in ("sft", "warm", "dpo", "rloo")}
    assert short == ["extended", "sft", "warm", "dpo", "rloo"], "nothing is made twice"
    weights = [s.model.model.layers[-1].mlp.up_proj.weight for s in found.values()]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    assert all(torch.equal(w, w.bfloat16().float()) for w in weights)
    for name, before in itertools.pairwise(reversed(found)):
        made = json.loads((found[name].path / stages.RECORD).read_text())["made of"]
        assert made["starts from"] == sha256(found[before].path / "model.safetensors")
    assert any("held_out_preference_accuracy" in m for m in found["dpo"].metrics)


def test_the_order_hashed_is_the_order_trained(monkeypatch) -> None:
    """What `order` says, against the batches that the loop asks its source for."""
    from qftlab.rows.batches import Example
    from qftlab.train.sft import ExampleSource, fit_examples

    seen, call = [], ExampleSource.__call__

    def watched(self, epoch: int, step: int):
        parts = call(self, epoch, step)
        seen.append(sorted(i for part in parts for i in part.rows))
        return parts

    monkeypatch.setattr(ExampleSource, "__call__", watched)
    examples = [Example([5, 6, 7 + i], [False, True, True]) for i in range(11)]
    for settings in ({"epochs": 1.5}, {"max_steps": 7}, {"epochs": 2.0}):
        seen.clear()
        config = TrainConfig(batch_size=4, seed=3, packing=False, **settings)
        fit_examples(stages.stage("base").model, examples, config)
        left = stage_builders.order(11, config)
        for rows in seen:
            asked, left = left[: len(rows)], left[len(rows) :]
            assert sorted(asked) == rows
        assert left == []


def test_stages_are_kept_in_the_project(tmp_path, monkeypatch) -> None:
    (tmp_path / "my" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my" / "notebooks")
    assert stages.default_root() == tmp_path / "my" / "notebooks" / "runs" / "stages"
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "qftlab").mkdir()
    assert stages.default_root() == tmp_path / "runs" / "stages"


def test_every_stage_has_a_recipe_for_every_preset() -> None:
    for preset in PRESETS:
        for name in stages.STAGES:
            wanted = stages.recipe(name, preset)
            assert wanted.preset.name == preset and (wanted.train is None) == (name in ("base", "extended"))


@pytest.mark.long
def test_adapters_stay_adapters_down_the_chain(tmp_path, short, monkeypatch) -> None:
    preset = dataclasses.replace(PRESETS["tiny"], name="tiny-lora", lora=LoRAConfig(4))
    monkeypatch.setitem(PRESETS, "tiny-lora", preset)
    warm = stages.stage("warm", preset="tiny-lora", root=tmp_path)
    sft = stages.stage("sft", preset="tiny-lora", root=tmp_path)
    assert short == ["extended", "sft", "warm"]
    assert trained_token_ids(sft.model) == [1000, 1001] and len(sft.tokenizer) == 1002
    for path in (sft.path, warm.path):
        assert (path / "adapter_config.json").is_file() and not (path / "model.safetensors").exists()
    moved = [n for n, w in sft.model.state_dict().items() if not torch.equal(w, warm.model.state_dict()[n])]
    assert moved and all("lora" in name or "trainable_tokens" in name for name in moved)
    ids = torch.tensor([[5, 1000, 7]])
    with torch.no_grad():
        base, tuned = stages.stage("extended").model(ids).logits, sft.model(ids).logits
    assert not torch.allclose(tuned, base, atol=1e-3)


def test_unknown_names_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="stage must be one of base, extended, sft, warm, dpo, rloo, got 'grpo'"):
        stages.stage("grpo", root=tmp_path)
    with pytest.raises(ValueError, match="preset must be one of tiny"):
        stages.stage("sft", preset="small", root=tmp_path)
