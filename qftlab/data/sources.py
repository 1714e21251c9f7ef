"""Rows from files, folders and hub names. A bad row is named and counted, never dropped in silence.

`load_rows` is the short way for fine-tuning, and strict. `load` and `stream` take every schema, merge sources, and keep
a `LoadReport` of what was read, refused and worth a look.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.data.hub import HUB, read_hub
from qftlab.data.readers import DataError, read_file
from qftlab.files import OWN_FOLDERS
from qftlab.rows.schemas import SCHEMAS, convert_row, remarks
from qftlab.settings import check_at_least, check_choice

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
        places: name → the first ten places of each remark.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remarks: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Good rows, all sources together."""
        return sum(self.counts.values())

    def note(self, row: dict, source: str, where: str) -> list[str]:
        """Counts a good row and what there is to remark on it, which is returned."""
        self.counts[source] = self.counts.get(source, 0) + 1
        found = remarks(row)
        for name in found:
            self.remarks[name] = self.remarks.get(name, 0) + 1
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
    rows = []
    for path in map(str, [paths] if isinstance(paths, str | Path) else paths):
        if not path.strip():
            raise DataError("paths must be files or names, got an empty one")
        schema = HUB[path].schema if path in HUB else "auto"
        found = read_hub(path) if _is_hub(path) else read_file(Path(path), columns=("instruction", "prompt"))
        for place, row in found:
            if isinstance(row, DataError):
                raise row
            row = convert_row(row, f"{path}, {place}", schema)
            if "messages" not in row and "output" not in row:
                raise DataError(f"{path}, {place} must have an answer to train on; it has {', '.join(row)}: use load()")
            rows.append(row)
    return rows


def load(sources: str | Path | Sequence[str | Path], **options) -> Loaded:
    """All rows of one source or several, in the lab's form, with a report; `options` are those of `stream`.

    Raises:
        DataError, FileNotFoundError, ValueError: as `stream`.
    """
    report = options.pop("report", None) or LoadReport()
    rows = list(stream(sources, report=report, **options))
    if report.num_bad:
        log.warning("%d rows or files were refused, first: %s", report.num_bad, report.problems[0])
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
    report: LoadReport | None = None,
) -> Iterator[dict]:
    """Rows of one source or several, one at a time; memory does not grow with the files (a .json is read whole).

    Args:
        sources: files (.json, .jsonl, .csv, .parquet), folders in the hub's format, or names on the hub.
        schema: a name of `schemas.SCHEMAS`; "auto" knows each row by its fields, and each known hub name.
        missing: a file that does not exist is an "error", or a "warning" and noted in the report.
        bad: a row or file that cannot be used is an "error", or goes to the "report": counted, with the first reasons.
        skip: remarks ("equal pair", "score tie", "empty answer", "labelled bad") whose rows are left out; the report
            counts them as it counts those that stay.
        split: of folders and hub names; each has its default.
        limit: the most rows.
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
    for source in [sources] if isinstance(sources, str | Path) else sources:
        for where, row in _guarded(str(source), split, missing, report, refuse):
            try:
                if isinstance(row, DataError):
                    raise row
                known = HUB.get(str(source)) if schema == "auto" else None
                row = convert_row(row, where, known.schema if known else schema)
            except (DataError, RecursionError) as error:
                refuse(error if isinstance(error, DataError) else DataError(f"{where} is nested too deep"))
                continue
            if left_out.intersection(report.note(row, str(source), where)):
                continue
            yield row
            given += 1
            if given == limit:
                return


def _reraise(error: Exception) -> None:
    raise error


def _guarded(
    source: str, split: str | None, missing: str, report: LoadReport, refuse: Callable[[Exception], None]
) -> Iterator[tuple[str, object]]:
    """A source's raw rows; what ends the reading of one source need not end the others."""
    if not source.strip():
        raise DataError("sources must be paths or names, got an empty one")
    report.counts.setdefault(source, 0)
    rows = read_hub(source, split) if _is_hub(source) else read_file(Path(source))
    while True:
        try:
            place, row = next(rows)
        except StopIteration:
            return
        except FileNotFoundError as error:
            if missing == "error":
                raise
            log.warning("%s", error)
            report.missing.append(source)
            return
        except (DataError, OSError) as error:
            refuse(error)
            return
        yield f"{source}, {place}", row


def _is_hub(source: str) -> bool:
    """Whether a source goes through `datasets`: a folder, or what is no path but has a hub name's form."""
    if Path(source).exists():
        return Path(source).is_dir()
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and source.split("/")[0] not in (*OWN_FOLDERS, "data")
    return source in HUB or bool(is_name) and not source.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
