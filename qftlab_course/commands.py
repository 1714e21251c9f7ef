"""The course's commands, which `qftlab` shows among its own; torch is not imported, so `--help` is fast."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.commands import PROGRAM, Command, hide_loading_bars
from qftlab.settings import AnswerConfig, Names, ServerConfig, check_at_least
from qftlab_course.agent_edit.commands import COMMANDS as AGENT_EDIT

FEW = 10  # references, of fewer of which no interval is told

PAGES = (".html", ".md")
NO_FOLDERS = (".json", ".jsonl", ".csv", ".txt", ".pdf", ".htm", ".parquet")


@dataclass(frozen=True)
class EvaluateConfig(AnswerConfig):
    """Asks a model every row of a file and prints what is right, with 95 % intervals that count prompts.

    Rows with a skill of the course are scored by its rule, Countdown problems without a reference by countdown_course
    and reasoned. Of any other row with a reference three things are measured: `exact` (the answer is the reference, but
    for case, blanks and punctuation), `contained` (the reference stands in the answer, in whole words) and the loss,
    perplexity and token accuracy of the references. What a model thinks counts for neither of the first two. Prompts
    alone are asked and not scored.

    Args:
        data: rows of any layout that `sft` or `rloo` reads, one source or [several]; of a conversation the last
            answer is asked for. By default the bundled held-out rows.
        columns: the rows' own names of fields, as in '{prompt: q, output: a}'.
        split: of folders and hub names.
        limit: ask only so many rows.
        few_shot: 0 asks in the chat format; k shows k solved examples as plain text: the fair way to ask a base model.
        max_new_tokens: the most tokens an answer may have; by default half as many again as the longest reference (its
            bytes, where a server answers), or 512 without any. Give more to a model that thinks.
        output: a folder such as outputs/NAME for the responses, their scores and evaluation_results.json; an evaluation
            that was killed goes on there, and other scorers score what is there. Or a page, .html or .md.
        seed: of the sampling and of the choice of examples.
        batch_size: answers written at once.
        scorers: what answers are scored by in place of the above, one or [several]: exact, contained, exact_match,
            contains_answer, countdown, reasoned, countdown_course, tinyzero, skill, agent_edit_course,
            agent_edit_strict, or module:function of your own.
        num_samples: answers to each row.
        pass_k: also the chance that one of k answers is right, for each of these k, as in [1,2,4,8,16].
        threshold: also the leaderboard's score by the first scorer, min(accuracy / threshold, 1).
        server: a server that answers in place of the model: server.url and server.model.

    Raises:
        ValueError: for a value out of range.
    """

    data: Names = ()
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    limit: int | None = None
    few_shot: int = 0
    max_new_tokens: int | None = None
    output: str = ""
    batch_size: int = 64
    scorers: Names = ()
    num_samples: int = 1
    pass_k: tuple[int, ...] = ()
    threshold: float | None = None
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, few_shot=self.few_shot)
        check_at_least(1, limit=self.limit, batch_size=self.batch_size, num_samples=self.num_samples)
        if self.output.endswith(NO_FOLDERS):
            raise ValueError(f"output must end in .html or .md, or be a folder, got {self.output!r}")
        if wrong := [k for k in self.pass_k if not 1 <= k <= self.num_samples]:
            raise ValueError(f"pass_k must be from 1 to num_samples {self.num_samples}, got {wrong[0]}: --num_samples "
                             f"{max(wrong[0], 1)}")  # fmt: skip
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.num_samples > 1 and not self.sampling.temperature:
            raise ValueError(f"num_samples must be 1 at temperature 0, where all answers are alike, got "
                             f"{self.num_samples}: --sampling.temperature 0.6")  # fmt: skip
        if self.few_shot and self.server.url:
            raise ValueError(
                f"few_shot must be 0 with a server, which is asked in the chat format, got {self.few_shot}"
            )
        if self.server.url and self.model != "tiny":
            raise ValueError(f"model must be left out with a server, whose model is server.model, got {self.model!r}")
        if self.server.adapters:
            raise ValueError("server.adapters must be left out of an evaluation, which sends none")

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of responses."""
        return bool(self.output) and not self.output.endswith(PAGES)


@dataclass(frozen=True)
class StagesConfig:
    """Where the course models go that are trained anew.

    Args:
        output: a folder; by default data/stages itself, whose models ship with the lab.
    """

    output: str = ""


