"""Pictures: each takes `ax=None`, returns the axes, says one thing, and survives greyscale print.

Colours are Okabe and Ito's (distinct to colour-blind eyes); a marker, dash or hatch says the same without colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
FONT_SIZE = 12  # points, the smallest text of a picture
TOKEN_FONT = "DejaVu Sans Mono"  # comes with matplotlib and has the signs of `visible`


def new_axes(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    """`ax` as it is, or the axes of a new pyplot figure of `width` x `height` inches."""
    if ax is not None:
        return ax
    # Here and not above: pyplot chooses a window system when it is imported.
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def finish(ax: Axes, xlabel: str, ylabel: str, title: str) -> Axes:
    """Labels axes as all pictures here are labelled, and returns them."""
    ax.set_xlabel(xlabel, fontsize=FONT_SIZE)
    ax.set_ylabel(ylabel, fontsize=FONT_SIZE)
    ax.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    ax.tick_params(labelsize=FONT_SIZE)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _check_lengths(**sequences: Sequence) -> None:
    lengths = {name: len(values) for name, values in sequences.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(lengths)} must be equally long, got {', '.join(map(str, lengths.values()))}")


def loss_curve(
    steps: Sequence[int],
    losses: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    held_out: tuple[Sequence[int], Sequence[float]] | None = None,
    window: int | None = None,
    title: str = "Loss falls as the model learns",
    ax: Axes | None = None,
) -> Axes:
    """Loss against optimizer steps: faint as logged, bold as a running mean.

    Args:
        steps: optimizer steps, one for each loss.
        losses: nats per trained token; or several runs, name to losses, over the same steps.
        held_out: (steps, losses) measured on held-out rows, in nats per token.
        window: steps in the running mean; by default a twentieth of the run; 1 draws the losses as they are.
        title: what the picture says.
        ax: axes to draw into.

    Raises:
        ValueError: if lengths differ.
    """
    ax = new_axes(ax)
    runs = losses if isinstance(losses, Mapping) else {"training": losses}
    for i, (name, values) in enumerate(runs.items()):
        _check_lengths(steps=steps, losses=values)
        size = window or max(1, len(values) // 20)
        color = PALETTE[i % len(PALETTE)]
        if size > 1:
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        label = name if size == 1 else f"{name}, mean of {size} steps"
        ax.plot(steps, running_mean(values, size), DASHES[i % len(DASHES)], color=color, linewidth=2, label=label)
    if held_out is not None:
        _check_lengths(held_out_steps=held_out[0], held_out_losses=held_out[1])
        ax.plot(*held_out, "s--", color=PALETTE[3], linewidth=2, markersize=6, label="held out")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "optimizer step", "loss (nats per trained token)", title)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values (fewer at the start), as long as `values`."""
    means = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(part) / len(part))
    return means


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
        _check_lengths(names=names, series=values)
        at = [row - 0.4 + thickness * (i + 0.5) for row in range(len(names))]
        percent = [100 * value for value in values]
        style = {"color": PALETTE[i % len(PALETTE)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "black"}
        ax.barh(at, percent, height=thickness * 0.9, label=model, linewidth=0.8, **style)
        if model in intervals:
            _check_lengths(names=names, intervals=intervals[model])
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
        _check_lengths(points=points, series=values)
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


def token_strip(
    strips: Mapping[str, Sequence[str]], *, trained: Mapping[str, Sequence[bool]] | None = None,
    width: int = 72, title: str = "One box is one token", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Rows of boxes, one box a token: before and after a tokenizer was extended, or trained against masked.

    Args:
        strips: row name ("before", "after") to the texts of its tokens.
        trained: row name to a mask; trained tokens get a heavy, hatched box.
        width: characters in a line; longer rows are wrapped.
        title: what the picture says.
        ax: axes to draw into (no axis is drawn: a strip has no units).

    Raises:
        ValueError: if a mask and its row differ in length.
    """
    boxes, headings, line = [], [], 0
    for number, (name, pieces) in enumerate(strips.items()):
        mask = (trained or {}).get(name, [False] * len(pieces))
        _check_lengths(pieces=pieces, trained=mask)
        plural = "" if len(pieces) == 1 else "s"
        headings.append((line, f"{name}: {len(pieces)} token{plural}"))
        line, column = line + 1, 0.0
        for piece, is_trained in zip(map(visible, pieces), mask, strict=True):
            size = len(piece) + 1.2
            if column and column + size > width:
                line, column = line + 1, 0.0
            boxes.append((line, column, size, piece, PALETTE[number % len(PALETTE)], is_trained))
            column += size
        line += 1
    ax = new_axes(ax, 0.125 * width, 0.6 + 0.34 * max(1, line))
    for at, text in headings:
        ax.text(0, at + 0.5, text, fontsize=FONT_SIZE, va="center", weight="bold")
    _draw_boxes(ax, boxes)
    ax.set_xlim(-0.5, width + 0.5)
    ax.set_ylim(max(1, line), -0.1)
    ax.set_axis_off()
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=FONT_SIZE + 1, loc="left")
    return ax


def _draw_boxes(ax: Axes, boxes: Sequence[tuple]) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    for line, column, size, piece, color, is_trained in boxes:
        face = to_rgba(color, 0.35 if is_trained else 0.12)
        style = {"linewidth": 2.2, "hatch": "////"} if is_trained else {"linewidth": 1.0}
        hatch_edge = to_rgba(color, 0.5)
        ax.add_patch(Rectangle((column, line + 0.08), size - 0.15, 0.84, facecolor=face, edgecolor=hatch_edge, **style))
        ax.add_patch(Rectangle((column, line + 0.08), size - 0.15, 0.84, fill=False, linewidth=style["linewidth"]))
        ax.text(column + size / 2 - 0.07, line + 0.5, piece, fontsize=FONT_SIZE, ha="center", va="center",
                family=TOKEN_FONT, parse_math=False)  # fmt: skip


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
    _check_lengths(pieces=pieces, logprobs=logprobs)
    ax = new_axes(ax, max(4.0, 0.42 * len(pieces)), 3.6)
    ax.bar(range(len(pieces)), [-x for x in logprobs], color=PALETTE[0], edgecolor="black", linewidth=0.8)
    rotation = 90 if max((len(p) for p in pieces), default=0) > 2 else 0
    ax.set_xticks(range(len(pieces)), map(visible, pieces), rotation=rotation, family=TOKEN_FONT,
                  parse_math=False)  # fmt: skip
    return finish(ax, "token", "surprise (nats)", title)
