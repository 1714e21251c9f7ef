"""The project: environment.yml, the pins, the badges and what is committed keep their word."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(f"qftlab_script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files_of_the_project() -> list[Path]:
    """Tracked files and those that would be; git's ignore rules apply."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_environment_yml_is_pyproject() -> None:
    """conda-forge gives what is compiled, torch's CPU build unless the user writes another; pip would bring CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {*project["dependencies"], *sum((project["optional-dependencies"][x] for x in ("lab", "test")), [])}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert conda[:2] == ["python=3.11", "pip"] and environment["channels"] == ["conda-forge"]
    assert {entry.replace("pytorch-cpu>", "torch>") for entry in conda[2:]} | set(pip) == wanted
    assert len(conda[2:]) + len(pip) == len(wanted), "each from one place: conda's pip upgrades what it is given"
    assert not [entry for entry in pip if not entry[0].isalpha()], "an option or a path depends on the folder"
    compiled = "accelerate datasets ipywidgets jupyterlab matplotlib numpy pandas peft pyyaml safetensors scipy"
    assert {*compiled.split(), "pytorch-cpu", "tokenizers", "transformers"} <= {
        re.split("[=<>]", entry)[0] for entry in conda
    }


def test_here_imports_this_checkout_from_any_folder(tmp_path: Path) -> None:
    """As conda's environment has no qftlab installed; -S hides what this one has."""
    env = load("lab.py").lab_env(None)
    code = "import qftlab; print(qftlab.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == ROOT / "qftlab" / "__init__.py", done.stderr


def test_constraints_pin_every_direct_dependency() -> None:
    rows = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(row.lower().split("==") for row in rows if row and not row.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.split(r"[=<>\[~! ]", entry)[0].lower() for entry in wanted}
    assert names <= set(pins), f"not pinned: {sorted(names - set(pins))}"
    assert pins["torch"] == "2.13.0"


def test_no_registry_host_and_no_path_of_a_machine() -> None:
    """The parts are joined here, so that this file does not hold what it forbids."""
    hosts = ["py" + "pi.org", "python" + "hosted", "registry.npm" + "js", "download.py" + "torch"]
    paths = ["/wo" + "rk/", "/ro" + "ot/", "/opt/py" + "pi", "/opt/wh" + "eels", "file://" + "/"]
    forbidden = re.compile("|".join(map(re.escape, hosts + paths)).encode())
    found = [str(p.relative_to(ROOT)) for p in files_of_the_project() if forbidden.search(p.read_bytes())]
    assert not found, f"a registry host or a path of one machine stands in {found}"


def test_ruff_is_clean() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_badges_are_written_once(tmp_path: Path) -> None:
    build = load("notebooks/build.py")
    (tmp_path / "source").mkdir()
    text = tmp_path / "source" / "00_demo.py"
    text.write_text("# %% [markdown]\n# # Demo\n# Hello.\n\n# %%\n1 + 1\n")
    target = build.pairs(tmp_path)[0][1]
    notebook = build.from_text(text)
    notebook.cells[1].execution_count = 1
    build.nbformat.write(notebook, target)
    build.write_badge(text, target, "ann/lab", tmp_path)
    once = text.read_text(), target.read_text()
    assert all("github/ann/lab/blob/main/notebooks/00_demo.ipynb" in form for form in once)
    assert build.differences(text, target) == []
    build.write_badge(text, target, "ann/lab", tmp_path)
    assert (text.read_text(), target.read_text()) == once
    build.write_badge(text, target, "bob/fork", tmp_path)
    assert text.read_text().count("Open in Colab") == 1 and "ann/lab" not in text.read_text() + target.read_text()


def setup_cells() -> dict[str, list[str]]:
    """The cells tagged `setup` of each lesson and solution, by the name of its text form."""
    build = load("notebooks/build.py")
    notebooks = {text: build.from_text(text) for text, _ in build.pairs()}
    return {
        text.relative_to(ROOT).as_posix(): [c.source for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        for text, notebook in notebooks.items()
    }


def test_every_notebook_has_the_one_setup_cell() -> None:
    """Short, the same everywhere, and the only address of a repository is a badge."""
    cells = setup_cells()
    wanted = cells["notebooks/source/00_tour.py"][:1]
    assert not [name for name, found in cells.items() if found != wanted], "another setup cell than 00's"
    lines = [line for line in wanted[0].splitlines() if line.strip()]
    assert len(lines) <= 8 and max(map(len, lines)) <= 88
    for name in cells:
        prose = [row for row in (ROOT / name).read_text(encoding="utf-8").splitlines() if "Open in Colab" not in row]
        assert not re.search(r"github[.com]*/[\w.-]+/[\w.-]+/blob/", "\n".join(prose)), name


COPY = {
    "metadata": {"colab": {"provenance": [{"file_id": "https://github.com/ann/lab/blob/spring/25/notebooks/00.ipynb"}]}}
}
BADGED = {"cells": [{"source": ["# 00\n", "[![Open in Colab](x.svg)](https://colab.research.google.com/github/eve/qft.lab/"
                                "blob/main/notebooks/solutions/01_tokens.ipynb)"]}]}  # fmt: skip


@pytest.mark.parametrize(
    ("opened", "notebook", "source"),
    [
        ("fileId=https%3A%2F%2Fgithub.com%2Fbob%2Ffork%2Fblob%2Fmain%2Fnotebooks%2F00_tour.ipynb", {}, "bob/fork@main"),
        ("fileId=https%3A%2F%2Fgithub.com%2Fbob%2Ffork%2Fblob%2Fmain%2Fnotebooks%2F00.ipynb", BADGED, "bob/fork@main"),
        ("fileId=1wJVqk0", COPY, "ann/lab@spring/25"),
        ("fileId=1wJVqk0", BADGED, "eve/qft.lab@main"),
        ("curl: (7) Failed to connect to host", BADGED, "eve/qft.lab@main"),
        ("fileId=1wJVqk0", {"cells": [{"source": "see github.com/x/y/blob/main/README.md"}]}, None),
    ],
)
def test_the_setup_cell_installs_from_where_the_notebook_came(monkeypatch, opened, notebook, source) -> None:
    """Opened from GitHub, copied to Drive, or with a badge; what Colab's server and page would answer is given."""
    ran, asked = [], []
    shell = SimpleNamespace(getoutput=lambda command: [f'[{{"path": "{opened}"}}]'], system=ran.append)
    message = SimpleNamespace(blocking_request=lambda kind: asked.append(kind) or {"ipynb": notebook})
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(_message=message))
    cell = setup_cells()["notebooks/source/00_tour.py"][0]
    if source is None:
        with pytest.raises(AssertionError, match="put here instead: !pip install git.https://github.com/OWNER/NAME"):
            exec(cell, {"get_ipython": lambda: shell})
    else:
        exec(cell, {"get_ipython": lambda: shell})
        assert ran == [f"pip install -q git+https://github.com/{source}"] and asked == ["get_ipynb"]
