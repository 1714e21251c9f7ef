"""Pictures: the numbers behind them, their labels, and that they survive a lack of colour."""

from __future__ import annotations

import itertools
import math

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from qftlab_course import plots  # noqa: E402


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def pictures() -> list:
    return [
        plots.loss_curve(range(40), [3 - 0.05 * i for i in range(40)], held_out=([0, 39], [3.0, 1.4])),
        plots.accuracy_bars(["add", "sort"], {"base": [0.0, 0.1], "SFT": [0.8, 1.0]},
                            intervals={"SFT": [(0.7, 0.9), (0.9, 1.0)]}, bar=0.75),
        plots.surprise_bars(["a", " b", "\n"], [-0.1, -2.0, -3.0]),
        plots.rate_lines(["base", "SFT"], {"format": [0.0, 1.0], "kept": [0.97, 0.92], "mode": [math.nan, 0.99]}),
    ]  # fmt: skip


def test_texts_are_at_least_12_points_and_units_are_named() -> None:
    for ax in pictures():
        ax.figure.canvas.draw()
        small = [t.get_text() for t in ax.figure.findobj(Text) if t.get_text() and t.get_fontsize() < 12]
        assert not small
        assert ax.get_title(loc="left")
    curve, bars, surprise, lines = pictures()
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("optimizer step", "loss (nats per trained token)")
    assert bars.get_xlabel() == "accuracy (%)"
    assert surprise.get_ylabel() == "surprise (nats)"


def test_ax_is_used_and_returned() -> None:
    _, axes = pyplot.subplots(1, 3)
    assert plots.loss_curve([0, 1], [2, 1], ax=axes[0]) is axes[0]
    assert plots.accuracy_bars(["a"], {"m": [1.0]}, ax=axes[1]) is axes[1]
    assert plots.surprise_bars(["a"], [-1.0], ax=axes[2]) is axes[2]


def test_bars_and_whiskers_are_the_numbers() -> None:
    ax = pictures()[1]
    bars = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert [round(b.get_width(), 6) for b in bars] == [0.0, 10.0, 80.0, 100.0]
    assert len({b.get_hatch() for b in bars}) == 2, "models differ without colour"
    whiskers = [c for c in ax.collections if len(c.get_segments()) == 2][0].get_segments()
    assert [tuple(round(float(x), 6) for x, _ in segment) for segment in whiskers] == [(70.0, 90.0), (90.0, 100.0)]
    with pytest.raises(ValueError, match="intervals must name models of series"):
        plots.accuracy_bars(["a"], {"m": [1.0]}, intervals={"n": [(0, 1)]})
    with pytest.raises(ValueError, match="equally long"):
        plots.accuracy_bars(["a", "b"], {"m": [1.0]})


def test_blanks_are_made_visible() -> None:
    assert plots.visible("\n a\t") == "⏎␣a⇥" and plots.visible("") == "∅"


def test_rate_lines_name_each_line_once_and_apart() -> None:
    ax = plots.rate_lines(["base", "SFT"], {"format": [0.0, 1.0], "kept": [0.97, 0.98], "mode": [math.nan, 0.99]})
    names = {t.get_text(): t.xy[1] for t in ax.texts}
    heights = sorted(names.values())
    assert set(names) == {"format", "kept", "mode"} and all(b - a > 5 for a, b in itertools.pairwise(heights))
    assert [list(line.get_ydata())[-1] for line in ax.lines] == [98.0, 99.0, 100.0]
    with pytest.raises(ValueError, match="equally long"):
        plots.rate_lines(["base"], {"format": [0.0, 1.0]})


def test_each_colour_has_a_marker_of_its_own() -> None:
    assert len(set(plots.MARKERS)) == len(plots.MARKERS) >= len(plots.PALETTE)
