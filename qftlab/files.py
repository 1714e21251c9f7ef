"""Files: where the bundled ones are, what a model name means, and writing so that what has its name is whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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

    Raises:
        FileNotFoundError: for what looks like a path and is no folder.
    """
    name = str(name_or_path)
    if name == "tiny":
        return str(bundled("tiny"))
    if Path(name).is_dir():
        return name
    is_hub_name = isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    if is_hub_name and name.split("/")[0] not in OWN_FOLDERS:
        return name
    raise FileNotFoundError(f'{name} is no folder: give "tiny", the folder of a saved model, or a name on the hub')


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


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
