"""The folder of a run: what was asked, every step's numbers, the curve, the tokens, and a pointer to the latest."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qftlab.decoding.engine import known_id
from qftlab.files import aside, not_written, resolve, sha256, versions
from qftlab.model.head import context_length
from qftlab.model.loading import extend_model, load_model, save_model
from qftlab.model.lora import add_adapters, check_continued, is_adapted
from qftlab.rows.chat import knows_thinking
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer, set_thinking_
from qftlab.settings import ENABLE_THINKING, RunConfig
from qftlab.train.checkpoint import Checkpoints, step_of
from qftlab.train.distributed import Ranks, processes, training_dtype, unsharded
from qftlab.train.loop import TrainResult

log = logging.getLogger(__name__)
METRICS, MODEL, CHECKPOINTS = "metrics.jsonl", "model", "checkpoints"
LATEST, FINAL = "latest", "final"  # pointers: to the last run that ended, and to its model


class RunFolder:
    """The folder `<parent>/<date>-<time>` holding config.json, and in time metrics.jsonl, model/ and more.

    Args:
        parent: the folder of runs, made if missing.
        config: a dataclass or dict, kept in config.json.
        data: files whose sha256 is kept beside it; folders and hub names are kept by name.
        facts: more to keep there, such as the stage and the model it began with, found once: `latest` moves on.
        resume: the folder of an earlier run, or "last" for the newest in `parent`, to go on with in place of a new one.

    Raises:
        FileNotFoundError: if there is no such run to resume.
        ValueError: if that run is finished and holds no checkpoint.
    """

    def __init__(
        self, parent: str | Path, config: object, data: Sequence = (), facts: Mapping = {}, resume: str | None = None
    ) -> None:
        self.is_writer = True
        self.path = find_run(resume, Path(parent)) if resume else _new_folder(Path(parent))
        if not resume:
            settings = asdict(config) if is_dataclass(config) else dict(config)
            hashes = {str(path): sha256(path) if Path(path).is_file() else "no file" for path in data}
            self.write_json("config.json", {"config": settings, **facts, "data_sha256": hashes, "versions": versions()})
        log.info("run folder %s", self.path)
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8", buffering=1)

    @classmethod
    def reader(cls, path: str | Path) -> RunFolder:
        """The folder of a run that another process writes: everything that would write does nothing."""
        run = cls.__new__(cls)
        run.path, run.is_writer = Path(path), False
        return run

    @property
    def model_path(self) -> Path:
        """Where the model and its tokenizer go."""
        return self.path / MODEL

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go, in a folder for each stage, beside the models `initial` and `final`."""
        return self.path / CHECKPOINTS

    def log(self, record: dict) -> None:
        """Adds one line to metrics.jsonl."""
        if self.is_writer:
            try:
                self._metrics.write(json.dumps(record) + "\n")
            except OSError as error:
                raise not_written(self.path / METRICS, error) from error

    def rewind(self, step: int) -> None:
        """Takes from metrics.jsonl what came after a step, as the run will do it again."""
        if not self.is_writer:
            return
        self._metrics.close()
        kept = [line for line, record in _records(self.path / METRICS) if record["step"] <= step]
        with aside(self.path / METRICS) as place:
            place.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8", buffering=1)

    def write_json(self, name: str, content: object) -> Path:
        """Writes a JSON file of the run and returns its path."""
        path = self.path / name
        if self.is_writer:
            with aside(path) as place:
                place.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        return path

    def put_model(self, path: Path, save: Callable[[Path], object]) -> None:
        """Has a model saved to `path`, so that a folder of that name is whole."""
        if not self.is_writer:
            return
        with aside(path) as place:
            place.mkdir()
            save(place)

    def finish(
        self, losses: Sequence[float] = (), held_out: Sequence[tuple[int, float]] = (), is_whole: bool = True
    ) -> None:
        """Draws curves.png, closes metrics.jsonl, and points `latest` and, where it fits, `checkpoints/final` here.

        A run that is not whole, because it was stopped, gets no pointers.
        """
        if not self.is_writer:
            return
        self._metrics.close()
        if losses:
            from qftlab.evaluate.plots import draw_curves

            records = [record for _, record in _records(self.path / METRICS)]
            draw_curves(self.path / "curves.png", losses, held_out, records)
        if not is_whole:
            return
        if self.checkpoints.is_dir():
            point(self.checkpoints / FINAL, f"../{MODEL}")
        point(self.path.parent / LATEST, self.path.name)


