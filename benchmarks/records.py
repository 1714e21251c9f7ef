"""Recorded runs of the lessons: `python -m benchmarks.records 08_leash 08_hack`, kept in data/records/.

A lesson that trains for longer than a reader waits shows a recorded run. Its cells tagged `recorded` hold the functions
that make it; here they run as they stand in notebooks/source/, in a process of their own for each draw (a seed under
some numerics), and what an expression of RECORDS gives there is kept. Stop it when you like: draws that are there are
not made again. After a change of the functions, delete the file first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext

from benchmarks.harness import machine
from qftlab.files import aside
from qftlab_course.lessons.preferences import by_length

ROOT = Path(__file__).resolve().parent.parent
SOURCES, FOLDER = ROOT / "notebooks/source", ROOT / "data/records"
# Other CPUs compute the last bits of a product in another order; these settings let one CPU do so too.
NUMERICS = {
    "plain": {},
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
# Such short runs hardly know numerics apart (equal to the third decimal), so seeds make the spread.
DRAWS = [(seed, "plain") for seed in range(8)] + [(0, "default"), (0, "avx2")]
# What is evaluated beside a lesson's tagged cells, with SEED set: a dict for JSON.
RECORDS: dict[str, str] = {
    "05_lora": "{name: run_path(*RUNS[name], STEPS, SEED) for name in RUNS}",
    "07_wreck": "{'before': solves(start.model, SEED)} | {name: run_dpo(*RUNS[name], SEED)[1] for name in RUNS}",
    "07_style": "{ending: run_style(ending, SEED) for ending in (ENDING, UNKNOWN)}",
    "07_judges": "{name: {'marks': marks} | by_length(scores, answers, LENGTHS)"
    " | best_of_curve(scores, answers, SIZES, checks.reference_of(checks.get_exercise('07.5')))"
    " for answers, judges in [run_judges(SEED)] for name, (marks, scores) in judges.items()}",
    "08_leash": "{f'{beta:g}': run_leash(beta, KL_STEPS, SEED) for beta in BETAS}",
    "08_hack": "{kind: run_course(student, pays, HACK_STEPS, SEED) for student in [lazy_model(SEED)]"
    " for kind, pays in [('hack', quick_verifier), ('repaired', countdown_reward)]}",
    "08_leashed_hack": "{f'{beta:g}': run_course(student, quick_verifier, HACK_STEPS, SEED, beta)"
    " for student in [lazy_model(SEED)] for beta in BETAS[1:]}",
}


def tagged_cells(name: str, *tags: str) -> list[str]:
    """The code cells with one of these tags, in the lesson whose number a record's name begins with."""
    (source,) = SOURCES.glob(f"{name[:2]}_*.py")
    cells = jupytext.read(source, fmt="py:percent").cells
    return [c.source for c in cells if c.cell_type == "code" and {*tags} & {*c.metadata.get("tags", [])}]


def settings(name: str) -> dict:
    """What the lesson's cell of parameters sets, as JSON has it; SEED is each run's own."""
    values: dict = {}
    exec("\n".join(tagged_cells(name, "parameters")), {}, values)
    return json.loads(json.dumps({key: value for key, value in values.items() if key != "SEED"}))


def draw(name: str, seed: int) -> dict:
    """One run in this process: the tagged cells, then the record's expression."""
    space = {"__name__": "lesson", "by_length": by_length}
    for cell in tagged_cells(name, "parameters", "recorded"):
        exec(compile(cell, name, "exec"), space)
        space["SEED"] = seed
    return eval(RECORDS[name], space)


def rounded(value):
    """The same with floats at four decimals."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def make(name: str) -> Path:
    """The file of a record, with every draw that was missing.

    Raises:
        ValueError: if the file was made with other parameters of the lesson.
    """
    path = FOLDER / f"{name}.json"
    record = {"settings": settings(name), "machine": machine("cpu"), "runs": []}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != settings(name):
            raise ValueError(f"{path.name} must have the lesson's parameters, got {record['settings']}: delete it")
    for seed, numerics in DRAWS:
        if any((run["seed"], run["numerics"]) == (seed, numerics) for run in record["runs"]):
            continue
        command = [sys.executable, "-m", "benchmarks.records", "--draw", name, str(seed)]
        environment = os.environ | {"QFTLAB_LAYOUT": "plain", "OMP_NUM_THREADS": "1"} | NUMERICS[numerics]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        record["runs"].append({"seed": seed, "numerics": numerics, **json.loads(done.stdout.splitlines()[-1])})
        with aside(path) as place:
            place.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def main(words: list[str]) -> int:
    """The command line: names of records (all without one), or `--draw NAME SEED`, which prints one run."""
    if words[:1] == ["--draw"]:
        print(json.dumps(rounded(draw(words[1], int(words[2])))))
    else:
        for name in words or RECORDS:
            print(make(name).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
