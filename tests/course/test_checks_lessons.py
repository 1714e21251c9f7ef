"""Run All in every lesson, with its stubs as shipped and with a right answer in each: no cell may end in an error.

Notebook 01 runs always, the others with `python lab.py test -m slow`. The answers are the second right ones of
exercise_answers.py, because these return tuples, NumPy arrays and float64 tensors wherever a check takes them.
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from exercise_answers import ANSWERS
from nbclient import NotebookClient

from qftlab_course.exercises import of_notebook

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parents[1] / "notebooks"
CHECK = re.compile(r'^checks\.check\("(\d\d\.\d)", (\w+)\)$', re.MULTILINE)
LESSONS = [pytest.param(path, id=path.stem, marks=[] if path.stem.startswith("01") else pytest.mark.slow)
           for path in sorted((FOLDER / "source").glob("[0-9]*.py"))]  # fmt: skip
assert LESSONS, f"no lesson in {FOLDER}"


def with_answer(found: re.Match) -> str:
    """The line of a check, after one that puts a right answer in the place of the student's function."""
    name, mine = found.groups()
    answer = f"from exercise_answers import {ANSWERS[name].right[1].__name__} as {mine}"
    return f"import sys\nsys.path.append({str(TESTS)!r})\n{answer}\n{found[0]}"


def told(cell: nbformat.NotebookNode) -> str:
    """What a cell shows as text."""
    return "\n".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)


@pytest.mark.long
@pytest.mark.timeout(3600)  # a lesson trains for minutes, on a busy machine for longer
@pytest.mark.parametrize("answered", [False, True], ids=["as shipped", "answered"])
@pytest.mark.parametrize("path", LESSONS)
def test_run_all_ends_without_an_error(path: Path, answered: bool) -> None:
    lesson = jupytext.read(path, fmt="py:percent")
    cells = [cell for cell in lesson.cells if cell.cell_type == "code"]
    checked = {found[1]: cell for cell in cells for found in [CHECK.search(cell.source)] if found}
    for cell in cells:
        cell.source = CHECK.sub(with_answer, cell.source) if answered else cell.source
    home = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(lesson, kernel_name="python3", timeout=1800, resources=home, allow_errors=True).execute()
    errors = [f"{output.ename}: {output.evalue}\nin the cell\n{cell.source}"
              for cell in cells for output in cell.outputs if output.output_type == "error"]  # fmt: skip
    assert not errors, "\n\n".join(errors)
    if number := path.stem[:2] if checked else "":
        assert list(checked) == list(of_notebook(number))
    for name, cell in checked.items():
        assert told(cell).startswith(f"✓ {name} passed" if answered else f"{name} not attempted yet"), told(cell)
    used = [line for cell in cells for line in told(cell).splitlines() if "the next cells run on" in line]
    assert all(("on your" in line) is answered for line in used)