def find_run(name: str | Path, parent: Path) -> Path:
    """The folder of a run to resume: by its path, or "last", the newest in `parent`, with a checkpoint if one has it.

    Raises:
        FileNotFoundError: if it is no run.
        ValueError: if it is finished and holds no checkpoint: going on would train it a second time.
    """
    path = Path(name)
    if str(name) == "last":
        runs = [p.parent for p in parent.glob("*/config.json") if not p.parent.is_symlink()]
        path = max(runs, key=lambda p: (has_checkpoint(p), (p / "config.json").stat().st_mtime_ns), default=parent)
    if not (path / METRICS).exists():
        raise FileNotFoundError(
            f"{name} is no run to resume: looked for {METRICS} in {path}; give the folder of a run, or `last` with the "
            "--output it was written to"
        )
    if (path / MODEL).is_dir() and not has_checkpoint(path):
        raise ValueError(f"{path} must hold a checkpoint to be resumed, got a finished run without one: start anew")
    return path.resolve()


def has_checkpoint(run: Path) -> bool:
    """Whether a run can go on from somewhere."""
    return any((run / CHECKPOINTS).glob("*/step-*"))


def own_settings(run: Path) -> dict:
    """What a run was given when it began, the device aside; for `--resume` without settings.

    Raises:
        FileNotFoundError: if its config.json is not there.
        ValueError: if that holds no settings.
    """
    file = run / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} must be whole JSON, got: {error}; give the settings once more, as they were"
        ) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("config"), dict):
        raise ValueError(f"{file} must hold the settings of the run, got none: give them once more, as they were")
    return {name: value for name, value in settings["config"].items() if name not in ("device", "resume")}


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """The lines of a metrics.jsonl and what they hold, without one that a killed process left half written.

    Raises:
        ValueError: naming file and line, for a line that is no record.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        if line.endswith("}"):
            try:
                record = json.loads(line)
                _ = record["step"] + 0
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number} must be a record with its step, got {line!r:.80}: remove that "
                                 "line") from None  # fmt: skip
            yield line, record


def point(pointer: Path, target: str) -> Path:
    """Makes `pointer` lead to a folder named relative to it: a link, or a text file where links are refused."""
    aside = pointer.with_name(f".{pointer.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target, target_is_directory=True)
    except OSError:
        log.info("%s is a text file: this file system refuses links", pointer)
        aside.write_text(target, encoding="utf-8")
    os.replace(aside, pointer)
    return pointer


def resolve_model(name: str | Path) -> str:
    """What to load for a name: the model of a run folder, also through `latest`; any other name as it is.

    Raises:
        FileNotFoundError: if `latest` points nowhere, or a run folder holds no model.
    """
    path = Path(name)
    if (path / LATEST).exists():  # the folder of runs stands for its last one
        return resolve_model(path / LATEST)
    for part in (path, *path.parents):
        if part.name in (LATEST, FINAL) and part.is_file():
            path = part.parent / part.read_text(encoding="utf-8").strip() / path.relative_to(part)
            break
    if path.name == LATEST and not path.exists():
        raise FileNotFoundError(f"{name} points nowhere: is {path.parent} the folder of runs, and has one finished?")
    if (path / METRICS).exists():
        if not any((path / MODEL / name).exists() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{name} is a run without a model: it did not finish; look at its metrics.jsonl")
        return str(path / MODEL)
    return str(path) if path.exists() else str(name)


@dataclass(frozen=True)
class Stage:
    """What is a stage's own, once it has read its data.

    Args:
        model: as it is before the first step.
        tokenizer: its tokenizer.
        identity: what decides the result, for the checkpoints.
        fit: trains the model; called as `fit(run, on_log=, progress=, checkpoints=, resume=)`.
        wrap: makes what is trained of a loaded model and its tokenizer.
        begin: adds to the checkpoints before they are looked at.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    identity: Mapping[str, object]
    fit: Callable[..., TrainResult]
    wrap: Callable[..., nn.Module] = lambda model, tokenizer: model
    begin: Callable[[Checkpoints], object] = lambda checkpoints: None


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, with what it had done saved; the message says how it goes on."""


def run_stage(name: str, config: RunConfig, prepare: Callable[[RunConfig], Stage], progress: bool) -> Path:
    """A stage from files to files, in one process or many: read, open a run or go on with one, train, save.

    Args:
        name: of the folder of checkpoints.
        config: of the stage.
        prepare: reads the data, so that what is wrong with it is said before there is a run.
        progress: whether to draw a bar.

    Returns:
        The run's folder.

    Raises:
        Interrupted: after Ctrl-C. The run then holds the weights so far, if it made a step; `latest` stays as it was.
    """
    with processes(best_device(config.device)) as device:
        config = replace(config, device=device)
        found = replace(config, model=resolve(resolve_model(config.model)))  # once: `latest` may move meanwhile
        stage, run = prepare(found), open_run(config, {"stage": name, "start": found.model})
        checkpoints = Checkpoints(run.checkpoints / name, run_identity(config) | stage.identity, config.train.keep)
        stage.begin(checkpoints)
        try:
            begin(run, checkpoints, config, stage.model, stage.tokenizer)
            result = stage.fit(run, on_log=run.log, progress=progress, checkpoints=checkpoints,
                               resume=bool(config.resume))  # fmt: skip
        finally:
            checkpoints.release()
        last = checkpoints.last()
        if not result.interrupted or (last and step_of(last) == result.steps):
            rebuild = partial(load_extended, replace(found, device="cpu"))
            model = unsharded(stage.model, lambda: stage.wrap(*rebuild()))
            run.put_model(run.model_path, lambda folder: save_model(model, stage.tokenizer, folder))
        run.finish(result.losses, result.held_out, is_whole=not result.interrupted)
        if result.interrupted:
            raise Interrupted(f"stopped after {result.steps} steps; to go on: --resume {run.path}")
        return run.path


def open_run(config: RunConfig, facts: Mapping = {}) -> RunFolder:
    """The folder of a new run, or of the one to resume; all processes get the same, and the first writes."""
    world, run = Ranks.current(), None
    if world.is_main:
        run = RunFolder(config.output, config, [*config.data, *config.held_out], facts, config.resume)
    path = world.gather(run.path if run else None)[0]
    return run or RunFolder.reader(path)


def begin(run: RunFolder, checkpoints: Checkpoints, config: RunConfig, model, tokenizer) -> None:
    """Saves the model before its first step, as `initial` beside the checkpoints, or goes back to the last of them.

    Args:
        run: its metrics are taken back to the last checkpoint where the run is resumed.
        checkpoints: of the stage.
        config: of any stage.
        model: as it is before the first step.
        tokenizer: saved with it.

    Raises:
        ValueError: if the last checkpoint is damaged or of another run.
        OSError: if another process writes there.
    """
    if Ranks.current().is_main:
        checkpoints.prepare()
    last = checkpoints.last()
    if last:
        checkpoints.check(last)
    if config.resume:
        run.rewind(step_of(last) if last else -1)
    if config.train.save_every and not last:
        run.put_model(run.checkpoints / "initial", lambda folder: save_model(model, tokenizer, folder))


def run_identity(config: RunConfig) -> dict:
    """The settings of a run that a resumed one must share, those of the loop aside; data count by their documents."""
    free = "data held_out output device resume train server num_proc base".split()  # another place is no other run
    return {name: value for name, value in asdict(config).items() if name not in free}


def load_extended(config: RunConfig) -> tuple:
    """Model and tokenizer of a configuration, with its new tokens in both, and the adapters that it has or asks for."""
    device, name = best_device(config.device), resolve_model(config.model)
    source, lora = (resolve_model(config.base), name) if config.base else (name, None)
    dtype = training_dtype(config.dtype, device)
    model = load_model(source, lora=lora, dtype=dtype, device=device, quant=config.quant, adapters=config.lora.from_)
    tokenizer = load_tokenizer(name)
    set_thinking_(tokenizer, ENABLE_THINKING[config.thinking])
    report = extend_tokenizer(tokenizer, config.new_tokens)
    wanted = {token.text: token.id for token in report.new}
    for text in config.lora.tokens:
        if (number := known_id(tokenizer, text)) is None:
            raise ValueError(f"lora.tokens must be tokens of the tokenizer, got {text!r}: --new_tokens adds one")
        wanted[text] = number
    if is_adapted(model):
        check_continued(model, config.lora, wanted)
        return model, tokenizer
    if config.new_tokens:
        extend_model(model, tokenizer, report)
    if config.lora.rank:
        model = add_adapters(model, config.lora, token_ids=sorted({*wanted.values(), *(t.id for t in report.tokens)}))
    return model, tokenizer


def row_options(config: RunConfig, model) -> dict:
    """What `encode_rows` and `encode_pairs` are told by a configuration."""
    return {"max_length": config.max_length or context_length(model), "thinking": ENABLE_THINKING[config.thinking],
            "num_proc": config.num_proc, "cache": Path(config.output) / "encoded"}  # fmt: skip


def ask_as_trained_(tokenizer: PreTrainedTokenizerBase, config: RunConfig, usage) -> None:
    """Has the template that is saved ask with thinking off, if no answer that is trained thinks."""
    if config.thinking == "auto" and knows_thinking(tokenizer) and not usage.thinking:
        set_thinking_(tokenizer, False)
        log.info("no answer thinks: the chat template that is saved asks with thinking off unless it is told otherwise")


def best_device(name: str = "auto") -> str:
    """The device that `auto` means here: the GPU where there is one; any other name as it is.

    Raises:
        ValueError: for a device that torch does not know or does not find.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch finds here, got {name!r}: {reason}") from None
    return name


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    for tail in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            (parent / (name + tail)).mkdir()
        except FileExistsError:
            continue
        return parent / (name + tail)
    raise FileExistsError(f"{parent} must have room for one more run named {name}, got 999 of them")
