"""Rows → examples and pairs of examples: what is trained on, what was left out and why."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.rows.batches import Example, count_trained
from qftlab.rows.schemas import convert_row, kind_of, remarks, unrendered
from qftlab.rows.sources import load

log = logging.getLogger(__name__)
NOTHING = "nothing in them is trained (an empty output, a weight of 0?)"
IN_PART = "too long, of rows whose other documents are kept"  # each such document counts
# What is worth a remark in a row, and keeps it out of training, by what is wanted of the row.
UNFIT = ("empty question", "rendered already", "pictures or sound")
REFUSED = {"sft": ("labelled bad", *UNFIT), "preference": ("equal pair", "score tie", "empty answer", *UNFIT),
           "problem": UNFIT}  # fmt: skip


@dataclass
class Usage:
    """What became of the rows; their numbers are 1-based, lengths are in tokens, of the documents that are kept.

    Args:
        rows, documents, tokens, trained_tokens: how many; a pair is two documents.
        longest, mean_length, median_length, p95_length: of the documents.
        left_out: reason → numbers of the rows: `REFUSED`, `NOTHING`, "too long", `IN_PART`, and "equal tokens" where
            the texts of a pair differ and come to the same ids.
        unrendered: field → number of rows in which it holds something that no template shows.
        sources: the rows of each source, in order, so that a row can be named by its file.
        thinking: conversations in which there is thinking.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    mean_length: float = 0.0
    median_length: int = 0
    p95_length: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)
    unrendered: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    thinking: int = 0

    def fit(self, rows: Iterable[dict], wanted: str, start: int = 0) -> Iterator[tuple[int, str, dict]]:
        """Number, place and row in the lab's form, of every row that can be trained on; the others are counted.

        Args:
            rows: of any layout.
            wanted: "sft", "preference" or "problem"; any row has a prompt, so any is a problem. "": as it is.
            start: rows before the first of them.

        Raises:
            DataError: for a row of no such layout, naming its place.
        """
        for number, raw in enumerate(rows, start + 1):
            self.rows, where = self.rows + 1, place_of(number, self.sources)
            is_any = wanted in ("", "problem")
            row = prompt_row(raw, where) if is_any else convert_row(dict(raw), where, wanted=wanted)
            for name in unrendered(row):
                self.unrendered[name] = self.unrendered.get(name, 0) + 1
            why = next((found for found in remarks(row) if found in REFUSED[wanted or kind_of(row)]), None)
            if why is None:
                yield number, where, row
            else:
                self.leave_out(number, why)

    def leave_out(self, number: int, why: str) -> None:
        """Counts a row that is not trained on."""
        self.left_out.setdefault(why, []).append(number)

    def merge(self, other: Usage) -> None:
        """Takes in what was counted of further rows."""
        self.rows += other.rows
        self.thinking += other.thinking
        for why, numbers in other.left_out.items():
            self.left_out.setdefault(why, []).extend(numbers)
        for name, count in other.unrendered.items():
            self.unrendered[name] = self.unrendered.get(name, 0) + count

    def close(self, examples: Sequence[Example]) -> None:
        """Measures what is kept, and logs what became of the rows: as a warning where some were left out.

        Raises:
            ValueError: if nothing is kept.
        """
        lengths = sorted(len(example) for example in examples) or [0]
        self.documents, self.tokens, self.trained_tokens = len(examples), sum(lengths), count_trained(examples)
        self.longest, self.mean_length = lengths[-1], sum(lengths) / len(lengths)
        self.median_length, self.p95_length = lengths[len(lengths) // 2], lengths[int(0.95 * (len(lengths) - 1))]
        if not examples:
            raise ValueError(f"rows must hold something to train on, got {self.summary()}")
        (log.warning if self.left_out else log.info)("%s", self.summary())

    def summary(self) -> str:
        """One line for a log."""
        line = (
            f"{self.rows} rows read, {self.documents} documents kept, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained, {self.median_length} tokens in the median document"
        )
        return line + self.remainder()

    def remainder(self) -> str:
        """The end of that line: rows left out, and fields that do not show."""
        line = ""
        for why, numbers in self.left_out.items():
            more = ", …" if numbers[5:] else ""
            line += f"; {len(numbers)} left out: {why} ({places_of(numbers[:5], self.sources)}{more})"
        if self.unrendered:
            found = ", ".join(f"{name} ({count})" for name, count in sorted(self.unrendered.items()))
            line += f"; fields that no template shows: {found}"
        return line


def prompt_row(row: Mapping, where: str) -> dict:
    """A row whose prompt is wanted, in the lab's form; an instruction alone, which no file may hold, is one too.

    Raises:
        DataError: if it has no prompt.
    """
    is_bare = "instruction" in row and "output" not in row
    made = convert_row({**row, "output": ""} if is_bare else dict(row), where)
    return {name: value for name, value in made.items() if name != "output"} if is_bare else made


def encode_rows(
    tokenizer,
    rows: Sequence[dict],
    *,
    max_length: int | None = None,
    train_on: str = "all",
    sources: Mapping[str, int] | None = None,
    **options,
) -> tuple[list[Example], Usage]:
    """Rows as examples by the loss-mask contract; rows that cannot be trained on are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: alpaca rows, rows with "messages", and whatever else `qftlab.rows.schemas` knows with an answer.
        max_length: the most tokens an example may have; longer ones are left out, never cut.
        train_on: "all" assistant turns or the "last".
        sources: rows by source, as `load_wanted` gives them: messages then name the file as well.
        options: `thinking` as in `render_chat`; `num_proc` processes; `cache`, a folder that keeps many rows' examples.

    Raises:
        ValueError: if a row cannot be rendered (its place is named), or no row is left.
    """
    from qftlab.rows.encoding import encode

    usage, examples = Usage(sources=dict(sources or {})), []
    for number, documents in encode(tokenizer, rows, "sft", usage, train_on=train_on, **options):
        kept = [e for e in documents if max_length is None or len(e) <= max_length]
        if not kept:
            usage.leave_out(number, "too long" if documents else NOTHING)
        for _ in range(len(documents) - len(kept) if kept else 0):
            usage.leave_out(number, IN_PART)
        examples += kept
    usage.close(examples)
    return examples, usage


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, tokens of the answers trained; `number` is that of its row, from 1."""

    chosen: Example
    rejected: Example
    number: int

    @property
    def length(self) -> int:
        """Tokens of both documents."""
        return len(self.chosen) + len(self.rejected)


def place_of(number: int, sources: Mapping[str, int]) -> str:
    """The file and the row, from 1, of a row by its number among all rows; without sources the number alone."""
    for name, count in sources.items():
        if number <= count:
            return f"{name}, row {number}"
        number -= count
    return f"row {number}"


def places_of(numbers: Sequence[int], sources: Mapping[str, int]) -> str:
    """Several places at once, each file named once."""
    rows: dict[str, list[str]] = {}
    for number in numbers:
        file, _, row = place_of(number, sources).rpartition("row ")
        rows.setdefault(file, []).append(row)
    return "; ".join(f"{file}row {', '.join(found)}" for file, found in rows.items())


def load_wanted(
    sources: Sequence[str | Path], wanted: str = "", columns: Mapping[str, str] | None = None, **options
) -> tuple[list[dict], dict[str, int]]:
    """Rows of files, folders and hub names, and how many each gave, for the messages of `Usage`; `options` of `load`.

    Raises:
        DataError, FileNotFoundError: as `load`.
    """
    loaded = load(list(sources), wanted=wanted, columns=columns, **options)
    is_told_apart = len(loaded.report.counts) == len(list(sources))  # not where a file is read twice
    return loaded.rows, dict(loaded.report.counts) if is_told_apart else {}


def encode_pairs(
    tokenizer,
    rows: Sequence[dict],
    *,
    max_length: int | None = None,
    sources: Mapping[str, int] | None = None,
    **options,
) -> tuple[list[Pair], Usage]:
    """Preference rows as pairs by the loss-mask contract; pairs that teach nothing are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: "prompt" (text or messages), "chosen" and "rejected" (texts, or messages that end with the answer), and
            whatever else `qftlab.rows.sources` reads as a preference row. Of equal scores neither answer is better.
        max_length: the most tokens a prompt with its answer may have; longer ones are left out, never cut.
        sources: rows by source, as `load_wanted` gives them: messages then name the file as well.
        options: as in `encode_rows`.

    Raises:
        ValueError: if a row is no preference row or cannot be rendered (its place is named), or no pair is left.
    """
    from qftlab.rows.encoding import encode

    usage, pairs = Usage(sources=dict(sources or {})), []
    for number, sides in encode(tokenizer, rows, "preference", usage, **options):
        pair = Pair(*sides, number)
        if why := _reason(pair, max_length):
            usage.leave_out(number, why)
        else:
            pairs.append(pair)
    usage.close(documents(pairs))
    return pairs, usage


def _reason(pair: Pair, max_length: int | None) -> str | None:
    """Why a pair is left out, if it is."""
    if pair.chosen.input_ids == pair.rejected.input_ids:
        return "equal tokens"
    longest = max(len(pair.chosen), len(pair.rejected))
    return "too long" if max_length is not None and longest > max_length else None


def documents(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected documents in turns, as a batch holds them."""
    return [example for pair in pairs for example in (pair.chosen, pair.rejected)]
