"""Every notebook: run in full, equal to its text form, small, mostly prose, and with words for every picture.

Alt text. A picture carries it where nbconvert reads it: `output.metadata["image/png"]["alt"]`, as
`display(figure, metadata={"image/png": {"alt": "..."}})` writes it. An HTML output carries `alt="..."` in each <img>,
and each <svg> a <title> or an aria-label; a picture in prose is `![alt text](figures/name.png)`.
That strict nbval compares the outputs is `python lab.py test`'s own work, not these tests'.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
IMAGES = ("image/png", "image/jpeg", "image/svg+xml")


def named(path: Path) -> str:
    """A notebook's name in the test report."""
    return path.relative_to(FOLDER).as_posix()


every_notebook = pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=named)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=named)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """notebooks/build.py as a module."""
    spec = importlib.util.spec_from_file_location("qftlab_notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook that is valid by nbformat's own schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def lines(cell: nbformat.NotebookNode) -> int:
    """How many lines of a cell are not blank."""
    return sum(1 for line in cell.source.splitlines() if line.strip())


def pictures_without_words(notebook: nbformat.NotebookNode) -> list[str]:
    """Where a picture has no alt text: `cell 3: image/png` for an output, the tag for prose."""
    bare = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            bare += [f"cell {number}: {found}" for found in re.findall(r"!\[\s*\]\([^)]*\)", cell.source)]
        html = [cell.source] if cell.cell_type == "markdown" else []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html.append(data.get("text/html", ""))
            for kind in (kind for kind in IMAGES if kind in data):
                if not output.metadata.get(kind, {}).get("alt", "").strip():
                    bare.append(f"cell {number}: {kind}")
        for tag in re.findall(r"<img\b[^>]*>", "\n".join(html)):
            if not re.search(r"\balt\s*=\s*[\"'][^\"']*\S", tag):
                bare.append(f"cell {number}: {tag[:60]}")
        for drawing in re.findall(r"<svg\b.*?</svg>", "\n".join(html), re.DOTALL):
            if "aria-label=" not in drawing and "<title" not in drawing and 'aria-hidden="true"' not in drawing:
                bare.append(f"cell {number}: {drawing[:60]}")
    return bare


@every_notebook
def test_every_code_cell_was_run_in_order_and_none_failed(path: Path) -> None:
    """A notebook without outputs would pass nbval unseen."""
    cells = code_cells(read(path))
    assert cells, "no code at all"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_each_text_form_has_its_notebook_and_each_notebook_its_text_form(build: ModuleType) -> None:
    pairs = build.pairs()
    assert {target for _, target in pairs} == {*LESSONS, *SOLUTIONS}
    problems = {named(target): build.differences(text, target) for text, target in pairs}
    assert not any(problems.values()), f"run `make notebooks`: {problems}"


@every_notebook
def test_no_pairing_no_widget_state_no_machine(path: Path) -> None:
    metadata = read(path).metadata
    assert set(metadata) == {"kernelspec", "language_info"}, f"a sync could erase answers: {sorted(metadata)}"
    assert "version" not in metadata.language_info


@every_notebook
def test_file_is_small(path: Path) -> None:
    size = path.stat().st_size
    assert size < 250_000, f"{size // 1000} KB; 250 KB at most: fewer or smaller pictures"


@every_lesson
def test_anatomy(path: Path) -> None:
    notebook = read(path)
    sizes = [lines(cell) for cell in code_cells(notebook)]
    prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert 40 <= len(notebook.cells) <= 70
    assert prose > len(notebook.cells) / 2, f"{prose} of {len(notebook.cells)} cells are prose"
    assert statistics.median(sizes) <= 6 and max(sizes) <= 35, sizes
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1, "one cell is tagged `parameters`"


@every_notebook
def test_every_picture_has_alt_text(path: Path) -> None:
    assert pictures_without_words(read(path)) == []


@every_lesson
def test_every_picture_has_a_read_it_line(path: Path) -> None:
    """In the markdown cell before or after it."""
    cells = read(path).cells
    for number, cell in enumerate(cells):
        if any(kind in output.get("data", {}) for output in cell.get("outputs", []) for kind in IMAGES):
            around = cells[max(0, number - 1) : number + 2]
            words = [near.source for near in around if near.cell_type == "markdown"]
            assert any("Read it" in text for text in words), f"no `Read it` line beside the picture of cell {number}"


@every_notebook
def test_pictures_in_prose_exist(path: Path) -> None:
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    local = [name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", prose) if "://" not in name]
    missing = [name for name in local if not name.startswith("attachment:") and not (path.parent / name).is_file()]
    assert not missing


def test_the_check_for_alt_text_can_fail() -> None:
    output = nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})
    cells = [
        nbformat.v4.new_code_cell("plot()", outputs=[output]),
        nbformat.v4.new_markdown_cell('![](a.png) <img src="b.png"> <svg></svg>'),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert len(pictures_without_words(notebook)) == 4
    output.metadata["image/png"] = {"alt": "loss falls from 3 to 1"}
    words = '![a curve](a.png) <img src="b.png" alt="b"> <svg><title>c</title></svg>'
    cells[1].source = words
    assert pictures_without_words(notebook) == []


def test_building_is_deterministic_and_only_when_needed(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    text = tmp_path / "source" / "00_demo.py"
    text.write_text("# %% [markdown]\n# # Demo\n\n# %%\n1 + 1\n\n# %%\n1 + 1\n", encoding="utf-8")
    ((_, target),) = build.pairs(tmp_path)
    assert build.differences(text, target) == ["not built"]
    build.build(text, target)
    first = target.read_bytes()
    assert build.differences(text, target) == []
    build.build(text, target)
    assert target.read_bytes() == first
    assert len({cell["id"] for cell in read(target).cells}) == 3
    text.write_text(text.read_text(encoding="utf-8") + "\n# %%\n2 + 2\n", encoding="utf-8")
    assert build.differences(text, target) == ["its cells are not those of the text form"]


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A pytest of its own, without the options and layout that this one was given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "QFTLAB_LAYOUT"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.long
def test_plain_nbval_at_the_root_collects_every_notebook() -> None:
    done = pytest_in(ROOT, "--nbval", "--collect-only", "--ignore-glob=tests/test_*.py")
    names = set(re.findall(r"^(\S+\.ipynb)::", done.stdout, re.MULTILINE))
    assert names == {path.relative_to(ROOT).as_posix() for path in LESSONS + SOLUTIONS}, done.stdout[-2000:]


@pytest.mark.long
def test_plain_nbval_compares_sanitised_from_any_folder_and_leaves_copies_alone(tmp_path: Path) -> None:
    """On a small repository with our settings: times differ, the layout is pinned, and only real notebooks are run."""
    for name in ("pyproject.toml", "conftest.py", "notebooks/sanitize.cfg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code = 'import os, time\nprint(f"{time.perf_counter():.3f} s in runs/{os.getpid()}", os.environ["QFTLAB_LAYOUT"])'
    outputs = {"notebooks/00": "1.2 s in runs/a plain", "notebooks/01": "1.2 s in runs/a other"}
    for name, shown in outputs.items() | dict.fromkeys(["my/00", "runs/00", "notebooks/source/00"], "a copy").items():
        place = tmp_path / f"{name}.ipynb"
        output = nbformat.v4.new_output("stream", text=shown + "\n")
        cells = [nbformat.v4.new_code_cell(code, outputs=[output], execution_count=1)]
        place.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), place)
    done = pytest_in(tmp_path / "notebooks", "--nbval", "..")
    assert re.search(r"\n1 failed, 1 passed", done.stdout), done.stdout[-3000:]
    assert "01.ipynb::Cell 0" in done.stdout.partition("short test summary")[2]


@pytest.mark.slow
@every_lesson
def test_a_lesson_opened_cold_shows_its_first_result_within_ten_seconds(
    path: Path, tmp_path: Path, monkeypatch
) -> None:
    """Seconds of the kernel's process, imports included, in a folder without runs/; the shipped stages are loaded."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(
        read(path), timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    cells = client.nb.cells
    settings = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    with client.setup_kernel():
        for i, cell in enumerate(cells):
            client.execute_cell(cell, i)
            if i > settings and cell.get("outputs"):
                break
        clock = nbformat.v4.new_code_cell("import time\ntime.process_time()")
        cells.append(clock)
        client.execute_cell(clock, len(cells) - 1)
    seconds = float(clock.outputs[0].data["text/plain"])
    assert cells[i].outputs and seconds < 10, f"{seconds:.1f} s to the output of:\n{cells[i].source}"


@every_notebook
def test_few_cells_are_not_compared(path: Path) -> None:
    """What is trained live is a verdict that strict nbval does not compare: three such cells at most."""
    tags = [tag for cell in code_cells(read(path)) for tag in cell.metadata.get("tags", [])]
    assert tags.count("nbval-ignore-output") <= 3 and "nbval-skip" not in tags


@every_notebook
def test_code_fits_a_narrow_window(path: Path) -> None:
    """88 columns, which 900 pixels show."""
    lines = [line for cell in code_cells(read(path)) for line in cell.source.splitlines() if len(line) > 88]
    assert lines == []
