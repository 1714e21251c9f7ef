"""Splits that do not leak, and a report on sets that do: rows with one prompt stay on one side."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from qftlab.evaluate.answers import WORDS
from qftlab.evaluate.data import ReadConfig, write_rows
from qftlab.rows.schemas import messages_of
from qftlab.rows.sources import LoadReport, load
from qftlab.settings import Names, check_at_least

FIRST = 10


@dataclass(frozen=True)
class Split:
    """Two sides of a data set, rows in their old order.

    Args:
        train: the larger side, mostly.
        test: the held-out side.
        num_groups: different prompts.
        num_repeated: rows whose prompt an earlier row has.
    """

    train: list[dict]
    test: list[dict]
    num_groups: int
    num_repeated: int

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"train {len(self.train):,}, test {len(self.test):,}; {self.num_groups:,} different prompts, "
            f"{self.num_repeated:,} rows repeat one and stay with it"
        )


def prompt_text(row: dict) -> str:
    """What a row asks, in words: instruction and input, or the turns up to the first answer but the system's.

    Raises:
        ValueError: if the row has no prompt.
    """
    if isinstance(said := row.get("messages", row.get("prompt")), str):
        return said
    if not said and "instruction" not in row:
        raise ValueError(f"row must have instruction, messages or prompt, got {', '.join(row) or 'nothing'}")
    asked = takewhile(lambda turn: turn["role"] != "assistant", messages_of(row))
    return "\n".join(turn.get("content") or "" for turn in asked if turn["role"] != "system")


def prompt_key(row: dict) -> str:
    """The prompt, normalised: NFKC, lower case, white space as one blank. A Countdown problem is its sorted numbers.

    Rows with one key must not stand on both sides of a split.
    """
    if row.get("numbers") and "target" in row:
        return f"countdown {sorted(row['numbers'])} {row['target']}"
    return " ".join(unicodedata.normalize("NFKC", prompt_text(row)).casefold().split())


def split_rows(rows: Sequence[dict], *, test: float = 0.2, seed: int = 0) -> Split:
    """A seeded split with no prompt on both sides; a pure function of the rows and the seed.

    Prompts are ordered by a hash of seed and text and go to the test side until it is full. So the order of the rows
    does not matter, and every platform gives the same split.

    Args:
        rows: anything with a prompt.
        test: share of the rows on the test side, in (0, 1); met to the row unless repeated prompts stand in the way.
        seed: another seed, another split.

    Raises:
        ValueError: for a share out of range, or if one side would be empty.
    """
    if not 0 < test < 1:
        raise ValueError(f"test must be in (0, 1), got {test}")
    keys = [prompt_key(row) for row in rows]
    sizes = Counter(keys)
    room, chosen = round(test * len(rows)), set()
    for key in sorted(sizes, key=lambda k: hashlib.sha256(f"{seed} {k}".encode()).digest()):
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        sides[key in chosen].append(row)
    if not all(sides):
        raise ValueError(f"rows must fill both sides, got {len(rows)} rows of {len(sizes)} prompts for test={test}")
    return Split(*sides, num_groups=len(sizes), num_repeated=len(rows) - len(sizes))


@dataclass(frozen=True)
class Contamination:
    """How much of a test set a training set gives away.

    Args:
        num_test: test rows.
        num_exact: those whose normalised prompt is in the training set.
        num_overlapping: others that share a run of `n` words with it.
        n: words in a row that count as copied; of a script without blanks, its characters.
        first: the first ten, each as (test row, train row, what), rows from 1.
    """

    num_test: int
    num_exact: int
    num_overlapping: int
    n: int
    first: tuple[tuple[int, int, str], ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.num_exact + self.num_overlapping

    def summary(self) -> str:
        """Lines for a terminal."""
        head = (
            f"of {self.num_test:,} test rows {self.num_exact:,} have a prompt of the training set, "
            f"{self.num_overlapping:,} more share {self.n} words in a row with one"
        )
        return "\n".join([head, *(f" test row {a} and train row {b}: {what}" for a, b, what in self.first)])


def contamination(train: Iterable[dict], test: Sequence[dict], *, n: int = 8) -> Contamination:
    """Test rows whose prompts are in the training set, word for word or in part.

    Args:
        train: may be a generator: only the test set is held in memory.
        test: rows to be protected.
        n: run of words that counts as copied, 2 at least; of a script without blanks, of characters. Short prompts can
            only be found by equality.

    Raises:
        ValueError: for n below 2, or a row without a prompt.
    """
    check_at_least(2, n=n)
    exact: dict[str, list[int]] = {}
    grams: dict[int, list[int]] = {}
    for number, row in enumerate(test):
        exact.setdefault(prompt_key(row), []).append(number)
        for gram in _grams(row, n):
            grams.setdefault(gram, []).append(number)
    found: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(train, start=1):
        for hit in exact.get(prompt_key(row), ()):
            if found.get(hit, (0, ""))[1] != "same prompt":
                found[hit] = (number, "same prompt")
        for gram in _grams(row, n):
            for hit in grams.get(gram, ()):
                found.setdefault(hit, (number, f"{n} words in a row"))
    num_exact = sum(what == "same prompt" for _, what in found.values())
    first = tuple((hit + 1, *found[hit]) for hit in sorted(found)[:FIRST])
    return Contamination(len(test), num_exact, len(found) - num_exact, n, first)


def _grams(row: dict, n: int) -> set[int]:
    """Hashes of all runs of n words of a prompt; Python's, which differ from process to process and need not agree."""
    words = WORDS.findall(unicodedata.normalize("NFKC", prompt_text(row)).casefold())
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)}


