"""The pictures a run folder draws: the numbers behind them, and that they survive a lack of colour."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.colors import to_rgb

matplotlib.use("Agg")

from qftlab.evaluate import plots  # noqa: E402


def test_loss_curve_draws_the_numbers() -> None:
    assert plots.running_mean([1, 2, 3, 6], 2) == [1.0, 1.5, 2.5, 4.5]  # by hand
    ax = plots.loss_curve([1, 2, 3, 4], {"lr 1": [1, 2, 3, 6], "lr 2": [4, 3, 2, 1]}, window=2)
    lines = [list(line.get_ydata()) for line in ax.lines]
    assert [1.0, 1.5, 2.5, 4.5] in lines and [4, 3, 2, 1] in lines
    bold = [line for line in ax.lines if line.get_linewidth() == 2]
    assert len({line.get_linestyle() for line in bold}) == 2, "runs differ without colour"
    with pytest.raises(ValueError, match="equally long, got 2, 1"):
        plots.loss_curve([1, 2], [1])


def test_palette_survives_greyscale() -> None:
    luminance = [
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(color), strict=True)) for color in plots.PALETTE
    ]
    assert abs(luminance[0] - luminance[1]) > 0.2, "the first two colours, used most, differ in grey"
