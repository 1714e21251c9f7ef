"""What a notebook shows: figures with words, tokens one by one, answers side by side, attention masks.

Every view reads without colour and without CSS, and has a text form of the same content: `print(view)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from textwrap import wrap

from qftlab_course.attention import attention_view as attention_view
from qftlab_course.decoding import decoding_tree as decoding_tree
from qftlab_course.drawing import Chip, Strip, chips_svg, image
from qftlab_course.pictures import Picture as Picture
from qftlab_course.pictures import picture as picture
from qftlab_course.pictures import show_figure as show_figure
from qftlab_course.tokens import Token, cells, column, read_tokens, visible

TEXT_WIDTH = 100  # columns of a text form


@dataclass(frozen=True)
class TokenView:
    """Tokens one by one: chips to look at, a table to read aloud, `print(view)` as text.

    Attributes:
        rows: the tokens of each row (one row, unless a conversation renders as several).
        title: what it shows.
        is_masked: whether trained and untrained are told apart.
        shift: whether the marks sit under the position that predicts, instead of under the token predicted.
        hidden: tokens left out at the end of each row because of `limit`.
    """

    rows: tuple[tuple[Token, ...], ...]
    title: str
    is_masked: bool
    shift: bool
    hidden: tuple[int, ...]

    def svg(self) -> str:
        """The chips as an SVG document."""
        strips = [Strip(self._heading(number), [self._chip(token) for token in row], first=0)
                  for number, row in enumerate(self.rows)]  # fmt: skip
        return chips_svg(strips, title=self.title, legend=self._legend())

    def _chip(self, token: Token) -> Chip:
        mark = token.is_loss_here if self.shift else token.is_trained
        then = (token.predicts or "(end)") if self.shift else None
        note = "" if token.gain is None else _signed(token.gain)
        tint = 0.0 if token.gain is None else max(-1.0, min(1.0, round(token.gain) / 4))
        return Chip(token.text, str(token.id), then, mark, token.is_special, "⏎" in token.text, note, tint)

    def _heading(self, number: int) -> str:
        parts = [f"row {number + 1} of {len(self.rows)}"] if len(self.rows) > 1 else []
        row = self.rows[number]
        parts.append(f"{len(row)} token" + ("s" if len(row) != 1 else ""))
        if self.is_masked:
            parts.append(f"{sum(bool(token.is_trained) for token in row)} trained")
        if self.hidden[number]:
            parts.append(f"{self.hidden[number]} more not shown")
        return ", ".join(parts)

    def _legend(self) -> str:
        if self._has_gains():
            return "under the id: the gain of the policy over the reference in nats; blue is up, orange is down"
        if self.shift:
            marks = "; solid line and T: this prediction is trained; dotted and ·: it is not" if self.is_masked else ""
            return f"→ what the position learns to predict{marks}"
        return "solid line and T: trained; dotted line and ·: not trained" if self.is_masked else ""

    def _repr_html_(self) -> str:
        alt = "; ".join(f"{self._heading(n)}: {_trained_text(row)}" for n, row in enumerate(self.rows))
        tables = "".join(self._table(number) for number in range(len(self.rows)))
        words = f"{escape(self.title)}: the tokens as a table"
        return (
            f"<p>{image(self.svg(), f'{self.title}. {alt}')}</p><details><summary>{words}</summary>{tables}</details>"
        )

    def _columns(self) -> list[str]:
        mark = ["loss here" if self.shift else "trained"] if self.is_masked else []
        return ["position", "id", "token", *mark, *(["gain"] if self._has_gains() else []), "predicts"]

    def _has_gains(self) -> bool:
        return any(token.gain is not None for row in self.rows for token in row)

    def _cells(self, token: Token) -> list[str]:
        mark = ["T" if (token.is_loss_here if self.shift else token.is_trained) else "·"] if self.is_masked else []
        gain = ["" if token.gain is None else _signed(token.gain)] if self._has_gains() else []
        return [str(token.position), str(token.id), token.text, *mark, *gain, token.predicts or "(end)"]

    def _table(self, number: int) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name in self._columns())
        lines = []
        for token in self.rows[number]:
            # <bdi>: right-to-left text must not reorder its neighbours.
            shown = (escape(text) if text.isascii() else f"<bdi>{escape(text)}</bdi>" for text in self._cells(token))
            lines.append(f"<tr><td>{'</td><td>'.join(shown)}</td></tr>")
        caption = f"<caption>{self._heading(number)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def __str__(self) -> str:
        lines = [self.title]
        for number, row in enumerate(self.rows):
            table = [self._columns(), *map(self._cells, row)]
            widths = [min(40, max(cells(line[place]) for line in table)) for place in range(len(table[0]))]
            lines.append(self._heading(number))
            lines += ["  ".join(map(column, line, widths)).rstrip(" ") for line in table]
        return "\n".join(lines)

    __repr__ = __str__


def _signed(gain: float) -> str:
    """A gain with one decimal and its sign; "0.0" for what rounds to it."""
    return f"{gain:+.1f}".replace("-", "−") if round(gain, 1) else "0.0"


def _trained_text(row: Sequence[Token]) -> str:
    """The trained stretches of a row, or all of it where nothing is masked, for the alt text."""
    if row and row[0].is_trained is None:
        return " ".join(token.text for token in row[:40])
    stretches, inside = [], False
    for token in row:
        if token.is_trained:
            stretches[-1:] = [stretches[-1] + token.text] if inside else [*stretches[-1:], token.text]
        inside = bool(token.is_trained)
    return "trained is " + (" and ".join(stretches[:4]) or "nothing")


def token_view(
    tokenizer, ids: Sequence[int], mask: Sequence[bool] | None = None, *,
    title: str = "One box is one token", shift: bool = False, limit: int = 200,
    gains: Sequence[float | None] | None = None,
) -> TokenView:  # fmt: skip
    """Every token with position, id and text, whether it is trained, and what it predicts.

    Args:
        tokenizer: a transformers tokenizer.
        ids: T token ids (list or 1-D tensor).
        mask: T values, true where the token counts in the loss (unshifted); None: no marks are drawn.
        title: what the view shows.
        shift: put the marks under the position that makes the prediction.
        limit: tokens shown; the view says how many it left out.
        gains: T numbers, how much more likely the policy finds each token than the reference (nats); None: no number.

    Raises:
        ValueError: if mask or gains and ids differ in length, or an id is negative.
    """
    view = _view(tokenizer, [(ids, mask)], title, shift, limit)
    if gains is None:
        return view
    if len(gains) != len(ids):
        raise ValueError(f"gains must have one value for each of the {len(ids)} ids, got {len(gains)}")
    row = tuple(replace(token, gain=gain) for token, gain in zip(view.rows[0], gains, strict=False))
    return replace(view, rows=(row,))


def mask_view(
    tokenizer, rendered, *, title: str = "What is trained, and what is only read", shift: bool = False, limit: int = 200
) -> TokenView:
    """`token_view` of what `render_chat` returns: one row with `input_ids` and `loss_mask`, or a list of them.

    Raises:
        TypeError: if `rendered` has no such fields.
        ValueError: as `token_view`.
    """
    several = rendered if isinstance(rendered, Sequence) else [rendered]
    for row in several:
        if not (hasattr(row, "input_ids") and hasattr(row, "loss_mask")):
            raise TypeError(
                f"rendered must be what render_chat returns (input_ids and loss_mask), got {type(row).__name__}; "
                "for bare ids use token_view"
            )
    return _view(tokenizer, [(row.input_ids, row.loss_mask) for row in several], title, shift, limit)


def _view(tokenizer, pairs: Sequence[tuple], title: str, shift: bool, limit: int) -> TokenView:
    if limit < 1:
        raise ValueError(f"limit must be at least 1 token, got {limit}")
    rows = [read_tokens(tokenizer, ids, mask) for ids, mask in pairs]
    is_masked = any(mask is not None for _, mask in pairs)
    hidden = tuple(max(0, len(row) - limit) for row in rows)
    return TokenView(tuple(row[:limit] for row in rows), visible(title, prose=True), is_masked, shift, hidden)


@dataclass(frozen=True)
class PiecesView:
    """A text as pieces before and after the tokenizer was extended; `print(view)` gives the text form."""

    text: str
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]

    def _headings(self) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        rows = (("before", self.before), ("after", self.after))
        return [(f"{name}: {len(row)} token" + ("s" if len(row) != 1 else ""), row) for name, row in rows]

    def _repr_html_(self) -> str:
        strips = [Strip(heading, [Chip(*piece) for piece in row]) for heading, row in self._headings()]
        return f"<p>{image(chips_svg(strips, title=f'The text {self.text}'), str(self))}</p>"

    def __str__(self) -> str:
        lines = [f"{heading:<20}{' '.join(f'[{shown}]' for shown, _ in row)}" for heading, row in self._headings()]
        return "\n".join([f"The text {self.text}", *lines])

    __repr__ = __str__


def pieces_view(
    text: str, before: Sequence[str | tuple[str, int]], after: Sequence[str | tuple[str, int]]
) -> PiecesView:
    """A text and its tokens before and after: `<|AGENT|>` goes from many pieces to one.

    Args:
        text: what was tokenised.
        before, after: the tokens' texts, or (text, id) pairs.
    """

    def shown(pieces: Sequence[str | tuple[str, int]]) -> tuple[tuple[str, str], ...]:
        pairs = [(piece, "") if isinstance(piece, str) else piece for piece in pieces]
        return tuple((visible(piece), str(number)) for piece, number in pairs)

    return PiecesView(visible(text, prose=True), shown(before), shown(after))


@dataclass(frozen=True)
class Comparison:
    """Answers side by side, a row for each prompt and a column for each model; `print(view)` gives the text form."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def _repr_html_(self) -> str:
        # Both: GitHub takes styles away, and JupyterLab's own style overrules the attribute.
        left = 'align="left" valign="top" style="text-align:left;vertical-align:top"'
        share = 76 // max(1, len(self.columns))
        head = f'<th scope="col" width="24%" {left}>prompt</th>'
        head += "".join(f'<th scope="col" width="{share}%" {left}>{escape(name)}</th>' for name in self.columns)
        body = []
        for prompt, answers in self.rows:
            row = "".join(f"<td {left}>{_lines(text)}</td>" for text in answers)
            body.append(f'<tr><th scope="row" {left}>{_lines(prompt)}</th>{row}</tr>')
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def __str__(self) -> str:
        size = max(map(len, self.columns), default=0) + 2
        blocks = []
        for prompt, answers in self.rows:
            lines = _folded(prompt, "")
            for name, text in zip(self.columns, answers, strict=True):
                first, *others = _folded(text, " " * (size + 2))
                lines += [f"  {name:<{size}}{first.lstrip()}", *others]
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    __repr__ = __str__


