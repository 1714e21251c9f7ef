"""Rows → examples and pairs of examples: what is trained on, what was left out and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.rows.batches import Example, count_trained
from qftlab.rows.chat import render_chat, row_to_messages
from qftlab.rows.schemas import convert_row, remarks
from qftlab.rows.sources import load

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenUsage:
    """What became of the rows. Row numbers are 1-based; lengths are in tokens, of the documents that are kept."""

    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    longest: int
    mean_length: float
    median_length: int
    p95_length: int
    without_trained_token: tuple[int, ...]
    too_long: tuple[int, ...]
    max_length: int | None

    def summary(self) -> str:
        """One line for a log."""
        left_out = "".join(
            f"; {len(numbers)} left out: {why} (row {', '.join(map(str, numbers[:5]))}{', …' if numbers[5:] else ''})"
            for numbers, why in (
                (self.without_trained_token, "the assistant says nothing in them (an empty output?)"),
                (self.too_long, f"longer than {self.max_length} tokens"),
            )
            if numbers
        )
        return (
            f"{self.rows} rows read, {self.documents} documents kept, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained, {self.median_length} tokens in the median row{left_out}"
        )


def encode_rows(
    tokenizer, rows: Sequence[dict], *, max_length: int | None = None, train_on: str = "all"
) -> tuple[list[Example], TokenUsage]:
    """Rows as examples by the loss-mask contract; rows that cannot be trained on are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: alpaca rows, or rows with "messages".
        max_length: the most tokens an example may have; longer ones are left out, never cut.
        train_on: "all" assistant turns or the "last".

    Raises:
        ValueError: if a row cannot be rendered (its number is named), or no row is left.
    """
    examples: list[Example] = []
    empty, too_long = [], []
    for number, row in enumerate(rows, 1):
        messages = row_to_messages(row)
        if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
            empty.append(number)
            continue
        try:
            rendered = render_chat(tokenizer, messages, train_on=train_on)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        for document in rendered:
            example = Example(document.input_ids, document.loss_mask)
            if max_length is not None and len(example.input_ids) > max_length:
                too_long.append(number)
            elif not count_trained([example]):
                empty.append(number)
            else:
                examples.append(example)
    usage = _usage(examples, len(rows), empty, too_long, max_length)
    if not examples:
        raise ValueError(f"rows must hold something to train on, got {usage.summary()}")
    (log.warning if empty or too_long else log.info)("%s", usage.summary())
    return examples, usage


def _usage(examples: list[Example], rows: int, empty: list[int], too_long: list[int], limit: int | None) -> TokenUsage:
    lengths = sorted(len(e.input_ids) for e in examples) or [0]
    return TokenUsage(
        rows=rows,
        documents=len(examples),
        tokens=sum(lengths),
        trained_tokens=count_trained(examples),
        longest=lengths[-1],
        mean_length=sum(lengths) / len(lengths),
        median_length=lengths[len(lengths) // 2],
        p95_length=lengths[int(0.95 * (len(lengths) - 1))],
        without_trained_token=tuple(dict.fromkeys(empty)),
        too_long=tuple(dict.fromkeys(too_long)),
        max_length=limit,
    )


REFUSED = ("equal pair", "score tie", "empty answer")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, tokens of the answers trained; `number` is that of its row, from 1."""

    chosen: Example
    rejected: Example
    number: int

    @property
    def length(self) -> int:
        """Tokens of both documents."""
        return len(self.chosen.input_ids) + len(self.rejected.input_ids)


@dataclass
class PairUsage:
    """What became of the rows: how many pairs and tokens, and under each reason the numbers (from 1) of rows left out.

    Reasons: "equal pair" and "empty answer", a "score tie", "too long", and "equal tokens" where texts that differ
    come to the same ids. `sources` counts the rows of each source, in order, so that a row can be named by its file.
    """

    rows: int = 0
    pairs: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for a log."""
        line = f"{self.rows} rows, {self.pairs} pairs, {self.tokens} tokens, {self.trained_tokens} of them in answers"
        for why, numbers in self.left_out.items():
            more = ", …" if numbers[5:] else ""
            line += f"; {len(numbers)} left out: {why} ({places_of(numbers[:5], self.sources)}{more})"
        return line


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


def load_pairs(sources: Sequence[str | Path]) -> tuple[list[dict], dict[str, int]]:
    """Preference rows of files, folders and hub names, and how many each gave, for the messages of `encode_pairs`.

    Raises:
        DataError, FileNotFoundError: as `load`.
    """
    loaded = load(list(sources), schema="preference")
    is_told_apart = len(loaded.report.counts) == len(list(sources))  # not where a file is read twice
    return loaded.rows, dict(loaded.report.counts) if is_told_apart else {}


def encode_pairs(
    tokenizer, rows: Sequence[dict], *, max_length: int | None = None, sources: Mapping[str, int] | None = None
) -> tuple[list[Pair], PairUsage]:
    """Preference rows as pairs by the loss-mask contract; pairs that teach nothing are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: "prompt" (text or messages), "chosen" and "rejected" (texts, or messages that end with the answer), and
            whatever else `qftlab.rows.sources` reads as a preference row. Of equal scores neither answer is better.
        max_length: the most tokens a prompt with its answer may have; longer ones are left out, never cut.
        sources: rows by source, as `load_pairs` gives them: messages then name the file as well.

    Raises:
        ValueError: if a row is no preference row or cannot be rendered (its place is named), or no pair is left.
    """
    usage, pairs = PairUsage(rows=len(rows), sources=dict(sources or {})), []
    for number, row in enumerate(rows, 1):
        where = place_of(number, usage.sources)
        row = convert_row(dict(row), where, "preference")
        why = next((r for r in remarks(row) if r in REFUSED), None)
        if why is None:
            pair = Pair(*(_encode(tokenizer, row, side, where) for side in ("chosen", "rejected")), number)
            why = _reason(pair, max_length)
        if why is None:
            pairs.append(pair)
        else:
            usage.left_out.setdefault(why, []).append(number)
    usage.pairs, usage.tokens = len(pairs), sum(p.length for p in pairs)
    usage.trained_tokens = count_trained([e for p in pairs for e in (p.chosen, p.rejected)])
    if not pairs:
        raise ValueError(f"rows must hold a pair to train on, got {usage.summary()}")
    (log.warning if usage.left_out else log.info)("%s", usage.summary())
    return pairs, usage


def _encode(tokenizer, row: dict, side: str, where: str) -> Example:
    try:
        [document] = render_chat(
            tokenizer, [*row["prompt"], {"role": "assistant", "content": row[side]}], train_on="last"
        )
    except ValueError as error:
        raise ValueError(f"{where}, {side!r}: {error}") from error
    return Example(document.input_ids, document.loss_mask)


def _reason(pair: Pair, max_length: int | None) -> str | None:
    """Why a pair is left out, if it is."""
    if pair.chosen.input_ids == pair.rejected.input_ids:
        return "equal tokens"
    longest = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))
    return "too long" if max_length is not None and longest > max_length else None


def documents(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected documents in turns, as a batch holds them."""
    return [example for pair in pairs for example in (pair.chosen, pair.rejected)]
