"""The page of `compare`: one screen with what each stage gave and cost, then what changed by skill, then the answers."""

from __future__ import annotations

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

    from qftlab.evaluate.winrate import WinRate

Changes = Mapping[tuple[str, str], Change]  # by scorer and the later evaluation's name


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
    return write_report(config.output, title, sections, intro=introduction(evaluations))


def introduction(evaluations: Sequence[Evaluated]) -> str:
    """What was asked, and in which settings the evaluations differ."""
    first = evaluations[0]
    samples = len(first.responses) // len(first.rows)
    said = f"{len(first.rows)} rows, {samples} answer{'s' * (samples > 1)} to each."
    differing = [name for name in first.settings if name not in ("model", "weights", "versions", "output")
                 and any(e.settings.get(name) != first.settings[name] for e in evaluations)]  # fmt: skip
    if differing:
        said += f" The evaluations differ in more than the model: {', '.join(differing)}."
    return said


def overview(evaluations: Sequence[Evaluated], scorers: Sequence[str], changes: Changes) -> list:
    """The table and the two pictures."""
    from qftlab_course.report import Picture, Section

    alt = "; ".join(f"{scorer}: {', '.join(f'{e.name} {_number(mean_of(e, scorer)[0])}' for e in evaluations)}"
                    for scorer in scorers)  # fmt: skip
    sections = [
        Section(
            "What each stage gave and cost",
            legend(evaluations, scorers, changes),
            stage_table(evaluations, scorers, changes),
            (Picture(means_picture(evaluations, scorers), alt),),
        )
    ]
    for scorer in scorers:
        counts = skill_counts(evaluations, scorer, changes)
        if len({skill for _, skill in counts}) > 1:
            alt = ", ".join(
                f"{stage} {skill}: {up} gained, {down} lost" for (stage, skill), (up, down) in counts.items()
            )
            sections.append(
                Section(f"Gained and lost by skill: {scorer}", "", pictures=(Picture(skills_picture(counts), alt),))
            )
    return sections  # fmt: skip


def stage_table(evaluations: Sequence[Evaluated], scorers: Sequence[str], changes: Changes) -> pandas.DataFrame:
    """A line for each scorer and stage: mean, change to the stage before, rows gained and lost, p, length, cut off."""
    import pandas

    lines = []
    for scorer in scorers:
        for e in evaluations:
            mean, low, high = mean_of(e, scorer)
            line = {"stage": e.name, "scorer": scorer, "mean": _number(mean), "95 % interval": _range(low, high)}
            change = changes.get((scorer, e.name))
            t = change and change.test
            line |= {"change": f"{_signed(t.difference)} ({_signed(t.low)} to {_signed(t.high)})" if t else "–",
                     "gained": len(change.gained) if change else "–", "lost": len(change.lost) if change else "–",
                     "p": _p(t.p_value) if t else "–"}  # fmt: skip
            lines.append(line | {"tokens": f"{sum(e.tokens) / len(e.tokens):.1f}", "cut off": f"{e.cut_off:.0%}"})
    frame = pandas.DataFrame(lines).set_index("stage")
    return frame.drop(columns="scorer") if len(scorers) == 1 else frame


def legend(evaluations: Sequence[Evaluated], scorers: Sequence[str], changes: Changes) -> str:
    """How to read the table, and what it could see."""
    said = (
        f"Scored by {', '.join(scorers)}. Intervals and p count prompts, not answers. Gained and lost are rows whose "
        "answers became better or worse than at the stage before."
    )
    if changes:
        widest = max(changes.values(), key=lambda change: change.visible)
        said += (
            f" With this many prompts ({widest.prompts}) you can see a change of {_number(widest.visible)} and more, "
            "8 times in 10; a smaller one may be there and not show."
        )
    if len(changes) > 1:
        said += (
            f" Of {len(changes)} tests, {len(changes) * 0.05:.2g} come out below 0.05 on average where nothing changed."
        )
    return said  # fmt: skip


def skill_counts(evaluations: Sequence[Evaluated], scorer: str, changes: Changes) -> dict[tuple[str, str], tuple]:
    """Rows gained and lost by stage and skill, where either is more than 0."""
    rows, found = evaluations[0].rows, {}
    for e in evaluations[1:]:
        if change := changes.get((scorer, e.name)):
            up, down = (Counter(str(rows[row].get("skill", "all rows")) for row in part)
                        for part in (change.gained, change.lost))  # fmt: skip
            found |= {(e.name, skill): (up[skill], down[skill]) for skill in sorted({*up, *down})}
    return found


