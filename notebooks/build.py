"""Notebooks from their text form: notebooks/source/NN_name.py (percent format) -> notebooks/NN_name.ipynb, executed.

    python notebooks/build.py                     build and run every notebook whose text form has changed
    python notebooks/build.py 00 03 --force       these only, changed or not
    python notebooks/build.py --badges OWNER/NAME write the Colab badges, which the setup cell reads

A notebook has no link to its text form (a jupytext sync could erase a student's answers), no widget state, and ids
that depend on its text only, so that building twice gives the same file but for what the cells print.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
BADGE = "[![Open in Colab]"
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"


def pairs(root: Path = HERE) -> list[tuple[Path, Path]]:
    """Every text form and the notebook it becomes, in order; solutions after lessons."""
    source = root / "source"
    texts = [*sorted(source.glob("[0-9]*.py")), *sorted(source.glob("solutions/[0-9]*.py"))]
    return [(text, (root / text.relative_to(source)).with_suffix(".ipynb")) for text in texts]


def from_text(text: Path) -> nbformat.NotebookNode:
    """The notebook a text form stands for: unrun, with our metadata and ids only."""
    notebook = jupytext.read(text, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number_cells(notebook)
    return notebook


def number_cells(notebook: nbformat.NotebookNode) -> None:
    """Give each cell an id made of its kind and text; cells with the same text are counted."""
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        key = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[key] += 1
        cell["id"] = f"{key}-{seen[key]}"


def differences(text: Path, target: Path) -> list[str]:
    """What is not as it should be between a text form and its notebook: missing, other cells, unrun, or failed."""
    if not target.is_file():
        return ["not built"]
    wanted, found = from_text(text), nbformat.read(target, as_version=4)
    problems = []
    if [(c.cell_type, c.source) for c in wanted.cells] != [(c.cell_type, c.source) for c in found.cells]:
        problems.append("its cells are not those of the text form")
    code = [cell for cell in found.cells if cell.cell_type == "code" and cell.source.strip()]
    if any(cell.execution_count is None for cell in code):
        problems.append("a code cell was never run")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        problems.append("a cell ended in an error")
    return problems


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in folder, then take out what must not be kept: widget state, times, the machine's Python."""
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "QFTLAB_LAYOUT": "plain"}.items():
        os.environ.setdefault(name, value)  # as the tests pin them, in conftest.py
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where, record_timing=False).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


def build(text: Path, target: Path) -> None:
    """Build and run one notebook, and write it; a failing cell leaves the old file as it was."""
    notebook = from_text(text)
    target.parent.mkdir(parents=True, exist_ok=True)
    execute(notebook, target.parent)
    nbformat.validate(notebook)
    nbformat.write(notebook, target)


def badge_line(repo: str, target: Path, root: Path = HERE, branch: str = "main") -> str:
    """The markdown of a Colab badge for a notebook of the repository OWNER/NAME."""
    path = (Path("notebooks") / target.relative_to(root)).as_posix()
    return f"{BADGE}({BADGE_IMAGE})](https://colab.research.google.com/github/{repo}/blob/{branch}/{path})"


def with_badge(markdown: str, line: str) -> str:
    """Markdown with the badge as its last paragraph; an older badge is replaced."""
    kept = "\n".join(row for row in markdown.split("\n") if not row.startswith(BADGE)).rstrip()
    return f"{kept}\n\n{line}"


def write_badge(text: Path, target: Path, repo: str, root: Path = HERE) -> None:
    """Put the badge in the first markdown cell of text form and notebook; the setup cell finds the repository in it."""
    line = badge_line(repo, target, root)
    head, mark, rest = text.read_text(encoding="utf-8").partition("# %% [markdown]\n")
    if not mark:
        raise SystemExit(f"{text.name} must begin with a markdown cell (`# %% [markdown]`) to carry a badge")
    cell, next_mark, tail = rest.partition("\n# %%")
    plain = "\n".join(re.sub(r"^# ?", "", row) for row in cell.rstrip().split("\n"))
    marked = "\n".join(f"# {row}".rstrip() for row in with_badge(plain, line).split("\n"))
    text.write_text(f"{head}{mark}{marked}\n{next_mark}{tail}", encoding="utf-8")
    if target.is_file():
        notebook, wanted = nbformat.read(target, as_version=4), from_text(text)
        for cell, new in zip(notebook.cells, wanted.cells, strict=True):
            cell.source = new.source
        number_cells(notebook)
        nbformat.write(notebook, target)


def chosen(names: list[str]) -> list[tuple[Path, Path]]:
    """The pairs whose name begins with one of the names; all of them without names."""
    wanted = [pair for pair in pairs() if not names or any(pair[0].stem.startswith(Path(n).stem) for n in names)]
    if names and not wanted:
        known = ", ".join(text.stem for text, _ in pairs()) or "none yet"
        raise SystemExit(f"no notebook is called {' or '.join(names)}; there are: {known}")
    return wanted


def main(words: list[str]) -> int:
    """Build what was asked for and return 1 if a notebook failed."""
    parser = argparse.ArgumentParser(prog="notebooks/build.py", description="Build and run notebooks from their text.")
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 00; default: all that have changed")
    parser.add_argument("--force", action="store_true", help="also those that are up to date")
    parser.add_argument("--badges", metavar="OWNER/NAME", help="write Colab badges instead of building")
    args = parser.parse_args(words)
    if args.badges is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.badges):
        parser.error(f"REPO must be OWNER/NAME, got {args.badges!r}: make badges REPO=owner/name")
    failed = 0
    for text, target in chosen(args.names):
        if args.badges:
            write_badge(text, target, args.badges)
            print(f"{target.name}: badge for {args.badges}")
            continue
        if not args.force and not differences(text, target):
            print(f"{target.name}: up to date")
            continue
        try:
            build(text, target)
            print(f"{target.name}: built, {target.stat().st_size // 1024} KB", flush=True)
        except CellExecutionError as error:
            failed = 1
            print(f"{target.name}: a cell failed\n{error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
