"""Writes the bundled rows: what SFT trains on, and the held-out problems every score is measured on."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from qftlab.data import bugfix, countdown
from qftlab.data.instructions import SKILLS, random_problem

TRAIN_ROWS = {
    "sum_to_n": 90,
    "capital": 36,
    "university": 44,
    "joke": 240,
    "multiply": 100,
    "spell": 130,
    "length": 130,
}
HELD_OUT_ROWS = {"sum_to_n": 11, "capital": 4, "university": 5, "joke": 20, "multiply": 12, "spell": 18, "length": 18}


def _unique(draw: Callable[[], object], count: int, taken: set[str]) -> list:
    """`count` different things (or as many as 200 draws in a row still find), none of them in `taken`."""
    found, misses = [], 0
    while len(found) < count and misses < 200:
        thing = draw()
        if thing.key in taken:
            misses += 1
            continue
        taken.add(thing.key)
        found.append(thing)
        misses = 0
    return found


def instruction_rows(*, held_out: bool, seed: int = 0, default: int | None = None) -> list[dict]:
    """Rows of every skill: 500 a skill to train on, 40 held out, fewer where a skill has fewer problems."""
    default = default or (40 if held_out else 500)
    counts = HELD_OUT_ROWS if held_out else TRAIN_ROWS
    rng = random.Random(f"instructions {held_out} {seed}")
    rows = []
    for skill in SKILLS:
        problems = _unique(
            lambda skill=skill: random_problem(rng, skill, held_out=held_out), counts.get(skill, default), set()
        )
        # The notation of pretraining, in which evaluate/kept.py asks what training must not lose.
        rows += [{**p.row(), "plain": p.plain} if held_out else p.row() for p in problems]
    rng.shuffle(rows)
    return rows


def countdown_rows(count: int, *, held_out: bool, seed: int = 0) -> list[dict]:
    """`count` different Countdown problems with one solution each."""
    rng = random.Random(f"countdown {held_out} {seed}")
    problems = _unique(lambda: countdown.random_problem(rng, held_out=held_out), count, set())
    return [countdown.countdown_row(p) for p in problems]


def bugfix_rows(count: int, *, held_out: bool, seed: int = 0) -> list[dict]:
    """`count` buggy programs, no program twice."""
    rng = random.Random(f"bugfix {held_out} {seed}")
    return [b.row() for b in _unique(lambda: bugfix.random_bug(rng, held_out=held_out), count, set())]


def write_bundle(folder: str | Path) -> dict[str, str]:
    """Writes the six files under `folder` and returns {relative name: sha256}; the same bytes every time."""
    folder = Path(folder)
    files = {
        "instructions/train.jsonl": instruction_rows(held_out=False),
        "instructions/heldout.jsonl": instruction_rows(held_out=True),
        "countdown/demonstrations.jsonl": countdown_rows(2_000, held_out=False),
        "countdown/heldout.jsonl": countdown_rows(400, held_out=True),
        "bugfix/train.jsonl": bugfix_rows(1_600, held_out=False),
        "bugfix/heldout.jsonl": bugfix_rows(300, held_out=True),
    }
    return {name: _write(folder / name, rows) for name, rows in files.items()}


def _write(path: Path, rows: Iterable[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    write_bundle(sys.argv[1] if len(sys.argv) > 1 else "data")
