"""Files as rows with their places: .json, .jsonl, .csv and .parquet, in bounded memory; nothing here knows a schema.

A reader yields (place, row). A row that cannot be read comes as a `DataError` in its place, so that the caller may
count it and go on; what makes the rest of the file unreadable is raised.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_JSON_BYTES = 256 * 2**20  # a .json file is read whole; Python objects take several times its size
MAX_LINE_BYTES = 64 * 2**20
BATCH_ROWS = 256


class DataError(ValueError):
    """A file or row that cannot be used; the message names the file, the row, the reason and the way out."""


def read_file(path: Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """What a file holds, each with its place in it ("line 3", "row 3"); see the module for errors in place of rows.

    Args:
        path: a regular file whose ending says its format.
        columns: names of which a CSV's first line must have one; none: any will do.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: for what is no regular file, an unknown ending, and contents that cannot be read on.
        PermissionError: if the file may not be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path (it is read from {Path.cwd()})")
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} must end in {', '.join(readers)}: rename or convert it")
    reader = readers[path.suffix.lower()]
    yield from _csv(path, columns) if reader is _csv else reader(path)


def _json(path: Path) -> Iterator[tuple[str, object]]:
    size = os.path.getsize(path)
    if size > MAX_JSON_BYTES:
        limit = f"{MAX_JSON_BYTES // 2**20} MiB"
        raise DataError(f"{path} has {size:,} bytes; a .json is read whole, so {limit} at most: convert it to .jsonl")
    try:
        rows = json.loads(_decoded(path.read_bytes(), str(path)).removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(f"{path} is not JSON, {where} (a file with a row a line should end in .jsonl)") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read: {_json_reason(error)}") from None
    if isinstance(rows, dict) and rows.keys() & {"conversations", "messages"}:
        rows = [rows]  # one conversation, as some tools save it
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, got {type(rows).__name__}: put [ ] around it")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _decoded(data: bytes, where: str) -> str:
    """UTF-8 text; a byte-order mark stays, since only the start of a file may lose it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = ", it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{where} is not UTF-8 (byte {error.start}{guess}): save it again as UTF-8") from None


def _json_reason(error: Exception) -> str:
    """Why text is no JSON, in a few words; Python also refuses numbers of thousands of digits."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, the byte-order mark of the first removed; a line longer than the limit ends the file."""
    for number in range(1, 2**63):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise DataError(f"{path}, line {number} is longer than {limit}: the rest of the file is not read")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in _lines(file, path):
            where = f"{path}, line {number}"
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                _decoded(line, f"{path}, line 1")  # UTF-16: no line of it can be read
            if not line.strip():
                continue
            try:
                row: object = json.loads(_decoded(line, where))
            except DataError as error:
                row = error
            except (ValueError, RecursionError) as error:
                row = DataError(f"{where}: {_json_reason(error)}; each line must be one JSON object")
            yield f"line {number}", row


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        lines = (_decoded(line, f"{path}, line {number}") for number, line in _lines(file, path))
        reader = csv.DictReader(lines, strict=True)
        try:
            names = reader.fieldnames
            if names and len(set(names)) != len(names):
                raise DataError(f"{path}, line 1 must name each column once, got {names!r:.200}")
            if not names or (columns and not {*names} & {*columns}):
                raise DataError(f"{path}, line 1 must name the columns instruction, input, output; got {names!r:.200}")
            for row in reader:
                if None in row or None in row.values():
                    where = f"{path}, line {reader.line_num}"
                    row = DataError(f"{where} must have {len(names)} cells: check its quotes")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install datasets") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except GeneratorExit:
        raise
    except Exception as error:  # pyarrow raises many kinds; all mean that the file is broken
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}, after row {number}: cannot be read as parquet: {reason:.200}") from None
