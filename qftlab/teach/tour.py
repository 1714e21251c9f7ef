"""The tour: extend, fine-tune, measure, and write a page about it, in one command and a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas

from qftlab.core import plots
from qftlab.core.sampling import SamplingParams
from qftlab.data.bundled import bundled
from qftlab.data.sources import load_rows
from qftlab.evaluate.kept import evaluate_kept
from qftlab.evaluate.report import Picture, Section, Verdict, verdict_table, write_report
from qftlab.evaluate.skills import Evaluation, Rate, compare, evaluate_rows
from qftlab.generate.engine import generate
from qftlab.teach.stages import Stage, stage

QUESTIONS = (
    "Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.",
    "What is the sum of the first 100 natural numbers? Please think step by step.",
)
OPEN_SKILLS = ("joke", "university")  # no single right answer
KEPT_SKILLS = ("add", "subtract", "reverse", "sort")


@dataclass(frozen=True)
class TourConfig:
    """What the tour runs and where its page goes.

    Args:
        preset: model and recipe, `tiny` by default.
        output: folder of `report.html`, `report.md` and the pictures.
        seed: of the sampled joke.
    """

    preset: str = "tiny"
    output: str = "runs/tour"
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """Everything the tour measured, base beside SFT."""

    base_chat: Evaluation
    base_shots: Evaluation
    base_bugs: Evaluation
    sft: Evaluation
    bugs: Evaluation
    countdown: Evaluation
    kept_before: Rate
    kept_after: Rate

    @property
    def verdicts(self) -> list[Verdict]:
        """The bars of the tour."""
        return [
            Verdict("base: format kept in chat", self.base_chat.format.accuracy, 0.05, at_most=True),
            Verdict("SFT: format kept", self.sft.format.accuracy, 0.95),
            Verdict("base: instructions right, in format", self.base_chat.in_format.accuracy, 0.05, at_most=True),
            Verdict("SFT: instructions right, in format", self.sft.in_format.accuracy, 0.75),
            Verdict("SFT: AGENT/EDIT choice right", self.bugs.mode.accuracy, 0.95),
        ]

    def table(self) -> pandas.DataFrame:
        """The before/after table, rates in [0, 1]; nan where a column does not apply."""
        lines = {
            "format kept": (self.base_chat.format, None, self.sft.format),
            "instructions right, in format": (self.base_chat.in_format, None, self.sft.in_format),
            "instructions right, leniently": (
                self.base_chat.instructions, self.base_shots.instructions, self.sft.instructions
            ),
            "AGENT/EDIT choice right": (self.base_bugs.mode, None, self.bugs.mode),
            "whole bug answer right": (self.base_bugs.fix, None, self.bugs.fix),
            "Countdown solved": (None, None, self.countdown.countdown),
            "old skills kept (plain text)": (self.kept_before, None, self.kept_after),
        }
        nan = float("nan")
        values = {name: [nan if rate is None else rate.accuracy for rate in rates] for name, rates in lines.items()}
        frame = pandas.DataFrame(values, index=["base, chat", "base, 3-shot", "after SFT"]).T
        frame.index.name = "held-out questions"
        return frame


def exact_rows(rows: list[dict]) -> list[dict]:
    """The rows that have one right answer."""
    return [row for row in rows if row["skill"] not in OPEN_SKILLS]


def measure(base: Stage, sft: Stage) -> Scores:
    """Asks base and SFT the held-out questions; the base gets few tokens in chat, where it never stops by itself."""
    rows = exact_rows(load_rows(bundled("instructions", "heldout.jsonl")))
    shown = load_rows(bundled("instructions", "train.jsonl"))
    bugs = load_rows(bundled("bugfix", "heldout.jsonl"))
    puzzles = load_rows(bundled("countdown", "heldout.jsonl"))
    old = [row for row in rows if row["skill"] in KEPT_SKILLS]
    return Scores(
        base_chat=evaluate_rows(base.model, base.tokenizer, rows, max_new_tokens=32),
        base_shots=evaluate_rows(base.model, base.tokenizer, rows, few_shot=3, examples=shown),
        base_bugs=evaluate_rows(base.model, base.tokenizer, bugs[:100], max_new_tokens=16),
        sft=evaluate_rows(sft.model, sft.tokenizer, rows),
        bugs=evaluate_rows(sft.model, sft.tokenizer, bugs),
        countdown=evaluate_rows(sft.model, sft.tokenizer, puzzles),
        kept_before=evaluate_kept(base.model, base.tokenizer, old),
        kept_after=evaluate_kept(sft.model, sft.tokenizer, old),
    )


def answers(stages: dict[str, Stage], seed: int = 0) -> pandas.DataFrame:
    """The three questions under each stage: greedy, but for the joke, which is sampled at temperature 1."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    warm, columns = SamplingParams(temperature=1.0), {}
    for name, s in stages.items():
        budget = 40 if name == "base" else 120
        texts = [c.text for c in generate(s.model, s.tokenizer, chats, max_new_tokens=budget)]
        texts[1] = generate(s.model, s.tokenizer, [chats[1]], max_new_tokens=budget, params=warm, seed=seed)[0].text
        columns[name] = texts
    frame = pandas.DataFrame(columns, index=list(QUESTIONS))
    frame.index.name = "question"
    return frame


