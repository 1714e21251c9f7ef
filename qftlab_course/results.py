"""What comes of an evaluation: its results, the leaderboards' submissions and official score, and the text of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qftlab.evaluate.scorers import SCORERS
from qftlab.evaluate.split import prompt_text
from qftlab.files import aside
from qftlab.maths.verify import CLOSE, OPEN
from qftlab_course.responses import to_lines

if TYPE_CHECKING:
    import pandas

CUT = 100  # characters of a text in the Tinker project's examples


def official_score(accuracy: float, threshold: float) -> float:
    """The leaderboard's score: min(accuracy ÷ threshold, 1)."""
    return min(accuracy / threshold, 1.0)


def tinker_results(rows: Sequence[Mapping], responses: Sequence[Mapping]) -> dict:
    """The keys of the Tinker project's evaluation_results.json, by its rule; empty without references.

    What its script would leave out of the denominator, because asking failed, counts here as wrong.
    """
    found = {"exact_match": 0, "contains_answer": 0, "total": 0, "examples": []}
    for response in responses:
        row, said = rows[response["row"]], response["response"].strip()
        if row.get("output"):
            marks = {name: bool(SCORERS[name](row, said)) for name in ("exact_match", "contains_answer")}
            for name, mark in marks.items():
                found[name] += mark
            found["total"] += 1
            found["examples"].append({"instruction": _cut(row.get("instruction") or prompt_text(row)),
                                      "expected": _cut(row["output"]), "predicted": _cut(said), **marks})  # fmt: skip
    total = found["total"]
    shares = {name: found[key] / total for name, key in (("exact_match_accuracy", "exact_match"),
              ("contains_accuracy", "contains_answer"))} if total else {}  # fmt: skip
    return {**found, **shares} if total else {}


def _cut(text: str) -> str:
    return text[:CUT] + "..." if len(text) > CUT else text


def last_expression(response: str) -> str:
    """What stands in the last `<answer>` of a response; "" without one."""
    found = re.findall(f"{OPEN}((?:(?!{OPEN}).)*?){CLOSE}", response, re.DOTALL)
    return found[-1].strip() if found else ""


def submission(rows: Sequence[Mapping], responses: Sequence[Mapping]) -> list[dict]:
    """The leaderboard's lines, of the first response to each row: {"num", "target", "response": expression} of a
    Countdown problem, {"prompt", "response"} of any other."""
    lines = []
    for response in (one for one in responses if not one["sample"]):
        row = rows[response["row"]]
        if is_problem(row):
            said = {"num": row["numbers"], "target": row["target"], "response": last_expression(response["response"])}
        else:
            said = {"prompt": prompt_text(row), "response": response["response"]}
        lines.append(said)
    return lines


def course_rows(rows: Sequence[Mapping], responses: Sequence[Mapping], scores: Sequence[Mapping]) -> list[dict]:
    """The lines of the 2026 CS224R evaluation: prompt, target, nums, ground_truth, and all responses with scores.

    The scores are those of the first scorer that scores the row.
    """
    lines: dict[int, dict] = {}
    for response, score in zip(responses, scores, strict=True):
        row = rows[response["row"]]
        if is_problem(row):
            truth = {"numbers": row["numbers"], "target": row["target"]}
            head = {"prompt": prompt_text(row), "target": row["target"], "nums": row["numbers"], "ground_truth": truth}
            line = lines.setdefault(response["row"], {**head, "response": [], "scores": []})
            line["response"].append(response["response"])
            values = [value for name, value in score.items() if name not in ("row", "sample")]
            line["scores"].append(next((float(value) for value in values if value is not None), None))
    return list(lines.values())


def is_problem(row: Mapping) -> bool:
    """Whether a converted row is a Countdown problem."""
    return {"numbers", "target"} <= {*row}


def write_lines(path: Path, records: Sequence[Mapping]) -> None:
    """Writes JSON lines, whole or not at all."""
    with aside(path) as place:
        place.write_bytes(to_lines(records))


def summary_table(found: Mapping[str, Mapping]) -> pandas.DataFrame:
    """The summaries of scorers, a line each, and a line for each pass@k: mean, low, high, answers, prompts."""
    import pandas

    lines = []
    for name, one in found.items():
        lines.append({"scorer": name, **{key: one[key] for key in ("mean", "low", "high", "answers", "prompts")}})
        lines += [{**lines[-1], "scorer": f"{name}, pass@{k}", **passed} for k, passed in one["pass_at_k"].items()
                  if k != "1" or passed["mean"] != one["mean"]]  # fmt: skip
    return pandas.DataFrame(lines, columns=["scorer", "mean", "low", "high", "answers", "prompts"]).set_index("scorer")


def difference_text(found: Mapping[str, Mapping]) -> str:
    """With how many prompts which difference can be seen, scorer by scorer; "" where none is known."""
    seen = [f"{100 * one['smallest_difference']:.1f} points of {name} ({one['prompts']} prompts)"
            for name, one in found.items() if one["smallest_difference"] is not None]  # fmt: skip
    if not seen:
        return ""
    return (f"with this many prompts you can see a difference of {', '.join(seen)}: a paired test finds one that large "
            "8 times in 10, and more often where both models find the same prompts hard")  # fmt: skip
