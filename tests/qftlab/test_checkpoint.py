"""Checkpoints: what is written is whole or not there, what is damaged or foreign is refused, what is old goes."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import resource
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from random_models import random_model

from qftlab.rows.batches import Example
from qftlab.settings import TrainConfig
from qftlab.train import checkpoint
from qftlab.train.checkpoint import Checkpoints, flatten, training_identity
from qftlab.train.loop import TrainResult
from qftlab.train.optimizer import MasterWeights, NonFiniteLoss, bare_name, make_optimizer, named_trainable
from qftlab.train.sft import fit_examples
from qftlab.train.step import Step


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 16, (count,), generator=g).tolist()
    return [Example(torch.randint(0, 1024, (n,), generator=g).tolist(), [i > 1 for i in range(n)]) for n in lengths]


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-2, "batch_size": 4, "max_steps": 6, "save_every": 2, **changes})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stop_at(step: int):
    def on_log(record: dict) -> None:
        if record["step"] == step and "loss" in record:
            raise KeyboardInterrupt

    return on_log


def moved(steps: int = 2, seed: int = 0) -> tuple[dict, torch.optim.Optimizer]:
    """Two weights after a few steps of AdamW on random gradients."""
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(module, TrainConfig())
    for _ in range(steps):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return named_trainable(module), optimizer


RESULT = {"steps": 2, "held_out": []}


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_exactly(tmp_path) -> None:
    weights, optimizer = moved()
    path = Checkpoints(tmp_path / "c").save(weights, optimizer, {**RESULT, "losses": [0.1, 1 / 3]})
    assert sorted(p.name for p in path.iterdir()) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    others, fresh = moved(0, seed=1)
    result = Checkpoints(tmp_path / "c").load_(path, others, fresh)
    assert result == {**RESULT, "losses": [0.1, 1 / 3]}
    assert_same(dict(others), dict(weights))
    for name in weights:
        ours, theirs = optimizer.state[weights[name]], fresh.state[others[name]]
        assert_same(theirs, ours)
        assert ours["step"] == 2


def test_an_optimizer_that_has_not_stepped_has_no_state(tmp_path) -> None:
    weights, optimizer = moved(0)
    path = Checkpoints(tmp_path).save(weights, optimizer, RESULT)
    others, fresh = moved(0, seed=1)
    Checkpoints(tmp_path).load_(path, others, fresh)
    assert_same(dict(others), dict(weights))
    assert not fresh.state


def test_old_ones_go_after_the_new_one_and_the_best_stays(tmp_path) -> None:
    saved, (weights, optimizer) = Checkpoints(tmp_path, keep=2), moved()
    result = TrainResult()
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 1.0}.items():
        result.add_held_out(step, loss)
        saved.save(weights, optimizer, {**asdict(result), "steps": step})
    assert [p.name for p in saved.all()] == ["step-000002", "step-000004", "step-000005"]
    assert saved.best().name == "step-000002" and saved.last().name == "step-000005"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path) -> None:
    saved, (weights, optimizer) = Checkpoints(tmp_path), moved()
    (tmp_path / ".step-000009-1").mkdir()
    (tmp_path / ".step-000009-1" / "weights.safetensors").write_bytes(b"half")
    assert saved.last() is None and saved.best() is None
    saved.save(weights, optimizer, RESULT)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_named_with_the_way_out(tmp_path, name: str, damage: str) -> None:
    saved, (weights, optimizer) = Checkpoints(tmp_path), moved()
    saved.save(weights, optimizer, {"steps": 1, "held_out": []})
    path = saved.save(weights, optimizer, RESULT)
    content = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2 if name != "state.json" else 0
        flipped = bytes([content[middle] ^ 0xFF])
        (path / name).write_bytes(content[:middle] + flipped + content[middle + 1 :])
    others, fresh = moved(0, seed=1)
    before = {n: w.detach().clone() for n, w in others.items()}
    with pytest.raises(
        ValueError, match=rf"step-000002 must be a whole .*{name}.* delete it to go on from step-000001"
    ):
        saved.load_(path, others, fresh)
    assert_same(dict(others), before)
    assert saved.load_(saved.all()[0], others, fresh)["steps"] == 1


def test_another_configuration_and_other_data_are_refused_with_the_difference(tmp_path) -> None:
    weights, optimizer = moved()
    ours = training_identity(random_model(), config(), examples())
    path = Checkpoints(tmp_path, ours).save(weights, optimizer, RESULT)
    changed = training_identity(random_model(), config(lr=3e-3, weight_decay=0.5), examples(11))
    with pytest.raises(ValueError) as error:
        Checkpoints(tmp_path, changed).load_(path, weights, optimizer)
    text = str(error.value)
    assert "train.lr: 0.01 in the checkpoint, 0.003 now" in text
    assert "train.weight_decay: 0.01 in the checkpoint, 0.5 now" in text
    assert "documents: 12 (sha256 " in text and "11 (sha256 " in text and "schedule" not in text
    neutral = training_identity(
        random_model(), config(micro_batch_size=2, keep=9, log_every=1, gradient_checkpointing=True), examples()
    )
    assert Checkpoints(tmp_path, neutral).load_(path, weights, optimizer)["steps"] == 2
    with pytest.raises(ValueError, match=r"weight: \[2, 3\] in the checkpoint, \[5, 3\] now"):
        other = torch.nn.Linear(3, 5)
        Checkpoints(tmp_path, ours).load_(path, named_trainable(other))
    assert flatten({"a": {"b": (1, 2)}}) == {"a.b": [1, 2]}


def test_the_mask_is_part_of_the_data() -> None:
    row = examples(1)[0]
    other = Example(row.input_ids, [not kept for kept in row.loss_mask])
    assert checkpoint.fingerprint([row]) != checkpoint.fingerprint([other])
    assert checkpoint.fingerprint(examples()) != checkpoint.fingerprint(examples()[::-1])


def test_every_value_of_a_small_frozen_tensor_counts() -> None:
    model = torch.nn.Linear(3, 1).requires_grad_(False)
    seen = [checkpoint.frozen_fingerprint(model)]
    for place in range(3):
        model.weight[0, place] += 1
        seen.append(checkpoint.frozen_fingerprint(model))
    assert len(set(seen)) == 4


# --- disks that refuse ------------------------------------------------------------------------------------------------


def in_a_process(job, *arguments) -> str:
    """What a function says that may put limits on its process, which are not to stay."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(job(*arguments)))
    process.start()
    assert ours.poll(60), "the process said nothing"
    said = ours.recv()
    process.join()
    return said


