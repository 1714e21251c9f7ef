"""The commands `data`, `lengths` and `split`: their settings, and functions that return what they have to say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from qftlab.rows.sources import DataError, LoadReport, load, stream
from qftlab.settings import check_at_least, make_tuples

Names = tuple[str, ...] | str


@dataclass(frozen=True)
class ReadConfig:
    """What the three commands share: which rows are read, and how.

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
        make_tuples(self, "data")
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
        skip: leave out rows with these remarks (equal pair, score tie, empty answer, labelled bad, rendered already,
            pictures or sound).
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
        make_tuples(self, "skip")
        if self.output and not self.output.endswith(".jsonl"):
            raise ValueError(f"output must end in .jsonl, got {self.output!r}")


@dataclass(frozen=True)
class LengthsConfig(ReadConfig):
    """Counts the tokens of rows as training renders them, in memory that does not grow with the files.

    Args:
        data: files, patterns, folders or hub names of rows, pairs or prompts, one or [several].
        model: whose tokenizer: `tiny`, a folder, or a name on the hub.
        max_length: also say which rows are longer than so many tokens.
        policy: what to do with those: `truncate` keeps the prompt, `skip` leaves them out, `error` fails.
        batch_size: rows tokenised at once.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    max_length: int | None = None
    policy: Literal["truncate", "skip", "error"] = "skip"
    batch_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, max_length=self.max_length)
        check_at_least(1, batch_size=self.batch_size)


@dataclass(frozen=True)
class SplitConfig(ReadConfig):
    """Splits rows so that no prompt is on both sides; with `against`, reports what two sets have in common.

    Args:
        data: files, patterns, folders or hub names, one or [several]; with `against`, the training set.
        output: new folder, gets train.jsonl and test.jsonl; without it the split is only described.
        test: share of the rows on the test side.
        seed: another seed, another split.
        against: a test set: files, folders or hub names; nothing is split, the overlap is reported.
        n: words in a row that count as copied, for `against`; of a script without blanks, its characters.

    Raises:
        ValueError: for a value out of range.
    """

    output: str = ""
    test: float = 0.2
    seed: int = 0
    against: Names = ()
    n: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        make_tuples(self, "against")
        check_at_least(2, n=self.n)
        if not 0 < self.test < 1:
            raise ValueError(f"test must be in (0, 1), got {self.test}")
        if self.output and self.against:
            raise ValueError(f"output must not stand beside against, which writes nothing; got {self.output!r}")


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
        shown = _json(first, ensure_ascii=True)
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


def measure(config: LengthsConfig) -> str:
    """Counts tokens and returns the statistics, and what `max_length` would do.

    Raises:
        ValueError: for rows that cannot be read or rendered; under the policy "error", if any row is too long.
    """
    from qftlab.rows.lengths import FIRST, LengthStats, limited, row_examples, row_lengths
    from qftlab.rows.tokenizer import load_tokenizer

    tokenizer, report, stats = load_tokenizer(config.model), LoadReport(), LengthStats()
    window: list[dict] = []  # the rows of the batch in work
    rows = _kept(config.read(report), window)
    done, affected, truncated, named = 0, 0, 0, []
    for batch in row_lengths(tokenizer, rows, batch_size=config.batch_size):
        stats.add(chain.from_iterable(batch))
        for i, lengths in enumerate(batch):
            if lengths and (config.max_length is None or max(lengths) <= config.max_length):
                continue
            affected += 1
            kept = row_examples(tokenizer, window[i], done + i + 1) if lengths else []
            done_to = [what for example in kept if (what := limited(example, config.max_length, config.policy)[1])]
            truncated += "truncated" in done_to
            if len(named) < FIRST:
                reason = done_to[0] if done_to else "nothing to train in it"
                named.append(f" row {done + i + 1}: {max(lengths, default=0):,} tokens, {reason}")
        done += len(batch)
        window.clear()
    lines = [report.summary(), stats.summary()]
    if affected:
        limit = f"max_length {config.max_length}, {config.policy}" if config.max_length else "no max_length"
        lines += [f"{affected:,} rows affected ({limit}), {truncated:,} of them truncated and kept:", *named]
    if affected and config.policy == "error" and config.max_length is not None:
        raise ValueError("\n".join([*lines, "raise max_length, or choose the policy truncate or skip"]))
    return "\n".join(lines)


def _kept(rows: Iterable[dict], window: list[dict]) -> Iterator[dict]:
    """The rows, each also put into `window`, which whoever reads them empties."""
    for row in rows:
        window.append(row)
        yield row


def divide(config: SplitConfig) -> str:
    """Splits, or compares with `against`, and returns the report; writes both sides where asked.

    Raises:
        ValueError: for rows that cannot be read or have no prompt.
        FileExistsError: if an output file exists.
    """
    from qftlab.rows.split import contamination, split_rows

    report = LoadReport()
    if config.against:
        protected = load(config.against, bad=config.bad, columns=config.columns).rows
        train = config.read(report)
        return "\n".join([contamination(train, protected, n=config.n).summary(), report.summary()])
    rows = list(config.read(report))
    made = split_rows(rows, test=config.test, seed=config.seed)
    lines = [report.summary(), made.summary()]
    if config.output:
        folder = Path(config.output)
        for name in ("train", "test"):
            if (folder / f"{name}.jsonl").exists():
                raise FileExistsError(f"{folder / name}.jsonl exists: choose another output or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        for name, side in (("train", made.train), ("test", made.test)):
            write_rows(side, folder / f"{name}.jsonl")
        lines.append(f"written to {folder}")
    return "\n".join(lines)


def write_rows(rows: Iterable[dict], path: str | Path) -> int:
    """Writes rows as JSON lines to a new file, whole or not at all; returns how many.

    Raises:
        FileExistsError: if the file exists.
        ValueError: for a row that JSON cannot hold.
    """
    path, count = Path(path), 0
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another output or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for row in rows:
                file.write(_json(row) + "\n")  # half a surrogate pair is written as JSON spells it
                count += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _json(row: dict, *, ensure_ascii: bool = False) -> str:
    try:
        return json.dumps(row, ensure_ascii=ensure_ascii, default=str)
    except RecursionError:
        raise DataError(f"row with the fields {', '.join(row):.100} is nested too deep to be written") from None
