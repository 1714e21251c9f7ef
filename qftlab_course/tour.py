"""The tour: extend, fine-tune, prefer, practise, measure each stage, and write a page about it, in one command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas

from qftlab.decoding.engine import GREEDY, generate
from qftlab.files import bundled
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.sources import load_rows
from qftlab_course import plots
from qftlab_course.measure import Comparison, Evaluation, Rate, compare, compare_marks, evaluate_kept, evaluate_rows
from qftlab_course.report import Picture, Section, Verdict, verdict_table, write_report
from qftlab_course.stages import Stage, stage
from qftlab_course.world.style import STYLE_SKILLS, is_polite

QUESTIONS = (
    "Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.",
    "What is the sum of the first 100 natural numbers? Please think step by step.",
)
HELD_OUT = "heldout.jsonl"
OPEN_SKILLS = ("joke", "university")  # no single right answer
KEPT_SKILLS = ("add", "subtract", "reverse", "sort")
TITLES = {"base": "base", "sft": "SFT", "warm": "more SFT", "dpo": "DPO", "rloo": "RLOO"}
WARM = SamplingParams(temperature=1.0)
ANSWERS = 4  # to each puzzle, where they are sampled: one alone would be a noisy measure
NUM_BASE_ROWS = 100  # the base never stops by itself, and is asked only so many bugs and puzzles


@dataclass(frozen=True)
class TourConfig:
    """What the tour runs and where its page goes.

    Args:
        preset: model and recipe, `tiny` by default.
        output: folder of `report.html`, `report.md`, the pictures, and `stages/`, the models that it trains. A second
            tour into the same folder takes them from there.
        seed: of the training and of the sampled joke.
    """

    preset: str = "tiny"
    output: str = "runs/tour"
    seed: int = 0


class MissedError(RuntimeError):
    """A bar of the tour was missed; the message names each."""


@dataclass(frozen=True)
class Marks:
    """What one stage was measured on: instructions and Countdown, greedy and sampled, bugs, and plain calculations."""

    chat: Evaluation
    lively: Evaluation
    bugs: Evaluation
    countdown: Evaluation
    sampled: Evaluation
    kept: Rate

    @property
    def polite(self) -> Rate:
        """Share of instructions whose sampled answer ends politely."""
        return Rate("polite", sum(self.polite_marks()), len(self.lively.rows))

    def polite_marks(self) -> list[bool]:
        """Polite or not, instruction by instruction."""
        return [is_polite(c.text.strip()) for c in self.lively.completions]

    def rates(self) -> dict[str, Rate]:
        """The lines of the table."""
        return {
            "format kept": self.chat.format,
            "instructions right, in format": self.chat.in_format,
            "polite, sampled": self.polite,
            "AGENT/EDIT choice right": self.bugs.mode,
            "whole bug answer right": self.bugs.fix,
            "Countdown solved, greedy": self.countdown.countdown,
            "Countdown solved, sampled": self.sampled.countdown,
            "old skills kept (plain text)": self.kept,
        }


@dataclass(frozen=True)
class Scores:
    """Everything the tour measured: each stage by its name, and the base with three examples in its prompt."""

    stages: Mapping[str, Marks]
    base_shots: Evaluation

    def countdown_change(self, before: str, after: str) -> Comparison:
        """Problems gained and lost between two stages, by the first answer to each at temperature 1."""
        pair = (self.stages[name].sampled.scores for name in (before, after))
        return compare_marks(*([score.correct for score in scores[: len(scores) // ANSWERS]] for scores in pair))

    def polite_change(self, before: str, after: str) -> Comparison:
        """Answers that became polite and that ceased to be, one to each instruction at temperature 1."""
        return compare_marks(*(self.stages[name].polite_marks() for name in (before, after)), "polite")

    def gain(self, line: str, before: str, after: str) -> float:
        """What lies between two stages in a line of the table, as a share."""
        first, second = (self.stages[name].rates()[line].accuracy for name in (before, after))
        return second - first

    @property
    def verdicts(self) -> list[Verdict]:
        """The bars of the tour."""
        base, sft, last = self.stages["base"], self.stages["sft"], self.stages["rloo"]
        return [
            Verdict("base: format kept in chat", base.chat.format.accuracy, 0.05, at_most=True),
            Verdict("SFT: format kept", sft.chat.format.accuracy, 0.95),
            Verdict("base: instructions right, in format", base.chat.in_format.accuracy, 0.05, at_most=True),
            Verdict("SFT: instructions right, in format", sft.chat.in_format.accuracy, 0.75),
            Verdict("SFT: AGENT/EDIT choice right", sft.bugs.mode.accuracy, 0.95),
            Verdict("DPO: polite answers gained, sampled", self.gain("polite, sampled", "warm", "dpo"), 0.4),
            Verdict("DPO: instructions right, in format", self.stages["dpo"].chat.in_format.accuracy, 0.75),
            Verdict("RLOO: Countdown gained, sampled", self.gain("Countdown solved, sampled", "dpo", "rloo"), 0.04),
            Verdict("RLOO: instructions right, in format", last.chat.in_format.accuracy, 0.75),
        ]

    def table(self) -> pandas.DataFrame:
        """The table of rates in [0, 1], one column a stage, and one for the base with three examples (else nan)."""
        lines = {name: marks.rates() for name, marks in self.stages.items()}
        frame = pandas.DataFrame({TITLES[name]: {k: r.accuracy for k, r in rates.items()}
                                  for name, rates in lines.items()})  # fmt: skip
        shots = {"instructions right, in format": self.base_shots.instructions.accuracy}
        frame.insert(1, "base, 3-shot*", pandas.Series(shots, dtype=float).reindex(frame.index))
        frame.index.name = "held-out questions"
        return frame


def exact_rows(rows: list[dict]) -> list[dict]:
    """The rows that have one right answer."""
    return [row for row in rows if row["skill"] not in OPEN_SKILLS]


def measure(stages: Mapping[str, Stage], file: str = HELD_OUT) -> Scores:
    """Asks each stage the held-out questions, and the base once more with three solved examples.

    Args:
        stages: by name, "base" among them.
        file: "heldout.jsonl", which no setting was chosen on, or "development.jsonl", which they were.
    """
    base, rows = stages["base"], exact_rows(load_rows(bundled("instructions", file)))
    shown = load_rows(bundled("instructions", "train.jsonl"))
    shots = evaluate_rows(base.model, base.tokenizer, rows, few_shot=3, examples=shown)
    return Scores({name: marks_of(s, file) for name, s in stages.items()}, shots)


def marks_of(s: Stage, file: str = HELD_OUT) -> Marks:
    """Asks one stage the held-out questions; the base gets few tokens in chat, where it never stops by itself."""
    instructions, bugs, puzzles = (load_rows(bundled(name, file)) for name in ("instructions", "bugfix", "countdown"))
    rows = exact_rows(instructions)
    asked, budget = (None, None) if s.name != "base" else (NUM_BASE_ROWS, 24)
    polite = [row for row in rows if row["skill"] in STYLE_SKILLS]
    old = [row for row in rows if row["skill"] in KEPT_SKILLS]

    def ask(questions: list[dict], params: SamplingParams = GREEDY) -> Evaluation:
        return evaluate_rows(s.model, s.tokenizer, questions, params=params, max_new_tokens=budget)

    return Marks(
        chat=ask(rows),
        lively=ask(polite, WARM),
        bugs=ask(bugs[:asked]),
        countdown=ask(puzzles[:asked]),
        sampled=ask(puzzles[:asked] * ANSWERS, WARM),
        kept=evaluate_kept(s.model, s.tokenizer, old),
    )


def answers(stages: Mapping[str, Stage], seed: int = 0) -> pandas.DataFrame:
    """The three questions under each stage: greedy, but for the joke, which is sampled at temperature 1."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    columns = {}
    for name, s in stages.items():
        budget = 40 if name == "base" else 120
        texts = [c.text for c in generate(s.model, s.tokenizer, chats, max_new_tokens=budget)]
        texts[1] = generate(s.model, s.tokenizer, [chats[1]], max_new_tokens=budget, params=WARM, seed=seed)[0].text
        columns[TITLES[name]] = texts
    frame = pandas.DataFrame(columns, index=list(QUESTIONS))
    frame.index.name = "question"
    return frame


