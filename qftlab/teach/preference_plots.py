"""Pictures of notebook 07: a bandit's policies, the logs of runs and what they hide, habits, taste and search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qftlab.core.plots import DASHES, FONT_SIZE, HATCHES, MARKERS, PALETTE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _panels(widths: Sequence[float] = (1, 1), height: float = 3.6, **options) -> Sequence[Axes]:
    from matplotlib import pyplot

    axes = pyplot.subplots(1, len(widths), figsize=(9.5, height), width_ratios=widths, layout="constrained", **options)[
        1
    ]
    for ax in axes:
        ax.tick_params(labelsize=FONT_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def _name(ax: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    ax.set_xlabel(xlabel, fontsize=FONT_SIZE)
    ax.set_ylabel(ylabel, fontsize=FONT_SIZE)
    ax.set_title(title, fontsize=FONT_SIZE, loc="left")


def _legend(ax: Axes, **options) -> None:
    ax.legend(fontsize=FONT_SIZE, frameon=False, title_fontsize=FONT_SIZE, **options)


def bandit(
    betas: Sequence[float], found: Tensor, fine: Sequence[float], exact: Tensor, names: Sequence[str],
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Probabilities of a few answers against β: points that training found, on the lines of the exact policy.

    Args:
        betas: of the points.
        found: (points, answers).
        fine: β of the lines.
        exact: (β of the lines, answers).
        names: of the answers.
        ax: axes to draw into.
    """
    ax = new_axes(ax, 7.0, 3.6)
    for i, name in enumerate(names):
        ax.plot(fine, exact[:, i].tolist(), DASHES[i], color=PALETTE[i], linewidth=2)
        ax.plot(betas, found[:, i].tolist(), MARKERS[i], color=PALETTE[i], markersize=8, label=name)
    ax.set_xscale("log")
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas], fontsize=FONT_SIZE)
    ax.minorticks_off()
    _name(ax, "β", "probability of the answer")
    _legend(ax)
    return ax


def logs(paths: Mapping[str, Sequence[Mapping[str, float]]], every: int) -> Axes:
    """Margin and preference accuracy of several runs: what every log of DPO shows.

    Args:
        paths: run → its held-out figures ("margin", "preference_accuracy") along the way.
        every: pairs seen between two of them.
    """
    left, right = _panels()
    for i, (name, path) in enumerate(paths.items()):
        look = {"color": PALETTE[i], "label": name, "markersize": 6}
        seen = [every * k for k in range(len(path))]
        left.plot(seen, [point["margin"] for point in path], MARKERS[i] + DASHES[i], **look)
        right.plot(seen, [100 * point["preference_accuracy"] for point in path], MARKERS[i] + DASHES[i], **look)
    _name(left, "pairs seen", "margin (nats)")
    _name(right, "pairs seen", "preference accuracy (%)")
    right.set_ylim(0, 100)
    _legend(right, loc="lower right")
    return left


def both_sides(ax: Axes, path: Sequence[Mapping[str, float]], every: int, color: str, name: str = "") -> None:
    """Draws the log-probabilities of chosen (solid) and rejected answers (dashed) of one run into `ax`."""
    seen = [every * k for k in range(len(path))]
    for side, dash, marker in (("chosen", "-", "o"), ("rejected", "--", "v")):
        label = f"{name}: {side}" if name else side
        ax.plot(seen, [p[f"{side}_logprob"] for p in path], dash + marker, color=color, linewidth=2, label=label)
    _name(ax, "pairs seen", "log-probability (nats)")


