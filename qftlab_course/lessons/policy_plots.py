"""The pictures of notebook 08: pushes, the clip, the leash, a run's curves, pass@k, and paid against true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qftlab_course.plots import DASHES, FONT_SIZE, HATCHES, MARKERS, PALETTE, TOKEN_FONT, finish, new_axes, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a run of RLOO logs, in the order in which to look at it.
CURVES = {
    "reward": "mean reward", "length": "length (tokens)", "entropy": "entropy (nats a token)",
    "equal_groups": "groups all alike", "truncated": "answers cut off", "clip_fraction": "answers clipped",
}  # fmt: skip


def advantage_bars(labels: Sequence[str], advantages: Sequence[float], title: str, ax: Axes | None = None) -> Axes:
    """One bar an answer: to the right what is pushed up, to the left, hatched, what is pushed down."""
    ax = new_axes(ax, 6.2, 0.9 + 0.34 * len(labels))
    for row, value in enumerate(advantages):
        is_up = value > 0
        ax.barh(row, value, color=PALETTE[0 if is_up else 1], hatch="" if is_up else HATCHES[1], edgecolor="black")
    ax.set_yticks(range(len(labels)), labels, family=TOKEN_FONT)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=1)
    return finish(ax, "advantage (reward above that of the siblings)", "", title)


def push_histogram(pushes: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Histograms as outlines over one axis that is wide enough for all of them."""
    ax = new_axes(ax, 6.2, 3.2)
    reach = max(values.abs().max().item() for values in pushes.values())
    bins = torch.linspace(-reach, reach, 41).tolist()
    for i, (name, values) in enumerate(pushes.items()):
        ax.hist(values.tolist(), bins=bins, histtype="step", linewidth=2.2, label=name, color=PALETTE[i],
                linestyle=DASHES[i])  # fmt: skip
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "what one puzzle says about the direction", "puzzles", "")


def clip_curves(loss: Callable[..., Tensor], epsilon: float, ax: Axes | None = None) -> Axes:
    """A loss of (logprobs, old_logprobs, advantages, epsilon) against the ratio, for advantages 1 and −1."""
    ax, ratio = new_axes(ax, 6.2, 3.0), torch.linspace(0.4, 1.8, 141)
    for i, sign in enumerate((1.0, -1.0)):
        curve = loss(ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, sign), epsilon)
        ax.plot(ratio, curve, DASHES[i], color=PALETTE[i], linewidth=2.2, label=f"advantage {sign:+.0f}")
    ax.axvspan(1 - epsilon, 1 + epsilon, color="grey", alpha=0.2)
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="center left")
    return finish(ax, "ratio ρ: how much likelier the answer has become", "loss", "")


