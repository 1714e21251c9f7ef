"""SVG for the views: rows of token chips and attention matrices, legible in greyscale and without any CSS.

Only presentation attributes are used, and the drawing travels as an <img> with a data address, so that nothing that
strips styles, scripts or inline SVG (GitHub does) can touch it. The background is drawn, for dark themes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qftlab_course.tokens import cells, shorten

WIDTH = 900  # pixels
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
SANS = "DejaVu Sans, Helvetica, Arial, sans-serif"
BLUE, PALE_BLUE, ORANGE, INK, GREY, PALE_GREY = "#0072B2", "#D9EAF6", "#E69F00", "#111111", "#555555", "#BBBBBB"
MARGIN, GUTTER, GAP = 10, 42, 5  # pixels: around, for the position at the left, between chips
CELL, SMALL_CELL = 8.5, 7.3  # pixels of a monospace cell at 14 and 12 px
MAX_CELLS = 60  # of text in one chip


@dataclass(frozen=True)
class Chip:
    """One token as drawn: `text` over `below` (its id); `then` is what it predicts; `mark` None draws no underline.

    `note` is a line under the id, in the place of `then`; `tint` colours the chip, blue up to 1 and orange down to −1.
    """

    text: str
    below: str = ""
    then: str | None = None
    mark: bool | None = None
    is_special: bool = False
    ends_line: bool = False
    note: str = ""
    tint: float = 0.0


@dataclass(frozen=True)
class Strip:
    """A heading (or "") and its chips; `first` is the position of the first one, None for no positions."""

    heading: str
    chips: Sequence[Chip]
    first: int | None = None


def image(svg: str, alt: str) -> str:
    """An <img> that carries the drawing inside, with its words for those who do not see it."""
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    return f'<img role="img" alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def svg_page(width: float, height: float, title: str, body: str) -> str:
    """An SVG document on white."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#FFFFFF"/>{body}</svg>'
    )


def chips_svg(strips: Sequence[Strip], *, title: str, legend: str = "") -> str:
    """Strips of chips, wrapped at 900 px and after each newline token."""
    layers = {name: [] for name in ("plain", "trained", "tints", "dotted", "solid", "texts", "ids", "thens", "words")}
    y = float(MARGIN)
    for text in filter(None, (title, legend)):
        weight = "bold" if text == title else "normal"
        layers["words"].append(_text(MARGIN, y + 15, text, f'font-size="14" font-weight="{weight}"'))
        y += 24
    for strip in strips:
        if strip.heading:
            layers["words"].append(_text(MARGIN, y + 17, strip.heading, 'font-size="14" font-weight="bold"'))
            y += 26
        y = _lay_out(strip, y, layers)
    return svg_page(WIDTH, y + MARGIN, title, _joined(layers))


def _lay_out(strip: Strip, y: float, layers: dict[str, list[str]]) -> float:
    """Draws the strip's chips from `y` down and returns where the next strip starts."""
    left = MARGIN + (GUTTER if strip.first is not None else 0)
    has_then = any(chip.then is not None or chip.note for chip in strip.chips)
    height = 60 if has_then else 41
    step = height + (24 if any(chip.mark is not None for chip in strip.chips) else 10)
    x = float(left)
    for place, chip in enumerate(strip.chips):
        width = _chip_width(chip)
        if x > left and x + width > WIDTH - MARGIN:
            x, y = float(left), y + step
        if x == left and strip.first is not None:
            layers["words"].append(
                _text(left - 8, y + 19, str(strip.first + place), f'font-size="12" fill="{GREY}" text-anchor="end"')
            )
        _draw_chip(chip, x, y, width, height, layers)
        x += width + GAP
        if chip.ends_line and place + 1 < len(strip.chips):
            x, y = float(left), y + step
    return y + step


def _chip_width(chip: Chip) -> float:
    shown = min(cells(chip.text), MAX_CELLS) * CELL
    then = 0 if chip.then is None else (min(cells(chip.then), MAX_CELLS) + 2) * SMALL_CELL
    return max(24, shown + 12, max(len(chip.below), len(chip.note)) * SMALL_CELL + 8, then + 8)


def _draw_chip(chip: Chip, x: float, y: float, width: float, height: float, layers: dict[str, list[str]]) -> None:
    middle = x + width / 2
    kind = "trained" if chip.mark and not chip.note else "plain"  # beside a tint, their blue would be read as one
    layers[kind].append(f"M{x:.0f} {y:.0f}h{width:.0f}v{height}h-{width:.0f}z")
    if chip.tint:
        box = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}"'
        look = f'fill="{BLUE if chip.tint > 0 else ORANGE}" fill-opacity="{0.8 * min(1, abs(chip.tint)):.1f}"'
        layers["tints"].append(f"<rect {box} {look}/>")
    weight = ' font-weight="bold"' if chip.is_special else ""
    layers["texts"].append(_text(middle, y + 19, shorten(chip.text, MAX_CELLS), weight))
    if chip.below:
        layers["ids"].append(_text(middle, y + 35, chip.below))
    if chip.then is not None:
        layers["thens"].append(_text(middle, y + 54, "→ " + shorten(chip.then, MAX_CELLS)))
    if chip.note:
        layers["thens"].append(_text(middle, y + 54, chip.note))
    if chip.mark is not None:
        layers["solid" if chip.mark else "dotted"].append(f"M{x:.0f} {y + height + 2:.0f}h{width:.0f}")
        size = 12 if chip.mark else 20  # the dot is small
        look = f'font-size="{size}" font-weight="{"bold" if chip.mark else "normal"}" text-anchor="middle"'
        layers["words"].append(_text(middle, y + height + 17, "T" if chip.mark else "·", look))


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    space = "" if not attributes or attributes.startswith(" ") else " "
    return f'<text x="{x:.0f}" y="{y:.0f}"{space}{attributes}>{escape(text, quote=False)}</text>'


