"""Your own copy of the notebooks, and JupyterLab on it: `python lab.py lab`; arguments go to JupyterLab."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def without_outputs(notebook: str) -> str:
    """The text of a notebook as if none of its cells had been run."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def copy_notebooks(source: Path, target: Path) -> tuple[list[str], list[str]]:
    """Copy lessons, solutions and figures from source to target, and return (copied, kept) relative names.

    Lessons come without outputs, which would answer every "Predict, then run"; solutions, which are read, keep theirs.
    What is there already is a student's work: it is kept as it is, never overwritten.
    """
    copied, kept = [], []
    for path in sorted([*source.glob("*.ipynb"), *source.glob("solutions/*.ipynb"), *source.glob("figures/*")]):
        place = target / path.relative_to(source)
        (kept if place.exists() else copied).append(path.relative_to(source).as_posix())
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.parent == source:
            place.write_text(without_outputs(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(path, place)
    return copied, kept


def main(arguments: list[str]) -> None:
    """Copy the notebooks to my/ and open the first of them; this process becomes JupyterLab, so signals reach it."""
    mine = HERE.parent / "my"
    copied, kept = copy_notebooks(HERE, mine)
    print(f"my/ is your own copy of the notebooks: {len(copied)} copied, {len(kept)} kept as they are.", flush=True)
    from jupyterlab.labapp import LabApp

    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    server = ["--ServerApp.answer_yes=True", f"--ServerApp.root_dir={mine}"]  # yes: one Ctrl-C ends it
    LabApp.launch_instance([*server, *root, *arguments, str(min(mine.glob("00*.ipynb")))])


if __name__ == "__main__":
    main(sys.argv[1:])