def collapse(
    paths: Mapping[str, Sequence[Mapping[str, float]]], solved: Mapping[str, Sequence[float]], every: int,
    shown: Sequence[str],
) -> Axes:  # fmt: skip
    """Both log-probabilities of the runs `shown`, and bars of what each model solves: what a margin hides.

    Args:
        paths: run → its held-out figures ("chosen_logprob", "rejected_logprob") along the way.
        solved: model → shares in [0, 1], greedy and sampled.
        every: pairs seen between two figures.
        shown: which runs are drawn on the left.
    """
    left, right = _panels((3, 2), 4.0)
    for i, name in enumerate(shown):
        both_sides(left, paths[name], every, PALETTE[(3, 0)[i % 2]], name)
    _legend(left)
    for i, how in enumerate(("greedy", "sampled")):
        right.barh([k + 0.4 * i for k in range(len(solved))], [100 * shares[i] for shares in solved.values()], 0.38,
                   color=PALETTE[5 - 4 * i], hatch=HATCHES[i], edgecolor="black", label=how)  # fmt: skip
    right.set_yticks([k + 0.2 for k in range(len(solved))], list(solved), fontsize=FONT_SIZE)
    right.invert_yaxis()
    _legend(right, loc="center right", bbox_to_anchor=(1.0, 0.68))
    _name(right, "solved (%)", "")
    return left


def habits(names: Sequence[str], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Axes:
    """Bars before and after DPO, a panel a model: what it prefers, and what it says.

    Args:
        names: of the models.
        before, after: for each model three shares in [0, 1]: preferred, said when greedy, said when sampled.
    """
    axes = _panels(height=3.4, sharey=True)
    for ax, name, values in zip(axes, names, zip(before, after, strict=True), strict=True):
        for i, when in enumerate(("before", "after")):
            ax.bar([k + 0.4 * i for k in range(3)], [100 * v for v in values[i]], 0.38, label=f"{when} DPO",
                   color=PALETTE[i], hatch=HATCHES[i], edgecolor="black")  # fmt: skip
        _name(ax, "", "", name)
        ax.set_xticks([k + 0.2 for k in range(3)], ["preferred", "said (greedy)", "said (sampled)"], fontsize=FONT_SIZE)
    axes[0].set_ylabel("per cent", fontsize=FONT_SIZE)
    _legend(axes[0])
    return axes[0]


def taste(tokens: Tensor, scores: Mapping[str, Tensor], right: Tensor, lengths: Sequence[int]) -> Axes:
    """Mean score of two reward models by length of the answer, and the share of right answers beside it.

    Args:
        tokens, right: length and verdict of each answer.
        scores: judge → score of each answer, drawn in its standard deviations.
        lengths: those drawn.
    """
    left, truth = _panels()
    for i, (name, score) in enumerate(scores.items()):
        means = [((score - score.mean()) / score.std())[tokens == length].mean().item() for length in lengths]
        left.plot(lengths, means, MARKERS[i] + DASHES[i], color=PALETTE[3 * i], linewidth=2, label=name)
    shares = [100 * right[tokens == length].mean().item() for length in lengths]
    truth.bar(lengths, shares, color=PALETTE[5], edgecolor="black")
    _name(left, "tokens of the answer", "mean score (std)")
    _name(truth, "tokens of the answer", "right answers (%)")
    _legend(left, title="the annotator …")
    return left


def search(sizes: Sequence[int], proxy: Mapping[str, Sequence[float]], truth: Mapping[str, Sequence[float]]) -> Axes:
    """Score and truth of the best of n answers against n, a line for each judge.

    Args:
        sizes: the values of n.
        proxy: judge → mean score of the choice, in standard deviations.
        truth: judge → share of right choices, in [0, 1].
    """
    axes = _panels()
    for i, name in enumerate(proxy):
        look = {"color": PALETTE[3 * i], "label": name, "linewidth": 2}
        axes[0].plot(sizes, proxy[name], MARKERS[i] + DASHES[i], **look)
        axes[1].plot(sizes, [100 * share for share in truth[name]], MARKERS[i] + DASHES[i], **look)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(sizes, sizes, fontsize=FONT_SIZE)
        ax.minorticks_off()
    _name(axes[0], "n, answers to choose from", "score of the choice (std)", "the proxy")
    _name(axes[1], "n, answers to choose from", "choices that are right (%)", "the truth")
    axes[1].set_ylim(bottom=0)
    _legend(axes[0], title="the annotator …")
    return axes[0]