def run_tour(config) -> None:
    """Runs the tour; exit code 1 if a stage missed its bar."""
    from qftlab_course import tour

    hide_loading_bars()
    try:
        tour.main(config)
    except tour.MissedError as error:
        print(f"qftlab tour: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def run_evaluate(config) -> None:
    """Prints the table and what it can tell, and says where the files are."""
    from qftlab_course.evaluation import evaluate
    from qftlab_course.report import Section, format_cell, write_report
    from qftlab_course.results import difference_text, summary_table

    try:
        done = evaluate(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped: the same command goes on" if config.is_folder else "") from None
    found = done.results
    said = [f"{found['num_rows']} rows of {', '.join(config.data) or 'the bundled held-out set'}."]
    title = f"Evaluation of {found['model']}"
    if done.evaluation is not None:
        heading, table = "By skill", done.evaluation.to_frame().map(format_cell)
    else:
        heading, table = "By scorer", summary_table(found["scores"])
        said.append(f"{config.num_samples} answers to each.")
    print(table.to_string(float_format="{:.3f}".format, na_rep="–") if len(table) else "nothing was scored")
    lines = reference_lines(found) + [difference_text(found["scores"])]
    if official := found.get("official_score"):
        lines.append(
            "official score: min({accuracy:.4f} / {threshold:g}, 1) = {score:.4f}, by {scorer}".format(**official)
        )
    for line in filter(None, lines):
        print(line)
    if config.is_folder:
        print(f"responses, scores and results: {config.output}")
    elif config.output:
        sections = [Section(heading, "\n\n".join([" ".join(said), *filter(None, lines)]), table)]
        print(f"page: {write_report(config.output, title, sections)}")


def reference_lines(found: dict) -> list[str]:
    """What the results say of the references, as lines."""
    if "loss" not in found:
        return []
    loss, others = found["loss"], [(name, found[name]) for name in ("perplexity", "token_accuracy")]
    if loss["rows"] < FEW:
        names = ", ".join(f"{name.replace('_', ' ')}: {one['mean']:.3f}" for name, one in [("loss", loss), *others])
        return [f"{names} of {loss['rows']} references, too few for an interval"]
    spans = [
        f"{name.replace('_', ' ')}: {one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for name, one in others
    ]
    return [f"loss: {loss['mean']:.3f} nats a token of {loss['rows']} references, 95 % interval {loss['low']:.3f} to "
            f"{loss['high']:.3f}", ", ".join(spans)]  # fmt: skip


def run_compare(config) -> None:
    """Writes the page and says where it is."""
    from qftlab_course.compare_page import compare

    print(f"page: {compare(config)}")


def run_pretrain(config) -> None:
    """Pretrains `tiny`."""
    from qftlab_course.world.pretrain import pretrain

    print(f"model: {pretrain(config)}")


def run_tinker(config) -> None:
    """Fine-tunes on Tinker, and says where the weights are and what they write."""
    from qftlab_course.tinker_project import fine_tune

    done = fine_tune(config)
    print(
        ("mean reward" if config.stage == "rloo" else "loss")
        + " of each epoch: "
        + ", ".join(f"{loss:.4f}" for loss in done.losses)
    )
    print(f"sampler: {done.sampler}\nstate, for --state: {done.state}")
    for text in done.samples:
        print(f"sample: {text!r}")
    if config.output:
        print(f"adapters: {config.output}\ntry it: {PROGRAM} chat --model {config.output}")


def run_tinker_local(config) -> None:
    """Answers as Tinker does until Ctrl-C, and says what to set so that the SDK asks here."""
    from qftlab_course.tinker_local import opened

    with opened(config) as (server, listener, url):
        print(f"export TINKER_BASE_URL={url} TINKER_API_KEY=tml-local\n(Ctrl-C stops; any key that begins with tml- is "
              f"taken; checkpoints are in {config.output})", flush=True)  # fmt: skip
        server.run([listener])


def run_stages(config) -> None:
    """Trains the course models anew."""
    from qftlab.files import bundled
    from qftlab_course.stages import rebuild

    rebuild(Path(config.output) if config.output else bundled("stages"))


COMMANDS = {
    "tour": Command("the whole way in minutes: two new tokens, SFT, DPO, RLOO, a page of results",
                    "tour", "qftlab_course.tour:TourConfig", run_tour, speaks=True),
    "evaluate": Command("accuracy by skill on held-out rows, with intervals",
                        "evaluate --model runs/sft/latest --data data/bugfix/heldout.jsonl",
                        "qftlab_course.commands:EvaluateConfig", run_evaluate),
    "compare": Command("a page over evaluations of the same rows: what each stage gave and cost",
                       "compare --evaluations [outputs/initial,outputs/sft,outputs/dpo,outputs/rloo]",
                       "qftlab_course.compare:CompareConfig", run_compare),
    "stages": Command("train the course models of data/stages anew",
                      "stages --output runs/anew/stages", "qftlab_course.commands:StagesConfig", run_stages),
    "pretrain": Command("rebuild the bundled model `tiny` from nothing (about an hour of one core)",
                        "pretrain --output data/tiny", "qftlab_course.world.pretrain:PretrainConfig", run_pretrain),
    "tinker": Command("fine-tune on Tinker, with the rows, masks and loss of sft",
                      "tinker --data data/instructions/train.jsonl --base_model Qwen/Qwen3-8B --output runs/adapters",
                      "qftlab_course.tinker_project:ProjectConfig", run_tinker),
    "tinker-local": Command("a Tinker service on this machine, for lessons and tests",
                            "tinker-local --models [tiny,Qwen/Qwen3-8B=tiny]",
                            "qftlab_course.tinker_local:TinkerLocalConfig", run_tinker_local),
    **AGENT_EDIT,
}  # fmt: skip