def means_picture(evaluations: Sequence[Evaluated], scorers: Sequence[str]):
    """Means with intervals over the stages, a line for each scorer; returns the axes."""
    from qftlab_course import plots

    ax = plots.new_axes(None, 8.5, 2.6)
    shown = {scorer: [mean_of(e, scorer) for e in evaluations] for scorer in scorers}
    is_share = all(0 <= x[0] <= 1 for means in shown.values() for x in means)
    for i, (scorer, means) in enumerate(shown.items()):
        scale = 100 if is_share else 1
        at = [x + 0.04 * (i - (len(scorers) - 1) / 2) for x in range(len(means))]
        reach = [[scale * (m - low) for m, low, _ in means], [scale * (high - m) for m, _, high in means]]
        ax.errorbar(at, [scale * m for m, _, _ in means], yerr=reach, fmt=plots.MARKERS[i % len(plots.MARKERS)]
                    + plots.DASHES[i % len(plots.DASHES)], color=plots.PALETTE[i % len(plots.PALETTE)], linewidth=2,
                    capsize=4, markersize=7, label=scorer)  # fmt: skip
    ax.set_xticks(range(len(evaluations)), [e.name for e in evaluations])
    if is_share:
        ax.set_ylim(0, 103)
    ax.legend(fontsize=plots.FONT_SIZE, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return plots.finish(ax, "", "mean (%)" if is_share else "mean", "Means, with 95 % intervals by prompt")


def skills_picture(counts: Mapping[tuple[str, str], tuple[int, int]]):
    """Rows gained to the right and lost to the left, by skill, side by side for the stages; returns the last axes."""
    from matplotlib import pyplot

    from qftlab_course import plots

    stages, skills = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(9.5, 1.1 + 0.32 * len(skills)), sharey=True, sharex=True,
                                   squeeze=False, layout="constrained")  # fmt: skip
    for ax, stage in zip(axes[0], stages, strict=True):
        up, down = ([counts.get((stage, skill), (0, 0))[i] for skill in skills] for i in (0, 1))
        bars = [ax.barh(range(len(skills)), up, color=plots.PALETTE[2], edgecolor="black", linewidth=0.8, label="gained"),
                ax.barh(range(len(skills)), [-x for x in down], color=plots.PALETTE[3], hatch="///", edgecolor="black",
                        linewidth=0.8, label="lost")]  # fmt: skip
        for part, values in zip(bars, (up, down), strict=True):
            ax.bar_label(part, [str(x) if x else "" for x in values], padding=2, fontsize=plots.FONT_SIZE - 1)
        ax.axvline(0, color="black", linewidth=1)
        ax.margins(x=0.2)
        plots.finish(ax, "rows lost | gained", "", stage)
        ax.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    axes[0][0].set_yticks(range(len(skills)), skills)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=plots.FONT_SIZE, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes[0][-1]


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
    text = f"The first answer to each of {len(picked)} rows, those that changed first; ✓ and ✗ as {scorer} says."
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
            "row": row + 1,
            "why": why,
            "asked": _short(prompt_text(content)),
            "reference": _short(_reference(content)),
        }
        for e, places in zip(evaluations, first, strict=True):
            value, response = e.scores[places[row]][scorer], e.responses[places[row]]
            end = "" if response["finish_reason"] != "length" else " …(cut off)"
            line[e.name] = f"{_mark(value)} {_short(response['response'])}{end}"
        lines.append(line)
    return pandas.DataFrame(lines).set_index("row")


def _reference(row: Mapping) -> str:
    return str(row.get("output") or (f"{row['numbers']} → {row['target']}" if "target" in row else "–"))


def _mark(value: object) -> str:
    """✓ for 1, ✗ for 0, the number for another, – for none."""
    if value is None:
        return "–"
    return {1.0: "✓", 0.0: "✗"}.get(float(value), f"{float(value):.3g}")


def _short(text: str, most: int = 280) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _win_section(rates: Mapping[str, WinRate], config: CompareConfig) -> list:
    import pandas

    from qftlab_course.report import Section

    if not rates:
        return []
    lines = [{"pair": pair, "win rate": _number(r.rate), "95 % interval": _range(r.low, r.high), "won": r.wins,
              "tied": r.ties, "lost": r.losses, "the order decided": f"{r.by_order:.0%}",
              "first place": f"{r.first:.0%}", "unreadable": r.unread} for pair, r in rates.items()]  # fmt: skip
    who = config.reward_model or config.judge.model
    rule = "A tie counts as lost." if config.ties_lose else "A tie counts half."
    text = (f"Judged by {Path(who).name if config.reward_model else who}, each pair in both orders, on the first "
            f"{config.judged} rows at most. {rule} Where the order decided, both orders together are a tie. First place "
            "is how often the answer that stood first won: 50 % without a bias. What could not be read counts as a "
            "tie.")  # fmt: skip
    return [Section("Win rates", text, pandas.DataFrame(lines).set_index("pair"))]


def _number(value: float) -> str:
    """A share in per cent, another number as it is."""
    return "–" if value != value else f"{100 * value:.1f} %" if -1 <= value <= 1 else f"{value:.3g}"


def _signed(value: float) -> str:
    return "–" if value != value else f"{100 * value:+.1f}" if -1 <= value <= 1 else f"{value:+.3g}"


def _range(low: float, high: float) -> str:
    is_share = -1 <= low <= high <= 1
    return "–" if low != low else f"{100 * low:.1f} to {100 * high:.1f}" if is_share else f"{low:.3g} to {high:.3g}"


def _p(value: float) -> str:
    return "–" if value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"
