"""lab.py: bare Python is enough for it, it says what is missing, and what it starts ends with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from test_house import imported
from test_notebooks import pytest_in

import lab
from notebooks import mine

ROOT = Path(__file__).resolve().parent.parent


def test_lab_imports_only_the_standard_library() -> None:
    roots = {name.split(".")[0] for name in imported(ROOT / "lab.py")}
    assert roots <= set(sys.stdlib_module_names), roots - set(sys.stdlib_module_names)


def test_lab_copies_lessons_without_outputs_and_never_overwrites(tmp_path: Path) -> None:
    source, mine_folder = tmp_path / "notebooks", tmp_path / "my"
    output = nbformat.v4.new_output("stream", text="the answer")
    cells = [
        nbformat.v4.new_code_cell('print("ä")', outputs=[output], execution_count=1),
        nbformat.v4.new_markdown_cell("Predict"),
    ]
    (source / "solutions").mkdir(parents=True)
    (source / "figures").mkdir()
    names = ["00_tour.ipynb", "figures/a.png", "solutions/00_tour.ipynb"]
    for name in (names[0], names[2]):
        nbformat.write(nbformat.v4.new_notebook(cells=cells), source / name)
    (source / names[1]).write_bytes(b"\x89PNG")
    (source / "build.py").write_text("not for students")
    assert mine.copy_notebooks(source, mine_folder) == (names, [])
    lesson, solution = (nbformat.read(mine_folder / name, as_version=4) for name in (names[0], names[2]))
    nbformat.validate(lesson)
    assert lesson.cells[0].source == 'print("ä")' and lesson.cells[1].source == "Predict"
    assert lesson.cells[0].outputs == [] and lesson.cells[0].execution_count is None
    assert solution.cells[0].outputs[0].text == "the answer"
    assert (mine_folder / names[1]).read_bytes() == b"\x89PNG" and not (mine_folder / "build.py").exists()
    (mine_folder / names[0]).write_text("the student's answer")
    shutil.copy(source / names[0], source / "01_next.ipynb")
    assert mine.copy_notebooks(source, mine_folder) == (["01_next.ipynb"], names)
    assert (mine_folder / names[0]).read_text() == "the student's answer"


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_lab_ends_jupyterlab(tmp_path: Path, name: str) -> None:
    """A real JupyterLab; before, SIGTERM ended lab.py only and the server went on."""
    for path in ("lab.py", "notebooks/mine.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / "00_tour.ipynb")
    own = {
        name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    command = [sys.executable, "lab.py", "--here", "lab", "--no-browser", "--IdentityProvider.token=t"]
    started = subprocess.Popen(command, cwd=tmp_path, env=os.environ | own, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        server = json.loads(
            eventually(lambda: next((tmp_path / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json")).read_text())
        )
        eventually(lambda: urllib.request.urlopen(f"{server['url']}api/status?token=t", timeout=1))
        os.kill(started.pid, signal.Signals[name])
        started.wait(timeout=60)
        eventually(lambda: os.kill(server["pid"], 0), ends=True)
    finally:
        started.kill()
    assert (tmp_path / "my" / "00_tour.ipynb").is_file()


def eventually(action, *, ends: bool = False, seconds: float = 60):
    """What an action gives as soon as it raises nothing; or, for ends, waits until it raises."""
    limit = time.monotonic() + seconds
    while True:
        try:
            result = action()
        except (OSError, StopIteration, ValueError) as error:
            if ends:
                return error
        else:
            if not ends:
                return result
        assert time.monotonic() < limit, f"not within {seconds} s"
        time.sleep(0.1)


def test_lab_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.shutil, "which", lambda name: None)
    with pytest.raises(lab.LabError, match=r"3\.10 or newer, got 3\.8; install"):
        lab.require_python((3, 8))
    with pytest.raises(lab.LabError, match=r"3 GB free to install, got 0\.5 GB"):
        lab.require_disk(500_000_000)
    monkeypatch.setattr(lab, "has_module", lambda name: name == "venv")
    with pytest.raises(lab.LabError, match="sudo apt install python3-venv"):
        lab.venv_commands()
    monkeypatch.setattr(lab, "has_module", lambda name: name in ("venv", "pip"))
    assert "--without-pip" in lab.venv_commands()[0] and "--python" in lab.venv_commands()[1]


def test_lab_keeps_the_callers_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert lab.lab_env()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert lab.lab_env()["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("command", "layout"), [("tour", "plain"), ("test", "plain"), ("notebooks", "plain"), ("bench", None)]
)
def test_lab_pins_the_layout_where_results_are_compared(monkeypatch, command: str, layout: str | None) -> None:
    seen = {}
    monkeypatch.setattr(lab, "carry_out", lambda words, env: seen.update(env) or 0)
    monkeypatch.delenv("QFTLAB_LAYOUT", raising=False)
    assert lab.main(["--here", command]) == 0 and seen.get("QFTLAB_LAYOUT") == layout
    monkeypatch.setenv("QFTLAB_LAYOUT", "mine")
    assert lab.main(["--here", command]) == 0 and seen["QFTLAB_LAYOUT"] == "mine"


def test_lab_test_runs_tests_and_notebooks_in_one_pytest(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["notebooks", "tests"]
    assert lab.test_command(Path("py"), ["-x"]) == ["py", "-m", "pytest", "--nbval", *lab.workers(), "-x"]
    here = str(Path(__file__))
    assert lab.test_command(Path("py"), ["-q", here]) == ["py", "-m", "pytest", "--nbval", "-q", here]


@pytest.mark.parametrize(("cores", "options"), [(1, []), (2, ["-n", "2"]), (64, ["-n", "4"])])
def test_a_process_for_each_core_four_at_most(monkeypatch, cores: int, options: list[str]) -> None:
    monkeypatch.setattr(lab.os, "cpu_count", lambda: cores)
    assert lab.workers()[:2] == options
    command = lab.command_line("check", Path("py"), ["-x"])
    assert command[-2:] == ["tests", "-x"] and "--nbval" not in command


def test_lab_docs_installs_what_it_needs_once(tmp_path: Path, monkeypatch) -> None:
    """Into .venv; again when a version has changed; and never with --here."""
    installed = []
    monkeypatch.setattr(lab, "VENV", tmp_path)
    monkeypatch.setattr(lab, "install", installed.append)
    for text in ("a", "a", "b"):
        monkeypatch.setattr(lab, "stamp_text", lambda text=text: text)
        lab.add_docs(is_here=False)
    assert installed == ["docs", "docs"] and "[docs]" in lab.install_command("docs")[-1]
    monkeypatch.setattr(lab, "has_module", lambda name: name != "sphinx")
    with pytest.raises(lab.LabError, match=r"Sphinx is not installed here: .*\.\[docs\]"):
        lab.add_docs(is_here=True)
    assert lab.command_line("docs", Path("py"), [])[:3] == ["py", "-m", "sphinx"] and len(installed) == 2


def test_lab_doctor_runs() -> None:
    command = [sys.executable, str(ROOT / "lab.py"), "--here", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("python", "disk", "data", "environment", "threads", "GPU"):
        assert re.search(rf"^{word} ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.long
def test_where_a_browser_is_required_a_skip_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As .ci/run asks for it; before, the browser tests were skipped in CI and nobody saw."""
    for name in ("pyproject.toml", "conftest.py", "tests/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    skipped = '@pytest.mark.{mark}\ndef test_{mark}():\n    pytest.importorskip("no_such_browser")\n'
    tests = "\n".join(skipped.format(mark=mark) for mark in ("browser", "distributed"))
    (tmp_path / "tests" / "test_a.py").write_text(f"import pytest\n\n{tests}")
    monkeypatch.setenv("QFTLAB_BROWSER", "required")
    done = pytest_in(tmp_path, "tests")
    assert "1 failed, 1 skipped" in done.stdout and "could not import 'no_such_browser'" in done.stdout, done.stdout