def puzzle(stages: Mapping[str, Stage]) -> pandas.DataFrame:
    """One prompt through all stages: the first held-out puzzle that RLOO solves and SFT did not, greedily answered."""
    rows = load_rows(bundled("countdown", HELD_OUT))[:NUM_BASE_ROWS]
    found = {name: evaluate_rows(s.model, s.tokenizer, rows, max_new_tokens=24)
             for name, s in stages.items()}  # fmt: skip
    marks = {name: [score.correct for score in e.scores] for name, e in found.items()}
    gained = [i for i in range(len(rows)) if marks["rloo"][i] and not marks["sft"][i]]
    i = gained[0] if gained else 0
    said = {TITLES[name]: e.completions[i].text for name, e in found.items()}
    return pandas.DataFrame(said, index=pandas.Index([rows[i]["instruction"]], name="puzzle"))


def stages_picture(scores: Scores):
    """Five rates over the stages; returns the axes."""
    names = {
        "instructions right, in format": "instructions", "AGENT/EDIT choice right": "AGENT or EDIT",
        "polite, sampled": "polite", "Countdown solved, sampled": "Countdown",
        "old skills kept (plain text)": "old skills, no chat",
    }  # fmt: skip
    table = scores.table().drop(columns="base, 3-shot*")
    ax = plots.rate_lines(list(table.columns), {names[k]: list(table.loc[k]) for k in names},
                          title="What each stage adds, and what it costs")  # fmt: skip
    ax.set_ylabel("held-out questions (%)")
    return ax


