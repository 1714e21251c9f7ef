"""How two sides are timed fairly: in one process, in turns, after their answers were compared; and how that is kept."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel")


class MismatchError(Exception):
    """The two sides do not give the same answer, so their times must not be compared."""


@dataclass(frozen=True)
class Options:
    """What a benchmark is told by the command line.

    Args:
        rounds: how often each side is timed.
        quick: tiny sizes that only show that the code runs; bars are not judged.
        device: "cpu" or "cuda".
        deadline: value of `time.monotonic()` after which nothing new is begun.
    """

    rounds: int = 5
    quick: bool = False
    device: str = "cpu"
    deadline: float = math.inf

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")

    def sized(self, full, quick):
        """`full`, or `quick` in a quick run."""
        return quick if self.quick else full

    def is_late(self) -> bool:
        """Whether the time given to the whole run is used up."""
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Benchmark:
    """One id of DESIGN.md's tables; `run` yields a row (from `compare`) whenever it has one."""

    title: str
    against: str
    run: Callable[[Options], Iterator[dict]]
    device: str = "cpu"


@dataclass(frozen=True)
class Side:
    """One of those compared. The first side of a row is ours; `bar` and `aim` of another are ratios ours must reach.

    `run` does the work once and returns its answer (token ids for generation, a loss for training); `rounds` caps how
    often a side too slow for the lease is timed. A side with a `server` (a context manager around all its runs) is
    timed by itself before the others, as its thread would disturb theirs.
    """

    name: str
    run: Callable[[], object]
    bar: float | None = None
    aim: float | None = None
    rounds: int = 1_000
    server: AbstractContextManager | None = None


@dataclass
class _Timed:
    side: Side
    count: float
    seconds: list[float] = field(default_factory=list)

    def take(self, device: str) -> None:
        """One more round."""
        self.seconds.append(timed(self.side.run, device)[0])


def synchronize(device: str) -> None:
    """Waits until the GPU has done what was asked of it; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> tuple[float, object]:
    """Seconds of one call and its answer: process CPU time on the CPU (cores are shared), wall time on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize(device)
    began = clock()
    answer = run()
    synchronize(device)
    return clock() - began, answer


def compare(
    name: str,
    sides: Sequence[Side],
    options: Options,
    *,
    count: Callable[[object], float],
    same: Callable[[object, object], str],
    unit: str = "tokens",
    facts: dict | None = None,
) -> dict:
    """Times the sides in turns, A/B/A/B, after one untimed round in which their answers are compared.

    Args:
        name: of the row.
        sides: ours first.
        options: rounds, device, deadline.
        count: how many real units (tokens, never padding) an answer stands for.
        same: compares our answer with another's: says what was found equal, or raises MismatchError.
        unit: of `count`.
        facts: what else should stand in the row.

    Returns:
        A row: sides with seconds and rate, ratios judged against bars, the others that were skipped and why.

    Raises:
        MismatchError: if an answer differs.
    """
    row = {"name": name, "unit": unit, "checked": {}, "sides": [], "judged": [], "skipped": [], **(facts or {})}
    answer = sides[0].run()
    ours = _Timed(sides[0], count(answer))
    others = [one for side in sides[1:] if (one := _check(side, answer, row, options, count, same))]
    for i in range(options.rounds):
        gc.collect()  # what earlier work left behind shall not be cleared away in one side's time
        for one in [ours, *others]:
            if not one.side.server and i < one.side.rounds and not (i and options.is_late()):
                one.take(options.device)
    row["sides"] = [_side_record(one) for one in [ours, *others]]
    row["judged"] = [_ratio(ours, one, options) for one in others]
    return row


def _check(side: Side, answer, row: dict, options: Options, count, same) -> _Timed | None:
    """Runs another side untimed and compares its answer with ours; None, and a line in the row, if it does not run."""
    try:
        if options.is_late():
            raise TimeoutError("the time given to the run was used up")
        with side.server or nullcontext():
            other = side.run()
            found = same(answer, other)
            one = _Timed(side, count(other))
            for _ in range(min(side.rounds, options.rounds) if side.server else 0):
                one.take(options.device)
    except MismatchError:
        raise
    except Exception as error:  # a competitor that fails is left out by name, and the rest is measured
        row["skipped"].append({"name": side.name, "reason": reason(error)})
        return None
    row["checked"][side.name] = found
    return one


def _side_record(one: _Timed) -> dict:
    rates = [one.count / max(s, 1e-9) for s in one.seconds]
    seconds = [round(s, 6) for s in one.seconds]
    return {
        "name": one.side.name,
        "count": one.count,
        "seconds": spread(seconds),
        "rate": spread(rates),
        "rounds": seconds,
    }


