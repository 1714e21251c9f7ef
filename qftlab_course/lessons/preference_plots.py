"""Pictures of notebook 07: a bandit, an easy preference, runs and what their logs hide, habits, taste and search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qftlab_course.plots import DASHES, FONT_SIZE, HATCHES, MARKERS, PALETTE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Sequence[Mapping[str, float]]  # along a run
SIDES = {"chosen": ("-", "o"), "rejected": ("--", "v")}


def _panels(widths: Sequence[float] = (1, 1), height: float = 3.1, **options) -> Sequence[Axes]:
    from matplotlib import pyplot

    size = (8.0, height)
    return pyplot.subplots(1, len(widths), figsize=size, width_ratios=widths, layout="constrained", **options)[1]


def _legend(ax: Axes, **options) -> None:
    """Over the picture, where no line can cross it."""
    options = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2} | options
    ax.legend(fontsize=FONT_SIZE, frameon=False, title_fontsize=FONT_SIZE, alignment="left", **options)


def runs(ax: Axes, x: Sequence[float], values: Sequence[Sequence[float]], line: str, **look) -> None:
    """Some runs of one kind: each a thin line, and their mean a bold one.

    Args:
        ax: axes to draw into.
        x: of all runs.
        values: run by run, each as long as `x`.
        line: marker and dash, as matplotlib has them; the marker is the mean's.
        look: colour and label.
    """
    from matplotlib.colors import to_rgb

    pale = tuple(1 - 0.4 * (1 - part) for part in to_rgb(look["color"]))  # solid: many shades make a large file
    for run in values:
        ax.plot(x, run, line[1:], color=pale, linewidth=1, antialiased=False)
    means = [sum(column) / len(column) for column in zip(*values, strict=True)]
    ax.plot(x, means, line, linewidth=2, markersize=6, **look)


def bars(
    ax: Axes, names: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], *, flat: bool = False
) -> None:
    """Bars side by side: the mean of some runs, and a point for each run.

    Args:
        ax: axes to draw into.
        names: what the bars stand for, group by group of the same.
        groups: label → for each name the shares in [0, 1], one for each run.
        flat: whether the bars lie.
    """
    for i, (label, shares) in enumerate(groups.items()):
        at = [k + 0.4 * i for k in range(len(names))]
        draw, width = (ax.barh, "height") if flat else (ax.bar, "width")
        draw(at, [100 * sum(s) / len(s) for s in shares], **{width: 0.38}, color=PALETTE[(5, 1)[i]], hatch=HATCHES[i],
             edgecolor="black", label=label)  # fmt: skip
        for where, found in zip(at, shares, strict=True):
            if len(found) > 1:
                points = [100 * share for share in found], [where] * len(found)
                ax.plot(*(points if flat else points[::-1]), "k.", markersize=4, zorder=3)
    ticks = [k + 0.2 for k in range(len(names))]
    (ax.set_yticks if flat else ax.set_xticks)(ticks, names)
    if flat:
        ax.invert_yaxis()


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
    ax = new_axes(ax, 6.2, 3.2)
    for i, name in enumerate(names):
        ax.plot(fine, exact[:, i].tolist(), DASHES[i], color=PALETTE[i], linewidth=2)
        ax.plot(betas, found[:, i].tolist(), MARKERS[i], color=PALETTE[i], markersize=8, label=name)
    ax.set_xscale("log")
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
    ax.minorticks_off()
    _legend(ax)
    return finish(ax, "β", "probability of the answer", "")


def both_sides(ax: Axes, paths: Sequence[Figures], seen: Sequence[int], color: str, name: str = "") -> Axes:
    """Draws the log-probabilities of chosen (solid) and rejected answers (dashed) of some runs into `ax`."""
    for side, (dash, marker) in SIDES.items():
        values = [[point[f"{side}_logprob"] for point in path] for path in paths]
        runs(ax, seen, values, marker + dash, color=color, label=f"{name}: {side}" if name else f"{side} answers")
    return finish(ax, "pairs seen", "log-probability (nats)", "")


def easy(path: Figures, before: Sequence[float], after: Sequence[float]) -> Axes:
    """A preference that is easy to learn: both log-probabilities along a run, and how often the trait is shown.

    Args:
        path: records of the training loop ("pairs", "chosen_logprob", "rejected_logprob").
        before, after: shares of answers with the trait, greedy and sampled, in [0, 1].
    """
    left, right = _panels((3, 2))
    both_sides(left, [path], [point["pairs"] for point in path], PALETTE[0])
    bars(right, ["greedy", "sampled"], {"before DPO": [[s] for s in before], "after DPO": [[s] for s in after]})
    _legend(left, ncols=2)
    _legend(right)
    finish(right, "", "with the ending (%)", "")
    return left


def logs(draws: Sequence[Mapping[str, Mapping]], names: Sequence[str], every: int) -> Axes:
    """Margin and preference accuracy of several runs: what every log of DPO shows.

    Args:
        draws: one for each seed: run → its "path" of held-out figures ("margin", "preference_accuracy").
        names: of the runs.
        every: pairs seen between two of them.
    """
    left, right = _panels()
    for i, name in enumerate(names):
        paths = [draw[name]["path"] for draw in draws]
        seen, look = [every * k for k in range(len(paths[0]))], {"color": PALETTE[i], "label": name}
        for ax, key, unit in ((left, "margin", 1), (right, "preference_accuracy", 100)):
            runs(ax, seen, [[unit * point[key] for point in path] for path in paths], MARKERS[i] + DASHES[i], **look)
    right.set_ylim(0, 100)
    _legend(left, ncols=2)
    finish(left, "pairs seen", "margin (nats)", "")
    finish(right, "pairs seen", "pairs ranked rightly (%)", "")
    return left


def collapse(draws: Sequence[Mapping[str, Mapping]], names: Sequence[str], shown: Sequence[str], every: int) -> Axes:
    """Both log-probabilities of the runs `shown`, and bars of what each model solves: what a margin hides.

    Args:
        draws: one for each seed: run, or "before", → "solved", shares greedy and sampled, and of a run the "path" of
            held-out figures.
        names: of the runs; a run has one colour in all pictures.
        shown: which runs are drawn on the left.
        every: pairs seen between two figures.
    """
    left, right = _panels((3, 2), 3.6)
    for name in shown:
        paths = [draw[name]["path"] for draw in draws]
        both_sides(left, paths, [every * k for k in range(len(paths[0]))], PALETTE[names.index(name)], name)
    models = ["before", *names]
    solved = {how: [[draw[name]["solved"][i] for draw in draws] for name in models]
              for i, how in enumerate(("greedy", "sampled"))}  # fmt: skip
    bars(right, models, solved, flat=True)
    _legend(left, ncols=2)
    _legend(right, ncols=2)
    finish(right, "solved (%)", "", "")
    return left


def habits(draws: Sequence[Mapping[str, Sequence[Mapping]]], endings: Sequence[str]) -> Axes:
    """Bars before and after DPO, a panel for each ending: what is preferred, and what is said.

    Args:
        draws: one for each seed: ending → two dicts, before and after, with "preferred", a share in [0, 1], and "said",
            ending → shares greedy and sampled.
        endings: those drawn.
    """
    axes = _panels(sharey=True)
    for ax, ending in zip(axes, endings, strict=True):
        groups = {}
        for k, when in enumerate(("before DPO", "after DPO")):
            values = [(draw[ending][k]["preferred"], *draw[ending][k]["said"][ending]) for draw in draws]
            groups[when] = list(zip(*values, strict=True))
        bars(ax, ["preferred", "said,\ngreedy", "said,\nsampled"], groups)
        finish(ax, f"…{ending}", "", "")
    _legend(axes[0], ncols=2)
    axes[0].set_ylabel("%", fontsize=FONT_SIZE)
    return axes[0]


def taste(lengths: Sequence[int], draws: Sequence[Mapping[str, Mapping]], judges: Sequence[str]) -> Axes:
    """Mean score of some reward models by length of the answer, and the share of right answers beside it.

    Args:
        lengths: in tokens.
        draws: one for each seed: judge → "score" in standard deviations and "right", a share in [0, 1] and the same
            for all judges, for each length.
        judges: those drawn.
    """
    left, truth = _panels()
    for i, name in enumerate(judges):
        values = [draw[name]["score"] for draw in draws]
        runs(left, lengths, values, MARKERS[i] + DASHES[i], color=PALETTE[3 * i], label=name)
    shares = [[100 * share for share in draw[judges[0]]["right"]] for draw in draws]
    runs(truth, lengths, shares, "^-", color=PALETTE[2], label="")
    truth.set_ylim(bottom=0)
    _legend(left, title="the annotator …")
    finish(left, "tokens of the answer", "mean score (std)", "")
    finish(truth, "tokens of the answer", "right (%)", "")
    return left


def search(sizes: Sequence[int], draws: Sequence[Mapping[str, Mapping]], judges: Sequence[str]) -> Axes:
    """Score and truth of the best of n answers against n, a line for each judge.

    Args:
        sizes: the values of n.
        draws: one for each seed: judge → "proxy", the mean score of the choice in standard deviations, and "truth",
            share of right choices in [0, 1], for each n.
        judges: those drawn.
    """
    axes = _panels()
    for i, name in enumerate(judges):
        for ax, key, unit in zip(axes, ("proxy", "truth"), (1, 100), strict=True):
            values = [[unit * value for value in draw[name][key]] for draw in draws]
            runs(ax, sizes, values, MARKERS[i] + DASHES[i], color=PALETTE[3 * i], label=name)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
    axes[1].set_ylim(bottom=0)
    _legend(axes[0], title="the annotator …")
    finish(axes[0], "n, answers to choose from", "mean score (std)", "")
    finish(axes[1], "n, answers to choose from", "right (%)", "")
    return axes[0]
