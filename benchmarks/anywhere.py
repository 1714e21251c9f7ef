"""Whether the lab's promises hold on other machines and seeds: `python lab.py anywhere`; hours, resumable, by commit.

A cell is the tour or the tests in one variant of the numerics, or one training lesson with another seed. Each runs in a
clone of its own, so nothing that was trained before is found, and leaves a log and a record in runs/anywhere/<commit>/.
A second call runs what has no record yet. `--only tour,test,seeds`, `--variants plain,avx2`, `--jobs 2`; `--again` runs
what failed once more. The Python that runs this file runs the clone's code, because PYTHONPATH puts the clone first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from benchmarks.harness import machine
from benchmarks.records import NUMERICS

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {**NUMERICS, "two-threads": {"OMP_NUM_THREADS": "2"}}  # "plain": as it is
TRAINED = ("00_tour", "03_training_loop", "05_lora", "06_teacher_data", "07_dpo", "08_rloo")
SEEDS = (1, 2, 3, 4)
KINDS = ("tour", "test", "seeds")
LIMIT = 2 * 3600  # seconds; no cell takes a quarter of it


@dataclass(frozen=True)
class Cell:
    """A row of the table: its name, the command (after the Python) in its clone, and what its environment has more."""

    kind: str
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def cells(kinds: list[str], variants: list[str]) -> list[Cell]:
    """The matrix: `make tour` and `make test` in each variant, and each lesson that trains with each seed."""
    found = [
        Cell(kind, f"{kind}-{name}", ("lab.py", "--here", kind), VARIANTS[name])
        for kind in ("tour", "test") if kind in kinds for name in variants
    ]  # fmt: skip
    if "seeds" in kinds:
        run = ("-m", "benchmarks.anywhere", "--notebook")
        found += [Cell("seeds", f"{name}-seed-{n}", (*run, name, str(n))) for name in TRAINED for n in SEEDS]
    return found


def with_seed(path: Path, seed: int):
    """A notebook whose cell `parameters` says `SEED = seed`.

    Raises:
        ValueError: where that cell has no such line.
    """
    notebook, changed = nbformat.read(path, as_version=4), 0
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source, changed = re.subn(r"^SEED = \d+", f"SEED = {seed}", cell.source, flags=re.MULTILINE)
    if changed != 1:
        raise ValueError(f"{path.name}: its cell `parameters` must have one line `SEED = …`, got {changed}")
    return notebook


def run_notebook(path: Path, seed: int) -> None:
    """Run a lesson to its end with another seed; its outputs are not compared; a cell that fails raises."""
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(with_seed(path, seed), timeout=LIMIT, kernel_name="python3", resources=where).execute()


def environment(clone: Path, cell: Cell) -> dict[str, str]:
    """The caller's environment with the cell's variant, and the clone before all that is installed."""
    pinned = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "QFTLAB_LAYOUT": "plain"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**pinned, **os.environ, **cell.environment, "PYTHONPATH": str(clone), "PATH": path}


def first_failure(log: str) -> str:
    """The line of a log that says best what went wrong."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"^(FAILED|ERROR) ", r"\bmissed\b", r"^\w*(Error|Exception)\b"):
        if found := [line for line in lines if re.search(pattern, line)]:
            return found[0][:160]
    return lines[-1][:160] if lines else "no output"


