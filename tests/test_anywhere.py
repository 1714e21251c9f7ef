"""`python lab.py anywhere`: cells run in clones of their own, are resumed one by one, and leave nothing cut short."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from benchmarks import anywhere
from benchmarks.anywhere import Cell, cells, run

ROOT = Path(__file__).resolve().parent.parent
SHOW = "import os, qftlab; print(qftlab.__file__, os.environ['MKL_CBWR'], os.environ['OMP_NUM_THREADS'])"


@pytest.fixture
def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.strip()


def test_the_matrix_is_four_numerics_and_six_lessons_with_four_seeds():
    matrix = cells(list(anywhere.KINDS), list(anywhere.VARIANTS))
    assert len({cell.name for cell in matrix}) == len(matrix) == 4 + 4 + 6 * 4
    assert [cell.environment for cell in matrix if cell.kind == "tour"] == [
        {},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"OMP_NUM_THREADS": "2"},
    ]
    assert [cell.name for cell in cells(["test"], ["avx2"])] == ["test-avx2"]


def test_each_training_lesson_takes_another_seed():
    for name in anywhere.TRAINED:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook, before = anywhere.with_seed(path, 3), nbformat.read(path, as_version=4)
        changed = [(a.source, b.source) for a, b in zip(before.cells, notebook.cells, strict=True) if a != b]
        assert [(a.replace("SEED = 0", "SEED = 3"), b) for a, b in changed] == [(changed[0][1], changed[0][1])]


def test_a_lesson_runs_to_its_end_with_its_seed(tmp_path: Path):
    path = tmp_path / "00.ipynb"
    first = nbformat.v4.new_code_cell("SEED = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell("assert SEED == 3")]), path)
    anywhere.run_notebook(path, 3)
    with pytest.raises(CellExecutionError):
        anywhere.run_notebook(path, 4)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("SEED = 0")]), path)
    with pytest.raises(ValueError, match="one line `SEED"):
        anywhere.run_notebook(path, 3)


def test_cells_run_the_clones_code_once_each(tmp_path: Path, commit: str):
    good = Cell("tour", "good", ("-c", SHOW), {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"})
    bad = Cell(
        "test", "bad", ("-c", "print('fine\\nFAILED tests/a.py::b\\n1 failed, 7 passed in 3 s'); raise SystemExit(1)")
    )
    records = run([bad, good], commit, tmp_path, jobs=2)
    assert [record["passed"] for record in records] == [False, True]
    assert (records[0]["first_failure"], records[0]["counts"]) == ("FAILED tests/a.py::b", "1 failed 7 passed")
    place, *settings = (tmp_path / "good.log").read_text().split()
    assert settings == ["COMPATIBLE", "2"] and not Path(place).is_relative_to(ROOT) and not Path(place).exists()
    assert json.loads((tmp_path / "good.json").read_text()) == records[1]

    changed = [Cell(cell.kind, cell.name, ("-c", "print('again')")) for cell in (bad, good)]
    assert run(changed, commit, tmp_path, jobs=2) == records, "a record is there: nothing is run"
    second = run(changed, commit, tmp_path, jobs=2, again=True)
    assert second[0]["passed"] and second[1] == records[1], "what failed is run again, and nothing else"
    text = anywhere.table(second, wanted=3)
    assert "| bad | yes |" in text and text.endswith("2 of 3 cells passed")


def test_what_is_cut_short_ends_and_leaves_no_record(tmp_path: Path, commit: str):
    started = tmp_path / "started"
    code = f"import pathlib, os, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    done = threading.Event()

    def interrupt():
        while not done.is_set():
            if started.is_file() and started.read_text():
                return signal.raise_signal(signal.SIGINT)
            done.wait(0.1)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        run([Cell("tour", "long", ("-c", code))], commit, tmp_path, jobs=1)
    done.set()
    watcher.join()
    assert not list(tmp_path.glob("*.json")) and not Path(f"/proc/{started.read_text()}").exists()