@dataclass(frozen=True)
class SplitConfig(ReadConfig):
    """Splits rows so that no prompt is on both sides; with `against`, reports what two sets have in common.

    Args:
        data: files, patterns, folders or hub names, one or [several]; with `against`, the training set.
        output: folder that gets the two files, which must be new; without it the split is only described.
        names: of the two files: .jsonl, or .json for a list, as in [train_set.json,test_set.json].
        test: share of the rows on the test side.
        seed: another seed, another split.
        against: a test set: files, folders or hub names; nothing is split, the overlap is reported.
        n: words in a row that count as copied, for `against`; of a script without blanks, its characters.

    Raises:
        ValueError: for a value out of range.
    """

    output: str = ""
    names: tuple[str, str] = ("train.jsonl", "test.jsonl")
    test: float = 0.2
    seed: int = 0
    against: Names = ()
    n: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, n=self.n)
        if not 0 < self.test < 1:
            raise ValueError(f"test must be in (0, 1), got {self.test}")
        if len(set(self.names)) < 2 or not all(Path(name).suffix in (".jsonl", ".json") for name in self.names):
            raise ValueError(f"names must be two that end in .jsonl or .json, got {', '.join(self.names)}")
        if self.output and self.against:
            raise ValueError(f"output must not stand beside against, which writes nothing; got {self.output!r}")


def divide(config: SplitConfig) -> str:
    """Splits, or compares with `against`, and returns the report; writes both sides where asked.

    Raises:
        ValueError: for rows that cannot be read or have no prompt.
        FileExistsError: if an output file exists.
    """
    report = LoadReport()
    if config.against:
        protected = load(config.against, bad=config.bad, columns=config.columns).rows
        train = config.read(report)
        return "\n".join([contamination(train, protected, n=config.n).summary(), report.summary()])
    rows = list(config.read(report))
    made = split_rows(rows, test=config.test, seed=config.seed)
    lines = [report.summary(), made.summary()]
    if config.output:
        files = [Path(config.output, name) for name in config.names]
        if there := next((file for file in files if file.exists()), None):
            raise FileExistsError(f"{there} exists: choose another output or remove it")
        for file, side in zip(files, (made.train, made.test), strict=True):
            write_rows(side, file)
        lines.append(f"written to {config.output}")
    return "\n".join(lines)
