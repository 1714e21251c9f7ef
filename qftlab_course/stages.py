"""The stages a notebook starts from: course models that ship as data, and how they are trained again.

`data/stages/` holds the chain of `tiny` in bf16, the same bytes everywhere, so a lesson opens with the same weights on
every machine. `recipe.json` beside them says, stage by stage, what was trained: the settings, the weights it started
from, and a hash of every token that was read. Tests compare it with what the code would train today.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qftlab.files import aside, bundled, resolve, sha256
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import is_adapted
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.checkpoint import fingerprint
from qftlab.train.run import best_device
from qftlab_course.stage_builders import WORKS, Say, countdown_pairs, noting, prepared, tell
from qftlab_course.stage_recipes import STAGES, STARTS, Recipe, plain, recipe

__all__ = ["STAGES", "Recipe", "Stage", "made_of", "recipe", "stage"]
log = logging.getLogger(__name__)
RECORD, RECIPES = "stage.json", "recipe.json"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@dataclass
class Stage:
    """A model as one stage left it.

    `metrics` are the records of its training, as the loop logs them; they and `losses` are empty before SFT.
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


def stage(
    name: str,
    preset: str = "tiny",
    *,
    seed: int = 0,
    fresh: bool = False,
    root: str | Path | None = None,
    say: Say | None = None,
) -> Stage:
    """A stage of the lab, ready to use.

    Those of `tiny` ship with the lab and are loaded. Those of other presets or seeds, or in a folder `root` of one's
    own, are trained where they are missing, and those they start from as well.

    Args:
        name: "base" as pretrained, "extended" with the two new tokens, "sft" fine-tuned, "warm" on more Countdown
            demonstrations, "dpo" on polite against plain answers, "rloo" on rewards.
        preset: "tiny", or a name of `qftlab_course.presets.PRESETS`.
        seed: of the training.
        fresh: train this stage here and now, from the stage before it; one of `tiny` is kept in `runs/stages/fresh`.
        root: the folder of a chain of one's own, by default `runs/stages/<preset>-<seed>`.
        say: gets a line now and then while a stage is trained; the log gets them as well.

    Returns:
        The stage; its model is in evaluation mode.

    Raises:
        ValueError: for an unknown stage or preset.
    """
    wanted, say = recipe(name, preset, seed), say or (lambda line: None)
    if name == "base":
        path = Path(resolve(wanted.preset.model))
    elif (preset, seed, root) == ("tiny", 0, None):
        path = bundled("stages", name)
        if fresh:
            path = _trained(name, wanted, _start(wanted, path.parent), default_root() / "fresh" / name, say)
    else:
        folder = default_root() / f"{preset}-{seed}" if root is None else Path(root)
        if fresh:
            shutil.rmtree(folder / name, ignore_errors=True)
        path = _made(name, preset, seed, folder, say)
    record = json.loads((path / RECORD).read_text(encoding="utf-8")) if (path / RECORD).is_file() else {}
    return Stage(name, path, *_load(path, wanted), record.get("metrics", []))


def made_of(name: str, wanted: Recipe, start: str | Path) -> dict:
    """What a stage is made of, as JSON holds it: settings, the weights it starts from, and the tokens it reads.

    The tokens are hashed with their masks, in the order of the steps: a change of code that changes what is trained is
    seen here, and one that does not is not.

    Args:
        name: of the stage.
        wanted: its recipe.
        start: the folder of the stage it starts from.
    """
    found = {"recipe": plain(wanted) | {"preset": wanted.preset.name, "start": wanted.start}}
    found["starts from"] = next((sha256(Path(start) / f) for f in WEIGHTS if (Path(start) / f).is_file()), str(start))
    if name in WORKS:
        model, tokenizer = prepared(name, wanted, *_load(start, wanted))
        found["documents"] = fingerprint(list(WORKS[name](wanted, model, tokenizer).documents))
    return found


def default_root() -> Path:
    """`runs/stages` of the project that the current folder is in, or else of the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "qftlab").is_dir():
            return folder / "runs" / "stages"
    return here / "runs" / "stages"


def is_whole(path: Path, made: dict) -> bool:
    """Whether a stage is there, made of this, with every byte that was written."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return record["made of"] == made and all(sha256(path / f) == d for f, d in record["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _start(wanted: Recipe, root: Path) -> Path:
    """The folder of the stage before, in the same chain."""
    return Path(resolve(wanted.preset.model)) if wanted.start == "base" else root / wanted.start


def _made(name: str, preset: str, seed: int, root: Path, say: Say) -> Path:
    """The folder of a stage in a chain of one's own, trained there if it is missing or made of something else."""
    wanted = recipe(name, preset, seed)
    if wanted.start != "base":
        _made(wanted.start, preset, seed, root, say)
    start, path = _start(wanted, root), root / name
    return path if is_whole(path, made_of(name, wanted, start)) else _trained(name, wanted, start, path, say)


def _load(folder: str | Path, wanted: Recipe, is_trainable: bool = False) -> tuple:
    """Model and tokenizer of a stage's folder; adapters stay adapters."""
    options = {"dtype": wanted.preset.dtype, "adapters": "continue" if is_trainable else "keep"}
    return load_model(folder, device=best_device(), **options), load_tokenizer(folder)


def _trained(name: str, wanted: Recipe, start: Path, path: Path, say: Say) -> Path:
    """Trains a stage and saves it, record and all, at once."""
    model, tokenizer = prepared(name, wanted, *_load(start, wanted, is_trainable=True))
    metrics: list[dict] = []
    if name in WORKS:
        work = WORKS[name](wanted, model, tokenizer)
        tell(say, f"training stage {name} of {wanted.preset.name} on {work.what}")
        metrics, note = noting(say, work.headline, every=10 if name == "rloo" else 50)
        if work.fit(note).interrupted:
            raise KeyboardInterrupt("interrupted: an unfinished stage is not kept")
    if not is_adapted(model) and wanted.preset.name == "tiny":
        model.to(torch.bfloat16)  # what ships, and what the next stage starts from
    with aside(path) as place:
        save_model(model, tokenizer, place)
        digests = {file.name: sha256(file) for file in sorted(place.iterdir())}
        record = {"stage": name, "made of": made_of(name, wanted, start), "sha256": digests, "metrics": metrics}
        (place / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def rebuild(folder: Path, say: Say = print) -> None:
    """Trains the chain of `tiny` anew into `folder` (data/stages), and the Countdown pairs of notebook 07 beside it."""
    recipes = {}
    for name in STARTS:
        began, wanted = time.process_time(), recipe(name)
        path = _trained(name, wanted, _start(wanted, folder), folder / name, say)
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        recipes[name] = record.pop("made of") | {"sha256": record.pop("sha256")}
        record["metrics"] = [{k: v for k, v in m.items() if not _is_of_this_run(k)} for m in record["metrics"]]
        (path / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        say(f"{name}: {time.process_time() - began:.0f} s")
    (folder / RECIPES).write_text(json.dumps(recipes, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in countdown_pairs(*_load(folder / "warm", recipe("warm"))))
    (folder.parent / "countdown" / "pairs.jsonl").write_text(lines, encoding="utf-8")


def _is_of_this_run(figure: str) -> bool:
    """Whether a figure of a record is about the machine and not about the training: times, speeds, memory."""
    return figure.endswith("seconds") or figure in ("tokens_per_second", "peak_gb", "mfu")
