"""What decoding looks like: the next-token distribution under its filters, and the tree of what was tried.

Pure functions of a trace. They read without colour: what leads is heavy and carries ★, what was dropped is dashed and
carries ✗, what a filter cut is hatched and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from qftlab_course.drawing import BLUE, GREY, INK, MARGIN, MONO, PALE_BLUE, PALE_GREY, SANS, WIDTH, image, svg_page
from qftlab_course.pictures import picture
from qftlab_course.tokens import cells, column, shorten, token_bytes, visible

if TYPE_CHECKING:
    from qftlab_course.trace import BeamTrace, Candidate, Distribution, Node, SampleTrace

STEP_GUTTER, BOX_HEIGHT, PITCH = 34, 38, 64  # pixels: for the step's number, of a node, from step to step
MAX_COLUMNS, MAX_BOX = 8, 100  # nodes of a step beside those that survive; pixels of the widest
MAX_DROPPED = 6  # named in a line of the text form
BAR, ROW_WIDTH, ROW_HEIGHT = 250, 400, 26  # pixels: a bar of 100 %, and the row it stands in


def texts_of(tokenizer) -> Callable[[Sequence[int]], list[str]]:
    """What ids say, made visible: the `texts` that `generate.trace` asks for."""
    known: dict[int, str] = {}

    def texts(ids: Sequence[int]) -> list[str]:
        new = [i for i in dict.fromkeys(ids) if i not in known]
        if new:
            known.update(zip(new, map(visible, token_bytes(tokenizer, new)), strict=True))
        return [known[i] for i in ids]

    return texts


@dataclass(frozen=True)
class DecodingTree:
    """A decoding run as a tree, a step a line, the likeliest at the left; `print(view)` gives the text form.

    Attributes:
        trace: the run.
        limit: steps shown, the last ones.
    """

    trace: SampleTrace | BeamTrace
    limit: int

    @property
    def title(self) -> str:
        """What it shows, in a line."""
        nodes = self.trace.nodes()
        steps = nodes[-1].step if nodes else 0
        many = f"{steps} step" + ("s" if steps != 1 else "")
        more = f", the last {self.limit} shown" if steps > self.limit else ""
        if self.trace.kind == "beam":
            beams = self.trace.num_beams
            return f"Beam search, {beams} beam{'s' if beams != 1 else ''}, {many}{more}"
        return f"Token by token, {many}{more}"

    @property
    def legend(self) -> str:
        """What the marks mean, in two lines."""
        if self.trace.kind == "beam":
            return ("★ heavy: the best path; thin: kept; ✗ dashed: dropped.\n"
                    "Sum of log-probabilities in nats; ■ finished: sum ÷ length^penalty.")  # fmt: skip
        return "★ heavy: taken; ✗ dashed: not taken.\nProbability after the filters, or the filter that cut it."

    def _shown(self) -> tuple[list[Node], list[list[int]]]:
        """All nodes, and for each step shown the indices of the nodes that are drawn."""
        nodes = list(self.trace.nodes())
        first = max(1, nodes[-1].step - self.limit + 1) if nodes else 1
        lines: list[list[int]] = [[] for _ in range(nodes[-1].step - first + 1)] if nodes else []
        for place, node in enumerate(nodes):
            if node.step >= first:
                lines[node.step - first].append(place)
        return nodes, [_drawn(nodes, line) for line in lines]

    def svg(self) -> str:
        """The tree as an SVG document."""
        nodes, lines = self._shown()
        pitch = min(MAX_BOX + 8.0, (WIDTH - 2 * MARGIN - STEP_GUTTER) / max(map(len, lines), default=1))
        left, top = MARGIN + STEP_GUTTER, MARGIN + 104.0
        at = {place: (left + pitch * number + (pitch - 8) / 2, top + PITCH * line + PITCH - BOX_HEIGHT)
              for line, places in enumerate(lines) for number, place in enumerate(places)}  # fmt: skip
        right = max([x + (pitch - 8) / 2 for x, _ in at.values()] + [left + 480])
        earlier = "… " if lines and nodes[lines[0][0]].step > 1 else ""
        prompt = shorten(earlier + self.trace.prompt, int((right - left - 12) / 8.5))
        body = [_words(MARGIN, MARGIN + 15, self.title, f'font-family="{SANS}" font-size="14" font-weight="bold"'),
                *(_words(MARGIN, MARGIN + 36 + 17 * number, words, f'font-family="{SANS}"')
                  for number, words in enumerate(self.legend.split("\n"))),
                _box(left, top - 34, right - left, 30, f'fill="#FFFFFF" stroke="{INK}"'),
                _words(left + 8, top - 14, prompt, 'font-size="14"')]  # fmt: skip
        for line, places in enumerate(lines):
            number = _words(left - 10, top + PITCH * (line + 1) - 14, str(nodes[places[0]].step), 'text-anchor="end"')
            body.append(f'<g fill="{GREY}">{number}</g>')
        drawn = sorted(at, key=lambda place: (nodes[place].is_best, nodes[place].status != "dropped"))
        body += [_edge(nodes[place], at, place, top - 4) for place in drawn]
        body += [self._node(nodes[place], *at[place], pitch - 8) for place in drawn]
        inner = f'<g font-family="{MONO}" font-size="12" fill="{INK}">{"".join(body)}</g>'
        return svg_page(right + MARGIN, top + PITCH * len(lines) + MARGIN, self.title, inner)

    def _node(self, node: Node, x: float, y: float, width: float) -> str:
        look = f'fill="#FFFFFF" stroke="{INK}"'
        if node.status == "dropped":
            look = f'fill="#FFFFFF" stroke="{GREY}" stroke-dasharray="4 3"'
        if node.is_best:
            look = f'fill="{PALE_BLUE}" stroke="{BLUE}" stroke-width="3"'
        room = width - 8
        weight = ' font-weight="bold"' if node.is_best else ""
        return (
            _box(x - width / 2, y, width, BOX_HEIGHT, look)
            + _words(x, y + 16, shorten(node.text, int(room / 8.5)), f'font-size="14" text-anchor="middle"{weight}')
            + _words(x, y + 32, shorten(self._caption(node), int(room / 7.3)), 'text-anchor="middle"')
        )

    def _caption(self, node: Node) -> str:
        mark = "★" if node.is_best else "✗" if node.status == "dropped" else ""
        if node.final is not None:
            mark += "■"
        return f"{mark} {self._value(node)}".strip()

    def _value(self, node: Node) -> str:
        if self.trace.kind == "beam":
            return signed(node.score if node.final is None else node.final)
        return node.note if node.note else f"{100 * node.score:.0f} %"

    def _label(self, node: Node) -> str:
        total = f" (sum {signed(node.score)})" if node.final is not None else ""
        return f"{self._caption(node).replace(self._value(node), node.text)} {self._value(node)}{total}"

    def _repr_html_(self) -> str:
        words = f"<details><summary>The tree as text</summary><pre>{escape(str(self))}</pre></details>"
        return f"<p>{image(self.svg(), self._alt())}</p>{words}"

    def _alt(self) -> str:
        best = " ".join(node.text for node in self.trace.nodes() if node.is_best)
        return f"{self.title}, after {shorten(self.trace.prompt, 60)}. The best path is {best or 'empty'}."

    def __str__(self) -> str:
        nodes, lines = self._shown()
        below: dict[int | None, list[int]] = {}
        for place in (place for line in lines for place in line):
            parent = nodes[place].parent
            is_root = nodes[place].step == nodes[lines[0][0]].step
            below.setdefault(None if is_root else parent, []).append(place)
        branches = self._branches(nodes, below, None, "")
        return "\n".join([self.title, self.legend, shorten(self.trace.prompt, 100), *branches])

    def _branches(self, nodes: list[Node], below: dict, parent: int | None, indent: str) -> Iterator[str]:
        """Lines of everything under a node; a lone survivor stands under its parent without a branch."""
        dropped = [nodes[place] for place in below.get(parent, []) if nodes[place].status == "dropped"]
        alive = [place for place in below.get(parent, []) if nodes[place].status != "dropped"]
        if dropped:
            named = " · ".join(f"{node.text} {self._value(node)}" for node in dropped[:MAX_DROPPED])
            yield f"{indent}✗ {named}" + (" · …" if len(dropped) > MAX_DROPPED else "")
        for place in alive:
            fork, under = ("├─ ", "│  ") if place != alive[-1] else ("└─ ", "   ")
            fork, under = (fork, under) if len(alive) > 1 else ("", "")
            yield indent + fork + self._label(nodes[place])
            yield from self._branches(nodes, below, place, indent + under)

    __repr__ = __str__


def _drawn(nodes: list[Node], places: list[int]) -> list[int]:
    """All that survive, and the first of the others, up to eight in all, in their order."""
    room = max(0, MAX_COLUMNS - sum(nodes[place].status != "dropped" for place in places))
    dropped = [place for place in places if nodes[place].status == "dropped"][:room]
    return [place for place in places if nodes[place].status != "dropped" or place in dropped]


def _edge(node: Node, at: dict[int, tuple[float, float]], place: int, root: float) -> str:
    x, y = at[place]
    from_x, from_y = at.get(node.parent, (x, root - BOX_HEIGHT))
    look = f'stroke="{GREY}"'
    if node.status == "dropped":
        look = f'stroke="{PALE_GREY}" stroke-dasharray="4 3"'
    if node.is_best:
        look = f'stroke="{BLUE}" stroke-width="4"'
    return f'<path d="M{from_x:.0f} {from_y + BOX_HEIGHT:.0f}L{x:.0f} {y:.0f}" fill="none" {look}/>'


def _box(x: float, y: float, width: float, height: float, look: str) -> str:
    return f'<path d="M{x:.0f} {y:.0f}h{width:.0f}v{height}h-{width:.0f}z" {look}/>'


def _words(x: float, y: float, text: str, look: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {look}>{escape(text, quote=False)}</text>'


def signed(value: float) -> str:
    """A number with two decimals and a minus sign as wide as a digit."""
    return f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")


def decoding_tree(trace: SampleTrace | BeamTrace, *, limit: int = 16) -> DecodingTree:
    """The tree of a decoding run, as SVG and as text.

    Args:
        trace: what `generate.trace` recorded.
        limit: steps shown, the last ones.

    Raises:
        ValueError: if `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 step, got {limit}")
    return DecodingTree(trace, limit)


def percent(share: float) -> str:
    """A probability as `41.2 %`, and `<0.1 %` where that would be 0.0 and it is not 0."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def candidate_words(candidate: Candidate) -> str:
    """`41.2 % → 55.0 %`, or `3.1 %, cut: top-p`."""
    after = f", cut: {candidate.cut}" if candidate.cut else f" → {percent(candidate.after)}"
    return percent(candidate.before) + after


def candidate_svg(candidate: Candidate) -> str:
    """One row: the outline is the probability before the filters, the solid bar after; hatched where it was cut."""
    before, after = BAR * candidate.before, BAR * candidate.after
    dash = ' stroke-dasharray="4 3"' if candidate.cut else ""
    body = [_box(0.5, 3.5, BAR, 19, 'fill="#F4F4F4"')]
    if candidate.cut:
        body.append(f'<path d="{_hatch(max(2.0, before), 4, 18)}" fill="none" stroke="{GREY}"/>')
    else:
        body.append(_box(0.5, 8, max(1.0, after), 10, f'fill="{BLUE}"'))
    body.append(_box(0.5, 3.5, max(1.0, before), 19, f'fill="none" stroke="{INK}" stroke-width="1.5"{dash}'))
    body.append(_words(BAR + 10, 18, candidate_words(candidate), f'font-family="{SANS}" font-size="13" fill="{INK}"'))
    return svg_page(ROW_WIDTH, ROW_HEIGHT, candidate.text, "".join(body))


def _hatch(width: float, top: float, height: float) -> str:
    """Diagonals every 6 pixels within a box at x 0."""
    lines, start = [], -height
    while start < width:
        x, end = max(start, 0.0), min(start + height, width)
        lines.append(f"M{x:.1f} {top + height - (x - start):.1f}L{end:.1f} {top + height - (end - start):.1f}")
        start += 6
    return "".join(lines)


@dataclass(frozen=True)
class DistributionView:
    """What may come next, before and after the filters; `print(view)` gives a table."""

    distribution: Distribution
    title: str

    @property
    def summary(self) -> str:
        """Entropy and kept mass, in a line."""
        seen = self.distribution
        kept = f"{seen.num_kept:,} token{'s' if seen.num_kept != 1 else ''} kept"
        return (f"entropy {abs(seen.entropy):.2f} nats before, {abs(seen.entropy_after):.2f} after the filters · "
                f"kept mass {percent(seen.kept_mass)}, {kept}")  # fmt: skip

    def picture(self):
        """The rows as a PNG (a `Picture`), for GitHub and paper."""
        from qftlab_course import plots

        rows = self.distribution.candidates
        ax = plots.new_axes(None, 7.5, 0.9 + 0.36 * len(rows))
        for at, row in enumerate(rows):
            ax.barh(at, 100 * row.before, height=0.78, fill=False, edgecolor="black",
                    linestyle="--" if row.cut else "-", hatch="////" if row.cut else "")  # fmt: skip
            ax.barh(at, 100 * row.after, height=0.4, color=plots.PALETTE[0])
            ax.text(100 * max(row.before, row.after) + 1, at, candidate_words(row), va="center",
                    fontsize=plots.FONT_SIZE)  # fmt: skip
        names = [shorten(row.text, 16) for row in rows]
        ax.set_yticks(range(len(rows)), names, family=plots.TOKEN_FONT, fontsize=plots.FONT_SIZE, parse_math=False)
        ax.invert_yaxis()
        ax.set_xticks(range(0, 101, 20))
        ax.set_xlim(0, 100 * max((max(row.before, row.after) for row in rows), default=1) * 1.45)
        ax.set_xlabel("probability (%): outline before the filters, solid after", fontsize=plots.FONT_SIZE)
        ax.tick_params(labelsize=plots.FONT_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(shorten(self.title, 80), fontsize=plots.FONT_SIZE + 1, loc="left", parse_math=False,
                     family=plots.TOKEN_FONT)  # fmt: skip
        return picture(ax, alt=f"{self.title}: {'; '.join(self._named(rows[:5]))}; {self.summary}")

    @staticmethod
    def _named(rows: Sequence[Candidate]) -> list[str]:
        return [f"{row.text} {candidate_words(row)}" for row in rows]

    def __str__(self) -> str:
        rows = self.distribution.candidates
        width = min(24, max((cells(row.text) for row in rows), default=5))
        lines = [f"{column('token', max(5, width))}  {'before':>8}  {'after':>8}  cut by"]
        for row in rows:
            figures = f"{percent(row.before):>8}  {percent(row.after):>8}"
            lines.append(f"{column(row.text, max(5, width))}  {figures}  {row.cut}".rstrip())
        return "\n".join([self.title, *lines, self.summary])

    __repr__ = __str__


def distribution_view(distribution: Distribution, *, title: str = "What may come next") -> DistributionView:
    """The next-token distribution as a table and, by `.picture()`, as a PNG."""
    return DistributionView(distribution, visible(title, prose=True))