def _ratio(ours: _Timed, other: _Timed, options: Options) -> dict:
    per_unit = zip(ours.seconds, other.seconds, strict=False)  # of the rounds that both did
    values = [(b / other.count) / max(a / ours.count, 1e-12) for a, b in per_unit]
    what = f"times {other.side.name}"
    return judge(what, values, other.side.bar, other.side.aim, is_judged=not options.quick)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def judge(
    what: str,
    values: Sequence[float],
    bar: float | None,
    aim: float | None,
    *,
    at_most: bool = False,
    is_judged: bool = True,
) -> dict:
    """A figure with its spread beside its bar and aim.

    Args:
        what: names the figure and its unit.
        values: one a round.
        bar, aim: what the median must reach; None where there is none.
        at_most: whether smaller is better.
        is_judged: False in a quick run, whose sizes are not those of the bar.

    Returns:
        Fields what, median, min, max, bar, aim and reached: "aim", "bar", "below" or "not judged".
    """
    found = spread(values)
    sign = -1 if at_most else 1
    reached = "not judged"
    if is_judged and bar is not None:
        goals = {"aim": bar if aim is None else aim, "bar": bar}
        reached = next((word for word, goal in goals.items() if sign * found["median"] >= sign * goal), "below")
    return {"what": what, **found, "bar": bar, "aim": aim, "reached": reached}


def reason(error: BaseException) -> str:
    """An error as one line without any path of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(?:[A-Za-z]:)?[\\/][\w.\\/-]*[\\/]", "", text)[:300]


def machine(device: str) -> str:
    """The processor's or GPU's name; never a host name."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and those packages of the comparison that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with "+" if library or benchmarks differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "qftlab", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def new_record(name: str, benchmark: Benchmark, options: Options) -> dict:
    """What a result file says before its first row."""
    return {
        "id": name,
        "title": benchmark.title,
        "against": benchmark.against,
        "machine": machine(options.device),
        "device": options.device,
        "clock": "wall seconds, synchronised" if options.device == "cuda" else "process CPU seconds",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "quick": options.quick,
        "status": "partial",
        "rows": [],
        "problems": [],
    }


def measure(name: str, benchmark: Benchmark, options: Options, folder: Path) -> dict:
    """Runs one benchmark, writes its file after every row, and returns the record; what fails is noted in it.

    `status` is "complete" once all rows are there, "partial" where a run was killed or ran late, "failed" after an
    error or an answer that differs.
    """
    record = new_record(name, benchmark, options)
    slug = re.sub(r"[^a-z0-9]+", "-", record["machine"].lower()).strip("-")
    path = folder / f"{slug}-{name}.json"
    try:
        for row in benchmark.run(options):
            record["rows"].append(row)
            write(path, record)
            if options.is_late():
                record["problems"].append("the time given to the run was used up")
                break
        else:
            record["status"] = "complete"
    except Exception as error:  # one benchmark's failure must not cost the others their results
        record["status"] = "failed"
        record["problems"].append(reason(error))
    write(path, record)
    return record


def write(path: Path, record: dict) -> None:
    """Writes a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def table(record: dict) -> str:
    """A record as lines for a terminal."""
    lines = [f"{record['id']}  {record['title']}  [{record['machine']}, {record['clock']}, {record['status']}]"]
    for row in record["rows"]:
        lines.append(f"  {row['name']}")
        for side in row["sides"]:
            seconds = side["seconds"]
            lines.append(
                f"    {side['name']:<40.40} {seconds['median']:9.4f} s ({seconds['min']:.4f} to {seconds['max']:.4f})"
                f" {side['rate']['median']:12,.0f} {row['unit']}/s"
            )
        lines += [f"    -> {_verdict(one)}" for one in row["judged"]]
        lines += [f"    checked against {name}: {found}" for name, found in row["checked"].items()]
        lines += [f"    left out: {one['name']}: {one['reason']}" for one in row["skipped"]]
    return "\n".join(lines + [f"  problem: {text}" for text in record["problems"]])


def _verdict(one: dict) -> str:
    goals = f"bar {one['bar']:g}" if one["bar"] is not None else ""
    goals += f", aim {one['aim']:g}" if one["aim"] is not None else ""
    verdict = f": {goals}: {one['reached']}" if goals else ""
    return f"{one['median']:,.2f} ({one['min']:,.2f} to {one['max']:,.2f}) {one['what']}{verdict}"
