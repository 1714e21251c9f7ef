"""Runs that are killed at any moment and resumed end as if nothing had happened: the same bytes.

The runs are processes of their own, forked from a server that has imported everything (an import takes seconds).
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from random_models import random_model

from qftlab import cli, files
from qftlab.files import bundled, sha256
from qftlab.model.loading import load_model, save_model
from qftlab.rows.batches import Example, pack
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train import checkpoint
from qftlab.train.checkpoint import Checkpoints
from qftlab.train.distributed import training_dtype
from qftlab.train.meter import causal_pairs, peak_flops, speed_line, speed_of, step_flops
from qftlab.train.optimizer import NonFiniteLoss, optimizer_step
from qftlab.train.run import Interrupted, RunFolder, find_run, resolve_model
from qftlab.train.sft import fit_examples, sft
from qftlab.train.step import Step

STEPS = 12


def little_run(folder: Path, output: str, resume: str | None = None, **changes) -> SFTConfig:
    train = TrainConfig(
        **{"lr": 1e-2, "max_steps": STEPS, "batch_size": 4, "eval_every": 4, "save_every": 1, **changes}
    )
    return SFTConfig(model=str(folder / "start"), data=str(folder / "train.jsonl"), held_out=str(folder / "held.jsonl"),
                     output=str(folder / output), device="cpu", resume=resume, train=train)  # fmt: skip


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A folder with a random model that has dropout, and rows."""
    folder = tmp_path_factory.mktemp("resume")
    save_model(random_model(attention_dropout=0.1), load_tokenizer("tiny"), folder / "start")
    rows = load_rows(bundled("instructions", "train.jsonl"))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:24])), encoding="utf-8")
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, rows[24:32])), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(little) -> Path:
    """The run that nobody disturbs."""
    torch.set_num_threads(1)
    return sft(little_run(little, "whole"))


def run_child(folder: str, output: str, ready, kill_at: int | None = None) -> None:
    """Begins or resumes a run; with `kill_at` it kills itself at that call of a function that touches the disk."""
    torch.set_num_threads(1)
    if kill_at is not None:
        kill_self_at(kill_at)
    begun = any((Path(folder) / output).glob("*/metrics.jsonl"))
    ready.send(True)
    sft(little_run(Path(folder), output, resume="last" if begun else None))
    ready.send(True)


