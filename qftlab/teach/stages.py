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
from pathlib import Path

from qftlab.core.files import bundled, resolve
from qftlab.data.sources import load_rows
from qftlab.model.loading import Preset, get_preset, load_model, save_model
from qftlab.model.lora import add_adapters
from qftlab.model.vocabulary import extend_model
from qftlab.text.tokenizer import NEW_TOKENS, extend_tokenizer, load_tokenizer
from qftlab.train.config import TrainConfig
from qftlab.train.runs import sha256
from qftlab.train.sft import best_device, fit_rows

log = logging.getLogger(__name__)
Say = Callable[[str], None]
# What decides the weights of a stage, besides its recipe: a change here makes it train anew.
CODE = ("core/chunks.py", "core/logprobs.py", "core/losses.py", "data/batching.py", "data/sources.py",
        "model/attention.py", "model/head.py", "model/loading.py", "model/lora.py", "model/modules.py",
        "model/vocabulary.py", "text/chat.py", "text/tokenizer.py", "train/config.py", "train/loop.py",
        "train/optim.py", "train/precision.py", "train/rows.py", "train/sft.py", "train/step.py",
        "train/update.py")  # fmt: skip
RECORD = "stage.json"


@dataclass(frozen=True)
class Recipe:
    """What a stage is made of, besides code: all of it goes into the hash.

    `version` is for changes that no file shows.
    """

    preset: Preset
    new_tokens: tuple[str, ...] = NEW_TOKENS
    train: TrainConfig | None = None
    version: int = 1


@dataclass
class Stage:
    """A model as one stage left it; `losses` (nats a trained token, one a step) and `metrics` are empty before SFT."""

    name: str
    path: Path
    model: object
    tokenizer: object
    metrics: list[dict] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The training loss of every optimizer step."""
        return [m["loss"] for m in self.metrics if "loss" in m]


def recipe(name: str, preset: str = "tiny") -> Recipe:
    """The recipe of a stage.

    Raises:
        ValueError: for a stage or preset that does not exist.
    """
    if name not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {name!r}")
    p = get_preset(preset)
    if name == "sft":
        # 16 rows of a real model fill a small GPU; `tiny` takes its whole step at once.
        micro = None if preset == "tiny" else 16
        train = TrainConfig(lr=p.lr, epochs=p.epochs, batch_size=p.batch_size, micro_batch_size=micro)
        return Recipe(p, train=train)
    return Recipe(p)


def stage(name: str, preset: str = "tiny", root: str | Path | None = None, *, say: Say | None = None) -> Stage:
    """A stage of the lab, ready to use: "base" as shipped, "extended" with the two new tokens, "sft" fine-tuned.

    Args:
        name: "base", "extended" or "sft".
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
    root = default_root() if root is None else Path(root)
    path = root / f"{name}-{preset}-{fingerprint(name, wanted)}"
    if not is_whole(path):
        _build(name, wanted, path, say or (lambda line: None))
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    return Stage(name, path, _load(path, wanted.preset), load_tokenizer(path), record["metrics"])


def measured(name: str, run: Callable[..., dict], root: str | Path | None = None, **settings) -> dict:
    """What `run(**settings)` gives, kept beside the stages: for numbers of a notebook that take more than seconds.

    Kept in `<name>-<hash>.json`, where the hash covers the settings, the text of `run`, and the code and starting model
    that decide the stages. What `run` reads besides its settings is not covered: hand it in as a setting.

    Args:
        name: says what was measured, in the file's name.
        run: gives a dict that JSON can hold.
        root: as for `stage`.
        settings: numbers and words.
    """
    digest = hashlib.sha256(fingerprint("sft", recipe("sft")).encode())
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
    for file in _starting_files(wanted.preset):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    if wanted.train:
        for part in wanted.preset.data:
            # As text, so that a checkout with Windows line ends has the same stages.
            digest.update(bundled(*part.split("/")).read_text(encoding="utf-8").encode())
    package = Path(__file__).resolve().parent.parent
    for part in CODE:
        digest.update(ast.dump(ast.parse((package / part).read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:12]


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


def _build(name: str, wanted: Recipe, path: Path, say: Say) -> None:
    """Makes a stage aside and renames it into place: what has its final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        log.warning("%s is not whole: making it again", path)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model, tokenizer, metrics = BUILDERS[name](wanted, say)
        save_model(model, tokenizer, aside)
        digests = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        record = {"stage": name, "recipe": asdict(wanted), "metrics": metrics, "sha256": digests}
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


def _build_extended(wanted: Recipe, say: Say) -> tuple:
    return *_extended(wanted)[:2], []


def _extended(wanted: Recipe) -> tuple:
    """The base with the new tokens, its tokenizer, and the tokens' ids."""
    source = resolve(wanted.preset.model)
    model, tokenizer = _load(source, wanted.preset), load_tokenizer(source)
    report = extend_tokenizer(tokenizer, wanted.new_tokens)
    extend_model(model, tokenizer, report)
    return model, tokenizer, [token.id for token in report.tokens]


def _build_sft(wanted: Recipe, say: Say) -> tuple:
    (model, tokenizer, new), metrics = _extended(wanted), []
    if wanted.preset.lora.rank:
        model = add_adapters(model, wanted.preset.lora, token_ids=new)
    rows = load_rows([bundled(*part.split("/")) for part in wanted.preset.data])
    _tell(say, f"training stage sft of {wanted.preset.name} on {len(rows):,} rows")
    steps = -(-len(rows) // wanted.train.batch_size) * wanted.train.epochs

    def on_log(record: dict) -> None:
        metrics.append(record)
        if record["step"] == 1 or record["step"] % max(1, round(steps / 6)) == 0:
            _tell(say, f"step {record['step']} of about {steps:.0f}: loss {record['loss']:.2f}")

    result = fit_rows(model, tokenizer, rows, wanted.train, on_log=on_log)
    if result.interrupted:
        raise KeyboardInterrupt("interrupted: an unfinished stage is not kept")
    return model, tokenizer, metrics


def _tell(say: Say, line: str) -> None:
    log.info("%s", line)
    say(line)


BUILDERS: dict[str, Callable[[Recipe, Say], tuple]] = {"extended": _build_extended, "sft": _build_sft}
STAGES = ("base", *BUILDERS)
