"""`qftlab validate`: a file of training rows judged, its right rows written for training, and a report on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qftlab.files import aside
from qftlab.rows.sources import read_file
from qftlab.settings import Names, check_at_least, check_fields
from qftlab_course.agent_edit.outputs import mend, read_cases, validate_cases
from qftlab_course.agent_edit.validate import Case, Report, Verdict
from qftlab_course.report import write_json

MOST_KINDS = 50  # in the page


@dataclass(frozen=True)
class ValidateConfig:
    """Judges training rows with mode tokens one by one and against each other, and writes the right ones.

    Written are, with NAME that of the data: reports/NAME_quality_report.txt, .json and .html (with pictures), and
    validation/NAME_valid_alpaca.json. Older ones are replaced, and never the data itself.

    Args:
        data: rows of instruction and output (Alpaca, a teacher's raw list) or of Query and Output: .json, .jsonl, .csv
            or .parquet.
        output: the folder to write to.
        fix: first take off white space, quotes and <tool_call> tags around an output or its parts; nothing else.
        keep_invalid: also write validation/NAME_invalid.json, the rows that are refused, each with its reason.
        prompts: files with system prompts that no output may repeat.
        max_length: the most characters of an instruction, and of an output.
        similarity: two instructions are near-duplicates from this share of common runs of five words on.

    Raises:
        ValueError: without data, or for a value out of range.
    """

    data: str = ""
    output: str = "outputs"
    fix: bool = False
    keep_invalid: bool = False
    prompts: Names = ()
    max_length: int = 20_000
    similarity: float = 0.95

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(1, max_length=self.max_length)
        if not self.data:
            raise ValueError("data must name a file of rows, got none: --data rows.json")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity must be in (0, 1], got {self.similarity}")

    def place(self, kind: str) -> Path:
        """Where a file is written to.

        Raises:
            ValueError: if that is the data itself.
        """
        folder = "reports" if kind.startswith("quality") else "validation"
        path = Path(self.output) / folder / f"{Path(self.data).stem}_{kind}"
        if path.exists() and path.samefile(self.data):
            raise ValueError(f"output must not be the data itself, got {path}: choose another folder")
        return path


def validate_file(config: ValidateConfig) -> tuple[Report, str]:
    """Judges the rows of a file and writes what `ValidateConfig` names.

    Returns:
        The report, and what to say in a terminal.

    Raises:
        FileNotFoundError, DataError, ValueError, OSError: for what cannot be read or written.
    """
    rows = [row for _, row in read_file(Path(config.data))]
    prompts = [Path(file).read_text(encoding="utf-8") for file in config.prompts]
    cases, num_mended = read_cases(rows, config.data), 0
    if config.fix:
        before, cases = cases, [_mended(case) for case in cases]
        num_mended = sum(case is not old for case, old in zip(cases, before, strict=True))
    report = validate_cases(cases, prompts=prompts, max_length=config.max_length, similarity=config.similarity)
    text = report.to_text()
    if config.fix:
        text += f"\n{num_mended:,} outputs were mended before (white space, quotes, <tool_call> tags)"
    told = list(zip(rows, report.cases, report.verdicts, strict=True))
    written = [write_json(config.place("valid_alpaca.json"), [_alpaca(*row[:2]) for row in told if row[2].ok])]
    if config.keep_invalid:
        refused = [_refused(row, number, of) for number, (row, _, of) in enumerate(told, 1) if not of.ok]
        written.append(write_json(config.place("invalid.json"), refused))
    written.append(write_json(config.place("quality_report.json"), report.to_json()))
    with aside(config.place("quality_report.txt")) as place:
        place.write_text(f"{config.data}\n{text}\n", encoding="utf-8", errors="backslashreplace")
    written += [config.place("quality_report.txt"), _write_page(config, report, text)]
    return report, "\n".join([text, *(f"written: {path}" for path in written)])


def _mended(case: Case) -> Case:
    output = mend(case.output) if isinstance(case.output, str) else case.output
    return case if output == case.output else replace(case, output=output)


def _alpaca(row: dict, case: Case) -> dict:
    asked = row["instruction"] if "instruction" in row else row["Query"]
    system = {"system": row["system"]} if row.get("system") else {}
    return {"instruction": asked, "input": row.get("input") or "", "output": case.output, **system}


def _refused(row: dict, number: int, verdict: Verdict) -> dict:
    return {**row, "quality": {"row": number, "reason": verdict.reason, "detail": verdict.detail}}


def _write_page(config: ValidateConfig, report: Report, text: str) -> Path:
    from qftlab_course.report import Section, write_report

    sections = _sections(report) if report.cases else [Section("What was found", text)]
    title, intro = f"Quality of {Path(config.data).name}", f"{config.data}: {text.splitlines()[0]}"
    return write_report(config.place("quality_report.html"), title, sections, intro=intro)


def _sections(report: Report) -> list:
    """What the page shows of at least one row."""
    from pandas import DataFrame

    from qftlab_course.report import Picture, Section

    found = report.to_json()
    counts = {"valid": found["valid"], **{name: of["count"] for name, of in found["reasons"].items()}}
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    bars = Picture(_bars(counts), f"Bars of the rows by verdict: {said}")
    reasons = [{"reason": name, "rows": of["count"], "meaning": of["meaning"]} for name, of in found["reasons"].items()]
    examples = [{"reason": name, **one} for name, of in found["reasons"].items() for one in of["examples"]]
    modes = sorted({case.mode for case in report.cases})
    oks = {mode: [v.ok for case, v in zip(report.cases, report.verdicts, strict=True) if case.mode == mode]
           for mode in modes}  # fmt: skip
    balance = [{"mode": mode, "rows that ask for it": len(of), "valid": sum(of)} for mode, of in oks.items()]
    sizes = [{"text": name, **of} for name, of in found["lengths"].items()]
    drawn = _histogram(report, modes, found["lengths"]["output"])
    lengths = Picture(drawn, "Histogram of the outputs' lengths, in the table as numbers")
    sections = [
        Section("Verdicts", "", DataFrame(reasons) if reasons else None, (bars,)),
        Section("Balance of the modes", "", DataFrame(balance)),
        Section("Lengths of the valid rows, in characters", "", DataFrame(sizes), (lengths,)),
    ]
    if kinds := [{"kind": kind, **of} for kind, of in found["kinds"].items()]:
        said = f"{min(MOST_KINDS, len(kinds))} of {len(kinds):,}, the most frequent ones."
        table = DataFrame(kinds[:MOST_KINDS], dtype=object)  # texts of pandas's own hold no half surrogate pair
        sections.append(Section("Kinds of problems", said, table))
    if examples:
        sections.append(Section("Examples of what is refused", "", DataFrame(examples)))
    return sections


def _axes(height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained").subplots()


def _bars(counts: dict[str, int]):
    from qftlab_course.plots import FONT_SIZE, PALETTE, finish

    ax = _axes(0.9 + 0.36 * len(counts))
    bars = ax.barh(list(counts), list(counts.values()), color=[PALETTE[0], *[PALETTE[1]] * (len(counts) - 1)],
                   edgecolor="black", hatch=["", *["///"] * (len(counts) - 1)])  # fmt: skip
    ax.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=FONT_SIZE)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    return finish(ax, "rows", "", "What became of the rows")


def _histogram(report: Report, modes: Sequence[str], found: dict[str, int]):
    from qftlab_course.plots import DASHES, FONT_SIZE, PALETTE, finish

    ax = _axes(3.5)
    sizes = {mode: [len(case.output) for case in report.valid if case.mode == mode] for mode in modes}
    for i, (mode, lengths) in enumerate(sizes.items()):
        if lengths:
            style = {
                "range": (found["min"], found["max"]),
                "histtype": "step",
                "linewidth": 2.2,
                "color": PALETTE[i % len(PALETTE)],
            }
            ax.hist(lengths, bins=20, linestyle=DASHES[i % len(DASHES)], label=mode, **style)
    if any(sizes.values()):
        ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "characters of an output", "valid rows", "How long the valid outputs are")
