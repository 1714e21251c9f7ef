"""Stages: trained once, loaded afterwards, rebuilt when anything that decides them has changed or a byte is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from qftlab.data.sources import load
from qftlab.model.config import LoRAConfig
from qftlab.model.loading import PRESETS, load_model
from qftlab.model.lora import trained_token_ids
from qftlab.teach import stage_builders, stages
from qftlab.text.tokenizer import load_tokenizer


@pytest.fixture
def short(monkeypatch):
    """The recipe of SFT with three steps; returns the list of stages that were built."""
    built, recipe = [], stages.recipe

    def short_recipe(name: str, preset: str = "tiny") -> stages.Recipe:
        wanted = recipe(name, preset)
        train = wanted.train and dataclasses.replace(wanted.train, max_steps=3, batch_size=8)
        return dataclasses.replace(wanted, train=train, problems=min(wanted.problems, 48), replay=8, passes=1)

    def counted(name: str):
        build = stages.BUILDERS[name]
        return lambda wanted, start, say: (built.append(name), build(wanted, start, say))[1]

    monkeypatch.setattr(stages, "recipe", short_recipe)
    monkeypatch.setattr(stages, "BUILDERS", {name: counted(name) for name in stages.BUILDERS})
    return built


def leftovers(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.name.startswith(".") and p.name != stages.LOCKS]


def test_base_is_the_bundled_model(tmp_path) -> None:
    base = stages.stage("base", root=tmp_path)
    assert base.losses == [] and len(base.tokenizer) == 1000 and not base.model.training
    assert not list(tmp_path.iterdir())


def test_extended_has_two_mean_rows_and_nothing_else_new(tmp_path) -> None:
    base, extended = stages.stage("base", root=tmp_path), stages.stage("extended", root=tmp_path)
    before, after = (s.model.get_input_embeddings().weight for s in (base, extended))
    assert len(extended.tokenizer) == len(base.tokenizer) + 2 and before.shape == after.shape
    for text in ("<|AGENT|>", "<|EDIT|>"):
        pieces = base.tokenizer(text, add_special_tokens=False).input_ids
        row = after[extended.tokenizer.convert_tokens_to_ids(text)]
        torch.testing.assert_close(row, before[pieces].mean(0), atol=1e-6, rtol=0)
    assert torch.equal(after[: len(base.tokenizer)], before[: len(base.tokenizer)])


def test_sft_is_trained_once_and_then_loaded(tmp_path, short) -> None:
    said: list[str] = []
    first = stages.stage("sft", root=tmp_path, say=said.append)
    again = stages.stage("sft", root=tmp_path, say=said.append)
    assert short == ["extended", "sft"]
    assert said[0].startswith("training stage sft of tiny on ") and "loss" in said[1]
    assert len(first.losses) == 3 and first.losses == again.losses and first.path == again.path
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert not first.model.training and leftovers(tmp_path) == []
    # The folder is a model like any other.
    assert torch.equal(load_model(first.path).lm_head.weight, first.model.lm_head.weight)
    assert len(load_tokenizer(first.path)) == 1002


@pytest.mark.parametrize("damage", ["no record", "no weights", "cut weights", "flipped byte", "bad record", "empty"])
def test_a_damaged_stage_is_made_again(tmp_path, short, damage: str) -> None:
    path = stages.stage("extended", root=tmp_path).path
    weights = path / "model.safetensors"
    if damage == "no record":
        (path / stages.RECORD).unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "bad record":
        (path / stages.RECORD).write_text("[]")
    else:
        shutil.rmtree(path)
        path.mkdir()
    assert not stages.is_whole(path)
    stages.stage("extended", root=tmp_path)
    assert short == ["extended", "extended"] and stages.is_whole(path) and leftovers(tmp_path) == []


def test_a_failed_or_interrupted_build_leaves_nothing(tmp_path, short, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.stage("extended", root=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] in ([stages.LOCKS], [])
    # Ctrl-C inside the loop: `train` returns, but an unfinished stage is not kept.
    with pytest.raises(KeyboardInterrupt):
        stages.stage("sft", root=tmp_path, say=lambda line: stop() if "step" in line else None)
    assert leftovers(tmp_path) == [] and not list(tmp_path.glob("sft-*"))


def test_two_processes_may_build_the_same_stage(tmp_path, monkeypatch) -> None:
    """The other one finishes while we build: its stage stays, ours is dropped."""
    build = stages.BUILDERS["extended"]
    path = stages.stage("extended", root=tmp_path / "other").path
    target = tmp_path / "root" / path.name

    def late(wanted, start, say):
        built = build(wanted, start, say)
        shutil.copytree(path, target)
        return built

    monkeypatch.setitem(stages.BUILDERS, "extended", late)
    stage = stages.stage("extended", root=tmp_path / "root")
    assert stage.path == target and stages.is_whole(target) and leftovers(tmp_path / "root") == []


def test_the_fingerprint_follows_recipe_code_and_data(tmp_path, monkeypatch) -> None:
    wanted = stages.recipe("sft")
    digest = stages.fingerprint("sft", wanted)
    assert digest == stages.fingerprint("sft", stages.recipe("sft"))
    changed = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, lr=0.5))
    others = [stages.fingerprint("extended", stages.recipe("extended")), stages.fingerprint("sft", changed)]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "CODE", (*stages.CODE, "core/rewards.py"))
        others.append(stages.fingerprint("sft", wanted))
    data = tmp_path / "data"
    shutil.copytree(stages.bundled(), data)
    monkeypatch.setattr(stages, "bundled", data.joinpath)
    assert stages.fingerprint("sft", wanted) == digest
    file = data / wanted.preset.data[0]
    lines = file.read_text(encoding="utf-8")
    file.write_bytes(lines.replace("\n", "\r\n").encode())
    assert stages.fingerprint("sft", wanted) == digest, "a checkout with Windows line ends has the same stages"
    file.write_text(lines + json.dumps({"instruction": "a", "input": "", "output": "b"}), encoding="utf-8")
    others.append(stages.fingerprint("sft", wanted))
    assert len({digest, *others}) == 5


def test_every_file_of_code_is_there() -> None:
    package = Path(stages.__file__).resolve().parent.parent
    every = [*stages.CODE, *(part for parts in stages.MORE_CODE.values() for part in parts)]
    assert [part for part in every if not (package / part).is_file()] == []


def test_stages_are_kept_in_the_project(tmp_path, monkeypatch) -> None:
    (tmp_path / "my" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my" / "notebooks")
    assert stages.default_root() == tmp_path / "my" / "notebooks" / "runs" / "stages"
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "qftlab").mkdir()
    assert stages.default_root() == tmp_path / "runs" / "stages"


def test_the_whole_chain_is_made_for_its_last_stage(tmp_path, short, monkeypatch) -> None:
    """Each stage starts from the one before it; the pairs of dpo can be read back as rows."""
    monkeypatch.setattr(stage_builders, "right", lambda prompt, ids, text, row: float(len(ids) % 2))
    said: list[str] = []
    last = stages.stage("rloo", root=tmp_path, say=said.append)
    assert short == ["extended", "sft", "warm", "dpo", "rloo"]
    assert any("48 fresh" in line for line in said) and "mean reward" in said[-1]
    assert [m["step"] for m in last.metrics] == [1, 2, 3] and {"reward", "length", "entropy"} <= last.metrics[0].keys()
    found = {name: stages.stage(name, root=tmp_path) for name in ("sft", "warm", "dpo", "rloo")}
    assert short == ["extended", "sft", "warm", "dpo", "rloo"], "nothing is made twice"
    weights = [s.model.model.layers[0].mlp.up_proj.weight for s in found.values()]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    rows = load(str(found["dpo"].path / stage_builders.PAIR_ROWS), schema="preference").rows
    assert rows and all(row["score_chosen"] > row["score_rejected"] and row["numbers"] for row in rows)
    assert any("held_out_preference_accuracy" in m for m in found["dpo"].metrics)


def test_a_later_stage_follows_what_it_starts_from(monkeypatch) -> None:
    digests = {name: stages.fingerprint(name, stages.recipe(name)) for name in ("sft", "warm", "dpo", "rloo")}
    monkeypatch.setattr(stages, "MORE_CODE", {"dpo": (), "rloo": stages.MORE_CODE["rloo"]})
    changed = {name: stages.fingerprint(name, stages.recipe(name)) for name in digests}
    assert [name for name in digests if digests[name] != changed[name]] == ["dpo", "rloo"]


def test_every_stage_has_a_recipe_for_every_preset() -> None:
    for preset in PRESETS:
        for name in stages.STAGES:
            wanted = stages.recipe(name, preset)
            assert wanted.preset.name == preset and (wanted.train is None) == (name in ("base", "extended"))


def test_adapters_stay_adapters_down_the_chain(tmp_path, short, monkeypatch) -> None:
    preset = dataclasses.replace(PRESETS["tiny"], name="tiny-lora", lora=LoRAConfig(4))
    monkeypatch.setitem(PRESETS, "tiny-lora", preset)
    warm = stages.stage("warm", preset="tiny-lora", root=tmp_path)
    sft = stages.stage("sft", preset="tiny-lora", root=tmp_path)
    assert (warm.path / "adapter_config.json").is_file() and not (warm.path / "model.safetensors").exists()
    moved = [n for n, w in sft.model.state_dict().items() if not torch.equal(w, warm.model.state_dict()[n])]
    assert moved and all("lora" in name or "trainable_tokens" in name for name in moved)


def test_unknown_names_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="stage must be one of base, extended, sft, warm, dpo, rloo, got 'grpo'"):
        stages.stage("grpo", root=tmp_path)
    with pytest.raises(ValueError, match="preset must be one of tiny"):
        stages.stage("sft", preset="small", root=tmp_path)


def test_a_preset_with_adapters_keeps_adapters_and_rows_only(tmp_path, short, monkeypatch) -> None:
    preset = dataclasses.replace(PRESETS["tiny"], name="tiny-lora", lora=LoRAConfig(4))
    monkeypatch.setitem(PRESETS, "tiny-lora", preset)
    first = stages.stage("sft", preset="tiny-lora", root=tmp_path)
    again = stages.stage("sft", preset="tiny-lora", root=tmp_path)
    assert (
        short == ["extended", "sft"] and trained_token_ids(again.model) == [1000, 1001] and len(again.tokenizer) == 1002
    )
    assert (first.path / "adapter_config.json").is_file() and not (first.path / "model.safetensors").exists()
    ids = torch.tensor([[5, 1000, 7]])
    with torch.no_grad():
        base, tuned = stages.stage("extended", root=tmp_path).model(ids).logits, first.model(ids).logits
        assert torch.equal(tuned, again.model(ids).logits) and not torch.allclose(tuned, base, atol=1e-3)
    assert stages.fingerprint("sft", stages.recipe("sft")) not in first.path.name


def test_measured_numbers_are_kept_until_what_decides_them_changes(tmp_path) -> None:
    calls = []

    def run(rank: int) -> dict:
        calls.append(rank)
        return {"losses": [(0, 1.5)], "rank": rank}

    def run_anew(rank: int) -> dict:
        return run(rank)

    first = stages.measured("ranks", run, tmp_path, rank=2)
    assert stages.measured("ranks", run, tmp_path, rank=2) == first == {"losses": [[0, 1.5]], "rank": 2}
    assert calls == [2] and len(list(tmp_path.iterdir())) == 1
    stages.measured("ranks", run, tmp_path, rank=4)
    stages.measured("ranks", run_anew, tmp_path, rank=2)
    assert calls == [2, 4, 2] and len(list(tmp_path.iterdir())) == 3
    next(tmp_path.glob("ranks-*.json")).write_text("{cut")
    stages.measured("ranks", run, tmp_path, rank=2)
    stages.measured("ranks", run, tmp_path, rank=4)
    stages.measured("ranks", run_anew, tmp_path, rank=2)
    assert len(calls) == 4, "the damaged one is measured again, the others are not"
