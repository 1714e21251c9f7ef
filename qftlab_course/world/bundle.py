"""Writes the bundled rows: what SFT trains on, and the held-out problems every score is measured on."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from qftlab.rows import countdown
from qftlab_course.world import bugfix
from qftlab_course.world.instructions import SKILLS, random_problem
from qftlab_course.world.style import courteous

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


FRESH_ROWS = 300
FRESH_SKILLS = ("add", "subtract", "reverse", "sort", "maximum", "minimum")  # the others have no further problems


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


def _instructions(counts: dict[str, int], *, held_out: bool, seed: int = 0, taken: Iterable[str] = ()) -> list:
    """Problems of each skill, as many as `counts` says, in random order; fewer where a skill has fewer."""
    rng = random.Random(f"instructions {held_out} {seed}")
    found = []
    for skill, count in counts.items():
        known = {key for key in taken if key.split()[0] == skill}
        found += _unique(lambda skill=skill: random_problem(rng, skill, held_out=held_out), count, known)
    rng.shuffle(found)
    return found


def _asked(problems: Iterable) -> list[dict]:
    """Rows with the notation of pretraining, in which evaluate/kept.py asks what training must not lose."""
    return [{**p.row(), "plain": p.plain} for p in problems]


def _countdowns(count: int, *, held_out: bool, seed: int = 0, taken: Iterable[str] = ()) -> list:
    rng = random.Random(f"countdown {held_out} {seed}")
    return _unique(lambda: countdown.random_problem(rng, held_out=held_out), count, set(taken))


def _bugs(count: int, *, held_out: bool, seed: int = 0, taken: Iterable[str] = ()) -> list:
    rng = random.Random(f"bugfix {held_out} {seed}")
    return _unique(lambda: bugfix.random_bug(rng, held_out=held_out), count, set(taken))


def write_bundle(folder: str | Path) -> dict[str, str]:
    """Writes the nine files under `folder` and returns {relative name: sha256}; the same bytes every time.

    Of what is held out there are two sets: on `development.jsonl` settings were chosen; `heldout.jsonl` was drawn
    afterwards, with another seed and no problem in common, and is what scores are reported on.
    """
    folder = Path(folder)
    train, tuning = ({skill: counts.get(skill, default) for skill in SKILLS}
                     for counts, default in ((TRAIN_ROWS, 500), (HELD_OUT_ROWS, 40)))  # fmt: skip
    known, puzzles, bugs = (
        _instructions(tuning, held_out=True),
        _countdowns(400, held_out=True),
        _bugs(300, held_out=True),
    )
    fresh = {"held_out": True, "seed": 1}
    each = dict.fromkeys(FRESH_SKILLS, FRESH_ROWS // len(FRESH_SKILLS))
    files = {
        "instructions/train.jsonl": [courteous(p.row(), p.key) for p in _instructions(train, held_out=False)],
        "instructions/development.jsonl": _asked(known),
        "instructions/heldout.jsonl": _asked(_instructions(each, **fresh, taken=[p.key for p in known])),
        "countdown/demonstrations.jsonl": map(countdown.countdown_row, _countdowns(2_000, held_out=False)),
        "countdown/development.jsonl": map(countdown.countdown_row, puzzles),
        "countdown/heldout.jsonl": map(
            countdown.countdown_row, _countdowns(400, **fresh, taken=[p.key for p in puzzles])
        ),
        "bugfix/train.jsonl": [b.row() for b in _bugs(1_600, held_out=False)],
        "bugfix/development.jsonl": [b.row() for b in bugs],
        "bugfix/heldout.jsonl": [b.row() for b in _bugs(300, **fresh, taken=[b.key for b in bugs])],
    }
    return {name: _write(folder / name, rows) for name, rows in files.items()}


def _write(path: Path, rows: Iterable[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    write_bundle(sys.argv[1] if len(sys.argv) > 1 else "data")
