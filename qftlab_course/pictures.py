"""A matplotlib figure as a PNG with words, which is what a notebook shows and a page without a kernel keeps."""

from __future__ import annotations

import sys
from base64 import b64encode
from dataclasses import dataclass, field
from io import BytesIO

DPI = 100


@dataclass(frozen=True)
class Picture:
    """A PNG and its words; the last line of a cell, or `IPython.display.display(picture)`, shows it.

    Attributes:
        png: the file's bytes.
        alt: what the picture shows, for readers who do not see it.
    """

    png: bytes = field(repr=False)
    alt: str

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"alt must say in words what the picture shows, got {self.alt!r}")

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": b64encode(self.png).decode("ascii"), "text/plain": repr(self)}
        return data, {"image/png": {"alt": self.alt}}

    def __repr__(self) -> str:
        return f"[picture: {self.alt}]"


def picture(figure, *, alt: str) -> Picture:
    """A matplotlib figure as a small PNG (256 colours, 100 dpi); the figure is closed.

    Args:
        figure: a Figure, or Axes (its figure is taken), or an array of Axes.
        alt: what the picture shows, in a sentence.

    Raises:
        ValueError: if `alt` is empty.
        TypeError: if `figure` is neither.
    """
    from PIL import Image

    first = figure.flat[0] if hasattr(figure, "flat") else figure
    whole = getattr(first, "figure", None) if not hasattr(first, "savefig") else first
    if whole is None:
        raise TypeError(f"figure must be a matplotlib Figure or Axes, got {type(figure).__name__}")
    drawn, small = BytesIO(), BytesIO()
    whole.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(whole)
    return Picture(small.getvalue(), alt)


def show_figure(figure, *, alt: str) -> None:
    """Displays a matplotlib figure in the notebook with alt text and closes it; see `picture` for the arguments."""
    from IPython.display import display

    display(picture(figure, alt=alt))