def skills_picture(scores: Scores):
    """Accuracy by skill with intervals, the base with three examples beside SFT; returns the axes."""
    series = {"base, 3-shot": scores.base_shots, "after SFT": scores.stages["sft"].chat}
    skills = series["after SFT"].skills
    return plots.accuracy_bars(
        skills,
        {name: [e.skill(s).accuracy for s in skills] for name, e in series.items()},
        intervals={name: [e.skill(s).interval for s in skills] for name, e in series.items()},
        title="Held-out questions answered right",
    )


def reward_picture(rloo: Stage):
    """The mean reward of each rollout; returns the axes."""
    rewards = [m["reward"] for m in rloo.metrics if "reward" in m]
    ax = plots.new_axes(None)
    steps = range(1, len(rewards) + 1)
    ax.plot(steps, rewards, color=plots.PALETTE[0], alpha=0.3, linewidth=1)
    ax.plot(steps, plots.running_mean(rewards, 5), color=plots.PALETTE[0], linewidth=2, label="mean of 5 steps")
    ax.legend(fontsize=plots.FONT_SIZE, frameon=False)
    ax.set_ylim(bottom=0)
    return plots.finish(ax, "optimizer step", "mean reward of 512 answers", "Practice: the reward rises")


def main(config: TourConfig, say: Callable[[str], None] = print) -> Path:
    """Runs the tour and returns the path of its page.

    Raises:
        MissedError: if a stage missed its bar; the page is written all the same.
    """

    def made(name: str) -> Stage:
        folder = Path(config.output) / "stages"
        return stage(name, preset=config.preset, seed=config.seed, root=folder, say=lambda line: say(f"     {line}"))

    say("1/6  A base model, and two new tokens")
    stages, extended = {"base": made("base")}, made("extended")
    for text in ("<|AGENT|>", "<|EDIT|>"):
        pieces = len(stages["base"].tokenizer.tokenize(text))
        say(f"     {text}: {pieces} pieces -> 1 token, id {extended.tokenizer.convert_tokens_to_ids(text)}")
    say("2/6  Supervised fine-tuning, then more of one task (each about a minute of one core; kept for the next time)")
    stages |= {name: made(name) for name in ("sft", "warm")}
    say("3/6  DPO: of two right answers, the polite one is preferred")
    stages["dpo"] = made("dpo")
    say("4/6  RLOO: practice on fresh problems, with a verifier for a teacher (about a minute and a half)")
    stages["rloo"] = made("rloo")
    say("5/6  Asking every stage the held-out questions")
    scores, said, solved = measure(stages), answers(stages, config.seed), puzzle(stages)
    say("6/6  Writing the page\n")
    path = write_page(Path(config.output), scores, said, solved, stages)
    tell(scores, said, solved, say)
    say(f"\nReport and pictures: {path}  (report.md beside it)")
    if missed := [verdict.name for verdict in scores.verdicts if not verdict.passed]:
        raise MissedError(f"missed: {'; '.join(missed)}. Please report it, with report.md and the make of your CPU")
    say("Open next: `make lab` (or `python lab.py lab`), notebook 00_tour")
    return path


