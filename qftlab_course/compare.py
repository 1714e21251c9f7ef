"""The command `compare`: one page over evaluations of one set of rows, stage by stage: what each gave and what it cost.

Every evaluation is a folder that `evaluate --output` wrote: settings.json, rows.jsonl, responses.jsonl, scores.jsonl.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qftlab.files import read_json
from qftlab.settings import Names, ServerConfig, check_at_least, check_fields

if TYPE_CHECKING:
    from qftlab.evaluate.statistics import PairedTest
    from qftlab_course.winrate import WinRate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareConfig:
    """One page over evaluations of the same rows: scores with intervals, what each stage gained and lost, answers.

    Args:
        evaluations: folders that `evaluate --output` wrote, in the order of the stages.
        output: the page, .html or .md.
        examples: answers shown side by side, those that changed first.
        judge: a server with a model that says which of two answers is better: judge.url and judge.model. What it
            answers is kept beside the page, so that a judging that was killed goes on.
        judge_gives: `verdict`, or `reward` for a reward model that answers "reward:-18.73".
        reward_model: or a reward model in this process: a run folder, a folder, or a name on the hub.
        judge_max_tokens: the most tokens of a verdict, thinking included.
        judged: rows judged, from the first on; each takes two questions for each of its samples and pair of stages.
        ties_lose: count a tie as lost, as the 2025 CS224R project does.
        device: of the reward model.

    Raises:
        ValueError: for a value out of range.
    """

    evaluations: Names = ()
    output: str = "outputs/comparison.html"
    examples: int = 24
    judge: ServerConfig = field(default_factory=lambda: ServerConfig(model=""))
    judge_gives: Literal["verdict", "reward"] = "verdict"
    reward_model: str = ""
    judge_max_tokens: int = 1024
    judged: int = 200
    ties_lose: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(0, examples=self.examples)
        check_at_least(1, judged=self.judged, judge_max_tokens=self.judge_max_tokens)
        if len(self.evaluations) < 2:
            raise ValueError(f"evaluations must be two or more, got {len(self.evaluations)}: --evaluations "
                             "[outputs/initial,outputs/sft]")  # fmt: skip
        if not self.output.endswith((".html", ".md")):
            raise ValueError(f"output must end in .html or .md, got {self.output!r}")
        if bool(self.judge.url) != bool(self.judge.model):
            raise ValueError("judge must have both url and model, got one: --judge.url http://… --judge.model NAME")
        if self.judge.url and self.reward_model:
            raise ValueError("judge and reward_model must not both be given: choose one")


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, as its folder holds it: `responses` and `scores` by row and sample, in one order."""

    name: str
    settings: Mapping
    rows: Sequence[dict]
    responses: Sequence[dict]
    scores: Sequence[dict]

    @property
    def scorers(self) -> list[str]:
        """Names of what the responses were scored by."""
        return [name for name in self.scores[0] if name not in ("row", "sample")] if self.scores else []

    @property
    def tokens(self) -> float:
        """Mean tokens of a response; nan where a server did not give the ids of all."""
        counts = [math.nan if r["token_ids"] is None else len(r["token_ids"]) for r in self.responses]
        return sum(counts) / len(counts)

    @property
    def cut_off(self) -> float:
        """Share of the responses that ended because there was no more room."""
        return sum(r["finish_reason"] == "length" for r in self.responses) / len(self.responses)


@dataclass(frozen=True)
class Change:
    """What one scorer saw from one evaluation to the next.

    Args:
        test: the paired test.
        gained: rows whose mean rose.
        lost: rows whose mean fell.
        prompts: how many the test counted.
        visible: the difference that a test like this finds 8 times in 10, (t + 0.84) standard errors; nan for one
            prompt.
    """

    test: PairedTest
    gained: list[int]
    lost: list[int]
    prompts: int
    visible: float


def load_evaluation(folder: str | Path) -> Evaluated:
    """Reads what `evaluate --output` wrote.

    Raises:
        FileNotFoundError: naming what the folder lacks.
        ValueError: for a line that is no record, or an evaluation that did not end.
    """
    from qftlab_course.responses import RESPONSES, ROWS, SCORES, SETTINGS

    folder, names = Path(folder), (SETTINGS, ROWS, RESPONSES, SCORES)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} must hold an evaluation that ended, got no {missing[0]}: evaluate --output")
    rows, responses, scores = (_lines(folder / name) for name in names[1:])
    places = [[(one["row"], one["sample"]) for one in part] for part in (responses, scores)]
    if places[0] != places[1] or {row for row, _ in places[0]} != set(range(len(rows))):
        raise ValueError(f"{folder} must hold a score for each response, got {len(rows)} rows, {len(responses)} "
                         f"responses and {len(scores)} scores: run evaluate --output once more")  # fmt: skip
    return Evaluated(folder.resolve().name, read_json(folder / names[0]), rows, responses, scores)


def _lines(path: Path) -> list[dict]:
    found = []
    # Only \n ends a line: an answer may hold U+2028, which JSON leaves as it is and splitlines() would cut at.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {line!r:.60}") from None
    return found


