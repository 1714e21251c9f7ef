"""The folder of a run: what was asked, every step's numbers, the curve, the tokens, and a pointer to the latest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

log = logging.getLogger(__name__)
LATEST = "latest"
MODEL = "model"


class RunFolder:
    """A new folder `<parent>/<date>-<time>` holding config.json, and in time metrics.jsonl, curves.png and more.

    Args:
        parent: the folder of runs, made if missing.
        config: a dataclass or dict, kept in config.json.
        data: files whose sha256 is kept beside it.
    """

    def __init__(self, parent: str | Path, config: object, data: Sequence[str | Path] = ()) -> None:
        self.path = _new_folder(Path(parent))
        settings = asdict(config) if is_dataclass(config) else dict(config)
        hashes = {str(path): sha256(path) for path in data}
        self.write_json("config.json", {"config": settings, "data_sha256": hashes, "versions": _versions()})
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    @property
    def model_path(self) -> Path:
        """Where the model and its tokenizer go."""
        return self.path / MODEL

    def log(self, record: dict) -> None:
        """Adds one line to metrics.jsonl."""
        self._metrics.write(json.dumps(record) + "\n")

    def write_json(self, name: str, content: object) -> Path:
        """Writes a JSON file of the run and returns its path."""
        path = self.path / name
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        return path

    def finish(self, losses: Sequence[float] = (), held_out: Sequence[tuple[int, float]] = ()) -> None:
        """Draws curves.png, closes metrics.jsonl, and points `latest` here."""
        self._metrics.close()
        if losses:
            draw_curves(self.path / "curves.png", losses, held_out)
        point_latest(self.path)


def draw_curves(path: Path, losses: Sequence[float], held_out: Sequence[tuple[int, float]] = ()) -> None:
    """Writes the loss curve as a PNG; no window system is touched."""
    from matplotlib.figure import Figure

    from qftlab.core.plots import loss_curve

    figure = Figure(figsize=(7, 4), layout="constrained")
    measured = tuple(zip(*held_out, strict=True)) if held_out else None
    loss_curve(range(1, len(losses) + 1), losses, held_out=measured, ax=figure.subplots())
    figure.savefig(path, dpi=120)


def point_latest(folder: Path) -> Path:
    """Makes `latest` beside a run folder point at it: a link, or a file with its name where links are not allowed."""
    pointer, aside = folder.parent / LATEST, folder.parent / f".{LATEST}-{os.getpid()}"
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        log.info("%s is a text file: this file system refuses links", pointer)
        aside.write_text(folder.name, encoding="utf-8")
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
        if part.name == LATEST and part.is_file():
            path = part.parent / part.read_text(encoding="utf-8").strip() / path.relative_to(part)
            break
    if path.name == LATEST and not path.exists():
        raise FileNotFoundError(f"{name} points nowhere: is {path.parent} the folder of runs, and has one finished?")
    if (path / "metrics.jsonl").exists():
        if not (path / MODEL / "config.json").exists():
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
