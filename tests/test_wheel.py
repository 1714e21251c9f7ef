"""The wheel: it carries data/, which is found from an empty folder, and it runs notebook 00 there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN_NOTEBOOK = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
"""


def run(command: list[str | Path], folder: Path) -> str:
    """The output of a command that must succeed, without this process's Python path."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
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


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel and borrows the other packages from this one.

    A .pth file named in another environment is not followed, so this checkout cannot be seen from there.
    """
    home = tmp_path_factory.mktemp("fresh")
    run([sys.executable, "-m", "venv", "--without-pip", home], home)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
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
    code = "from qftlab.data.bundled import bundled; print(bundled(), sum(p.is_file() for p in bundled().rglob('*')))"
    where, count = run([installed, "-c", code], tmp_path).rsplit(maxsplit=1)
    assert Path(where).name == "_bundled" and ROOT not in Path(where).parents
    assert int(count) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_installed_wheel_runs_notebook_00(installed: Path, tmp_path: Path) -> None:
    notebooks = sorted((ROOT / "notebooks").glob("00*.ipynb"))
    assert notebooks, "notebooks/ has no notebook 00"
    run([installed, "-c", RUN_NOTEBOOK, notebooks[0]], tmp_path)