def check_same_rows(evaluations: Sequence[Evaluated]) -> None:
    """Refuses evaluations of different rows or numbers of samples: nothing could be paired.

    Raises:
        ValueError: naming the first difference.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        said = f"{other.name} must be of the rows of {first.name}"
        for number, (ours, theirs) in enumerate(zip(first.rows, other.rows), 1):  # noqa: B905
            if ours != theirs:
                name = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
                raise ValueError(f"{said}, got another row {number}: {name} {theirs.get(name)!r:.80} for "
                                 f"{ours.get(name)!r:.80}")  # fmt: skip
        if len(other.rows) != len(first.rows) or len(other.responses) != len(first.responses):
            raise ValueError(f"{said}, got {len(other.rows)} rows and {len(other.responses)} responses for "
                             f"{len(first.rows)} and {len(first.responses)}")  # fmt: skip


def common_scorers(evaluations: Sequence[Evaluated]) -> list[str]:
    """The scorers that all evaluations have.

    Raises:
        ValueError: if there is none.
    """
    found = [name for name in evaluations[0].scorers if all(name in other.scorers for other in evaluations)]
    if not found:
        raise ValueError("evaluations must share a scorer, got none: evaluate each with the same --scorers")
    return found


def mean_of(evaluated: Evaluated, scorer: str) -> tuple[float, float, float]:
    """Mean over answers, low and high: the 95 % interval that counts prompts; nan without an answer that is scored."""
    from qftlab.evaluate.split import prompt_key
    from qftlab_course.responses import interval_of

    scored = [(float(one[scorer]), one["row"]) for one in evaluated.scores if one[scorer] is not None]
    if not scored:
        return (float("nan"),) * 3
    return interval_of([value for value, _ in scored], [prompt_key(evaluated.rows[row]) for _, row in scored])


def change_of(before: Evaluated, after: Evaluated, scorer: str) -> Change | None:
    """The paired test, row by row; None where no answer is scored on both sides."""
    from scipy import stats

    from qftlab.evaluate.split import prompt_key
    from qftlab.evaluate.statistics import paired_test

    both = [(float(a[scorer]), float(b[scorer]), a["row"]) for a, b in zip(before.scores, after.scores, strict=True)
            if a[scorer] is not None and b[scorer] is not None]  # fmt: skip
    if not both:
        return None
    old, new, rows = zip(*both, strict=True)
    totals: dict[int, float] = {}
    for a, b, row in both:
        totals[row] = totals.get(row, 0.0) + b - a
    gained, lost = [row for row, x in totals.items() if x > 1e-9], [row for row, x in totals.items() if x < -1e-9]
    keys = [prompt_key(before.rows[row]) for row in rows]
    test, n = paired_test(old, new, keys), len(set(keys))
    visible = (test.high - test.difference) * (1 + stats.norm.ppf(0.8) / stats.t.ppf(0.975, n - 1))
    # Without any spread none can be told, which is not the same as seeing everything.
    return Change(test, gained, lost, n, float(visible) or math.nan)


def win_rates(evaluations: Sequence[Evaluated], config: CompareConfig) -> dict[str, WinRate]:
    """Each stage against the one before, and the last against the first, by the judge that is named.

    Raises:
        ServerError: if the server fails; what it said is kept beside the page.
    """
    pairs = list(zip(evaluations, evaluations[1:], strict=False))
    pairs += [(evaluations[0], evaluations[-1])] if len(pairs) > 1 else []
    if config.reward_model:
        return _judged(pairs, _model_scores(evaluations, config), config)
    from qftlab.remote.client import Client
    from qftlab_course import judge

    with Client(config.judge, Path(config.output).with_suffix(".judge.jsonl")) as client:
        if config.judge_gives == "reward":
            scores = judge.endpoint_scores(client, config.judge.model, _answers(evaluations, config))
            return _judged(pairs, judge.score_judge(scores), config)
        asked = judge.model_judge(client, config.judge.model, config.judge_max_tokens)
        return _judged(pairs, asked, config, judge.in_threads(client))


def _judged(pairs: Sequence, judge, config: CompareConfig, run=map) -> dict[str, WinRate]:
    from qftlab.evaluate.split import prompt_key
    from qftlab_course.winrate import win_rate

    found = {}
    for before, after in pairs:
        a, b = ([one for one in e.responses if one["row"] < config.judged] for e in (before, after))
        texts = [[one["response"] for one in part] for part in (a, b)]
        keys = [prompt_key(before.rows[one["row"]]) for one in a]
        options = {"keys": keys, "strict": config.ties_lose, "run": run}
        name, count = f"{after.name} against {before.name}", 2 * len(a)
        log.info("%s: %d verdicts are asked for", name, count)
        found[name] = win_rate([o["prompt"] for o in a], *texts, judge, **options)
        if found[name].unread * 2 > count:
            log.warning("%s: %d of %d verdicts could not be read and count as ties: this judge says nothing",
                        name, found[name].unread, count)  # fmt: skip
    return found


def _answers(evaluations: Sequence[Evaluated], config: CompareConfig) -> list[tuple]:
    """Prompts and answers that are judged."""
    return [(evaluations[0].responses[i]["prompt"], one["response"])
            for e in evaluations for i, one in enumerate(e.responses) if one["row"] < config.judged]  # fmt: skip


def _model_scores(evaluations: Sequence[Evaluated], config: CompareConfig):
    """A judge by a reward model in this process."""
    from qftlab.train.reward import ModelReward
    from qftlab.train.run import best_device
    from qftlab_course import judge

    answers = _answers(evaluations, config)
    model = ModelReward.load(config.reward_model, device=best_device(config.device))
    values = model.many([(judge.conversation(prompt), [], text, {}) for prompt, text in answers])
    keys = [judge.score_key(*answer) for answer in answers]
    return judge.score_judge(dict(zip(keys, values, strict=True)))