def _joined(layers: dict[str, list[str]]) -> str:
    path = '<path d="{0}" fill="{1}" stroke="{2}" stroke-width="{3}"{4}/>'
    group = '<g font-family="{0}" font-size="{1}" fill="{2}" text-anchor="{3}">{4}</g>'
    shapes = [("plain", "#FFFFFF", PALE_GREY, 1, ""), ("trained", PALE_BLUE, BLUE, 1, ""),
              ("dotted", "none", GREY, 2, ' stroke-dasharray="2 4"'), ("solid", "none", INK, 4, "")]  # fmt: skip
    words = [("texts", MONO, 14, INK, "middle"), ("ids", MONO, 12, GREY, "middle"),
             ("thens", MONO, 12, INK, "middle"), ("words", SANS, 12, INK, "start")]  # fmt: skip
    drawn = [path.format("".join(layers[name]), *how) for name, *how in shapes if layers[name]]
    return "".join(
        drawn + layers["tints"] + [group.format(*how, "".join(layers[name])) for name, *how in words if layers[name]]
    )


@dataclass(frozen=True)
class Matrix:
    """One attention matrix: `rows` of `■` attends, `×` attends but must not, `·` blocked, `–` a padded position."""

    heading: str
    labels: Sequence[str]  # one for each position, as "A0"
    positions: Sequence[int]  # the position ids
    rows: Sequence[str]


SQUARE = 26  # pixels


def matrices_svg(panels: Sequence[Sequence[Matrix]], *, title: str, legend: str) -> str:
    """Panels side by side (wrapped at 900 px), the matrices of a panel one under the other."""
    body = [_text(MARGIN, MARGIN + 15, title, 'font-size="14" font-weight="bold"'), _text(MARGIN, MARGIN + 38, legend)]
    x, y, lowest = float(MARGIN), MARGIN + 58.0, 0.0
    for panel in panels:
        width = max(max(44 + SQUARE * len(matrix.labels), 8 * len(matrix.heading)) for matrix in panel) + 24
        if x > MARGIN and x + width > WIDTH:
            x, y = float(MARGIN), lowest + 16
        top = y
        for matrix in panel:
            body += _matrix(matrix, x, top)
            top += 66 + SQUARE * len(matrix.labels)
        x, lowest = x + width, max(lowest, top)
    body = f'<g font-family="{SANS}" font-size="12" fill="{INK}">{"".join(body)}</g>'
    return svg_page(WIDTH, lowest + MARGIN, title, body)


def _matrix(matrix: Matrix, x: float, y: float) -> list[str]:
    """A heading, the key labels with their position ids above, the query labels at the left, and the squares."""
    drawn = [_text(x, y + 12, matrix.heading, 'font-weight="bold"')]
    left, top = x + 36, y + 50
    fills = {"■": BLUE, "×": ORANGE, "·": "#FFFFFF", "–": "#EEEEEE"}
    for column, (label, position) in enumerate(zip(matrix.labels, matrix.positions, strict=True)):
        middle = left + SQUARE * (column + 0.5)
        drawn.append(_text(middle, y + 31, label, 'text-anchor="middle"'))
        drawn.append(_text(middle, y + 45, str(position), f'fill="{GREY}" text-anchor="middle"'))
    squares: dict[str, list[str]] = {kind: [] for kind in fills}
    signs: dict[str, list[str]] = {"×": [], "·": [], "–": []}
    for line, row in enumerate(matrix.rows):
        at = top + SQUARE * line
        drawn.append(_text(left - 6, at + 17, matrix.labels[line], 'text-anchor="end"'))
        for column, kind in enumerate(row):
            place = left + SQUARE * column
            squares[kind].append(f"M{place:.0f} {at:.0f}h{SQUARE}v{SQUARE}h-{SQUARE}z")
            if kind in signs:
                signs[kind].append(_text(place + SQUARE / 2, at + 19, kind))
    drawn += [f'<path d="{"".join(paths)}" fill="{fills[kind]}" stroke="{GREY}"/>' for kind, paths in squares.items()]
    for kind, texts in signs.items():
        look = 'font-size="18" font-weight="bold"' if kind == "×" else f'fill="{GREY}"'
        drawn.append(f'<g {look} text-anchor="middle">{"".join(texts)}</g>')
    return drawn
