"""Rows from files: alpaca JSON and CSV, JSON lines of rows or messages. A bad row is named, never dropped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path


class DataError(ValueError):
    """A file or row that cannot be used; the message names the file, the row, the reason and the way out."""


def load_rows(paths: str | Path | Sequence[str | Path]) -> list[dict]:
    """The rows of one file or several: `.json` (a list), `.jsonl` (a row a line) or `.csv` (a header line).

    Args:
        paths: one path or a list; rows come in this order. UTF-8, with or without a byte-order mark.

    Returns:
        Dicts with "instruction", "input" and "output" (and whatever else the row holds), or with "messages".

    Raises:
        DataError: naming the file and the row or line (counted from 1) for anything that is not such a row.
        FileNotFoundError: for a path that does not exist.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    rows = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: check the path (it is read from {Path.cwd()})")
        if not path.is_file():
            raise DataError(f"{path} is not a file")
        rows += [_checked(row, f"{path}, {place}") for place, row in _read(path)]
    return rows


def _read(path: Path) -> Iterator[tuple[str, object]]:
    """What the file holds, each with its place in the file, such as "line 3"."""
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} must end in {', '.join(readers)}: rename or convert it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it again as UTF-8") from None
    return readers[path.suffix.lower()](text, path)


def _json(text: str, path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(f"{path} is not JSON, {where} (a file with a row a line should end in .jsonl)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read: {_json_reason(error)}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, got {type(rows).__name__}: put [ ] around it")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_reason(error: Exception) -> str:
    """Why text is no JSON, in a few words; Python also refuses numbers of thousands of digits."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = _json_reason(error)
                raise DataError(f"{path}, line {number}: {reason}; each line must be one JSON object") from None
            yield f"line {number}", row


def _csv(text: str, path: Path) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if not reader.fieldnames or "instruction" not in reader.fieldnames:
        raise DataError(f"{path}, line 1 must name the columns instruction, input, output; got {reader.fieldnames}")
    if len(set(reader.fieldnames)) != len(reader.fieldnames):
        raise DataError(f"{path}, line 1 must name each column once, got {reader.fieldnames}")
    try:
        for row in reader:
            if None in row or None in row.values():
                cells = len(reader.fieldnames)
                raise DataError(f"{path}, line {reader.line_num} must have {cells} cells: check its quotes")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num}: {error}") from None


def _checked(row: object, where: str) -> dict:
    """The row with an "input", or an error that says what it lacks."""
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with instruction and output, got {type(row).__name__}")
    if "messages" in row:
        return _checked_messages(row, where)
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{where} must have a text {name!r}, got {row.get(name)!r:.60}; it has {sorted(row)}")
    if not isinstance(row.get("input") or "", str):
        raise DataError(f'{where} must have a text "input" or none, got {row["input"]!r:.60}')
    for name in ("instruction", "input", "output"):
        _check_text(row.get(name) or "", f"{where}, {name!r}")
    return {**row, "input": row.get("input") or ""}


def _check_text(text: str, where: str) -> None:
    """Refuses half a surrogate pair, which JSON can spell (\\ud800) and no tokenizer can read."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{where} holds half a surrogate pair, which is no character: remove it")


def _checked_messages(row: dict, where: str) -> dict:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" must be a list of turns, got {messages!r:.60}')
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise DataError(f"{where}, turn {number} must have role and content, got {turn!r:.60}")
        if isinstance(turn["content"], str):
            _check_text(turn["content"], f"{where}, turn {number}")
        elif turn["content"] is not None or not turn.get("tool_calls"):
            raise DataError(f"{where}, turn {number} must have a text as content, got {turn['content']!r:.60}")
    return row
