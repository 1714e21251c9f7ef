"""Pictures: each takes `ax=None`, returns the axes, says one thing, and survives greyscale print.

Colours are Okabe and Ito's (distinct to colour-blind eyes); a marker, dash or hatch says the same without colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
DASHES = ("-", "--", "-.", ":")
FONT_SIZE = 12  # points, the smallest text of a picture
# Where the loss says little: what a run's records hold in its place, the axis, and the title.
TELLING = (
    (("reward",), "mean reward of an answer", "The reward of the sampled answers"),
    (("chosen_logprob", "rejected_logprob"), "log-probability (nats an answer)", "The margin grows; look where to"),
)


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


def check_lengths(**sequences: Sequence) -> None:
    """Raises ValueError unless all are equally long; the message has their names and lengths."""
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
        check_lengths(steps=steps, losses=values)
        size = window or max(1, len(values) // 20)
        color = PALETTE[i % len(PALETTE)]
        if size > 1:
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        label = name if size == 1 else f"{name}, mean of {size} steps"
        ax.plot(steps, running_mean(values, size), DASHES[i % len(DASHES)], color=color, linewidth=2, label=label)
    if held_out is not None:
        check_lengths(held_out_steps=held_out[0], held_out_losses=held_out[1])
        ax.plot(*held_out, "s--", color=PALETTE[3], linewidth=2, markersize=6, label="held out")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "optimizer step", "loss (nats per trained token)", title)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values (fewer at the start), as long as `values`."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw_curves(
    path: Path, losses: Sequence[float], held_out: Sequence[tuple[int, float]] = (), records: Sequence[dict] = ()
) -> None:
    """Writes what a run is judged by as a PNG: its rewards, both log-probabilities of pairs, or else its losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for names, ylabel, title in TELLING:
        found = [record for record in records if names[0] in record]
        if found:
            curves = {name: [record[name] for record in found] for name in names}
            loss_curve([record["step"] for record in found], curves, ax=ax)
            values = [value for curve in curves.values() for value in curve]
            if any(values):
                ax.set_ylim(min(0.0, 1.05 * min(values)), max(0.0, 1.05 * max(values)))
            finish(ax, "optimizer step", ylabel, title)
            break
    else:
        measured = tuple(zip(*held_out, strict=True)) if held_out else None
        loss_curve(range(1, len(losses) + 1), losses, held_out=measured, ax=ax)
    figure.savefig(path, dpi=120)
