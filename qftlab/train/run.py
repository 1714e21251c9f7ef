"""The folder of a run: what was asked, every step's numbers, the curve, the tokens, and a pointer to the latest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

log = logging.getLogger(__name__)
METRICS, MODEL, CHECKPOINTS = "metrics.jsonl", "model", "checkpoints"
LATEST, FINAL = "latest", "final"  # pointers: to the last run that ended, and to its model

# Where the loss says little: what records hold in its place, the axis, and the title.
TELLING = (
    (("reward",), "mean reward of an answer", "The reward of the sampled answers"),
    (("chosen_logprob", "rejected_logprob"), "log-probability (nats an answer)", "The margin grows; look where to"),
)


class RunFolder:
    """The folder `<parent>/<date>-<time>` holding config.json, and in time metrics.jsonl, model/ and more.

    Args:
        parent: the folder of runs, made if missing.
        config: a dataclass or dict, kept in config.json.
        data: files whose sha256 is kept beside it; folders and hub names are kept by name.
        resume: the folder of an earlier run, or "last" for the newest in `parent`, to go on with in place of a new one.

    Raises:
        FileNotFoundError: if there is no such run to resume.
        ValueError: if that run is finished and holds no checkpoint.
    """

    def __init__(
        self, parent: str | Path, config: object, data: Sequence[str | Path] = (), resume: str | Path | None = None
    ) -> None:
        self.is_writer = True
        self.path = find_run(resume, Path(parent)) if resume else _new_folder(Path(parent))
        if not resume:
            settings = asdict(config) if is_dataclass(config) else dict(config)
            hashes = {str(path): sha256(path) if Path(path).is_file() else "no file" for path in data}
            self.write_json("config.json", {"config": settings, "data_sha256": hashes, "versions": _versions()})
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
            self._metrics.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Takes from metrics.jsonl what came after a step, as the run will do it again."""
        if not self.is_writer:
            return
        self._metrics.close()
        kept = [line for line in _whole_lines(self.path / METRICS) if json.loads(line)["step"] <= step]
        aside = self.path / f".{METRICS}"
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path / METRICS)
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8", buffering=1)

    def write_json(self, name: str, content: object) -> Path:
        """Writes a JSON file of the run and returns its path."""
        path = self.path / name
        if self.is_writer:
            path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        return path

    def put_model(self, path: Path, save: Callable[[Path], object]) -> None:
        """Has a model saved aside and renames it to `path`, so that a folder of that name is whole."""
        if not self.is_writer:
            return
        aside = path.with_name(f".{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save(aside)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(aside, path)

    def finish(self, losses: Sequence[float] = (), held_out: Sequence[tuple[int, float]] = ()) -> None:
        """Draws curves.png, closes metrics.jsonl, and points `latest` and, where it fits, `checkpoints/final` here."""
        if not self.is_writer:
            return
        self._metrics.close()
        if losses:
            records = [json.loads(line) for line in _whole_lines(self.path / METRICS)]
            draw_curves(self.path / "curves.png", losses, held_out, records)
        if self.checkpoints.is_dir():
            point(self.checkpoints / FINAL, f"../{MODEL}")
        point(self.path.parent / LATEST, self.path.name)


def find_run(name: str | Path, parent: Path) -> Path:
    """The folder of a run to resume: by its path, or "last" for the newest in `parent`.

    Raises:
        FileNotFoundError: if it is no run.
        ValueError: if it is finished and holds no checkpoint: going on would train it a second time.
    """
    path = Path(name)
    if str(name) == "last":
        runs = [p.parent for p in parent.glob("*/config.json") if not p.parent.is_symlink()]
        path = max(runs, key=lambda p: (p / "config.json").stat().st_mtime_ns, default=parent)
    if not (path / METRICS).exists():
        raise FileNotFoundError(
            f"{name} is no run to resume: looked for {METRICS} in {path}; give the folder of a run, or `last` with the "
            "--output it was written to"
        )
    if (path / MODEL).is_dir() and not any((path / CHECKPOINTS).glob("*/step-*")):
        raise ValueError(f"{path} must hold a checkpoint to be resumed, got a finished run without one: start anew")
    return path.resolve()


def own_settings(run: Path) -> dict:
    """What a run was given when it began, the device aside; for `--resume` without settings.

    Raises:
        FileNotFoundError: if its config.json is not there.
        ValueError: if that holds no settings.
    """
    file = run / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings.get("config"), dict):
        raise ValueError(f"{file} must hold the settings of the run, got none: give them once more, as they were")
    return {name: value for name, value in settings["config"].items() if name not in ("device", "resume")}


def _whole_lines(path: Path) -> list[str]:
    """The lines of a JSONL file, without one that a killed process left half written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line for line in lines if line.endswith("}")]


def draw_curves(
    path: Path,
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]] = (),
    records: Sequence[dict] = (),
) -> None:
    """Writes what a run is judged by as a PNG: its rewards, both log-probabilities of pairs, or else its losses."""
    from matplotlib.figure import Figure

    from qftlab.maths.plots import finish, loss_curve

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for names, ylabel, title in TELLING:
        found = [record for record in records if names[0] in record]
        if found:
            curves = {name: [record[name] for record in found] for name in names}
            loss_curve([record["step"] for record in found], curves, ax=ax)
            values = [value for curve in curves.values() for value in curve]
            ax.set_ylim(min(0.0, 1.05 * min(values)), max(0.0, 1.05 * max(values)))
            finish(ax, "optimizer step", ylabel, title)
            break
    else:
        measured = tuple(zip(*held_out, strict=True)) if held_out else None
        loss_curve(range(1, len(losses) + 1), losses, held_out=measured, ax=ax)
    figure.savefig(path, dpi=120)


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


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("qftlab", "torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
