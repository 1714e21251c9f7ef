"""Who may attend to whom: the masks of a padded batch, of documents packed carelessly, and packed properly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qftlab_course.drawing import Matrix, image, matrices_svg

KINDS = ("padded", "packed wrong", "packed right")
LEGEND = "■ attends; × attends to another document, which is wrong; · blocked; – padding"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class AttentionView:
    """Attention matrices, queries down and keys across; `print(view)` gives the text form.

    Attributes:
        panels: kind to its matrices (one for each row of the batch).
    """

    panels: dict[str, tuple[Matrix, ...]]

    def count(self, kind: str, sign: str) -> int:
        """How many squares of a kind's matrices carry a sign: `■` attends, `×` wrongly, `·` blocked, `–` padding."""
        return sum(row.count(sign) for matrix in self.panels[kind] for row in matrix.rows)

    def _repr_html_(self) -> str:
        title = "Attention: queries down, keys across; the number under a label is its position id"
        svg = matrices_svg(list(self.panels.values()), title=title, legend=LEGEND)
        told = [f"{kind}: {self.count(kind, '■')} pairs attend within a document, {self.count(kind, '×')} across "
                f"documents, {self.count(kind, '–')} squares are padding" for kind in self.panels]  # fmt: skip
        words = f"<details><summary>The masks as text</summary><pre>{escape(str(self))}</pre></details>"
        return f"<p>{image(svg, 'Attention masks. ' + '; '.join(told))}</p>{words}"

    def __str__(self) -> str:
        blocks = [LEGEND]
        for matrices in self.panels.values():
            for matrix in matrices:
                wide = max(map(len, matrix.labels))
                pairs = zip(matrix.labels, matrix.rows, strict=True)
                lines = [f"{label:<{wide}}  {' '.join(row)}" for label, row in pairs]
                numbers = "position ids " + " ".join(map(str, matrix.positions))
                blocks.append("\n".join([matrix.heading, numbers, *lines]))
        return "\n\n".join(blocks)

    __repr__ = __str__


def attention_view(kind: str | Sequence[str] = KINDS, lengths: Sequence[int] = (3, 4)) -> AttentionView:
    """The attention mask of a batch of documents A, B, ...: drawn, and as text.

    Args:
        kind: "padded" (a row each, filled up at the right), "packed wrong" (one row, plain causal mask, positions
            running on), "packed right" (one row, causal within each document, positions restarting), or several.
        lengths: tokens of each document.

    Raises:
        ValueError: for another kind, no document or a length under 1.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {name!r}")
    if not 1 <= len(lengths) <= len(LETTERS) or min(lengths) < 1:
        raise ValueError(f"lengths must be 1 to {len(LETTERS)} numbers of at least 1 token, got {list(lengths)}")
    return AttentionView({name: _padded(lengths) if name == "padded" else _packed(name, lengths) for name in kinds})


def _padded(lengths: Sequence[int]) -> tuple[Matrix, ...]:
    longest = max(lengths)
    matrices = []
    for number, length in enumerate(lengths):
        labels = [f"{LETTERS[number]}{i}" if i < length else "pad" for i in range(longest)]
        rows = ["■" * (i + 1) + "·" * (length - i - 1) + "–" * (longest - length) for i in range(length)]
        rows += ["–" * longest] * (longest - length)
        positions = [i if i < length else 0 for i in range(longest)]
        heading = f"padded, row {number + 1}"
        matrices.append(Matrix(heading, labels, positions, rows))
    return tuple(matrices)


def _packed(kind: str, lengths: Sequence[int]) -> tuple[Matrix, ...]:
    places = [(number, i) for number, length in enumerate(lengths) for i in range(length)]
    across = "×" if kind == "packed wrong" else "·"
    rows = ["".join("·" if key > query else "■" if places[key][0] == document else across for key in range(len(places)))
            for query, (document, _) in enumerate(places)]  # fmt: skip
    labels = [f"{LETTERS[number]}{i}" for number, i in places]
    positions = list(range(len(places))) if kind == "packed wrong" else [i for _, i in places]
    return (Matrix(kind, labels, positions, rows),)
