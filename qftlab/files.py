"""Files: where the bundled ones are, what a model name means, and writing so that what has its name is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from qftlab import __version__

# First parts of a path that are this lab's own folders, so that a mistyped run is not looked for on the hub.
OWN_FOLDERS = ("runs", "my")


def bundled(*parts: str) -> Path:
    """The path of a bundled file or folder, such as `bundled("countdown", "heldout.jsonl")`.

    Raises:
        FileNotFoundError: if neither a checkout (`data/`) nor an installation (`qftlab/_bundled`) holds it.
    """
    package = Path(__file__).resolve().parent
    places = (package.parent / "data", package / "_bundled")
    for place in places:
        if (place / "tiny").is_dir() and (path := place.joinpath(*parts)).exists():
            return path
    wanted = "/".join(parts) or "data"
    raise FileNotFoundError(f"bundled data {wanted!r} is neither in {places[0]} nor in {places[1]}: reinstall qftlab")


def resolve(name_or_path: str | Path) -> str:
    """What transformers' `from_pretrained` is given: the bundled folder for "tiny", an existing folder, or a hub name.

    A folder is named by its whole path, links followed: `latest` may point elsewhere tomorrow.

    Raises:
        FileNotFoundError: for what looks like a path and is no folder.
    """
    name = str(name_or_path)
    if name == "tiny":
        return str(bundled("tiny"))
    if Path(name).is_dir():
        return str(Path(name).resolve())
    is_hub_name = isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    if is_hub_name and name.split("/")[0] not in OWN_FOLDERS:
        return name
    raise FileNotFoundError(f'{name} is no folder: give "tiny", the folder of a saved model, or a name on the hub')


def read_json(path: Path) -> dict:
    """What a JSON file holds.

    Raises:
        ValueError: naming the file, if it is no whole JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object, got: {error}") from error


def weight_files(source: str) -> list[Path]:
    """The files that hold the weights (or the adapters) of a folder or hub name: safetensors, or else a folder's GGUF.

    Args:
        source: as `resolve` gives it; shards of the hub are fetched.

    Raises:
        ValueError: for an index that is none, or names anything but safetensors beside or below it.
        OSError: if a folder has none, or the hub does not give them.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name = "adapter_model" if (Path(source) / "adapter_config.json").is_file() else "model"
    if found := cached_file(source, f"{name}.safetensors", _raise_exceptions_for_missing_entries=False):
        return [Path(found)]
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        found = sorted(Path(source).glob("*.gguf"))
        if Path(source).is_dir() and len(found) != 1:
            raise FileNotFoundError(f"weights are read from .safetensors only, or one GGUF, got {len(found)}")
        return found
    content = read_json(Path(index))
    if not all(isinstance(content.get(name), dict) for name in ("metadata", "weight_map")):
        raise ValueError(f"{index} must hold metadata and a weight_map, got {', '.join(content)}")
    for name in sorted(set(map(str, content["weight_map"].values()))):
        if Path(name).suffix != ".safetensors" or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} must name .safetensors files of its own folder, got {name}")
    return [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]


@contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which is flushed and then renamed: whole, or not at all.

    A file or folder that has the name already is replaced, and stays as it was where something fails.

    Raises:
        OSError: in one sentence, if it cannot be written: a full disk, a folder that is read-only.
    """
    path = Path(path)
    place, old = (path.with_name(f".{path.name}{tail}") for tail in (".part", ".old"))
    try:
        remove(place)
        remove(old)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield place
        flush(place)
        if path.is_dir() and not path.is_symlink():
            os.rename(path, old)  # a folder that is half removed must not look like a whole one
        try:
            os.replace(place, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        flush(path.parent, deep=False)
        remove(old)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        remove(place)


def not_written(path: Path, error: Exception) -> OSError:
    """The one sentence that says why something cannot be written."""
    reason = getattr(error, "strerror", None) or error
    said = OSError(f"{path} must be written, got: {reason}; free some space or choose another folder (what was written "
                   "before is intact)")  # fmt: skip
    said.errno = getattr(error, "errno", None)
    return said


def remove(path: Path) -> None:
    """A file, a link or a folder with what it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path, deep: bool = True) -> None:
    """Waits until a file, or a folder's names and (`deep`) files, are on the disk; some systems cannot, for folders."""
    is_folder = path.is_dir()
    for file in sorted(path.rglob("*")) if is_folder and deep else ():
        if file.is_file():
            flush(file)
    try:
        number = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError:
        if is_folder:  # Windows opens no folder
            return
        raise
    try:
        os.fsync(number)
    finally:
        os.close(number)


BLOCK, BLOCKS = 1 << 14, 1 << 12  # bytes read at a time; how many of a large file a quick digest reads


def sha256(*paths: str | Path, quick: bool = False) -> str:
    """The SHA-256 of files one after the other, in hexadecimal.

    Args:
        paths: of the files.
        quick: of a file of more than 64 MiB take 4,096 blocks, evenly spaced. That tells models that were trained
            apart, whose every matrix differs; two that differ in a few rows of a large embedding it may take for one.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, quick * size // BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The installed versions of what decides a run's arithmetic."""
    return {"qftlab": __version__, **{name: version(name) for name in ("torch", "transformers", "tokenizers")}}