def lines(x: Sequence[float], series: Mapping[str, Sequence], xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Some lines over one axis, each with its own colour, marker and dash; the y axis begins at 0.

    Args:
        x: where the values stand.
        series: name to values, or to a list of runs with such values each: thin lines, and their mean in bold.
        xlabel, ylabel: with units.
        ax: axes to draw into.
    """
    ax = new_axes(ax, 6.2, 3.2)
    for i, (name, values) in enumerate(series.items()):
        runs = values if isinstance(values[0], Sequence) else []
        for run in runs:
            ax.plot(x, run, color=_pale(PALETTE[i]), linewidth=1, antialiased=False)
        means = [sum(column) / len(column) for column in zip(*runs, strict=True)] if runs else values
        style = {"color": PALETTE[i], "linestyle": DASHES[i % 4], "marker": MARKERS[i], "linewidth": 2}
        ax.plot(x, means, label=f"{name}, mean of {len(runs)} runs" if runs else name, **style)
    ax.set_ylim(bottom=0)
    if runs:
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend above what is thin
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, xlabel, ylabel, "")


def run_curves(metrics: Sequence[Mapping[str, float]]):
    """Six small pictures of a run's log (an array of axes): faint as logged, bold as a mean of five steps."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots(2, 3, figsize=(8.0, 3.6), layout="constrained", sharex=True)
    for ax, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        values = [record[name] for record in metrics if name in record]
        ax.plot(range(1, len(values) + 1), values, color=_pale(PALETTE[0]), linewidth=1, antialiased=False)
        ax.plot(range(1, len(values) + 1), running_mean(values, 5), color=PALETTE[0], linewidth=2)
        ax.set_ylim(0, max(1.25 * max(values), 0.05))
        finish(ax, "step" if ax in axes[1] else "", "", title)
    return axes


def pass_curves(ks: Sequence[int], passes: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """pass@k against k on a doubling axis; dotted, the level of the last model's single answer."""
    ax = lines(ks, passes, "k: answers drawn, of which the verifier picks", "puzzles solved (pass@k)", ax)
    ax.axhline(list(passes.values())[-1][0], color="grey", linestyle=":", linewidth=1.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, map(str, ks))
    ax.set_ylim(0, 1)
    return ax


def frontier(
    best: Sequence[tuple[float, float]], best_of_n: Mapping[int, tuple[float, float]], trained: tuple[float, float],
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Success against distance: the best policies as a line, best-of-n as squares, a trained model as a diamond.

    Args:
        best: (KL in nats, success) of the best policy at each β.
        best_of_n: the same by n.
        trained: the same of a trained model.
        ax: axes to draw into.
    """
    ax = new_axes(ax, 6.2, 3.4)
    ax.plot(*zip(*best, strict=True), "-", color=PALETTE[0], linewidth=2, label="best policy, β from 10 to 0.1")
    ax.plot(*zip(*best_of_n.values(), strict=True), "s--", color=PALETTE[1], linewidth=1.5, label="best of n")
    for n, point in best_of_n.items():
        ax.annotate(str(n), point, textcoords="offset points", xytext=(6, -14), fontsize=FONT_SIZE)
    ax.plot(*trained, "D", color=PALETTE[3], markersize=10, label="RLOO, one answer")
    ax.set_ylim(0, 1)
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="upper left")
    return finish(ax, "KL from the old model (nats an answer)", "puzzles solved", "")


def courses(panels: Mapping[str, tuple[Mapping[str, Sequence[float]], Sequence[Mapping[str, Sequence[float]]]]]):
    """Runs side by side (an array of axes): what was "paid", dashed, and what was "true", as means of five steps.

    Args:
        panels: title to a run, drawn in bold, and other runs of the same kind, drawn thin.
    """
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, len(panels), figsize=(3.8 * len(panels), 3.1), layout="constrained", sharey=True)
    for ax, (title, (run, others)) in zip(axes, panels.items(), strict=True):
        for name, label, color, dash in (("paid", "paid reward", 3, "--"), ("true", "true accuracy", 0, "-")):
            for one in others:
                ax.plot(range(1, len(one[name]) + 1), running_mean(one[name], 5), color=_pale(PALETTE[color]),
                        linewidth=1, antialiased=False)  # fmt: skip
            ax.plot(range(1, len(run[name]) + 1), running_mean(run[name], 5), dash, color=PALETTE[color],
                    linewidth=2.4, label=label)  # fmt: skip
        ax.set_ylim(0, 1.02)
        finish(ax, "optimizer step", "", title)
    axes[-1].legend(fontsize=FONT_SIZE, frameon=False, loc="upper left")
    return axes


def sample_rows(samples: Sequence[Mapping], ax: Axes | None = None) -> Axes:
    """Samples of a run as rows of text: the puzzle, the answer, and what it was paid (no axis: text has no units)."""
    ax = new_axes(ax, 7.6, 0.5 + 0.4 * len(samples))
    for x, heading in ((0.0, "puzzle"), (0.66, "answer"), (1.0, "paid")):
        ax.text(x, 0, heading, fontsize=FONT_SIZE, weight="bold", ha="right" if x == 1 else "left")
    for row, sample in enumerate(samples, 1):
        ax.text(0, row, _shortened(sample["prompt"]), fontsize=FONT_SIZE)
        ax.text(0.66, row, sample["text"][:24], fontsize=FONT_SIZE, family=TOKEN_FONT, parse_math=False)
        ax.text(1, row, f"{sample['reward']:g}", fontsize=FONT_SIZE, ha="right")
    ax.set_ylim(len(samples) + 0.5, -0.7)
    ax.set_axis_off()
    return ax


def _pale(color: str) -> tuple[float, ...]:
    """A colour on its way to white: a solid one, because many shades make a large file."""
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.4 * (1 - part) for part in to_rgb(color))


def _shortened(prompt: str, width: int = 54) -> str:
    return prompt if len(prompt) <= width else prompt[: width - 1] + "…"