def try_to_save(folder: Path, step: int = 3) -> str:
    weights, optimizer = moved()
    saved = Checkpoints(folder)
    try:
        saved.prepare()
        saved.save(weights, optimizer, {"steps": step, "held_out": []})
    except OSError as error:
        return str(error)
    finally:
        saved.release()
    return "saved"


def assert_intact(folder: Path) -> None:
    """Step 2 is whole, and nothing else is there."""
    weights, optimizer = moved()
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == ["step-000002"]
    assert Checkpoints(folder).load_(Checkpoints(folder).last(), weights, optimizer)["steps"] == 2


def test_an_old_one_that_cannot_be_removed_is_a_clear_error(tmp_path, monkeypatch) -> None:
    weights, optimizer = moved()
    saved = Checkpoints(tmp_path / "c", keep=1)
    saved.save(weights, optimizer, {"steps": 1, "held_out": []})

    def refuse(*paths) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "rename", refuse)
    with pytest.raises(OSError, match="c must be written, got: Permission denied; free some space"):
        saved.save(weights, optimizer, {"steps": 2, "held_out": []})
    assert saved.last().name == "step-000002"


def test_a_file_that_may_not_grow_is_a_clear_error(tmp_path) -> None:
    """Writing stops in the middle of a file, as on a full disk; this needs no rights to mount one."""
    assert try_to_save(tmp_path / "c", 2) == "saved"

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        return try_to_save(tmp_path / "c")

    said = in_a_process(limited)
    assert "step-000003 must be written, got: " in said and "File too large" in said and "is intact" in said
    assert_intact(tmp_path / "c")