def kill_self_at(number: int) -> None:
    """Counts writes, flushes, renames and removals of checkpoints; at one of them the process dies, half done."""
    left = [number]

    def dying(function, half):
        def call(*arguments, **options):
            left[0] -= any("/sft/" in str(argument) for argument in arguments)  # settings and models are not counted
            if left[0] < 0:
                half(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    checkpoint.save_file = dying(checkpoint.save_file, lambda tensors, path: Path(path).write_bytes(b"half"))
    files.flush = dying(files.flush, lambda path, **_: None)
    moves = {name: staticmethod(dying(getattr(os, name), lambda a, b: None)) for name in ("rename", "replace")}
    files.os = checkpoint.os = type("os", (), {**vars(os), **moves})
    tree = dying(shutil.rmtree, lambda path: next(Path(path).iterdir()).unlink())
    files.shutil = type("shutil", (), {"rmtree": staticmethod(tree)})


@pytest.fixture(scope="module")
def server():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume", "transformers.models.qwen2.modeling_qwen2", "matplotlib.figure"])
    here = Path(__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        # The server does not take over sys.path, and would silently import nothing.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [here, *here.parents[:2]])))
        process = context.Process(target=int)
        process.start()
        process.join()
    return context


def start(server, folder: Path, output: str, kill_at: int | None = None):
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=run_child, args=(str(folder), output, theirs, kill_at))
    process.start()
    theirs.close()
    assert ours.recv()
    return process, ours


def finish(server, folder: Path, output: str) -> Path:
    """Resumes until the end; returns the run's folder."""
    process, ours = start(server, folder, output)
    process.join(120)
    assert process.exitcode == 0
    return resolve(folder / output)


def resolve(output: Path) -> Path:
    (run,) = [p for p in output.iterdir() if (p / "metrics.jsonl").exists() and not p.is_symlink()]
    return run


def records(run: Path) -> list[dict]:
    timing = ("seconds", "tokens_per_second", "peak_gb")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def assert_as_if_undisturbed(run: Path, whole: Path) -> None:
    assert sha256(run / "model" / "model.safetensors") == sha256(whole / "model" / "model.safetensors")
    assert records(run) == records(whole)
    for folder in (run, whole):
        assert [p.name for p in (folder / "checkpoints" / "sft").glob(".step-*")] == []
    names = [p.name for p in Checkpoints(run / "checkpoints" / "sft").all()]
    assert names == [p.name for p in Checkpoints(whole / "checkpoints" / "sft").all()]
    for name in names:
        for part in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
            places = [folder / "checkpoints" / "sft" / name / part for folder in (run, whole)]
            assert sha256(places[0]) == sha256(places[1])


def kill_at_random_moments(server, little: Path, whole: Path, kills: int, seed: int) -> int:
    """Kills so many runs and resumes each; returns how many were inside a save."""
    chance, inside = random.Random(seed), 0
    clock = time.perf_counter()
    process, _ = start(server, little, f"timed-{seed}")
    process.join(120)
    longest = time.perf_counter() - clock
    for number in range(kills):
        output = f"killed-{seed}-{number}"
        process, _ = start(server, little, output)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        inside += any((little / output).glob("*/checkpoints/sft/.step-*"))
        assert_as_if_undisturbed(finish_any(server, little, output), whole)
    return inside


def finish_any(server, folder: Path, output: str) -> Path:
    """As `finish`, but a run that was killed before its folder was ready leaves that folder behind."""
    process, _ = start(server, folder, output)
    process.join(120)
    assert process.exitcode == 0
    done = [p for p in (folder / output).iterdir() if (p / "model").exists() and not p.is_symlink()]
    assert len(done) == 1
    return done[0]


@pytest.mark.long
def test_killed_at_three_random_moments(server, little, whole) -> None:
    kill_at_random_moments(server, little, whole, kills=3, seed=1)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(server, little, whole) -> None:
    inside = kill_at_random_moments(server, little, whole, kills=50, seed=2)
    assert inside >= 1, "none of fifty kills fell into a save: save more often"


# A save is two writes, four flushes, a rename, one more flush; from the third on also a rename and a removal.
@pytest.mark.parametrize("kill_at", [0, 1, 5, 6, 7, 23, 24, 25])
def test_killed_inside_a_save(server, little, whole, kill_at: int) -> None:
    output = f"inside-{kill_at}"
    process, _ = start(server, little, output, kill_at)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder = resolve(little / output) / "checkpoints" / "sft"
    for path in Checkpoints(folder).all():
        state = checkpoint.read_state(path)
        assert all(sha256(path / name) == digest for name, digest in state["sha256"].items())
    assert_as_if_undisturbed(finish(server, little, output), whole)


# --- Ctrl-C and run folders -------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_step_finishes_it(tmp_path) -> None:
    """The signal comes in the forward pass of step 3; without the delay weights could be half updated when saved."""
    model, calls = random_model(), []

    def interrupt(*_) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.model.layers[0].register_forward_hook(interrupt)
    config = TrainConfig(batch_size=4, max_steps=6)
    examples = [Example([i, 2, 3, 4], [False, True, True, True]) for i in range(10, 22)]
    result = fit_examples(model, examples, config, checkpoints=tmp_path / "c")
    assert result.interrupted and result.steps == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    handle.remove()
    resumed, undisturbed = random_model(), random_model()
    fit_examples(resumed, examples, config, checkpoints=tmp_path / "c", resume=True)
    fit_examples(undisturbed, examples, config)
    for ours, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def impatient(monkeypatch, moment: str, calls: list[int]) -> None:
    """Ctrl-C twice in step 3: in its forward pass, or when its update has just been made."""

    def stop() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    def stopping(step, *arguments, **options):
        calls.append(1)
        if len(calls) == 3 and moment == "forward":
            step.register_forward_hook(lambda *_: stop())
        report = optimizer_step(step, *arguments, **options)
        if len(calls) == 3:
            stop()
        return report

    monkeypatch.setattr("qftlab.train.loop.optimizer_step", stopping)


@pytest.mark.parametrize("moment", ["forward", "update"])
def test_a_second_ctrl_c_keeps_what_it_says_it_keeps(moment: str, tmp_path, monkeypatch, caplog) -> None:
    """Before the first checkpoint: two whole steps are saved, unless the weights of the third had begun to move."""
    config = TrainConfig(batch_size=4, max_steps=6)
    examples = [Example([i, 2, 3, 4], [False, True, True, True]) for i in range(10, 22)]
    impatient(monkeypatch, moment, [])
    result = fit_examples(random_model(), examples, config, checkpoints=tmp_path / "c")
    monkeypatch.undo()
    assert result.interrupted and result.steps == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    last = Checkpoints(tmp_path / "c").last()
    if moment == "update":
        assert last is None and "stopped while the weights moved: resume goes on from step 0" in caplog.text
        return
    assert last.name == "step-000002" and "after 2 of 6 steps; the weights so far are kept" in caplog.text
    resumed, undisturbed = random_model(), random_model()
    fit_examples(resumed, examples, config, checkpoints=tmp_path / "c", resume=True)
    fit_examples(undisturbed, examples, config)
    for ours, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ctrl_c_while_the_last_checkpoint_is_written_is_not_heard(tmp_path, monkeypatch) -> None:
    def stop_at_two(record: dict) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    save = Checkpoints.save

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    examples = [Example([i, 2, 3, 4], [False, True, True, True]) for i in range(10, 22)]
    config = TrainConfig(batch_size=4, max_steps=6)
    result = fit_examples(random_model(), examples, config, checkpoints=tmp_path / "c", on_log=stop_at_two)
    assert result.interrupted and Checkpoints(tmp_path / "c").last().name == "step-000002"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def signalled(monkeypatch, numbers: list[int], moment: str, step: int = 3) -> None:
    """Signals to this process in the given step: in its forward pass, its update, or the write of its checkpoint."""
    calls = []

    def stop() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    def stepping(module, *arguments, **options):
        calls.append(1)
        if len(calls) == step and moment == "forward":
            stop()
        report = optimizer_step(module, *arguments, **options)
        if len(calls) == step and moment == "update":
            stop()
        return report

    def saving(tensors, path) -> None:
        if len(calls) == step and moment == "write" and path.name == checkpoint.OPTIMIZER:
            stop()
        save_file(tensors, path)

    save_file = checkpoint.save_file
    monkeypatch.setattr("qftlab.train.loop.optimizer_step", stepping)
    monkeypatch.setattr(checkpoint, "save_file", saving)


def test_a_second_ctrl_c_while_a_checkpoint_is_written_loses_nothing(little, whole, monkeypatch) -> None:
    """Twice in the write after step 3: the write is finished, and the run goes on from it to the same bytes."""
    signalled(monkeypatch, [signal.SIGINT] * 2, "write")
    config = little_run(little, "twice")
    with pytest.raises(Interrupted, match="stopped after 3 steps"):
        sft(config)
    monkeypatch.undo()
    run = resolve(little / "twice")
    assert [p.name for p in Checkpoints(run / "checkpoints" / "sft").all()][-1] == "step-000003"
    assert not (little / "twice" / "latest").exists()
    assert_as_if_undisturbed(sft(replace(config, resume="last")), whole)


def test_sigterm_saves_as_ctrl_c_does_and_ends_with_143(little, whole, monkeypatch) -> None:
    """`save_every` is 100, so what is there was saved because of the signal."""
    signalled(monkeypatch, [signal.SIGTERM], "forward")
    config = little_run(little, "term", save_every=100)
    with pytest.raises(SystemExit) as ended:
        sft(config)
    monkeypatch.undo()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run = resolve(little / "term")
    assert Checkpoints(run / "checkpoints" / "sft").last().name == "step-000003"
    again = sft(replace(config, resume=str(run)))
    assert sha256(again / "model" / "model.safetensors") == sha256(whole / "model" / "model.safetensors")


def test_a_loss_that_is_no_number_saves_the_steps_before_it(tmp_path, monkeypatch) -> None:
    def spoilt(step, *arguments, **options):
        if options["number"] == 4:
            raise NonFiniteLoss("loss must be finite, got nan at step 4")
        return optimizer_step(step, *arguments, **options)

    monkeypatch.setattr("qftlab.train.loop.optimizer_step", spoilt)
    examples = [Example([i, 2, 3, 4], [False, True, True, True]) for i in range(10, 22)]
    config = TrainConfig(batch_size=4, max_steps=6, save_every=100)
    with pytest.raises(NonFiniteLoss):
        fit_examples(random_model(), examples, config, checkpoints=tmp_path / "c")
    assert Checkpoints(tmp_path / "c").last().name == "step-000003"


def test_two_processes_cannot_go_on_with_one_run(little, whole, server) -> None:
    """The second is told so at once and touches nothing; the first one's checkpoints are as they were."""
    places = whole / "checkpoints" / "sft"
    names = sorted(p.name for p in places.glob("step-*"))
    mine = Checkpoints(places)
    mine.prepare()
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=try_to_prepare, args=(str(places), theirs))
    process.start()
    said = ours.recv()
    process.join()
    mine.release()
    assert "must be written by one run, got another process that has it" in said
    assert sorted(p.name for p in places.glob("step-*")) == names
    Checkpoints(places).prepare()


