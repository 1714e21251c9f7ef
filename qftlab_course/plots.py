"""Pictures that several lessons show, in the style of `qftlab.evaluate.plots`, whose tools are here under one name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qftlab.evaluate.plots import (
    DASHES,
    FONT_SIZE,
    PALETTE,
    check_lengths,
    finish,
    loss_curve,
    new_axes,
    running_mean,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DASHES", "FONT_SIZE", "HATCHES", "MARKERS", "PALETTE", "TOKEN_FONT",
    "accuracy_bars", "check_lengths", "finish", "loss_curve", "new_axes", "rate_lines", "running_mean",
    "surprise_bars", "visible",
]  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
TOKEN_FONT = "DejaVu Sans Mono"  # comes with matplotlib and has the signs of `visible`


def accuracy_bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    bar: float | None = None,
    title: str = "Accuracy, with 95 % intervals",
    ax: Axes | None = None,
) -> Axes:
    """Horizontal bars of accuracy, one group for each name and one bar for each model.

    Args:
        names: what was measured, one group each, top to bottom.
        series: model name ("base", "SFT") to accuracies in [0, 1], one for each name.
        intervals: model name to (low, high) in [0, 1], drawn as whiskers.
        bar: an accuracy to clear, drawn as a dotted line.
        title: what the picture says.
        ax: axes to draw into.

    Raises:
        ValueError: if lengths differ or `intervals` names a model that `series` lacks.
    """
    intervals = intervals or {}
    unknown = sorted(set(intervals) - set(series))
    if unknown:
        raise ValueError(f"intervals must name models of series ({', '.join(series)}), got {', '.join(unknown)}")
    ax = new_axes(ax, 7.0, 0.9 + 0.32 * max(1, len(names)) * max(1, len(series)))
    thickness = 0.8 / max(1, len(series))
    for i, (model, values) in enumerate(series.items()):
        check_lengths(names=names, series=values)
        at = [row - 0.4 + thickness * (i + 0.5) for row in range(len(names))]
        percent = [100 * value for value in values]
        style = {"color": PALETTE[i % len(PALETTE)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "black"}
        ax.barh(at, percent, height=thickness * 0.9, label=model, linewidth=0.8, **style)
        if model in intervals:
            check_lengths(names=names, intervals=intervals[model])
            low, high = zip(*intervals[model], strict=True)
            reach = [[p - 100 * x for p, x in zip(percent, low, strict=True)],
                     [100 * x - p for p, x in zip(percent, high, strict=True)]]  # fmt: skip
            reach = [[max(0.0, x) for x in side] for side in reach]
            ax.errorbar(percent, at, xerr=reach, fmt="none", ecolor="black", capsize=3, linewidth=1.2)
    if bar is not None:
        ax.axvline(100 * bar, color="black", linestyle=":", linewidth=1.5)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finish(ax, "accuracy (%)", "", title)


def rate_lines(
    points: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str = "What each stage changes",
    ax: Axes | None = None,
) -> Axes:
    """Rates over stages that follow one another: a line and a marker for each, its name at its right end.

    Args:
        points: names of the stages, left to right.
        series: what was measured to its rates in [0, 1], one for each point; nan leaves a gap.
        title: what the picture says.
        ax: axes to draw into.

    Raises:
        ValueError: if lengths differ.
    """
    ax = new_axes(ax, 8.5, 4.4)
    ends: list[float] = []
    for i, (name, values) in sorted(enumerate(series.items()), key=lambda item: item[1][1][-1]):
        check_lengths(points=points, series=values)
        percent = [100 * value for value in values]
        ax.plot(range(len(points)), percent, MARKERS[i % len(MARKERS)] + DASHES[i % len(DASHES)], markersize=8,
                color=PALETTE[i % len(PALETTE)], linewidth=2.2, clip_on=False)  # fmt: skip
        ends.append(max(percent[-1], ends[-1] + 6.5 if ends else 0.0))  # names that would overlap are moved up
        ax.annotate(name, (len(points) - 1 + 0.08, ends[-1]), fontsize=FONT_SIZE, va="center",
                    color="black", annotation_clip=False)  # fmt: skip
    ax.set_xticks(range(len(points)), points)
    ax.set_ylim(0, 103)
    ax.set_xlim(-0.15, len(points) - 1)
    return finish(ax, "", "held-out questions right (%)", title)


def visible(piece: str) -> str:
    """A token's text with its blanks shown: `␣` space, `⏎` newline, `⇥` tab, `∅` nothing."""
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def surprise_bars(
    pieces: Sequence[str], logprobs: Sequence[float], *, title: str = "Surprise, token by token", ax: Axes | None = None
) -> Axes:
    """How surprised the model was by each token: −log p as bars.

    Args:
        pieces: texts of the tokens.
        logprobs: log-probability of each token, in nats.
        title: what the picture says.
        ax: axes to draw into.

    Raises:
        ValueError: if lengths differ.
    """
    check_lengths(pieces=pieces, logprobs=logprobs)
    ax = new_axes(ax, max(4.0, 0.42 * len(pieces)), 3.6)
    ax.bar(range(len(pieces)), [-x for x in logprobs], color=PALETTE[0], edgecolor="black", linewidth=0.8)
    rotation = 90 if max((len(p) for p in pieces), default=0) > 2 else 0
    ax.set_xticks(range(len(pieces)), map(visible, pieces), rotation=rotation, family=TOKEN_FONT,
                  parse_math=False)  # fmt: skip
    return finish(ax, "token", "surprise (nats)", title)
