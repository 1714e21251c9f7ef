"""The pictures of notebook 09: intervals that hold the truth or miss it, differences, and power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qftlab_course.plots import DASHES, FONT_SIZE, MARKERS, PALETTE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interval = tuple[float, float]


def coverage(intervals: Mapping[str, Sequence[Interval]], truth: float, xlabel: str) -> Figure:
    """Repeated experiments below each other, one panel a method; an interval that misses the truth has a cross."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(intervals), sharex=True, sharey=True, figsize=(8.4, 4.2),
                                     layout="constrained")  # fmt: skip
    for ax, (name, found) in zip(panels, intervals.items(), strict=True):
        for y, (low, high) in enumerate(found):
            is_hit = low <= truth <= high
            ax.plot([low, high], [y, y], color=PALETTE[0] if is_hit else PALETTE[3], linewidth=2 if is_hit else 3)
            if not is_hit:
                ax.plot((low + high) / 2, y, "x", color="black", markersize=8, markeredgewidth=2)
        ax.axvline(truth, color="black", linestyle=DASHES[1], linewidth=1)
        missed = sum(not low <= truth <= high for low, high in found)
        finish(ax, xlabel, "", f"{name}: {missed} of {len(found)} miss")
        ax.set_yticks([])
        ax.xaxis.set_major_formatter("{x:.0%}")
    return figure


def differences(found: Mapping[str, tuple[float, float, float]], ax: Axes | None = None) -> Axes:
    """Differences (mean, low, high), one line each, against zero."""
    ax = new_axes(ax, 6.4, 0.9 + 0.5 * len(found))
    for y, (mean, low, high) in enumerate(found.values()):
        ax.plot([low, high], [y, y], color=PALETTE[y], linewidth=3)
        ax.plot(mean, y, MARKERS[y], color=PALETTE[y], markersize=9)
    ax.axvline(0, color="black", linestyle=DASHES[1], linewidth=1)
    ax.set_yticks(range(len(found)), list(found), fontsize=FONT_SIZE)
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:+.0%}")
    return finish(ax, "difference of the two rates, with 95 % interval", "", "")


def power_curves(prompts: Sequence[int], powers: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """How often a difference is found, against the number of prompts; a dotted line at 80 %."""
    ax = new_axes(ax, 6.6, 3.6)
    for i, (name, values) in enumerate(powers.items()):
        ax.plot(prompts, values, DASHES[i], marker=MARKERS[i], color=PALETTE[i], linewidth=2, label=name)
    ax.axhline(0.8, color="black", linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks(prompts, [f"{n:,}" for n in prompts])
    ax.minorticks_off()
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "prompts", "found at p < 0.05", "")


def picked(curves: Mapping[str, Mapping[int, float]], ax: Axes | None = None) -> Axes:
    """Accuracy of the answer that is picked from n, one curve for each way of picking."""
    ax = new_axes(ax, 6.4, 3.6)
    for i, (name, curve) in enumerate(curves.items()):
        ax.plot(list(curve), list(curve.values()), DASHES[i], marker=MARKERS[i], color=PALETTE[i], linewidth=2,
                label=name)  # fmt: skip
    ns = list(next(iter(curves.values())))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ns, [str(n) for n in ns])
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "answers to choose from (n)", "right after choosing", "")
