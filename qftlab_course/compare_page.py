"""The page of `compare`: one screen with what each stage gave and cost, then win rates, then the answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qftlab_course.compare import (
    Change,
    CompareConfig,
    Evaluated,
    change_of,
    check_same_rows,
    common_scorers,
    load_evaluation,
    mean_of,
    win_rates,
)

if TYPE_CHECKING:
    import pandas

    from qftlab_course.winrate import WinRate

Changes = Mapping[tuple[str, str], Change]  # by scorer and the later evaluation's name
Counts = Mapping[tuple[str, str], tuple[int, int, int]]  # rows gained, lost and all, by stage and skill


def compare(config: CompareConfig) -> Path:
    """Writes the page and returns its path.

    Raises:
        FileNotFoundError, ValueError: for folders that hold no evaluations, or evaluations of other rows.
        ServerError: if a judge fails.
    """
    from qftlab_course.report import write_report

    evaluations = [load_evaluation(folder) for folder in config.evaluations]
    check_same_rows(evaluations)
    scorers = common_scorers(evaluations)
    changes = {(scorer, after.name): change for scorer in scorers
               for before, after in zip(evaluations, evaluations[1:], strict=False)
               if (change := change_of(before, after, scorer))}  # fmt: skip
    rates = win_rates(evaluations, config) if config.judge.url or config.reward_model else {}
    sections = [*overview(evaluations, scorers, changes), *_win_section(rates, config)]
    sections += examples(evaluations, scorers[0], changes, config.examples)
    title = "Comparison: " + ", ".join(e.name for e in evaluations)
    return write_report(config.output, title, sections, intro=introduction(evaluations, scorers[0], changes))


def introduction(evaluations: Sequence[Evaluated], scorer: str, changes: Changes) -> str:
    """What was asked, what could be seen by the first scorer, and in which settings the evaluations differ."""
    first, scale = evaluations[0], scale_of(evaluations, scorer)
    samples = len(first.responses) // len(first.rows)
    said = f"{len(first.rows)} rows, {samples} answer{'s' * (samples > 1)} to each."
    seen = [change for (name, _), change in changes.items() if name == scorer and change.visible == change.visible]
    if seen:
        least, most = (_figure(end(change.visible for change in seen), scale) for end in (min, max))
        ends = least if least == most else f"{least} to {most}"
        said += f" With {seen[0].prompts} prompts you can see a change of {ends}{' points' * (scale == 100)}"
        said += f" of {scorer}{', by the stage' * (least != most)}."
    differing = [name for name in first.settings if name not in ("model", "weights", "versions", "output")
                 and any(e.settings.get(name) != first.settings[name] for e in evaluations)]  # fmt: skip
    if differing:
        said += f" The evaluations differ in more than the model: {', '.join(differing)}."
    return said


def overview(evaluations: Sequence[Evaluated], scorers: Sequence[str], changes: Changes) -> list:
    """The table and the picture, how to read them, and the skills of further scorers."""
    from qftlab_course.report import Picture, Section

    counts = [skill_counts(evaluations, scorer, changes) for scorer in scorers]
    scales = [scale_of(evaluations, scorer) for scorer in scorers]
    drawn = [scorer for scorer, scale in zip(scorers, scales, strict=True) if scale == scales[0]]
    alts = ["; ".join(f"{stage}, {skill}: {up} gained, {down} lost" for (stage, skill), (up, down, _) in found.items())
            for found in counts]  # fmt: skip
    alt = [f"{scorer}: {', '.join(f'{e.name} {_figure(mean_of(e, scorer)[0], scales[0])}' for e in evaluations)}"
           for scorer in drawn]  # fmt: skip
    picture = Picture(overview_picture(evaluations, drawn, counts[0]), "; ".join([*alt, alts[0]]))
    sections = [Section("What each stage gave and cost", "", stage_table(evaluations, scorers, changes), (picture,))]
    sections.append(Section("How to read it", legend(scorers, changes)))
    for scorer, found, words in zip(scorers[1:], counts[1:], alts[1:], strict=True):
        if found:
            pictures = (Picture(skills_picture(found), words),)
            sections.append(Section(f"Gained and lost by skill: {scorer}", pictures=pictures))
    return sections


def stage_table(evaluations: Sequence[Evaluated], scorers: Sequence[str], changes: Changes) -> pandas.DataFrame:
    """A line for each scorer and stage: mean, change to the stage before, what could be seen, p, rows, length."""
    import pandas

    lines = []
    for scorer in scorers:
        scale = scale_of(evaluations, scorer)
        for e in evaluations:
            (mean, *ends), change = mean_of(e, scorer), changes.get((scorer, e.name))
            line = {"stage": e.name, "scorer": scorer + ", %" * (scale == 100)}
            line["mean"] = f"{_figure(mean, scale)} ({_range(*ends, scale)})"
            line |= dict.fromkeys(("change", "visible from", "p", "gained", "lost"), "–")
            if change:
                t = change.test
                line |= {"change": f"{_figure(t.difference, scale, '+')} ({_range(t.low, t.high, scale)})",
                         "visible from": _figure(change.visible, scale), "p": _p(t.p_value),
                         "gained": str(len(change.gained)), "lost": str(len(change.lost))}  # fmt: skip
            lines.append(
                line
                | {
                    "tokens": "–" if math.isnan(e.tokens) else f"{e.tokens:.1f}",
                    "cut off": f"{_figure(e.cut_off, 100)}\u00a0%",
                }
            )
    frame = pandas.DataFrame(lines).set_index("stage")
    if len(scorers) > 1:
        return frame.drop(columns="visible from")  # to keep lines whole
    return frame.drop(columns="scorer").rename(columns={"mean": "mean, %" if scale == 100 else "mean"})


def legend(scorers: Sequence[str], changes: Changes) -> str:
    """How to read the table."""
    said = f"Scored by {', '.join(scorers)}. In brackets are 95 % intervals; they and p count prompts, not answers. "
    said += "Change is to the stage before, in points where the mean is in per cent. "
    if len(scorers) == 1:
        said += "A change as large as “visible from” is found 8 times in 10; a smaller one may be there and not show. "
    said += "Gained and lost are the rows whose answers became better or worse; tokens the mean length of an answer, "
    said += "cut off the share of those that ended for want of room."
    if len(changes) > 1:
        expected = f"{len(changes) * 0.05:.2g}"
        said += f" Of {len(changes)} tests, {expected} come out below 0.05 on average where nothing changed."
    return said


def scale_of(evaluations: Sequence[Evaluated], scorer: str) -> int:
    """100 where all of a scorer's values are from 0 to 1, and shown in per cent, else 1."""
    values = [one[scorer] for e in evaluations for one in e.scores if one[scorer] is not None]
    return 100 if values and all(0 <= value <= 1 for value in values) else 1


