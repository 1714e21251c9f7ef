"""Runs benchmarks by their ids: `python benchmarks/run.py C1 C2`, `cpu`, `gpu` or `all`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where each id is measured; a module that is not there yet is named, not imported.
MODULES = {
    "generation": ("C1", "C2", "C3", "C7", "G3", "G4", "G5"),
    "training": ("C4", "G1", "G2"),
    "preference": ("C5",),
    "policy": ("C6", "G6"),
    "adapters": ("G7",),
    "rows": ("C9",),
}
IDS = sorted(name for names in MODULES.values() for name in names)
GPU_SECONDS = 540  # a lent machine gives one command 600 seconds


def selection(words: list[str]) -> list[str]:
    """Ids meant by words such as C1, cpu, gpu and all, each once, in the order of the tables.

    Raises:
        ValueError: for an unknown word.
    """
    groups = {"all": IDS, "cpu": [i for i in IDS if i[0] == "C"], "gpu": [i for i in IDS if i[0] == "G"]}
    wanted = set()
    for word in words:
        found = groups.get(word.lower(), [word.upper()])
        if not set(found) <= set(IDS):
            raise ValueError(f"a benchmark must be one of {', '.join([*groups, *IDS])}, got {word!r}")
        wanted |= set(found)
    return [name for name in IDS if name in wanted]


def find(name: str):
    """The Benchmark of an id, or a line that says why there is none."""
    module = next(module for module, names in MODULES.items() if name in names)
    if importlib.util.find_spec(f"benchmarks.{module}") is None:
        return f"benchmarks/{module}.py is not there yet"
    found = importlib.import_module(f"benchmarks.{module}").BENCHMARKS
    return found.get(name) or f"benchmarks/{module}.py does not measure it yet"


def run(names: list[str], options, folder: Path, device: str | None) -> int:
    """Measures one id after the other and prints its table; 1 if any failed.

    Args:
        names: ids.
        options: rounds, quick, deadline; the device is each benchmark's own unless `device` says otherwise.
        folder: of the result files.
        device: "cpu" makes a quick run of GPU benchmarks on the CPU.
    """
    from dataclasses import replace

    import torch

    from benchmarks.harness import measure, table

    failed = []
    for name in names:
        benchmark = find(name)
        where = device or (benchmark.device if not isinstance(benchmark, str) else "cpu")
        why = benchmark if isinstance(benchmark, str) else None
        if where == "cuda" and not torch.cuda.is_available():
            why = "needs a CUDA device (--device cpu --quick tries the code without one)"
        if why or options.is_late():
            print(f"{name}  skipped: {why or 'the time given to the run was used up'}", flush=True)
            continue
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if where == "cpu" else threads)
        record = measure(name, benchmark, replace(options, device=where), folder)
        torch.set_num_threads(threads)
        print(table(record), flush=True)
        if record["status"] == "failed":
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("ids", nargs="*", default=["cpu"], help="ids of DESIGN.md's tables, or cpu, gpu, all")
    parser.add_argument("--rounds", type=int, default=None, help="how often each side is timed (5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the code runs, judges nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu: GPU benchmarks on the CPU, with --quick only")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results; quick: runs/benchmarks)")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new is begun (with a GPU 540)")
    args = parser.parse_args(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from benchmarks.harness import Options

    try:
        names = selection(args.ids)
        on_gpu = [name for name in names if name[0] == "G"]
        if args.device == "cpu" and on_gpu and not args.quick:
            raise ValueError(f"--device cpu must come with --quick for {', '.join(on_gpu)}: their sizes need a GPU")
        if args.device == "cuda" and len(on_gpu) < len(names):
            raise ValueError("--device cuda must come with G ids only: the C ids are measured on the CPU")
        seconds = args.budget or (GPU_SECONDS if on_gpu and args.device != "cpu" else math.inf)
        options = Options(args.rounds or (2 if args.quick else 5), args.quick, "cpu", time.monotonic() + seconds)
    except ValueError as error:
        parser.error(str(error))
    folder = args.out or ROOT / ("runs/benchmarks" if args.quick else "benchmarks/results")
    return run(names, options, folder, args.device)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # as `python benchmarks/run.py` puts benchmarks/ there instead
    sys.exit(main())
