"""Rows from files, folders and hub names. A bad row is named and counted, never dropped in silence.

A reader yields (place, row); one that cannot be read comes as a `DataError` in its place. `load_rows` is the short way
for fine-tuning, and strict. `load` and `stream` take every schema, merge sources, and keep a `LoadReport` of what was
read, refused and worth a look.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import BinaryIO

from qftlab.files import OWN_FOLDERS
from qftlab.rows.schemas import NAMES, SCHEMAS, DataError, convert_row, remarks, unrendered
from qftlab.settings import check_at_least, check_choice

MAX_JSON_BYTES = 256 * 2**20  # a .json file is read whole; Python objects take several times its size
MAX_LINE_BYTES = 64 * 2**20
BATCH_ROWS = 256


def read_file(path: Path) -> Iterator[tuple[str, object]]:
    """What a file holds, each with its place in it ("line 3", "row 3"); see the module for errors in place of rows.

    Args:
        path: a regular file whose ending says its format.

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
    yield from readers[path.suffix.lower()](path)


def _json(path: Path) -> Iterator[tuple[str, object]]:
    size = os.path.getsize(path)
    if size > MAX_JSON_BYTES:
        limit = f"{MAX_JSON_BYTES // 2**20} MiB"
        raise DataError(f"{path} has {size:,} bytes; a .json is read whole, so {limit} at most: convert it to .jsonl")
    text = _decoded(path.read_bytes(), str(path)).removeprefix("\ufeff")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(f"{path} is not JSON, {where} (a file with a row a line should end in .jsonl)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read: {_json_reason(error)}") from None
    rows = _rows_in(rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows, got {type(rows).__name__}: a row alone needs [ ] around it")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _rows_in(found: dict) -> object:
    """Rows of a file that is one object: {"data": [rows]}, pandas' columns or its "split", or one conversation."""
    cells = list(found.values())
    lists = [value for value in cells if isinstance(value, list) and value and isinstance(value[0], dict)]
    if found.keys() & {*NAMES["messages"]}:
        return [found]
    if isinstance(found.get("columns"), list) and isinstance(found.get("data"), list):
        return [dict(zip(found["columns"], row, strict=False)) for row in found["data"] if isinstance(row, list)]
    if cells and all(isinstance(column, dict) and column.keys() == cells[0].keys() for column in cells):
        return [{name: column[key] for name, column in found.items()} for key in cells[0]]
    return lists[0] if len(lists) == 1 else found


def _without_nulls(value: object) -> object:
    """A table's value without the null keys of its objects: other rows have them, this one said nothing of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


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
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
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


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit, of its whole process, is 128 KiB a cell
    with path.open("rb") as file:
        lines = (_decoded(line, f"{path}, line {number}") for number, line in _lines(file, path))
        reader = csv.DictReader(lines, strict=True)
        try:
            names = reader.fieldnames
            if names and len(set(names)) != len(names):
                raise DataError(f"{path}, line 1 must name each column once, got {names!r:.200}")
            if not names:
                raise DataError(f"{path}, line 1 must name the columns instruction, input, output; got none")
            for row in reader:
                if None in row or None in row.values():
                    where = f"{path}, line {reader.line_num}"
                    count = sum(cell is not None for name, cell in row.items() if name) + len(row.get(None, ()))
                    row = DataError(f"{where} must have {len(names)} cells, got {count}: check its commas and quotes")
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
                    yield f"row {number}", _without_nulls(row)
    except Exception as error:  # pyarrow raises many kinds; all mean that the file is broken
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}, after row {number}: cannot be read as parquet: {reason:.200}") from None


@dataclass(frozen=True)
class HubSource:
    """A known data set: where it is, how its rows are laid out, and what it is for.

    Args:
        name: on the hub.
        schema: a name of `schemas.SCHEMAS`.
        recipe: the stage that trains on it: "sft", "dpo" or "rloo".
        split: the default split.
        is_large: read as a stream, so that only the rows that are asked for are fetched.
        file: a JSON-lines file of the repository to read, where its own loading script is not to be run.
    """

    name: str
    schema: str
    recipe: str
    split: str = "train"
    is_large: bool = True
    file: str = ""


KNOWN_SOURCES = (
    HubSource("HuggingFaceTB/smol-smoltalk", "messages", "sft"),
    HubSource("HuggingFaceH4/ultrafeedback_binarized", "preference", "dpo", "train_prefs"),
    HubSource("Asap7772/cog_behav_all_strategies", "prompt_completion", "sft", is_large=False),
    HubSource("Jiayi-Pan/Countdown-Tasks-3to4", "countdown", "rloo"),
    HubSource("livecodebench/code_generation_lite", "livecodebench", "rloo", "test", file="test.jsonl"),
)
HUB = {source.name: source for source in KNOWN_SOURCES}


def read_hub(name: str, split: str | None = None) -> Iterator[tuple[str, object]]:
    """Rows of a data set with their places, streamed where it is large.

    Args:
        name: a name on the hub, or a folder of files that `datasets` loads; one of its configurations stands behind a
            colon, as in openai/gsm8k:main.
        split: by default the registry's, else "train".

    Raises:
        DataError: if `datasets` is not installed, or cannot find or read it; the reason is in the message.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install datasets") from None
    name, config = _configured(name)
    known = HUB.get(name)
    wanted = split or (known.split if known else "train")
    is_folder = Path(name).is_dir()
    path, options = name, {"name": config or None, "streaming": is_folder or known is None or known.is_large}
    if known and known.file and not is_folder:
        path, options["data_files"] = "json", {wanted: f"hf://datasets/{name}/{known.file}"}
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(path, split=wanted, **options), 1):
            yield f"row {number}", _without_nulls(row)
    except Exception as error:  # datasets passes on the errors of a dozen libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        way_out = "check its files" if is_folder else "check the name, the split and the connection"
        way_out += f" (a configuration is named as {name}:NAME)" if "config" in reason.lower() else ""
        raise DataError(f"{name}, after row {number} of split {wanted!r}: {reason:.300}; {way_out}") from None


