"""The command `data`, and what all commands that read rows share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from qftlab.files import aside
from qftlab.rows.sources import DataError, LoadReport, stream
from qftlab.settings import Names, check_at_least, check_fields


@dataclass(frozen=True)
class ReadConfig:
    """What all commands that read rows share: which rows are read, and how.

    Args:
        data: files (.json, .jsonl, .csv, .parquet) or patterns of them, folders in the hub's format, or names on the
            hub (with a configuration: openai/gsm8k:main); one or [several].
        columns: the rows' own names of fields, as in '{prompt: q, output: a}'.
        bad: a row or file that cannot be used is an `error`, or goes to the `report`.
        split: of folders and hub names.
        limit: the most rows to read.

    Raises:
        ValueError: for a value out of range.
    """

    data: Names = ()
    columns: dict[str, str] = field(default_factory=dict)
    bad: Literal["error", "report"] = "error"
    split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(1, limit=self.limit)
        if not self.data:
            raise ValueError("data must name at least one file of rows, got none: --data rows.jsonl")

    def read(self, report: LoadReport, **options) -> Iterator[dict]:
        """The rows as `stream` gives them; raises what it raises."""
        return stream(self.data, columns=self.columns, bad=self.bad, split=self.split, limit=self.limit, report=report,
                      **options)  # fmt: skip


@dataclass(frozen=True)
class DataConfig(ReadConfig):
    """Reads rows of any known layout, says how many are good, refused, or worth a look, and shows the first.

    Args:
        schema: layout of the rows (alpaca, messages, sharegpt, prompt_completion, preference, prompt, countdown,
            livecodebench); `auto` knows it by the fields.
        missing: a file that does not exist is an `error`, or a `warning`.
        skip: leave out rows with these remarks (equal pair, score tie, empty answer, empty question, labelled bad,
            wrong solution, rendered already, pictures or sound).
        instruction: a text that takes the place of each row's instruction; {target}, {numbers} and the row's other
            fields in braces stand for what the row holds, lists with commas.
        output: also write the rows, in the lab's form and in one file, to this new .jsonl file.

    Raises:
        ValueError: for a value out of range.
    """

    schema: str = "auto"
    missing: Literal["error", "warning"] = "error"
    skip: Names = ()
    instruction: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output and not self.output.endswith(".jsonl"):
            raise ValueError(f"output must end in .jsonl, got {self.output!r}")


def describe(config: DataConfig) -> str:
    """Reads the rows and returns the report, with the first row; writes them where asked.

    Raises:
        DataError, FileNotFoundError, FileExistsError, ValueError: what cannot be read or written.
    """
    report = LoadReport()
    rows = config.read(report, schema=config.schema, missing=config.missing, skip=config.skip)
    if config.instruction:
        rows = (row | {"instruction": _filled(config.instruction, row)} for row in rows)
    first = next(rows, None)
    rows = rows if first is None else chain([first], rows)
    if config.output:
        written = write_rows(rows, config.output)
    else:
        written = sum(1 for _ in rows)
    lines = [report.summary()]
    if config.output or written != report.num_rows:
        lines.append(f"{written:>8,} rows kept{f', written to {config.output}' if config.output else ''}")
    if first is not None:
        shown = to_json(first, ensure_ascii=True)
        lines.append(f"first row: {shown:.400}{' …' if len(shown) > 400 else ''}")
    return "\n".join(lines)


def _filled(template: str, row: dict) -> str:
    """A text with the fields of a row in place of their names in braces.

    Raises:
        ValueError: for a field that the row does not have, or a row whose prompt is no instruction.
    """
    if "instruction" not in row:
        raise ValueError(f"instruction can word rows that have one, got a row with {', '.join(row)}")
    fields = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
    try:
        return template.format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"instruction must name fields of the row, got {template!r:.80} ({error!r}); it has "
                         f"{', '.join(row)}") from None  # fmt: skip


def write_rows(rows: Iterable[dict], path: str | Path) -> int:
    """Writes rows to a new file, whole or not at all; returns how many. A .json gets a list, others JSON lines.

    Raises:
        FileExistsError: if the file exists.
        ValueError: for a row that JSON cannot hold.
    """
    path, count = Path(path), 0
    start, between, end = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another output or remove it")
    with aside(path) as place, place.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write((between if count else start) + to_json(row))  # half a surrogate pair: as JSON spells it
            count += 1
        file.write(end if count else "")
    return count


def to_json(row: Mapping, *, ensure_ascii: bool = False) -> str:
    """A row as JSON on one line.

    Raises:
        DataError: if it is nested too deep.
    """
    try:
        return json.dumps(row, ensure_ascii=ensure_ascii, default=str)
    except RecursionError:
        raise DataError(f"row with the fields {', '.join(row):.100} is nested too deep to be written") from None