class Run:
    """A cell that runs in a fresh clone, until `finish` or `stop`."""

    def __init__(self, cell: Cell, commit: str, folder: Path) -> None:
        self.cell, self.commit, self.folder = cell, commit, folder
        self.place = tempfile.TemporaryDirectory(prefix="qftlab-anywhere-", ignore_cleanup_errors=True)
        clone = Path(self.place.name) / "qftlab"
        subprocess.run(["git", "clone", "-q", "-n", str(ROOT), str(clone)], check=True)
        subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=clone, check=True)
        env = environment(clone, cell)
        where = [sys.executable, "-c", "import qftlab; print(qftlab.__file__)"]
        used = subprocess.run(where, cwd=self.place.name, env=env, check=True, capture_output=True, text=True).stdout
        if clone not in Path(used.strip()).parents:
            raise RuntimeError(f"the clone's own code must run, got {used.strip()}")
        self.log, self.began = folder / f"{cell.name}.log", time.monotonic()
        command = [sys.executable, *cell.command]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=clone, env=env, stdout=out, stderr=out)

    def is_over(self) -> bool:
        """Whether it has ended, by itself or because its time is up."""
        if self.process.poll() is None and time.monotonic() - self.began > LIMIT:
            self.process.kill()
            self.process.wait()
        return self.process.returncode is not None

    def finish(self) -> dict:
        """Write the record of a cell that is over, and return it."""
        seconds, log = time.monotonic() - self.began, self.log.read_text(encoding="utf-8", errors="replace")
        passed = self.process.returncode == 0
        record = {
            "cell": self.cell.name, "commit": self.commit, "passed": passed, "exit": self.process.returncode,
            "seconds": round(seconds), "counts": " ".join(re.findall(r"\d+ (?:failed|passed|error)", log[-2000:])),
            "first_failure": "" if passed else first_failure(log), "environment": self.cell.environment,
            "machine": f"{machine('cpu')}, {os.cpu_count()} cores",
        }  # fmt: skip
        part = self.folder / f"{self.cell.name}.part"
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / f"{self.cell.name}.json")
        self.place.cleanup()
        return record

    def stop(self) -> None:
        """End a cell that is not over; it leaves no record."""
        self.process.terminate()
        self.process.wait()
        self.place.cleanup()


def table(records: list[dict], wanted: int) -> str:
    """The records as a markdown table, with a last line that counts."""
    rows = ["| cell | passed | seconds | counts | first failure |", "|---|---|---|---|---|"]
    for r in records:
        failure = r["first_failure"].replace("|", "\\|")
        rows.append(f"| {r['cell']} | {'yes' if r['passed'] else 'no'} | {r['seconds']} | {r['counts']} | {failure} |")
    return "\n".join([*rows, "", f"{sum(r['passed'] for r in records)} of {wanted} cells passed"])


def read(cell: Cell, folder: Path, again: bool) -> dict | None:
    """The record of a cell, if there is one; a failed one is none where it is to be run again."""
    path = folder / f"{cell.name}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if record and again and not record["passed"] else record


def run(matrix: list[Cell], commit: str, folder: Path, jobs: int, again: bool = False) -> list[dict]:
    """The records of a matrix: those that are there, and those made now, `jobs` cells at once.

    Tests take all cores, so one cell of them runs at a time, and alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = {cell.name: read(cell, folder, again) for cell in matrix}
    waiting = sorted((cell for cell in matrix if records[cell.name] is None), key=lambda cell: cell.kind == "test")
    running: list[Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < (1 if waiting[0].kind == "test" else jobs):
                running.append(Run(waiting.pop(0), commit, folder))
            time.sleep(0.2)
            for done in [one for one in running if one.is_over()]:
                running.remove(done)
                record = records[done.cell.name] = done.finish()
                passed = "passed" if record["passed"] else "FAILED"
                print(f"{done.cell.name}: {passed}, {record['seconds']} s", flush=True)
    finally:
        for one in running:
            one.stop()
    return [records[cell.name] for cell in matrix]


def subset(known: tuple[str, ...]):
    """A parser of comma-separated words that are all known."""

    def words(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return found

    return words


def main(arguments: list[str]) -> int:
    """Run what is missing, write and print the table, and return 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="lab.py anywhere", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=subset(KINDS), default=list(KINDS))
    parser.add_argument("--variants", type=subset(tuple(VARIANTS)), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="tours and lessons at once")
    parser.add_argument("--again", action="store_true", help="run failed cells once more")
    parser.add_argument("--notebook", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.notebook:
        run_notebook(ROOT / "notebooks" / f"{args.notebook[0]}.ipynb", int(args.notebook[1]))
        return 0
    git = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **git).stdout.strip()
    if subprocess.run(["git", "status", "--porcelain"], **git).stdout:
        print("What is not committed is not in the clones.", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, matrix = ROOT / "runs" / "anywhere" / commit[:12], cells(args.only, args.variants)
    records = run(matrix, commit, folder, args.jobs, args.again)
    text = table(records, len(matrix))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(record["passed"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
