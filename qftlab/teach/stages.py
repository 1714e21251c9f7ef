"""The stages a notebook starts from: loaded where they were trained before, trained where not.

A stage lives in `runs/stages/<name>-<preset>-<hash>`, where the hash covers its recipe, its data, the model it starts
from and the code that trains it: change one of them, and the next notebook trains anew.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from filelock import FileLock

from qftlab.core.files import bundled, resolve
from qftlab.model.loading import Preset, load_model, save_model
from qftlab.teach.stage_builders import BUILDERS, Say, start_of
from qftlab.teach.stage_recipes import CODE, MORE_CODE, STAGES, Recipe, recipe
from qftlab.text.tokenizer import load_tokenizer
from qftlab.train.runs import sha256
from qftlab.train.sft import best_device

__all__ = ["CODE", "STAGES", "Recipe", "Stage", "fingerprint", "measured", "recipe", "stage"]
log = logging.getLogger(__name__)
RECORD = "stage.json"
LOCKS = ".locks"


@dataclass
class Stage:
    """A model as one stage left it.

    `metrics` are the records of its training, as the loop logs them; they and `losses` are empty before SFT. The folder
    `path` of "dpo" also holds pairs.jsonl: prompt, chosen, rejected, both scores, and the problem's numbers and target.
    """

    name: str
    path: Path
    model: object
    tokenizer: object
    metrics: list[dict] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The training loss of every optimizer step."""
        return [m["loss"] for m in self.metrics if "loss" in m]


def stage(name: str, preset: str = "tiny", root: str | Path | None = None, *, say: Say | None = None) -> Stage:
    """A stage of the lab, ready to use; the stages it starts from are made as well where they are missing.

    Args:
        name: "base" as shipped, "extended" with the two new tokens, "sft" fine-tuned, "warm" on more Countdown
            demonstrations, "dpo" on pairs of its own answers, "rloo" on rewards.
        preset: "tiny", or a name of `qftlab.model.loading.PRESETS`.
        root: where stages are kept, by default `runs/stages` of the project.
        say: gets a line now and then while a stage is trained (about a minute for `tiny`); the log gets them as well.

    Returns:
        The stage; its model is in evaluation mode.

    Raises:
        ValueError: for an unknown stage or preset.
    """
    wanted = recipe(name, preset)
    if name == "base":
        folder = resolve(wanted.preset.model)
        return Stage(name, Path(folder), _load(folder, wanted.preset), load_tokenizer(folder))
    path = _made(name, wanted, default_root() if root is None else Path(root), say or (lambda line: None))
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    return Stage(name, path, _load(path, wanted.preset), load_tokenizer(path), record["metrics"])


def _made(name: str, wanted: Recipe, root: Path, say: Say) -> Path:
    """The folder of a stage, made there if need be, and before it those it starts from; nothing is loaded for that."""
    if name == "base":
        return Path(resolve(wanted.preset.model))
    path = root / f"{name}-{wanted.preset.name}-{fingerprint(name, wanted)}"
    if not is_whole(path):
        (root / LOCKS).mkdir(parents=True, exist_ok=True)
        with FileLock(root / LOCKS / path.name):  # another notebook may be making it: wait, and take that
            if not is_whole(path):
                start = _made(wanted.start, recipe(wanted.start, wanted.preset.name), root, say)
                _build(name, wanted, start, path, say)
    return path


def measured(
    name: str, run: Callable[..., dict], root: str | Path | None = None, *, start: str = "sft", **settings
) -> dict:
    """What `run(**settings)` gives, kept beside the stages: for numbers of a notebook that take more than seconds.

    Kept in `<name>-<hash>.json`, where the hash covers the settings, the text of `run`, and the code, data and
    starting model that decide the stage `start`. What `run` reads besides its settings is not covered: hand it in as a
    setting.

    Args:
        name: says what was measured, in the file's name.
        run: gives a dict that JSON can hold.
        root: as for `stage`.
        start: the last stage whose model or training code `run` uses.
        settings: numbers and words.
    """
    digest = hashlib.sha256(fingerprint(start, recipe(start)).encode())
    digest.update(json.dumps({"name": name, **settings}, sort_keys=True).encode())
    digest.update(inspect.getsource(run).encode())
    path = (default_root() if root is None else Path(root)) / f"{name}-{digest.hexdigest()[:12]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.info("measuring %s with %s", name, settings)
    result = run(**settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(result), encoding="utf-8")
    os.replace(aside, path)
    return json.loads(json.dumps(result))


def default_root() -> Path:
    """`runs/stages` of the project that the current folder is in, or else of the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "qftlab").is_dir():
            return folder / "runs" / "stages"
    return here / "runs" / "stages"


def fingerprint(name: str, wanted: Recipe) -> str:
    """Twelve hexadecimal digits over the recipe, the data, the starting model and the code of a stage.

    Code counts without its comments and line breaks.
    """
    digest = hashlib.sha256(json.dumps({"stage": name, **asdict(wanted)}, sort_keys=True).encode())
    if wanted.start and wanted.start != "base":
        digest.update(fingerprint(wanted.start, recipe(wanted.start, wanted.preset.name)).encode())
    for file in _starting_files(wanted.preset):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    if wanted.train:
        for part in wanted.preset.data:
            # As text, so that a checkout with Windows line ends has the same stages.
            digest.update(bundled(*part.split("/")).read_text(encoding="utf-8").encode())
    package = Path(__file__).resolve().parent.parent
    for part in (*CODE, *MORE_CODE.get(name, ())):
        digest.update(_code(package / part, (package / part).stat().st_mtime_ns))
    return digest.hexdigest()[:12]


@cache
def _code(file: Path, changed: int) -> bytes:
    """A file of code without comments and line breaks; kept, as each stage asks for those of all before it.

    `changed` is its time of change, so that an edited file is read anew.
    """
    return ast.dump(ast.parse(file.read_text(encoding="utf-8"))).encode()


def _starting_files(preset: Preset) -> list[Path]:
    """The files of the starting model where it is a folder; a hub name stands for itself."""
    folder = Path(resolve(preset.model))
    kept = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return sorted(file for pattern in kept for file in folder.glob(pattern)) if folder.is_dir() else []


def is_whole(path: Path) -> bool:
    """Whether a stage is there with every byte that was written."""
    try:
        files = json.loads((path / RECORD).read_text(encoding="utf-8"))["sha256"]
        return all(sha256(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _load(folder: str | Path, preset: Preset):
    return load_model(folder, dtype=preset.dtype, device=best_device())


def _build(name: str, wanted: Recipe, start: Path, path: Path, say: Say) -> None:
    """Makes a stage aside and renames it into place: what has its final name is whole."""
    if path.exists():
        log.warning("%s is not whole: making it again", path)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        built = BUILDERS[name](wanted, start_of(start, wanted.preset.dtype), say)
        save_model(built.model, built.tokenizer, aside)
        for file, text in built.files.items():
            (aside / file).write_text(text, encoding="utf-8")
        digests = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        record = {"stage": name, "recipe": asdict(wanted), "metrics": built.metrics, "sha256": digests}
        (aside / RECORD).write_text(json.dumps(record), encoding="utf-8")
        aside.chmod(0o755)
        _put(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: Path, path: Path) -> None:
    """Renames; what stands there gives way, unless another process has just put a whole stage there."""
    if path.exists() and not is_whole(path):
        shutil.rmtree(path)
    try:
        os.rename(aside, path)
    except OSError:
        if not is_whole(path):
            raise