def before_after_picture(scores: Scores):
    """The four numbers that changed, base beside SFT, with intervals; returns the axes."""
    rates = {
        "ends its turn": (scores.base_chat.format, scores.sft.format),
        "answers right": (scores.base_chat.in_format, scores.sft.in_format),
        "AGENT or EDIT": (scores.base_bugs.mode, scores.bugs.mode),
        "old skills, no chat": (scores.kept_before, scores.kept_after),
    }
    columns = dict(zip(("base model", "after SFT"), zip(*rates.values(), strict=True), strict=True))
    return plots.accuracy_bars(
        list(rates),
        {name: [rate.accuracy for rate in column] for name, column in columns.items()},
        intervals={name: [rate.interval for rate in column] for name, column in columns.items()},
        title="Before and after a minute of fine-tuning",
    )


def skills_picture(scores: Scores):
    """Accuracy by skill with intervals, the base with three examples beside SFT; returns the axes."""
    skills = scores.sft.skills
    series = {"base, 3-shot": scores.base_shots, "after SFT": scores.sft}
    return plots.accuracy_bars(
        skills,
        {name: [e.skill(s).accuracy for s in skills] for name, e in series.items()},
        intervals={name: [e.skill(s).interval for s in skills] for name, e in series.items()},
        title="Held-out questions answered right",
    )


def main(config: TourConfig, say: Callable[[str], None] = print) -> Path:
    """Runs the tour and returns the path of its page."""
    say("1/4  A base model, and two new tokens")
    base, extended = stage("base", preset=config.preset), stage("extended", preset=config.preset)
    for text in ("<|AGENT|>", "<|EDIT|>"):
        pieces = len(base.tokenizer.tokenize(text))
        say(f"     {text}: {pieces} pieces -> 1 token, id {extended.tokenizer.convert_tokens_to_ids(text)}")
    say("2/4  Supervised fine-tuning (about a minute of one core; kept for the next time)")
    sft = stage("sft", preset=config.preset, say=lambda line: say(f"     {line}"))
    say("3/4  Asking the base and the fine-tuned model the held-out questions")
    scores = measure(base, sft)
    said = answers({"base": base, "after SFT": sft}, config.seed)
    change = compare(scores.base_chat, scores.sft)
    say("4/4  Writing the page\n")
    path = write_page(Path(config.output), scores, said, sft)
    say(scores.table().map(lambda x: "–" if x != x else f"{x:.0%}").to_string())
    say(f"\n{change.gained} questions gained, {change.lost} lost (exact McNemar p = {change.p_value:.1g})\n")
    for question, answer in said["after SFT"].items():
        say(f"You:   {question}\nModel: {answer}\n")
    say(verdict_table(scores.verdicts).to_string())
    say(f"\nReport and pictures: {path}  (report.md beside it)")
    say("Open next: `make lab` (or `python lab.py lab`), notebook 00_tour")
    return path


def write_page(folder: Path, scores: Scores, said: pandas.DataFrame, sft: Stage) -> Path:
    """Writes report.html and report.md with the table, the answers, the loss curve and the bars; returns the first."""
    loss = plots.loss_curve(range(1, len(sft.losses) + 1), sft.losses)
    bars, skills = before_after_picture(scores), skills_picture(scores)
    sections = [
        Section("Before and after", "Rates on questions that were never trained on.", scores.table(),
                (Picture(bars, "Four rates on held-out questions, base model beside SFT"),)),
        Section("The three questions", table=said),
        Section("Training", "Mean surprise of the trained tokens, in nats.",
                pictures=(Picture(loss, "Training loss over optimizer steps"),)),
        Section("By skill", "The base model is shown three solved examples, and read leniently.", scores.sft.to_frame(),
                (Picture(skills, "Accuracy by skill: base model with three examples, and after SFT"),)),
    ]  # fmt: skip
    intro = "A tiny Qwen2, pretrained on generated text, after two new tokens and a minute of fine-tuning."
    for name in ("report.md", "report.html"):
        path = write_report(folder / name, "The tour", sections, verdicts=scores.verdicts, intro=intro)
    return path
