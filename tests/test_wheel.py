"""The wheel: it carries data/, all that lessons import and read is there, and notebook 00 runs from an empty folder.

On Colab it is what the setup cell installs; the last test runs that cell in a kernel, with real git, pip and curl.
"""

from __future__ import annotations

import ast
import http.server
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest

from qftlab_course.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks" / "source").rglob("[0-9]*.py"))
RUN_NOTEBOOK = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
"""


# All that Colab has of its own and the setup cell asks: the notebook, as its page sends it.
COLAB = """
import json, os
from types import SimpleNamespace
_message = SimpleNamespace(blocking_request=lambda kind: {"ipynb": json.loads(os.environ["NOTEBOOK"])})
"""


def run(command: list[str | Path], folder: Path, **more: str) -> str:
    """The output of a command that must succeed, without this process's Python path; `more` goes to its environment."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | more
    done = subprocess.run([str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built with the environment's own hatchling."""
    pytest.importorskip("hatchling", reason="hatchling comes with the extra [test]")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    return folder


def fresh(home: Path) -> tuple[Path, Path]:
    """The Python of an environment without qftlab that borrows the other packages from this one, and its site-packages.

    A .pth file named in another environment is not followed, so this checkout cannot be seen from there.
    """
    run([sys.executable, "-m", "venv", "--without-pip", home], home.parent)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel."""
    home = tmp_path_factory.mktemp("fresh")
    python, site = fresh(home)
    wheel = next(built.glob("*.whl"))
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], home)
    return python


def test_wheel_and_sdist_carry_every_file_of_data(built: Path) -> None:
    in_checkout = {p.relative_to(ROOT / "data").as_posix() for p in (ROOT / "data").rglob("*") if p.is_file()}
    in_checkout = {name for name in in_checkout if "__pycache__" not in name}
    assert in_checkout, "data/ is empty"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert in_checkout <= {name.removeprefix("qftlab/_bundled/") for name in names}
    assert not [name for name in names if name.startswith(("tests/", "notebooks/", "data/"))]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        assert in_checkout <= {name.partition("/data/")[2] for name in sdist.getnames()}


def test_installed_wheel_finds_the_data_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "from qftlab.files import bundled; print(bundled(), sum(p.is_file() for p in bundled().rglob('*')))"
    where, count = run([installed, "-c", code], tmp_path).rsplit(maxsplit=1)
    assert Path(where).name == "_bundled" and ROOT not in Path(where).parents
    assert int(count) > 0


def wanted_of(lesson: Path) -> tuple[list[str], list[list[str]]]:
    """The import statements of a lesson, wherever they stand, and the arguments of its calls of `bundled`."""
    nodes = list(ast.walk(ast.parse(lesson.read_text(encoding="utf-8"))))
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "bundled"]
    paths = [[a.value for a in n.args] for n in calls if all(isinstance(a, ast.Constant) for a in n.args)]
    return [ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)], paths


@pytest.mark.long
def test_installed_wheel_has_what_every_lesson_imports_and_reads(installed: Path, tmp_path: Path) -> None:
    """Stages and records among it; a lesson's own run is the business of `lab.py anywhere`."""
    wanted = [wanted_of(lesson) for lesson in LESSONS]
    lines = sorted({line for imports, _ in wanted for line in imports})
    paths = sorted({tuple(path) for _, found in wanted for path in found if path})
    assert len(lines) > 30 and len(paths) > 3
    code = "from qftlab.files import bundled\nfrom qftlab_course.stages import STAGES, stage\n"
    code += "".join(f"{line}\n" for line in lines)
    code += f"assert all([bundled(*path).is_file() for path in {paths}])\n"  # it names what is not there
    code += "print([bundled() in stage(name).path.parents for name in STAGES])"
    assert run([installed, "-c", code], tmp_path).splitlines()[-1] == str([True] * len(STAGES)), "one was trained here"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Colab is Linux; its pip is a shell script here")
def test_the_setup_cell_installs_the_wheel_that_git_gives(tmp_path: Path) -> None:
    """As Colab runs it, but that git takes this repository for ann/lab and pip builds with the hatchling it has."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    python, site = fresh(tmp_path / "env")
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text(COLAB)
    (site / "colab.pth").write_text("import google.colab\n")  # there before the first cell, as on Colab
    pip = python.with_name("pip")
    pip.write_text(f'#!/bin/sh\nexec "{python}" -m pip "$@"\n')
    pip.chmod(0o755)
    text = LESSONS[0].read_text(encoding="utf-8")
    setup = text.partition('# %% tags=["setup"]\n')[2].partition("# %%")[0]
    where = "import qftlab; from qftlab.files import bundled; print(qftlab.__file__, bundled('tiny'))"
    cells = [nbformat.v4.new_code_cell(source) for source in (setup, where)]
    notebook = json.dumps(nbformat.v4.new_notebook(cells=cells))
    (tmp_path / "a.ipynb").write_text(notebook)
    commit = run(["git", "rev-parse", "HEAD"], ROOT).strip()
    address = quote(f"https://github.com/ann/lab/blob/{commit}/notebooks/00_tour.ipynb", safe="")

    class Sessions(http.server.BaseHTTPRequestHandler):
        """Colab's list of sessions."""

        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([{"path": f"fileId={address}"}]).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sessions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code = RUN_NOTEBOOK + "print(notebook.cells[1].outputs[0].text)"
        said = run([python, "-c", code, "a.ipynb"], tmp_path, NOTEBOOK=notebook, COLAB_JUPYTER_IP="127.0.0.1",
                   KMP_TARGET_PORT=str(server.server_port), PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}",
                   PIP_NO_BUILD_ISOLATION="0", PIP_NO_INDEX="1", GIT_CONFIG_COUNT="1",
                   GIT_CONFIG_KEY_0=f"url.{ROOT.as_uri()}.insteadOf",
                   GIT_CONFIG_VALUE_0="https://github.com/ann/lab")  # fmt: skip
    finally:
        server.shutdown()
    assert [Path(place).is_relative_to(site / "qftlab") for place in said.split()] == [True, True], said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_installed_wheel_runs_notebook_00(installed: Path, tmp_path: Path) -> None:
    notebooks = sorted((ROOT / "notebooks").glob("00*.ipynb"))
    assert notebooks, "notebooks/ has no notebook 00"
    run([installed, "-c", RUN_NOTEBOOK, notebooks[0]], tmp_path)
