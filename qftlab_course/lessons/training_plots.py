"""Pictures of notebooks 03 and 05: schedules, packed rows, ranks, rows that moved, learned against forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qftlab_course.plots import DASHES, FONT_SIZE, MARKERS, PALETTE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH_COLORS = (*PALETTE[:6], PALETTE[7])  # without yellow, which is too pale for a line
OVER = {"loc": "lower left", "bbox_to_anchor": (0, 1), "fontsize": FONT_SIZE, "frameon": False}  # no line crosses it


def rates(series: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Learning rates, as shares of the peak, against optimizer steps."""
    ax = new_axes(ax, 7.0, 3.4)
    for i, (name, values) in enumerate(series.items()):
        ax.plot(values, DASHES[i] + (MARKERS[i] if len(series) == 1 else ""), color=PALETTE[i], linewidth=2, label=name)
    ax.legend(ncols=len(series), **OVER)
    return finish(ax, "optimizer step", "rate (share of the peak)", "")


def documents(panels: Mapping[str, tuple[Sequence[Sequence[int]], int]]):
    """Rows of documents side by side (an array of axes): solid what is real, hatched what fills a row up.

    Args:
        panels: title to rows, each a list of document lengths in tokens, and the tokens that every row has room for.
    """
    from matplotlib import pyplot

    _, (axes,) = pyplot.subplots(1, len(panels), figsize=(9.5, 4.6), layout="constrained", squeeze=False)
    for ax, (title, (rows, width)) in zip(axes, panels.items(), strict=True):
        for y, row in enumerate(rows):
            begins = [sum(row[:i]) for i in range(len(row))]
            ax.barh(y, row, left=begins, height=0.9, color=PALETTE[0], edgecolor="white")
            ax.barh(y, width - sum(row), left=sum(row), height=0.9, color="0.93", edgecolor="0.6", hatch="////",
                    linewidth=0)  # fmt: skip
        real = sum(map(sum, rows)) / (width * len(rows))
        finish(ax, "tokens", "", f"{title}: {real:.0%} real").set_yticks([])
        ax.invert_yaxis()
    return axes


def shares_by_rank(curves: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Share of a matrix, in [0, 1], that its best approximation of each rank holds."""
    ax = new_axes(ax, 7.0, 3.8)
    for i, (name, values) in enumerate(curves.items()):
        ax.plot(range(1, len(values) + 1), values, DASHES[i], color=PALETTE[3 * i], linewidth=2, label=name)
    ax.set_xscale("log")
    ax.set_xticks([1, 4, 16, 64, 160], ["1", "4", "16", "64", "160"])
    ax.minorticks_off()
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="upper left")
    return finish(ax, "rank", "share of the matrix", "")


def rows_moved(moved: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """How far each row (V,) of an embedding table has moved, for two ways to train: the first as dots."""
    ax = new_axes(ax, 7.5, 3.8)
    for i, (name, distances) in enumerate(moved.items()):
        ax.plot(distances, ".D"[i], color=PALETTE[1 - i], markersize=4 + i, label=name)
    ax.legend(ncols=2, **OVER)
    return finish(ax, "row of the table (token id)", "how far it moved", "")


def trade_off(kinds: Mapping[str, Tensor], yours: tuple[str, Tensor], ax: Axes | None = None) -> Axes:
    """Paths of what was learned against what was forgotten: a thin line for each run, a bold one for each kind's mean.

    Args:
        kinds: name to its runs' paths (runs, points, 2): losses on what is new and on what is old, in nats.
        yours: name and path (points, 2) of a run drawn as stars; all but its first point, where all paths begin.
        ax: axes to draw into.
    """
    ax = new_axes(ax, 8.5, 5.0)
    for i, (name, paths) in enumerate(kinds.items()):
        for path in paths:
            ax.plot(path[1:, 1], path[1:, 0], DASHES[i % 4], color=PATH_COLORS[i], linewidth=0.7, alpha=0.4)
        learned, forgotten = paths.mean(0)[1:].T
        ax.plot(forgotten, learned, MARKERS[i] + DASHES[i % 4], color=PATH_COLORS[i], linewidth=2.2, label=name)
    name, path = yours
    ax.plot(path[1:, 1], path[1:, 0], "*", color="white", markeredgecolor="black", markersize=12, label=name)
    ax.axvline(path[0, 1], color="grey", linestyle=":", linewidth=1.5)
    ax.set_xscale("log")
    ax.set_xticks([0.2, 0.3, 0.5, 1], ["0.2", "0.3", "0.5", "1"])
    ax.minorticks_off()
    ax.set_ylim(0, 4)
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    names = "forgotten: loss on plain problems (nats)", "learned: loss on new puzzles (nats)"
    return finish(ax, *names, "Down is learned, right is forgotten")