def skill_counts(evaluations: Sequence[Evaluated], scorer: str, changes: Changes) -> dict[tuple[str, str], tuple]:
    """Rows gained, lost and all, by stage and skill; empty where the rows name no two skills."""
    skills = [str(row.get("skill", "others")) for row in evaluations[0].rows]
    sizes = Counter(skills)
    found = {}
    for e in evaluations[1:] if len(sizes) > 1 else ():
        if change := changes.get((scorer, e.name)):
            up, down = (Counter(skills[row] for row in part) for part in (change.gained, change.lost))
            found |= {(e.name, skill): (up[skill], down[skill], sizes[skill]) for skill in sorted(sizes)}
    moved = {skill for (_, skill), (up, down, _) in found.items() if up or down}
    return {key: value for key, value in found.items() if key[1] in moved}


def overview_picture(evaluations: Sequence[Evaluated], scorers: Sequence[str], counts: Counts):
    """Means with intervals over the stages, beside them what was gained and lost by skill; returns the first axes."""
    from matplotlib import pyplot

    stages, skills = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    ratios = [1.5 + 0.2 * len(evaluations), *[1.2] * len(stages)]
    height = max(2.4, 0.8 + 0.22 * len(skills))
    figure, axes = pyplot.subplots(1, len(ratios), figsize=(0.9 + 1.65 * sum(ratios), height), squeeze=False,
                                   width_ratios=ratios, layout="constrained")  # fmt: skip
    means_picture(evaluations, scorers, axes[0][0])
    if stages:
        skills_picture(counts, axes[0][1:])
    return axes[0][0]


