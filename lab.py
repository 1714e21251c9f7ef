"""The lab's one door: `python lab.py COMMAND`, see `--help`.

It uses the standard library only. It makes .venv beside this file if that is missing, installs what pyproject.toml
and constraints.txt say, and does so again only when one of them has changed. Linux, macOS and Windows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 10)
PINNED_PYTHON = (3, 11)  # constraints.txt names versions that need it
DOWNLOAD_GB, DISK_GB, WANTED_GB = 1.0, 1.8, 3.0  # the download, what stays on disk, what pip needs while it works

# Run in the decoder's plain layout, the same on every CPU.
PINNED = {"tour", "test", "check", "notebooks", "anywhere", "stages"}
FAST = "not slow and not long and not gpu and not browser and not distributed"  # no notebooks; a test runs ruff

HELP = """commands:
  tour       the whole way in minutes: a small Qwen learns two tokens, to answer, to prefer and to practise
  lab        open JupyterLab at notebook 00, in my/, your own copy of the notebooks
  test       all tests and all notebooks (strict nbval); arguments go to pytest
  check      the fast part of the tests, and ruff over the code; arguments go to pytest
  notebooks  build and run notebooks/*.ipynb from their text form: [NAME ...] [--force]
  bench      the side-by-side benchmarks
  docs       the reference and the pictures of five flows as a site: docs/_build/index.html; no network once installed
  anywhere   tour, tests and training lessons in four numerics and four seeds, in fresh clones; three hours, resumable
  stages     train the course models of data/stages anew
  badges     write the Colab badges for whoever hosts the repository: OWNER/NAME
  doctor     what this machine has, and what to do about what it lacks

Without .venv, each makes it first (about 1 GB to download, 1.8 GB on disk, 2-3 minutes).
--here      (before the command) use the Python that runs this file, for conda or a container: nothing is installed
"""


class LabError(Exception):
    """Something the reader can put right; its text says how."""


def say(text: str = "") -> None:
    """Print one line at once, so that it stands before what a child process prints."""
    print(text, flush=True)


def venv_python(venv: Path = VENV) -> Path:
    """The path of the environment's Python, which differs on Windows."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def lab_env(venv: Path | None = VENV) -> dict[str, str]:
    """The environment of every command: one thread unless the caller chose, and no tokenizer threads."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("PYTHONUTF8", "1")
    if venv is not None:
        env["VIRTUAL_ENV"] = str(venv)
        env["PATH"] = str(venv_python(venv).parent) + os.pathsep + env.get("PATH", "")
        env.pop("PYTHONHOME", None)
    else:  # --here installs nothing: what is imported is this checkout, also by kernels that start in another folder
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env


def require_python(version: tuple[int, ...] = tuple(sys.version_info[:2])) -> None:
    """Raise LabError if this Python is too old, naming a newer one that is installed."""
    if tuple(version) >= OLDEST_PYTHON:
        return
    newer = [name for name in (f"python3.{minor}" for minor in range(13, 9, -1)) if shutil.which(name)]
    way_out = f"{newer[0]} is installed: run `{newer[0]} lab.py tour`" if newer else "install Python 3.11 or newer"
    raise LabError(f"Python must be 3.10 or newer, got {version[0]}.{version[1]}; {way_out}")


def require_disk(free_bytes: int) -> None:
    """Raise LabError if the disk has not the room that an installation takes."""
    if free_bytes < WANTED_GB * 1e9:
        raise LabError(
            f"the disk must have {WANTED_GB:.0f} GB free to install, got {free_bytes / 1e9:.1f} GB at {ROOT}; free some"
            " (`pip cache purge` often frees gigabytes) or move this folder to a larger disk"
        )


def stamp_text() -> str:
    """A digest of all that decides what .venv holds; a different one means: install again."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest() + "\n"


def works(python: Path) -> bool:
    """Whether this Python starts and has pip."""
    try:
        return subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def has_module(name: str) -> bool:
    """Whether this Python could import a module."""
    return importlib.util.find_spec(name) is not None


def venv_commands() -> list[list[str]]:
    """The commands that make .venv with what this Python has; Debian ships Python without ensurepip."""
    if has_module("venv") and has_module("ensurepip"):
        return [[sys.executable, "-m", "venv", str(VENV)]]
    if has_module("virtualenv"):
        return [[sys.executable, "-m", "virtualenv", "--quiet", str(VENV)]]
    if shutil.which("virtualenv"):
        return [["virtualenv", "--quiet", "--python", sys.executable, str(VENV)]]
    if has_module("venv") and has_module("pip"):
        bare = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
        return [bare, [sys.executable, "-m", "pip", "--python", str(venv_python()), "install", "--quiet", "pip"]]
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    raise LabError(
        "this Python cannot make a virtual environment: its module venv or ensurepip is missing. On Debian and Ubuntu:"
        f" `sudo apt install python3-venv` (or {package}); elsewhere `python -m pip install virtualenv`. Then run again"
    )


def make_venv() -> None:
    """Make .venv; what a failed attempt leaves behind is removed."""
    for command in venv_commands():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            tail = (done.stdout + done.stderr).strip()[-1500:]
            raise LabError(f"making .venv failed:\n{tail}\nOn Debian and Ubuntu `sudo apt install python3-venv` helps")


def install_command(extras: str = "lab,test") -> list[str]:
    """The pip command that fills .venv: CI's exact versions where this Python can have them."""
    pins = ["-c", str(ROOT / "constraints.txt")] if sys.version_info[:2] >= PINNED_PYTHON else []
    if not pins:
        say("Python 3.10: pip chooses versions inside pyproject's ranges, as the pinned ones need 3.11 or newer.")
    pip = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    return [*pip, *pins, "-e", f"{ROOT}[{extras}]"]


def install(extras: str = "lab,test") -> None:
    """Fill .venv, log to .venv/install.log, and say every 20 seconds that it goes on."""
    log, began = VENV / "install.log", time.monotonic()
    with log.open("wb") as out:
        pip = subprocess.Popen(install_command(extras), stdout=out, stderr=subprocess.STDOUT, cwd=str(ROOT))
        try:
            while True:
                try:
                    pip.wait(timeout=20)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  installing ... {time.monotonic() - began:.0f} s")
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LabError(
            f"{tail}\n\nThe installation failed (all of it: .venv/install.log). Is there a network, and disk space?"
            " Run the same command again: it goes on where it stopped. If it fails again, remove .venv first"
        )
    say(f"  installed in {time.monotonic() - began:.0f} s")


def ready_python() -> Path:
    """The Python of a .venv that holds what pyproject.toml and constraints.txt say; made or refreshed if need be."""
    require_python()
    python, stamp = venv_python(), VENV / "qftlab.stamp"
    if stamp.is_file() and stamp.read_text() == stamp_text() and python.exists():
        return python
    fresh = not VENV.exists()
    if fresh:
        require_disk(shutil.disk_usage(str(ROOT)).free)
        say(f"First run: setting up .venv (about {DOWNLOAD_GB:.0f} GB to download, {DISK_GB} GB on disk, 2-3 minutes).")
        if platform.system() == "Linux" and shutil.which("nvidia-smi") is None:
            say("No NVIDIA GPU: if pip still fetches CUDA packages (6 GB), see `Troubleshooting` in README.md.")
        make_venv()
    elif not works(python):
        raise LabError("the Python in .venv does not start or has no pip; remove the folder .venv and run again")
    else:
        say("pyproject.toml or constraints.txt has changed, or the last installation was cut short: completing .venv.")
    install()
    stamp.write_text(stamp_text())
    return python


def add_docs(is_here: bool) -> None:
    """Install what the site is built with into .venv, if it does not hold it yet; with --here only look for it."""
    stamp = VENV / "docs.stamp"
    if is_here:
        if not has_module("sphinx"):
            raise LabError('Sphinx is not installed here: `python -m pip install -c constraints.txt -e ".[docs]"`')
    elif not (stamp.is_file() and stamp.read_text() == stamp_text()):
        say("Adding what the site is built with to .venv.")
        install("docs")
        stamp.write_text(stamp_text())


def workers() -> list[str]:
    """pytest-xdist's options: a process for each core, four at most, and a file is one process's work."""
    count = min(4, os.cpu_count() or 1)
    return ["-n", str(count), "--dist", "loadfile", "--no-loadscope-reorder"] if count > 1 else []


def test_command(python: Path, arguments: list[str]) -> list[str]:
    """One pytest run: all that pyproject.toml names, notebooks strictly compared, in parallel; or named paths."""
    named = any(not word.startswith("-") and Path(word.split("::")[0]).exists() for word in arguments)
    return [str(python), "-m", "pytest", "--nbval", *([] if named else workers()), *arguments]


def command_line(command: str, python: Path, arguments: list[str]) -> list[str]:
    """The process that carries out a command."""
    if command == "test":
        return test_command(python, arguments)
    words = {
        "tour": ["-m", "qftlab_course", "tour"],
        "lab": ["notebooks/mine.py"],
        "check": ["-m", "pytest", *workers(), "-q", "-m", FAST, "tests"],
        "notebooks": ["notebooks/build.py"],
        "badges": ["notebooks/build.py", "--badges"],
        "bench": ["-m", "benchmarks.run"],
        "anywhere": ["-m", "benchmarks.anywhere"],
        "stages": ["-m", "qftlab_course", "stages"],
        "docs": ["-m", "sphinx", "-q", "-W", "--keep-going", "docs", "docs/_build"],
    }[command]
    return [str(python), *words, *arguments]


PROBE = """
import importlib.metadata as m, json
found = {}
for name in ("torch", "transformers", "jupyterlab", "nbval", "qftlab"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: found[name] = None
try:
    import torch
    found["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["threads"] = torch.get_num_threads()
except Exception as error:
    found["torch_error"] = str(error)
print(json.dumps(found))
"""


def probe(python: Path) -> dict:
    """What an environment's Python has: versions, CUDA devices, threads; empty if it does not run."""
    try:
        done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, env=lab_env(), timeout=120)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}


def report_environment(python: Path) -> list[str]:
    """Say what .venv holds and return advice."""
    if not python.exists():
        say("environment  none yet (.venv): the first command makes it")
        return []
    found = probe(python)
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "jupyterlab") if found.get(name))
    say(f"environment  {versions or 'does not run, or is empty'}")
    say(f"threads      {found.get('threads', '?')} for torch (OMP_NUM_THREADS={lab_env()['OMP_NUM_THREADS']})")
    say(f"GPU          {', '.join(found.get('cuda') or []) or 'none that torch can use: all lessons run on the CPU'}")
    advice = []
    if found.get("torch_error"):
        advice.append(f"torch does not import ({found['torch_error']}): remove .venv and run again")
    if shutil.which("nvidia-smi") and not found.get("cuda"):
        advice.append("nvidia-smi is here but torch sees no GPU: the driver is too old, or this torch is a CPU build")
    if not found.get("qftlab"):
        advice.append("qftlab is not installed in .venv yet: `python lab.py tour` does it")
    return advice


def doctor(python: Path) -> int:
    """Say what this machine has, then what to do; 1 if the lab cannot run here, else 0."""
    free = shutil.disk_usage(str(ROOT)).free
    weights = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "data").glob("**/*.safetensors"))
    say(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    say(f"disk         {free / 1e9:.1f} GB free")
    say(f"data         {', '.join(weights) or 'data/ holds no model'}")
    fatal = []
    try:
        require_python()
        if not python.exists():
            require_disk(free)
            venv_commands()
    except LabError as error:
        fatal.append(str(error))
    if not weights:
        fatal.append("the bundled model is missing: the clone is incomplete, clone again")
    advice = report_environment(python)
    for line in fatal + advice:
        say(f"* {line}.")
    if not fatal and not advice:
        say("All is well: `python lab.py tour` is next.")
    return 1 if fatal else 0


def carry_out(command: list[str], env: dict[str, str]) -> int:
    """Run a command in ROOT and return its exit status; where there is exec, it takes this process's place.

    So a signal to this process, SIGTERM too, reaches the command: nothing is left running.
    """
    if os.name == "nt":
        return subprocess.run(command, cwd=str(ROOT), env=env).returncode
    os.chdir(str(ROOT))
    os.execve(command[0], command, env)


def main(words: list[str]) -> int:
    """Carry out one command and return its exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python lab.py", epilog=HELP, formatter_class=formatter)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    choices = ["tour", "lab", "test", "check", "notebooks", "bench", "docs", "anywhere", "stages", "badges", "doctor"]
    parser.add_argument("command", choices=choices)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="go to the command")
    args = parser.parse_args(words or ["--help"])
    try:
        if args.command == "doctor":
            return doctor(Path(sys.executable) if args.here else venv_python())
        python = Path(sys.executable) if args.here else ready_python()
        if args.command == "docs":
            add_docs(args.here)
        command = command_line(args.command, python, args.arguments)
    except LabError as error:
        print(f"lab.py: {error}.", file=sys.stderr)
        return 1
    env = lab_env(None if args.here else VENV)
    if args.command in PINNED:
        env.setdefault("QFTLAB_LAYOUT", "plain")
    return carry_out(command, env)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