__all__ = ["DataError", "LoadReport", "Loaded", "load", "load_rows", "stream"]
FIRST = 10  # places kept of each kind, whatever the size of the data
log = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What a loading read so far; it grows while rows are streamed, but not with their number.

    Args:
        counts: good rows by source.
        num_bad: rows and files refused.
        problems: the first ten reasons, each naming file and row.
        missing: sources that do not exist.
        remarks: name → number of rows, for what is loaded but should be looked at ("equal pair", "score tie", …).
        unrendered: field → number of rows in which it holds something that no template shows.
        places: name → the first ten places of each remark.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    unrendered: Counter[str] = field(default_factory=Counter)

    @property
    def num_rows(self) -> int:
        """Good rows, all sources together."""
        return sum(self.counts.values())

    def note(self, row: dict, source: str, where: str) -> list[str]:
        """Counts a good row and what there is to remark on it, which is returned."""
        self.counts[source] = self.counts.get(source, 0) + 1
        found = remarks(row)
        self.unrendered.update(unrendered(row))
        self.remarks.update(found)
        for name in found:
            if self.remarks[name] <= FIRST:
                self.places.setdefault(name, []).append(where)
        return found

    def refuse(self, problem: Exception) -> None:
        """Counts a row or a file that cannot be used."""
        self.num_bad += 1
        if len(self.problems) < FIRST:
            self.problems.append(str(problem))

    def summary(self) -> str:
        """Lines for a terminal."""
        lines = [f"{count:>8,} rows  {name}" for name, count in self.counts.items()]
        lines += [f"{self.num_rows:>8,} rows in all, {self.num_bad:,} refused"]
        lines += [f" refused: {problem}" for problem in self.problems]
        lines += [f" and {self.num_bad - FIRST:,} more"] if self.num_bad > FIRST else []
        lines += [f" missing: {name}" for name in self.missing]
        for name, count in self.remarks.items():
            more = ", …" if count > FIRST else ""
            places = self.places[name]
            if len(self.counts) == 1:
                places = [place.removeprefix(f"{next(iter(self.counts))}, ") for place in places]
            lines.append(f"{count:>8,} x {name}: {', '.join(places)}{more}")
        lines += [f"{count:>8,} x a field that no template shows: {name}" for name, count in self.unrendered.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Loaded:
    """Rows in the lab's form, and the report of how they were read."""

    rows: list[dict]
    report: LoadReport


def load_rows(paths: str | Path | Sequence[str | Path]) -> list[dict]:
    """The rows of one file or several to fine-tune on: `.json` (a list), `.jsonl`, `.csv` (a header line), `.parquet`.

    Args:
        paths: one path or a list; rows come in this order. UTF-8, with or without a byte-order mark. Folders in the
            hub's format and names on the hub as well.

    Returns:
        Dicts with "instruction", "input" and "output" (and whatever else the row holds), or with "messages".

    Raises:
        DataError: naming the file and the row or line (counted from 1) for anything that is not such a row.
        FileNotFoundError: for a path that does not exist.
    """
    return load([paths] if isinstance(paths, str | Path) else paths, wanted="sft").rows


def load(sources: str | Path | Sequence[str | Path], **options) -> Loaded:
    """All rows of one source or several, in the lab's form, with a report; `options` are those of `stream`.

    Raises:
        DataError, FileNotFoundError, ValueError: as `stream`.
    """
    report = options.pop("report", None) or LoadReport()
    rows = list(stream(sources, report=report, **options))
    if report.num_bad:
        log.warning("%d rows or files were refused, first: %s", report.num_bad, report.problems[0])
    if wrong := report.remarks["wrong solution"]:
        log.warning(
            "%d x wrong solution of the row's own problem, first: %s", wrong, report.places["wrong solution"][0]
        )
    return Loaded(rows, report)


def stream(
    sources: str | Path | Sequence[str | Path],
    *,
    schema: str = "auto",
    missing: str = "error",
    bad: str = "error",
    skip: Iterable[str] = (),
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    wanted: str = "",
    report: LoadReport | None = None,
) -> Iterator[dict]:
    """Rows of one source or several, one at a time; memory does not grow with the files (a .json is read whole).

    Args:
        sources: files (.json, .jsonl, .csv, .parquet) or patterns of them (rows/*.jsonl), folders in the hub's format,
            or names on the hub, with a configuration as in openai/gsm8k:main.
        schema: a name of `schemas.SCHEMAS`; "auto" knows each row by its fields, and each known hub name.
        missing: a file that does not exist is an "error", or a "warning" and noted in the report.
        bad: a row or file that cannot be used is an "error", or goes to the "report": counted, with the first reasons.
        skip: remarks ("equal pair", "score tie", "empty answer", "empty question", "labelled bad", "wrong solution")
            whose rows are left out; the report counts them as it counts those that stay.
        split: of folders and hub names; each has its default.
        limit: the most rows.
        columns: the fields' own names, as {"prompt": "q", "output": "a"}; see `convert_row`.
        wanted: "sft" or "preference": rows of other kinds are refused.
        report: is filled as rows are read.

    Raises:
        DataError: naming the file and the row (counted from 1), where bad="error".
        FileNotFoundError: for a missing file, where missing="error".
        ValueError: for an unknown option.
    """
    check_choice(("auto", *SCHEMAS), schema=schema)
    check_choice(("error", "warning"), missing=missing)
    check_choice(("error", "report"), bad=bad)
    check_at_least(1, limit=limit)
    report, left_out = LoadReport() if report is None else report, frozenset(skip)
    refuse = report.refuse if bad == "report" else _reraise
    given = 0
    for source in _expanded([sources] if isinstance(sources, str | Path) else sources):
        for where, row in _guarded(source, split, missing, report, refuse):
            try:
                if isinstance(row, DataError):
                    raise row
                known = HUB.get(source) if schema == "auto" else None
                row = convert_row(row, where, known.schema if known else schema, columns, wanted)
            except (DataError, RecursionError) as error:
                refuse(error if isinstance(error, DataError) else DataError(f"{where} is nested too deep"))
                continue
            if not left_out.intersection(report.note(row, source, where)):
                given += 1
                yield row
            if given == limit:
                return


def _expanded(sources: Iterable[str | Path]) -> Iterator[str]:
    """The sources, with the files that a pattern stands for, in order, in its place."""
    for source in map(str, sources):
        is_pattern = any(c in source for c in "*?[") and not Path(source).exists()
        yield from (is_pattern and sorted(glob(source, recursive=True))) or [source]


def _configured(source: str) -> tuple[str, str]:
    """A folder or name for `datasets`, and the configuration behind its colon, if there is one."""
    name, _, config = source.rpartition(":")
    return (name, config) if name and not Path(source).exists() else (source, "")


def _reraise(error: Exception) -> None:
    raise error


def _guarded(
    source: str, split: str | None, missing: str, report: LoadReport, refuse: Callable[[Exception], None]
) -> Iterator[tuple[str, object]]:
    """A source's raw rows; what ends the reading of one source need not end the others."""
    if not source.strip():
        raise DataError("sources must be paths or names, got an empty one")
    report.counts.setdefault(source, 0)
    try:
        for place, row in read_hub(source, split) if _is_hub(source) else read_file(Path(source)):
            yield f"{source}, {place}", row
    except FileNotFoundError as error:
        if missing == "error":
            raise
        log.warning("%s", error)
        report.missing.append(source)
    except (DataError, OSError) as error:
        refuse(error)


def _is_hub(source: str) -> bool:
    """Whether a source goes through `datasets`: a folder, or what is no path but has a hub name's form."""
    source = _configured(source)[0]
    if Path(source).exists():
        return Path(source).is_dir()
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and source.split("/")[0] not in (*OWN_FOLDERS, "data")
    return source in HUB or bool(is_name) and not source.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
