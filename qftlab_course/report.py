"""The report: one page with verdicts, tables and pictures, as HTML (one file) or Markdown (pictures beside it)."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qftlab.files import aside

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: bold; padding: .3rem 0; }
th, td { border-bottom: 1px solid #bbb; padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
td { white-space: pre-wrap; }
img { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured against it, both in the same unit; `at_most` turns the bar into a ceiling."""

    name: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value is at the bar or on its good side; nan never is."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar


@dataclass(frozen=True)
class Picture:
    """Axes (or the path of a PNG) and the text that stands for them where they cannot be seen."""

    source: Axes | str | Path
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what there is to see."""

    title: str
    text: str = ""
    table: pandas.DataFrame | None = None
    pictures: tuple[Picture, ...] = ()


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, verdicts: Sequence[Verdict] = (), intro: str = ""
) -> Path:
    """Writes the page and returns its path; folders are made.

    Args:
        path: `.html` (self-contained, pictures as data links) or `.md` (pictures as PNG files beside it).
        title: heading of the page.
        sections: what the page shows, in order.
        verdicts: the bars, shown first as a table with "passed" or "missed".
        intro: a paragraph above everything.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"path must end in .html or .md, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if verdicts:
        sections = [Section("Verdicts", table=verdict_table(verdicts)), *sections]
    page = (
        _html_page(title, intro, sections) if path.suffix == ".html" else _markdown_page(title, intro, sections, path)
    )
    with aside(path) as place:
        place.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def write_json(path: str | Path, content: object) -> Path:
    """Writes JSON to be read by people, whole or not at all, and returns its path; folders are made."""
    path = Path(path)
    with aside(path) as place, place.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)  # half a surrogate pair is written as JSON spells it
    return path


def verdict_table(verdicts: Sequence[Verdict]) -> pandas.DataFrame:
    """The verdicts as a table: measured, bar, and "passed" or "missed" in words."""
    import pandas

    lines = [
        {"what": v.name, "measured": v.value, "bar": f"{'at most' if v.at_most else 'at least'} {v.bar:g}",
         "verdict": "passed" if v.passed else "missed"} for v in verdicts
    ]  # fmt: skip
    return pandas.DataFrame(lines).set_index("what")


def format_cell(value: object) -> str:
    """A table cell: two decimals for a float, an en dash for nan and None, everything else as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def picture_png(picture: Picture) -> bytes:
    """The PNG bytes of a picture; figures are drawn at 120 dots an inch."""
    if isinstance(picture.source, str | Path):
        return Path(picture.source).read_bytes()
    buffer = io.BytesIO()
    picture.source.figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


def _cells(table: pandas.DataFrame) -> tuple[list[str], list[list[object]]]:
    """Head and body, the index as the first column if it has a name."""
    frame = table.reset_index() if table.index.name else table
    return [str(name) for name in frame.columns], [list(line) for line in frame.itertuples(index=False)]


def _html_page(title: str, intro: str, sections: Sequence[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", *_html_text(intro)]
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", *_html_text(section.text)]
        if section.table is not None:
            body.append(_html_table(section.table, section.title))
        for picture in section.pictures:
            data = base64.b64encode(picture_png(picture)).decode()
            body.append(f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}"></p>')
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    main = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{main}\n</body></html>\n'
    )


def _html_text(text: str) -> list[str]:
    return [f"<p>{html.escape(part)}</p>" for part in text.split("\n\n") if part.strip()]


def _html_table(table: pandas.DataFrame, caption: str) -> str:
    head, lines = _cells(table)
    is_number = [bool(lines) and all(isinstance(line[i], int | float) for line in lines) for i in range(len(head))]
    mark = [' class="number"' if number else "" for number in is_number]
    top = "".join(f'<th scope="col"{m}>{html.escape(h)}</th>' for h, m in zip(head, mark, strict=True))
    rows = [
        "<tr>"
        + "".join(f"<td{m}>{html.escape(format_cell(c))}</td>" for c, m in zip(line, mark, strict=True))
        + "</tr>"
        for line in lines
    ]
    return f"<table><caption>{html.escape(caption)}</caption><tr>{top}</tr>\n" + "\n".join(rows) + "</table>"


def _markdown_page(title: str, intro: str, sections: Sequence[Section], path: Path) -> str:
    body = [f"# {title}", intro]
    for number, section in enumerate(sections, 1):
        body += [f"## {section.title}", section.text]
        if section.table is not None:
            body.append(_markdown_table(section.table))
        for i, picture in enumerate(section.pictures, 1):
            name = re.sub(r"\W+", "-", section.title.lower()).strip("-")
            file = path.with_name(f"{path.stem}-{number}-{name}-{i}.png")
            file.write_bytes(picture_png(picture))
            body.append(f"![{' '.join(picture.alt.split())}]({file.name})")
    return "\n\n".join(part for part in body if part) + "\n"


def _markdown_table(table: pandas.DataFrame) -> str:
    def line(cells: Sequence[object]) -> str:
        shown = [format_cell(c).replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>") for c in cells]
        return "| " + " | ".join(shown) + " |"

    head, lines = _cells(table)
    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, lines)])