def means_picture(evaluations: Sequence[Evaluated], scorers: Sequence[str], ax=None):
    """Means with intervals over the stages, a line for each scorer; returns the axes."""
    from qftlab_course import plots

    ax = plots.new_axes(ax, 6, 3)
    shown = {scorer: [mean_of(e, scorer) for e in evaluations] for scorer in scorers}
    scale = scale_of(evaluations, scorers[0])
    for i, (scorer, means) in enumerate(shown.items()):
        at = [x + 0.06 * (i - (len(scorers) - 1) / 2) for x in range(len(means))]
        reach = [[scale * (m - low) for m, low, _ in means], [scale * (high - m) for m, _, high in means]]
        style = plots.MARKERS[i % len(plots.MARKERS)] + plots.DASHES[i % len(plots.DASHES)]
        ax.errorbar(at, [scale * m for m, _, _ in means], yerr=reach, fmt=style, linewidth=2, capsize=4, markersize=7,
                    color=plots.PALETTE[i % len(plots.PALETTE)], label=scorer)  # fmt: skip
    ax.set_xticks(range(len(evaluations)), [e.name for e in evaluations])
    ax.margins(x=0.1)
    if scale == 100:
        ax.set_ylim(0, 103)
    if len(scorers) > 1:
        ax.legend(fontsize=plots.FONT_SIZE, frameon=False)
    return plots.finish(ax, "", "mean (%)" if scale == 100 else "mean", "Means and their intervals")


def skills_picture(counts: Counts, axes=None):
    """Shares of each skill's rows, gained to the right, lost to the left, a panel a stage; returns the first axes."""
    from matplotlib import pyplot

    from qftlab_course import plots

    stages, skills = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    if axes is None:
        size = (1.5 + 2.4 * len(stages), max(2.8, 1.0 + 0.25 * len(skills)))
        axes = pyplot.subplots(1, len(stages), figsize=size, squeeze=False, layout="constrained")[1][0]
    ends = [100 * max(v[i] / v[2] for v in counts.values()) for i in (0, 1)]
    for ax, stage in zip(axes, stages, strict=True):
        for i, (word, sign, color, hatch) in enumerate((("gained", 1, 2, ""), ("lost", -1, 3, "///"))):
            values = [counts[stage, skill] for skill in skills]
            bars = ax.barh(range(len(skills)), [sign * 100 * v[i] / v[2] for v in values], color=plots.PALETTE[color],
                           hatch=hatch, edgecolor="black", linewidth=0.8, label=word)  # fmt: skip
            ax.bar_label(bars, [str(v[i]) if v[i] else "" for v in values], padding=2, fontsize=plots.FONT_SIZE - 1)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_xlim(-ends[1] - 35, ends[0] + 45)  # room for the numbers at the bars
        ax.set_xticks([x for x in (-100, -50, 0, 50, 100) if -ends[1] - 35 < x < ends[0] + 45])
        ax.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        ax.set_yticks(range(len(skills)), skills if ax is axes[0] else [""] * len(skills))
        ax.invert_yaxis()
        plots.finish(ax, "lost | gained (%)", "", stage)
    return axes[0]


def examples(evaluations: Sequence[Evaluated], scorer: str, changes: Changes, most: int) -> list:
    """Answers side by side: rows gained and lost in turn, stage by stage, then others."""
    from qftlab_course.report import Section

    chosen: dict[int, str] = {}
    queues = [(f"{kind} by {e.name}", list(rows)) for e in evaluations[1:] if (change := changes.get((scorer, e.name)))
              for kind, rows in (("gained", change.gained), ("lost", change.lost))]  # fmt: skip
    queues_left = [queue for queue in queues if queue[1]]
    while queues_left and len(chosen) < most:
        for why, rows in queues_left:
            if len(chosen) < most:
                chosen.setdefault(rows.pop(0), why)
        queues_left = [queue for queue in queues_left if queue[1]]
    chosen |= {row: "the same" for row in range(len(evaluations[0].rows)) if row not in chosen}
    picked = sorted(list(chosen.items())[:most], key=lambda item: [why for why, _ in queues].index(item[1])
                    if item[1] != "the same" else len(queues))  # fmt: skip
    if not picked:
        return []
    several = len(evaluations[0].responses) > len(evaluations[0].rows)
    marks = "1/4 before it: one of four answers is right," if several else "✓ and ✗"
    text = f"The first answer to each of {len(picked)} rows, those that changed first; {marks} as {scorer} says."
    return [Section("Answers side by side", text, answer_table(evaluations, scorer, picked))]


