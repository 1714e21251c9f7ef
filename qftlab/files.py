"""Where things are: the bundled data of a checkout or a wheel, and the folder or hub name a model name means."""

from __future__ import annotations

import re
from pathlib import Path

# First parts of a path that are this lab's own folders, so that a mistyped run is not looked for on the hub.
OWN_FOLDERS = ("runs", "my")


def bundled(*parts: str) -> Path:
    """The path of a bundled file or folder, such as `bundled("countdown", "heldout.jsonl")`.

    Raises:
        FileNotFoundError: if neither a checkout (`data/`) nor an installation (`qftlab/_bundled`) holds it.
    """
    package = Path(__file__).resolve().parent.parent
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


__all__ = ["bundled"]
