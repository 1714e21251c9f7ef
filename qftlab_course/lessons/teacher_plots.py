"""The pictures of notebook 06: when threads come back, answers against threads, faults, and what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qftlab_course.plots import DASHES, FONT_SIZE, HATCHES, MARKERS, PALETTE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def returns(seconds: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """When threads come back, a histogram each as an outline."""
    ax = new_axes(ax, 6.2, 3.0)
    reach = max(max(values) for values in seconds.values())
    bins = [reach * i / 40 for i in range(41)]
    for i, (name, values) in enumerate(seconds.items()):
        ax.hist(values, bins=bins, histtype="step", linewidth=2.2, label=name, color=PALETTE[i], linestyle=DASHES[i])
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "seconds after the refusal", "threads that come back", "")


def throughput(rates: Mapping[int, float], latency: float, ax: Axes | None = None) -> Axes:
    """Answers per second against threads, and what Little's law allows."""
    ax, threads = new_axes(ax, 6.2, 3.2), list(rates)
    ax.plot(threads, [n / latency for n in threads], DASHES[1], color=PALETTE[1], label="threads ÷ latency")
    ax.plot(threads, list(rates.values()), DASHES[0], color=PALETTE[0], marker=MARKERS[0], label="measured")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(threads, [str(n) for n in threads])
    ticks = [2**k for k in range(3, 10)]
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.legend(fontsize=FONT_SIZE, frameon=False)
    return finish(ax, "threads", "answers per second", "")


def reasons(counts: Mapping[str, int], ax: Axes | None = None) -> Axes:
    """One bar a reason, longest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ax = new_axes(ax, 6.2, 0.9 + 0.34 * len(ordered))
    for row, (_, count) in enumerate(ordered):
        ax.barh(row, count, color=PALETTE[0], edgecolor="black")
    ax.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=FONT_SIZE)
    ax.invert_yaxis()
    return finish(ax, "answers", "", "")


def modes_picked(shares: Mapping[str, Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Groups of bars: for each kind of bug the share of programs with the right mode, a bar for each set."""
    ax, kinds = new_axes(ax, 6.2, 3.2), list(next(iter(shares.values())))
    width = 0.8 / len(shares)
    for i, (name, by_kind) in enumerate(shares.items()):
        places = [k + (i - (len(shares) - 1) / 2) * width for k in range(len(kinds))]
        ax.bar(places, [by_kind[kind] for kind in kinds], width, label=name, color=PALETTE[i], hatch=HATCHES[i],
               edgecolor="black")  # fmt: skip
    ax.set_xticks(range(len(kinds)), kinds, fontsize=FONT_SIZE)
    ax.set_ylim(0, 1.25)
    ax.legend(fontsize=FONT_SIZE, frameon=False, loc="upper center", ncols=len(shares))
    return finish(ax, "", "right mode (share)", "")