def answer_table(evaluations: Sequence[Evaluated], scorer: str, picked: Sequence[tuple[int, str]]) -> pandas.DataFrame:
    """A line for each row: why it is shown, what was asked, the reference, and each stage's first answer."""
    import pandas

    from qftlab.evaluate.split import prompt_text

    first = [{one["row"]: i for i, one in reversed(list(enumerate(e.responses)))} for e in evaluations]
    lines = []
    for row, why in picked:
        content = evaluations[0].rows[row]
        line = {
            "row": f"{row + 1}, {why}",
            "asked": _short(prompt_text(content)),
            "reference": _short(_reference(content)),
        }
        for e, places in zip(evaluations, first, strict=True):
            values, response = [one[scorer] for one in e.scores if one["row"] == row], e.responses[places[row]]
            end = "" if response["finish_reason"] != "length" else " …(cut off)"
            line[e.name] = f"{_mark(values)} {_short(response['response'])}{end}"
        lines.append(line)
    return pandas.DataFrame(lines).set_index("row")


def _reference(row: Mapping) -> str:
    return str(row.get("output") or (f"{row['numbers']} → {row['target']}" if "target" in row else "–"))


def _mark(values: Sequence) -> str:
    """✓ for 1, ✗ for 0, 1/4 where one of four is right, else the mean; – for none."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return "–"
    if set(numbers) <= {0.0, 1.0}:
        return f"{sum(numbers):g}/{len(numbers)}" if len(values) > 1 else "✓" if numbers[0] else "✗"
    return f"{sum(numbers) / len(numbers):.3g}"


def _short(text: str, most: int = 240) -> str:
    """A text of at most so many characters, whose long words may be broken anywhere."""
    text = re.sub(r"\n\s*\n", "\n", text if len(text) <= most else text[: most - 1] + "…")
    return re.sub(r"(\S{10})(?=\S)", "\\1\u200b", text)


def _win_section(rates: Mapping[str, WinRate], config: CompareConfig) -> list:
    import pandas

    from qftlab_course.report import Section

    if not rates:
        return []
    lines = []
    for pair, r in rates.items():
        line = {"pair": pair, "win rate, %": f"{_figure(r.rate, 100)} ({_range(r.low, r.high, 100)})"}
        line |= {"won": r.wins, "tied": r.ties, "lost": r.losses, "unreadable": r.unread}
        shares = {"the order decided": r.by_order, "first place": r.first}
        lines.append(line | {name: f"{100 * share:.0f}\u00a0%" for name, share in shares.items()})
    who = config.reward_model or config.judge.model
    rule = "A tie counts as lost." if config.ties_lose else "A tie counts half."
    name = Path(who).name if config.reward_model else who
    text = (f"Judged by {name}, each pair in both orders, on the first {config.judged} rows at most. {rule} Where the "
            "order decided, both orders together are a tie. First place is how often the answer that stood first won: "
            "50 % without a bias. What could not be read counts as a tie.")  # fmt: skip
    return [Section("Win rates", text, pandas.DataFrame(lines).set_index("pair"))]


def _figure(value: float, scale: int, sign: str = "-") -> str:
    found = f"{100 * value:{sign}.1f}" if scale == 100 else f"{value:{sign}.3g}"
    return "–" if value != value else found.replace("-", "−")


def _range(low: float, high: float, scale: int) -> str:
    return "–" if low != low else f"{_figure(low, scale)}\u00a0to\u00a0{_figure(high, scale)}"


def _p(value: float) -> str:
    return "–" if value != value else "<\u00a00.001" if value < 0.001 else f"{value:.3f}"