def try_to_prepare(folder: str, pipe) -> None:
    time.sleep = lambda seconds: pipe.send("waited")
    try:
        Checkpoints(folder).prepare()
        pipe.send("nothing")
    except OSError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("change", ["steps", "losses", "folder"])
def test_a_state_that_was_changed_is_not_gone_on_with(change: str, tmp_path) -> None:
    examples = [Example([i, 2, 3, 4], [False, True, True, True]) for i in range(10, 22)]
    fit_examples(random_model(), examples, TrainConfig(batch_size=4, max_steps=3), checkpoints=tmp_path / "c")
    last = Checkpoints(tmp_path / "c").last()
    state = json.loads((last / "state.json").read_text())
    if change == "folder":
        last = last.rename(last.with_name("step-000009"))
    else:
        state["result"][change] = 2 if change == "steps" else [0.0]
        (last / "state.json").write_text(json.dumps(state))
    config = TrainConfig(batch_size=4, max_steps=3)
    with pytest.raises(ValueError, match="is not as it was written; delete it"):
        fit_examples(random_model(), examples, config, checkpoints=tmp_path / "c", resume=True)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", '{"config": {"mod', "config.json must be whole JSON, got: "),
        ("config.json", "[]", "config.json must hold the settings of the run"),
        ("metrics.jsonl", '{"step": 0}\n{"st}\n', "metrics.jsonl, line 2 must be a record with its step"),
        ("metrics.jsonl", '{"loss": 0}\n', "metrics.jsonl, line 1 must be a record with its step"),
    ],
)
def test_torn_files_of_a_run_are_named(file: str, text: str, said: str, little, whole, tmp_path, capsys) -> None:
    run = tmp_path / "runs" / "one"
    shutil.copytree(whole, run, symlinks=True)
    (run / file).write_text(text)
    assert cli.main(["sft", "--resume", str(run), "--output", str(tmp_path / "runs"), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err and str(run) in err


def test_last_is_the_newest_run_that_has_a_checkpoint(tmp_path) -> None:
    for number, name in enumerate(("older", "newer", "newest")):
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").touch()
        (run / "config.json").write_text("{}")
        os.utime(run / "config.json", (number, number))
    assert find_run("last", tmp_path).name == "newest", "none has one"
    (tmp_path / "newer" / "checkpoints" / "sft" / "step-000002").mkdir(parents=True)
    assert find_run("last", tmp_path).name == "newer"


def test_a_full_disk_is_one_sentence(little, monkeypatch, capsys) -> None:
    """Wherever it strikes: settings, metrics, checkpoints, the model."""
    for place in ("config.json", "metrics.jsonl", "initial", "step-000001", "model"):
        with pytest.MonkeyPatch.context() as patch:
            full_at(patch, place)
            patch.setattr(cli, "parse", lambda name, arguments: little_run(little, f"full-{place}"))  # noqa: B023
            assert cli.main(["sft"]) == 2, place
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "must be written" in line]
        assert f"{place} must be written, got: No space left on device; free some space" in line


def full_at(patch, place: str) -> None:
    """A disk that is full when the given file or folder of a run is written."""
    full, flush = OSError(errno.ENOSPC, "No space left on device"), files.flush

    def flushing(path, **options) -> None:
        if path.name == f".{place}.part":
            raise full
        flush(path, **options)

    class Full:
        def write(self, text: str) -> None:
            raise full

        def close(self) -> None:
            pass

    patch.setattr(files, "flush", flushing)
    if place == "metrics.jsonl":
        begin = RunFolder.__init__

        def beginning(self, *arguments, **options) -> None:
            begin(self, *arguments, **options)
            self._metrics = Full()

        patch.setattr(RunFolder, "__init__", beginning)


def test_a_run_has_its_stages_under_checkpoints(little, whole) -> None:
    places = whole / "checkpoints"
    assert sorted(p.name for p in places.iterdir()) == ["final", "initial", "sft"]
    assert resolve_model(places / "final") == str(places / "final")
    begun, ended = (load_model(places / name) for name in ("initial", "final"))
    start, model = (load_model(folder) for folder in (little / "start", whole / "model"))
    for name, weight in model.named_parameters():
        assert torch.equal(dict(ended.named_parameters())[name], weight)
        assert not torch.equal(dict(begun.named_parameters())[name], weight)
    body = [n for n, _ in start.named_parameters() if "embed" not in n]
    assert all(torch.equal(dict(begun.named_parameters())[n], dict(start.named_parameters())[n]) for n in body)


def test_resuming_with_other_settings_or_data_is_refused_with_the_difference(little, whole, tmp_path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError) as error:
        sft(little_run(little, "whole", resume=str(whole), lr=3e-3))
    assert "train.lr: 0.01 in the checkpoint, 0.003 now" in str(error.value)
    lines = (little / "train.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"documents: 24 \(sha256 \w+\) in the checkpoint, 23 \("):
        sft(replace(little_run(little, "whole", resume="last"), data=str(tmp_path / "fewer.jsonl")))
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resume_alone_takes_the_runs_own_settings(little, whole, tmp_path, monkeypatch, capsys) -> None:
    """On the command line: a neutral setting may change, another is refused with the difference."""
    copy = tmp_path / "runs" / whole.name
    shutil.copytree(whole, copy, symlinks=True)
    shutil.rmtree(copy / "model")
    for path in Checkpoints(copy / "checkpoints" / "sft").all()[1:]:
        shutil.rmtree(path)
    settings = json.loads((copy / "config.json").read_text(encoding="utf-8"))["config"]
    found = cli.parse("sft", ["--resume", str(copy), "--train.log_every", "3"])
    assert asdict(found) == json.loads(json.dumps({**settings, "resume": str(copy), "device": "auto",
        "train": {**settings["train"], "log_every": 3}}), object_hook=tuples)  # fmt: skip
    assert cli.parse("sft", [f"--output={tmp_path / 'runs'}", "--resume=last"]).data == found.data
    assert cli.main(["sft", "--resume", str(copy), "--train.lr", "3e-3"]) == 2
    assert "train.lr: 0.01 in the checkpoint, 0.003 now" in capsys.readouterr().err
    assert cli.main(["sft", "--resume", "last", "--output", str(tmp_path / "runs"), "--device", "cpu"]) == 0
    assert sha256(copy / "model" / "model.safetensors") == sha256(whole / "model" / "model.safetensors")
    file = tmp_path / "all.yaml"
    file.write_text("data: other.jsonl\n", encoding="utf-8")
    assert cli.parse("sft", ["--config", str(file), "--resume", str(copy)]).data == ("other.jsonl",), "as it was given"


def test_data_that_are_no_file_are_kept_by_name(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    run = RunFolder(tmp_path / "runs", {}, [tmp_path / "rows.jsonl", tmp_path, "someone/data-set"])
    kept = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["data_sha256"]
    assert [len(kept[str(tmp_path / "rows.jsonl")]), kept[str(tmp_path)], kept["someone/data-set"]] == [
        64, "no file", "no file"]  # fmt: skip


def tuples(found: dict) -> dict:
    """JSON's lists as the tuples they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def test_what_to_resume_is_found_or_named(little, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no run to resume: looked for metrics.jsonl in nowhere"):
        find_run("nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="last is no run to resume"):
        find_run("last", tmp_path)
    first, second = (RunFolder(tmp_path, {}) for _ in range(2))
    assert (
        find_run("last", tmp_path) == second.path.resolve() and find_run(first.path, tmp_path) == first.path.resolve()
    )
    first.put_model(first.model_path, lambda folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(ValueError, match="must hold a checkpoint to be resumed, got a finished run without one"):
        find_run(first.path, tmp_path)


def test_rewinding_takes_out_later_steps_and_half_lines(tmp_path) -> None:
    run = RunFolder(tmp_path, {})
    for step in (1, 2, 2, 3):
        run.log({"step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = RunFolder(tmp_path, {}, resume=run.path)
    again.rewind(2)
    again.log({"step": 3})
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()] == [1, 2, 2, 3]


# --- what is computed, and how fast -----------------------------------------------------------------------------------


def batch_of_one(length: int = 24) -> dict:
    return pack([Example(list(range(length)), [True] * length)])


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_step_equal_torchs_count(tied: bool) -> None:
    """Of transformers' own forward; torch counts every pair of attention, not only causal ones, and so do we here."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(tie_word_embeddings=tied)
    model.set_attn_implementation("eager")
    batch = {k: v for k, v in batch_of_one().items() if k in ("input_ids", "labels", "position_ids")}
    with FlopCounterMode(display=False) as counted:
        model(**batch).loss.backward()
    theirs = counted.get_total_flops()
    assert step_flops(Step(model), tokens=24, trained_tokens=24, pairs=24 * 24) == pytest.approx(theirs, rel=0.01)
    assert causal_pairs(batch) == 24 * 25 // 2


def test_mfu_is_operations_over_what_the_device_could_do(monkeypatch) -> None:
    step, batch = Step(random_model()), batch_of_one()
    assert "mfu" not in speed_of(step, 2.0, 24, 23, [batch])  # the peak of a CPU is not known
    monkeypatch.setattr("qftlab.train.meter.peak_flops", lambda device: 1e9)
    found = speed_of(step, 2.0, 24, 23, [batch])
    assert found["tokens_per_second"] == 12.0 and found["peak_gb"] > 0
    assert found["mfu"] == pytest.approx(step_flops(step, 24, 23, 300) / 2e9, abs=1e-4)
    assert "12 tokens/s, " in speed_line(found) and "% MFU" in speed_line(found)


def as_cuda(monkeypatch, name: str, has_bf16: bool) -> torch.device:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    return torch.device("cuda")


def test_a_t4_trains_in_fp32(monkeypatch, caplog) -> None:
    t4 = as_cuda(monkeypatch, "Tesla T4", has_bf16=False)
    for dtype in ("bfloat16", "auto", "float16"):
        assert training_dtype(dtype, t4) == "float32"
    assert "bfloat16 is loaded as float32: Tesla T4 has no bf16 of its own" in caplog.text
    assert "float16 is loaded as float32: Qwen2 can overflow in it" in caplog.text
    assert training_dtype("float32", t4) == "float32" and peak_flops(t4) is None
    for name, peak in {"NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12,
                       "NVIDIA L40S": 362e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A10G": None}.items():  # fmt: skip
        gpu = as_cuda(monkeypatch, name, has_bf16=True)
        assert training_dtype("bfloat16", gpu) == "bfloat16" and peak_flops(gpu) == peak


def few() -> list[Example]:
    return [Example([i, 2, 3, 4, 5, 6], [False, False, True, True, True, True]) for i in range(10, 18)]


def losses(model=None, **settings) -> list[float]:
    config = TrainConfig(**{"lr": 3e-3, "batch_size": 4, "max_steps": 4, **settings})
    return fit_examples(model or random_model(), few(), config).losses


def test_gradient_checkpointing_changes_memory_only() -> None:
    model, entries = random_model(attention_dropout=0.2), []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: entries.append(1))
    assert losses(model, gradient_checkpointing=True) == losses(random_model(attention_dropout=0.2))
    assert len(entries) == 2 * 4, "every step runs the block once forward and once more backward"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    handle.remove()


def test_bf16_by_autocast_or_with_master_weights_follows_fp32() -> None:
    """bf16 keeps 8 bits, so a loss of 7 is right to about 0.03; that neither is fp32 itself is asserted as well."""
    exact = losses()
    for found in (losses(precision="autocast"), losses(random_model().to(torch.bfloat16), precision="master")):
        assert found == pytest.approx(exact, abs=0.1) and found != exact


def test_autocast_keeps_fp32_weights_and_master_keeps_bf16_ones() -> None:
    ours, theirs = random_model(), random_model().to(torch.bfloat16)
    losses(ours, precision="autocast")
    losses(theirs, precision="master")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_float16_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="trained weights must be float32 or bfloat16, got float16"):
        losses(random_model().half())


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_losses() -> None:
    """Inductor's kernels sum in another order."""
    assert losses(compile=True, max_steps=2) == pytest.approx(losses(max_steps=2), abs=1e-5)