def test_a_full_disk_is_a_clear_error(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here; the test above stands for it")
    try:
        assert try_to_save(disk / "c", 2) == "saved"
        (disk / "filler").write_bytes(b"x" * (64 * 1024 - 6 * 4096))
        with pytest.raises(OSError) as full, (disk / "more").open("wb") as more:
            more.write(b"x" * 4 * 4096)
        assert full.value.errno == errno.ENOSPC
        (disk / "more").unlink()
        (disk / "more").write_bytes(b"x" * 4096)
        said = try_to_save(disk / "c")
        assert "step-000003 must be written, got: " in said and "No space left" in said and "free some space" in said
        assert_intact(disk / "c")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_fails_before_the_first_step() -> None:
    """Root may write everywhere, so root becomes nobody for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert try_to_save(folder / "c", 2) == "saved"
        for path in (folder, folder / "c"):
            path.chmod(0o555)

        def as_nobody() -> str:
            if not os.geteuid():
                os.setuid(65534)
            return try_to_save(folder / "c")

        said = in_a_process(as_nobody)
        assert f"{folder / 'c'} must be written, got: " in said and "Permission denied" in said
        for path in (folder, folder / "c"):
            path.chmod(0o755)
        assert_intact(folder / "c")


def test_a_failing_save_ends_the_run_and_leaves_the_last_good_one(tmp_path, monkeypatch) -> None:
    real, calls = checkpoint.save_file, []

    def save_file(tensors, path) -> None:
        calls.append(path)
        if len(calls) == 4:  # the optimizer's state of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="step-000004 must be written, got: .*No space left"):
        fit_examples(random_model(), examples(), config(), checkpoints=tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").glob("*step*")] + [p.name for p in (tmp_path / "c").glob(".step*")] == [
        "step-000002"
    ]
    monkeypatch.setattr(checkpoint, "save_file", real)
    resumed, whole = random_model(), random_model()
    fit_examples(resumed, examples(), config(), checkpoints=tmp_path / "c", resume=True)
    fit_examples(whole, examples(), config())
    assert_same(weights_of(resumed), weights_of(whole))


# --- runs that stop and go on -----------------------------------------------------------------------------------------


def adapted(kind: str):
    """A model with dropout, so that randomness must come back as well."""
    model = random_model(attention_dropout=0.2)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], trainable_token_indices=[3, 4])
        return get_peft_model(model, lora)
    if kind == "part":
        for name, p in model.named_parameters():
            p.requires_grad_("layers.1" in name)
    if kind == "bf16":
        return model.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("kind", ["full", "lora", "part", "bf16"])
@pytest.mark.parametrize("stop", [3, 4])
def test_ctrl_c_saves_and_a_resumed_run_ends_bit_identical(tmp_path, kind: str, stop: int) -> None:
    settings = config(precision="master" if kind == "bf16" else "weights", micro_batch_size=2, eval_every=3)
    whole, part, resumed = adapted(kind), adapted(kind), adapted(kind)
    rows, held = examples(), examples(4, seed=7)
    expected = fit_examples(whole, rows, settings, held_out=held)
    first = fit_examples(part, rows, settings, held_out=held, checkpoints=tmp_path / "c", on_log=stop_at(stop))
    assert first.interrupted and first.steps == stop
    assert Checkpoints(tmp_path / "c").last().name == f"step-{stop:06}"
    records: list[dict] = []
    second = fit_examples(resumed, rows, settings, held_out=held, checkpoints=tmp_path / "c", resume=True,
                          on_log=records.append)  # fmt: skip
    assert [r["step"] for r in records if "loss" in r] == list(range(stop + 1, 7))
    assert_same(weights_of(resumed), weights_of(whole))
    assert second.losses == expected.losses and second.held_out == expected.held_out
    assert second.tokens == expected.tokens and not second.interrupted
    saved = Checkpoints(tmp_path / "c").last() / "weights.safetensors"
    trained = {bare_name(n): p for n, p in Step(resumed).named_parameters() if p.requires_grad}
    with checkpoint.safe_open(saved, "pt") as file:
        assert set(file.keys()) == set(trained)


def test_a_finished_run_resumes_to_itself(tmp_path) -> None:
    whole, again = random_model(), random_model()
    expected = fit_examples(whole, examples(), config(), checkpoints=tmp_path / "c")
    result = fit_examples(again, examples(), config(), checkpoints=tmp_path / "c", resume=True)
    assert_same(weights_of(again), weights_of(whole))
    assert result.losses == expected.losses


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path) -> None:
    fit_examples(random_model(), examples(), config(max_steps=2), checkpoints=tmp_path / "c")
    with pytest.raises(ValueError, match="must hold no checkpoint, got step-000002: resume, or take another folder"):
        fit_examples(random_model(), examples(), config(max_steps=2), checkpoints=tmp_path / "c")


def test_another_base_under_the_same_adapters_is_refused(tmp_path) -> None:
    """The base is frozen and not in the checkpoint, so nothing but its fingerprint could tell."""
    fit_examples(adapted("lora"), examples(), config(max_steps=2), checkpoints=tmp_path / "c")
    other = adapted("lora")
    with torch.no_grad():
        other.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="frozen weights: .* in the checkpoint, .* now"):
        fit_examples(other, examples(), config(max_steps=2), checkpoints=tmp_path / "c", resume=True)


def test_save_every_0_saves_at_ctrl_c_only(tmp_path) -> None:
    fit_examples(random_model(), examples(), config(save_every=0), checkpoints=tmp_path / "c")
    assert Checkpoints(tmp_path / "c").all() == []
    fit_examples(random_model(), examples(), config(save_every=0), checkpoints=tmp_path / "c", on_log=stop_at(3))
    assert [p.name for p in Checkpoints(tmp_path / "c").all()] == ["step-000003"]


def test_a_non_finite_loss_leaves_the_last_good_checkpoint(tmp_path) -> None:
    model = random_model()

    def spoil(record: dict) -> None:
        if record["step"] == 3:
            model.model.norm.weight.data[0] = math.nan

    with pytest.raises(NonFiniteLoss, match="loss must be finite, got nan at step 4 in rows"):
        fit_examples(model, examples(), config(), checkpoints=tmp_path / "c", on_log=spoil)
    resumed, whole = random_model(), random_model()
    fit_examples(resumed, examples(), config(), checkpoints=tmp_path / "c", resume=True)
    fit_examples(whole, examples(), config())
    assert_same(weights_of(resumed), weights_of(whole))


def test_patience_stops_and_gives_the_best_weights_back(tmp_path) -> None:
    """Held-out losses by hand: best at step 2, then two without a new lowest one."""
    from qftlab.train.loop import train
    from qftlab.train.sft import ExampleSource

    values = iter([3.0, 2.0, 2.5, 2.0, 1.0, 0.5])
    model, seen = random_model(), {}
    settings = config(max_steps=20, eval_every=2, patience=2, save_every=50)
    result = train(Step(model), ExampleSource(examples(), settings), settings, held_out=lambda: next(values),
                   on_log=lambda r: seen.setdefault(r["step"], weights_of(model)),
                   checkpoints=Checkpoints(tmp_path / "c"))  # fmt: skip
    assert result.stopped_early and result.steps == 6
    assert result.held_out == [(0, 3.0), (2, 2.0), (4, 2.5), (6, 2.0)]
    assert_same(weights_of(model), seen[2])
    assert json.loads((tmp_path / "c" / "step-000002" / "state.json").read_text())["result"]["steps"] == 2


def test_master_weights_keep_updates_that_bf16_rounds_away() -> None:
    """1 + 2^-10 is 1 in bf16: ten such steps add up in the copy and show in the end."""
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    master = MasterWeights(module)
    for _ in range(10):
        (module(torch.ones(1, 1, dtype=torch.bfloat16)).sum() * 2**-10).backward()
        assert module.weight.grad is None
        with torch.no_grad():
            master.named["weight"] += master.named["weight"].grad
        master.named["weight"].grad = None
        master.write_()
    assert master.named["weight"].item() == 1 + 10 * 2**-10
    assert module.weight.item() == 1.0078125
    master.remove()
    module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad is not None