def _lines(text: str) -> str:
    """Text as HTML that keeps its lines and its indentation."""
    kept = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        kept.append("&nbsp;" * indent + escape(line[indent:]))
    return "<bdi>" + "<br>".join(kept) + "</bdi>"


def _folded(text: str, indent: str) -> list[str]:
    """Lines of at most 100 columns, each after `indent`; at least one."""
    lines = [piece for line in text.split("\n") for piece in wrap(line, max(40, TEXT_WIDTH - len(indent))) or [""]]
    return [(indent + line).rstrip() for line in lines]


def side_by_side(table: Mapping[str, Mapping[str, str]]) -> Comparison:
    """Answers of several models to the same prompts: before and after.

    Args:
        table: prompt → {column: answer}; every prompt has the same columns.

    Raises:
        ValueError: if a prompt's columns differ from the first one's.
    """
    columns = tuple(next(iter(table.values()), {}))
    for prompt, answers in table.items():
        if set(answers) != set(columns):
            raise ValueError(f"every prompt needs the columns {list(columns)}, got {list(answers)} for {prompt!r}")
    rows = tuple(
        (visible(prompt, prose=True), tuple(visible(answers[name], prose=True) or "(nothing)" for name in columns))
        for prompt, answers in table.items()
    )
    return Comparison(tuple(visible(name, prose=True) for name in columns), rows)