def tell(scores: Scores, said: pandas.DataFrame, solved: pandas.DataFrame, say: Callable[[str], None]) -> None:
    """Says what was measured: the table, what each stage changed, the answers, the verdicts."""
    say(scores.table().map(lambda x: "–" if x != x else f"{x:.0%}").to_string())
    say("* with three solved examples in the prompt, and read leniently\n")
    changes = {
        "SFT": (compare(scores.stages["base"].chat, scores.stages["sft"].chat), "questions gained, {} lost, greedy"),
        "DPO": (scores.polite_change("warm", "dpo"), "answers became polite, {} ceased to be, sampled"),
        "RLOO": (scores.countdown_change("dpo", "rloo"), "puzzles gained, {} lost, sampled"),
    }
    for name, (change, words) in changes.items():
        line = f"{change.gained} of {change.before.n} {words.format(change.lost)}"
        say(f"{name + ':':5} {line} (exact McNemar p = {change.p_value:.1g})")
    say("\nThe three questions, after SFT:")
    for question, answer in said["SFT"].items():
        say(f"\nYou:   {question}\nModel: {answer}")
    say(f"\nOne puzzle through all stages: {solved.index[0]}")
    for name, answer in solved.iloc[0].items():
        say(f"{name + ':':9} {answer!r}")
    say("\n" + verdict_table(scores.verdicts).to_string())


def write_page(
    folder: Path, scores: Scores, said: pandas.DataFrame, solved: pandas.DataFrame, stages: Mapping[str, Stage]
) -> Path:
    """Writes report.html and report.md with the table, the answers, the curves and the bars; returns the first."""
    sft = stages["sft"]
    loss = plots.loss_curve(range(1, len(sft.losses) + 1), sft.losses)
    sections = [
        Section("Stage by stage", "Rates on questions that were never trained on. *With three solved examples in the "
                "prompt, read leniently.", scores.table(),
                (Picture(stages_picture(scores), "Five rates on held-out questions over five stages, base to RLOO"),)),
        Section("The three questions", "Greedy, but for the joke. The right sum is 5050, and the year 1896.", said),
        Section("One puzzle through all stages", "The first held-out puzzle that RLOO solves and SFT did not.", solved),
        Section("Training", "Left to right: the mean surprise of the trained tokens during SFT, in nats, and the mean "
                "reward during RLOO.",
                pictures=(Picture(loss, "Training loss over optimizer steps"),
                          Picture(reward_picture(stages["rloo"]), "Mean reward over optimizer steps of RLOO"))),
        Section("By skill, after SFT", "The base model is shown three solved examples, and read leniently.",
                scores.stages["sft"].chat.to_frame(),
                (Picture(skills_picture(scores),
                         "Accuracy by skill: base model with three examples, and after SFT"),)),
    ]  # fmt: skip
    intro = "A tiny Qwen2, pretrained on generated text: two new tokens, SFT, DPO and RLOO, each measured."
    for name in ("report.md", "report.html"):
        path = write_report(folder / name, "The tour", sections, verdicts=scores.verdicts, intro=intro)
    return path
