"""Scores and intervals worked by hand, and a table from a model whose answers are known."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path

import matplotlib
import pandas
import pytest

matplotlib.use("Agg")

from qftlab.decoding.engine import Completion  # noqa: E402
from qftlab.evaluate import answers as evaluate  # noqa: E402
from qftlab_course import (  # noqa: E402
    measure,
    plots,  # noqa: E402
    report,  # noqa: E402
    scores,
)
from qftlab_course.world.style import ENDING  # noqa: E402


class FakeTokenizer:
    """One id a character; the special tokens have ids of their own. Enough for scoring, which reads ids and text."""

    special = {"<|im_end|>": 1, "<|AGENT|>": 2, "<|EDIT|>": 3, "<|im_start|>": 4}
    eos_token_id = 0

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.special.get(token)

    def convert_ids_to_tokens(self, index: int) -> str:
        return {i: token for token, i in self.special.items()}[index]

    def __call__(self, text, add_special_tokens: bool = True):
        ids = [self.encode(t) for t in text] if isinstance(text, list) else self.encode(text)
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, ids: list[int]) -> str:
        special = {number: token for token, number in self.special.items()}
        return "".join(special.get(number) or chr(number - 100) for number in ids if number > 99 or number in special)

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"<\|\w+\|>|.", text, flags=re.DOTALL)
        return [self.special.get(piece, 100 + ord(piece[0])) for piece in pieces]


TOKENIZER = FakeTokenizer()


def wrote(text: str, *, ended: bool = True) -> Completion:
    ids = TOKENIZER.encode(text) + ([1] if ended else [])
    return Completion([9], ids, text, "stop" if ended else "length")


def row(output: str, skill: str | None = "add", **extra) -> dict:
    return {"instruction": "?", "input": "", "output": output, **({"skill": skill} if skill else {}), **extra}


def score(reference: dict, text: str, *, ended: bool = True) -> scores.SkillScore:
    return scores.score_row(reference, wrote(text, ended=ended), TOKENIZER)


# --- scores ---


def test_rows_without_a_skill_are_matched_without_thinking() -> None:
    """Three rows: the reference itself, a sentence around it, and thinking that names it but was cut off."""
    rows = [row("Paris", skill=None)] * 3 + [row("9", "add"), row("x", "countdown"), row("x", skill=["list"])]
    said = ["<think>\nRome?\n</think>\n\nparis.", "It is Paris, I think.", "<think>\nParis", "9", "y", "y"]
    answers = tuple(wrote(text) for text in said)
    opened = Completion(TOKENIZER.encode("?<think>"), TOKENIZER.encode("Paris"), "Paris", "length")
    marks = tuple(scores.score_row(r, a, TOKENIZER) for r, a in zip(rows, answers, strict=True))
    found = measure.Evaluation(tuple(rows), answers, marks)
    assert (found.exact.correct, found.contained.correct, found.exact.n) == (1, 2, 5), "two rows name no skill we know"
    assert found.skills == ["unlabelled", "add"]
    assert list(found.to_frame().index) == ["exact", "contained", "add", "instructions"]
    assert scores.score_row(rows[0], opened, TOKENIZER).answered == "", "the prompt opened the thinking"


@pytest.mark.parametrize(
    ("reference", "text", "correct", "formatted"),
    [
        (row("105"), "105", True, True),
        (row("105"), " 105. ", True, True),
        (row("105"), "106", False, True),
        (row("105"), "105\n105", False, False),
        (row("105"), "The answer is 105", False, True),
        (row("105"), "", False, False),
        (row("105"), "105<|im_start|>user", False, False),
        (row("87 79 66", "reverse"), "87 79 66", True, True),
        (row("h-i-l-l", "spell"), "h-i-l", False, True),
        (row("Moscow.", "capital"), "Moscow", True, True),
        (row("Step. The answer is 5050.", "sum_to_n"), "Another way. The answer is 5050.", True, True),
        (row("Step. The answer is 5050.", "sum_to_n"), "The answer is 5050. No: the answer is 5051.", False, True),
        (row("Step. The answer is 5050.", "sum_to_n"), "5050", False, True),
        (row("Any.", "joke"), "Why?", None, True),
        (row("SJTU is old, 1896.", "university", check="1896"), "Founded 1896: SJTU is in Shanghai.", True, True),
        (row("SJTU is old, 1896.", "university", check="1896"), "SJTU was founded in 1897.", False, True),
        (row("SJTU is old, 1896.", "university", check="1896"), "Kyoto is old, from 1896.", False, True),
        (row("SJTU is new.", "university"), "Founded in 1897.", None, True),
        (row("Anything.", None), "Something", None, True),
        (row("a\nb", "poem"), "A\nB", True, True),
    ],
)
def test_score_row(reference: dict, text: str, correct: bool | None, formatted: bool) -> None:
    done = score(reference, text)
    assert (done.correct, done.formatted, done.fix_correct) == (correct, formatted, None)
    assert not score(reference, text, ended=False).formatted


def test_another_end_than_the_turns_is_no_format() -> None:
    stopped_by_eos = Completion([9], [*TOKENIZER.encode("105"), 0], "105", "stop")
    assert scores.score_row(row("105"), stopped_by_eos, TOKENIZER) == scores.SkillScore(True, False, "105")


def test_score_countdown() -> None:
    reference = row("<answer>3 * 4</answer>", "countdown", numbers=[3, 4], target=12)
    assert score(reference, "<answer>4 * 3</answer>") == scores.SkillScore(True, True, "4 * 3")
    assert score(reference, "Try 3 + 4. <answer>3 * 4</answer>").correct
    assert score(reference, "<answer>3 + 4</answer>") == scores.SkillScore(False, True, "3 + 4")
    assert score(reference, "3 * 4") == scores.SkillScore(False, False, "")
    assert score(reference, "<answer>3 * 4</answer><answer>3 * 4</answer>") == scores.SkillScore(False, False, "")
    assert score(reference, "<answer>4 * 3</answer>", ended=False) == scores.SkillScore(True, False, "4 * 3")


def test_score_bugfix_reads_ids() -> None:
    reference = row("<|EDIT|>line 2: acc = 0", "bugfix", mode="EDIT")
    done = score(reference, "<|EDIT|>line 2: acc = 0")
    assert (done.correct, done.formatted, done.fix_correct) == (True, True, True)
    done = score(reference, "<|EDIT|>line 3: acc = 0")
    assert (done.correct, done.formatted, done.fix_correct) == (True, True, False)
    done = score(reference, "<|AGENT|>line 2: acc = 0")
    assert (done.correct, done.formatted, done.fix_correct) == (False, True, False)
    done = score(reference, "<|EDIT|>")
    assert (done.correct, done.formatted, done.fix_correct) == (True, False, False)
    assert not score(reference, "<|EDIT|>a<|AGENT|>b").formatted
    # The same characters, typed: no mode token, so no mode.
    typed = Completion([9], [100 + ord(c) for c in "<|EDIT|>line 2: acc = 0"] + [1], "<|EDIT|>line 2: acc = 0", "stop")
    done = scores.score_row(reference, typed, TOKENIZER)
    assert (done.correct, done.formatted, done.fix_correct) == (False, False, False)


def test_a_mode_is_its_token() -> None:
    assert [scores.mode_of(ids, TOKENIZER) for ids in ([2, 9], [3], [9, 2], [])] == ["AGENT", "EDIT", None, None]


@pytest.mark.parametrize(
    ("reference", "text", "want"),
    [
        (row("105"), " 105\n", True),
        (row("105"), " It is 105, I think.", True),
        (row("105"), "\n 105", True),
        (row("105"), " 8 + 97 = 105", False),  # the first number counts
        (row("105"), "1050", False),
        (row("4 65 95", "sort"), " 4, 65, 95.", True),
        (row("4 65 95", "sort"), "Sorted: 4 65 95", True),
        (row("4 65 95", "sort"), "4 65 95 97", False),
        (row("h-i-l-l", "spell"), "h i l l", True),
        (row("h-i-l-l", "spell"), "hill", False),
        (row("Moscow.", "capital"), " Moscow\nQuestion", True),
        (row("x. The answer is 55.", "sum_to_n"), "1 to 10: 55", True),
        (row("x. The answer is 55.", "sum_to_n"), "55 is 10 * 11", False),
        (row("y", "joke"), "Why", None),
        (row("", "countdown", numbers=[3, 4], target=12), " 3 * 4 = 12", True),
        (row("", "countdown", numbers=[3, 4], target=12), "<answer>3 * 4</answer>", True),
        (row("", "countdown", numbers=[3, 4], target=12), "12", False),
        (row("<|EDIT|>x", "bugfix", mode="EDIT"), "<|EDIT|>y", True),
        (row("105"), "", False),
    ],
)
def test_lenient(reference: dict, text: str, want: bool | None) -> None:
    assert scores.lenient_score(reference, text).correct is want


# --- the table ---

ROWS = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3", "skill": "add"},
    {"instruction": "Add 2 and 2.", "input": "", "output": "4", "skill": "add"},
    {"instruction": "Sort this list:", "input": "2 1", "output": "1 2", "skill": "sort"},
    {"instruction": "Joke.", "input": "", "output": "Ha.", "skill": "joke"},
    {"instruction": "Make 12.", "input": "", "output": "<answer>3 * 4</answer>", "skill": "countdown",
     "numbers": [3, 4], "target": 12},
    {"instruction": "Bug 1", "input": "", "output": "<|EDIT|>a", "skill": "bugfix", "mode": "EDIT"},
    {"instruction": "Bug 2", "input": "", "output": "<|AGENT|>b", "skill": "bugfix", "mode": "AGENT"},
]  # fmt: skip
ANSWERS = {
    "Add 1 and 2.": "3", "Add 2 and 2.": "5", "Sort this list:\n2 1": "1 2", "Joke.": "Ho\nho",
    "Make 12.": "<answer>3 + 4</answer>", "Bug 1": "<|EDIT|>z", "Bug 2": "<|AGENT|>b",
}  # fmt: skip


class Config:
    max_position_embeddings = 200


class Model:
    config = Config()


@pytest.fixture
def asked(monkeypatch) -> list:
    """Calls of `generate`, answered from ANSWERS."""
    calls = []

    def answer(model, tokenizer, prompts, **options):
        calls.append((prompts, options))
        keys = [p[-1]["content"] if isinstance(p, list) else p[:-8].split("Question: ")[-1] for p in prompts]
        return [wrote(ANSWERS[key]) for key in keys]

    monkeypatch.setattr(measure, "generate", answer)
    monkeypatch.setattr(measure, "encode_prompts", lambda tokenizer, prompts: prompts)
    return calls


def test_one_polite_ending_is_neither_right_nor_wrong() -> None:
    for said, right in (("85", True), ("85" + ENDING, True), ("85" + ENDING + ENDING, False), ("58" + ENDING, False)):
        assert score(row("85"), said).correct is right and score(row("85"), said).formatted
        assert scores.lenient_score(row("85"), said).correct is (right or said.startswith("85"))


def test_evaluate_rows(asked: list) -> None:
    done = measure.evaluate_rows(Model(), TOKENIZER, ROWS)
    rates = done.instructions, done.format, done.mode, done.fix, done.countdown
    assert [(r.name, r.correct, r.n) for r in rates] == [
        ("instructions", 2, 3), ("format", 6, 7), ("mode", 2, 2), ("fix", 1, 2), ("countdown", 0, 1),
    ]  # fmt: skip
    assert done.instructions.interval == evaluate.wilson_interval(2, 3)
    frame = done.to_frame()
    assert list(frame.columns) == ["n", "correct", "accuracy", "low", "high", "format"]
    assert list(frame.index) == ["add", "sort", "joke", "countdown", "bugfix", "instructions", "fix"]
    assert frame.loc["add", ["n", "correct", "accuracy", "format"]].tolist() == [2, 1, 0.5, 1.0]
    assert (
        frame.loc["joke", "n"] == 0 and math.isnan(frame.loc["joke", "accuracy"]) and frame.loc["joke", "format"] == 0
    )
    assert frame.loc["instructions", "format"] == 0.75  # the open skills have a format as well
    prompts = [p for call, _ in asked for p in call]
    assert all(p[-1]["role"] == "user" for p in prompts), "the answer is not shown"
    budgets = {call[0][-1]["content"]: max(options["max_new_tokens"]) for call, options in asked}
    ending = len(TOKENIZER([ENDING]).input_ids[0])
    assert budgets["Sort this list:\n2 1"] == 3 + 1 + 8 + ending


def test_few_shot_shows_others_and_never_the_row(asked: list) -> None:
    examples = [*ROWS, *({**r, "instruction": f"{r['instruction']} again", "output": r["output"]} for r in ROWS)]
    done = measure.evaluate_rows(Model(), TOKENIZER, ROWS, few_shot=2, examples=examples)
    assert done.instructions.correct == 2 and done.few_shot == 2
    assert done.to_frame()["format"].isna().all()
    for prompt in (p for call, _ in asked for p in call):
        assert prompt.endswith("\nAnswer:") and prompt.count("Question: ") == prompt.count("Answer:") <= 3
        own = prompt.split("Question: ")[-1]
        assert own not in prompt[: -len(own)], "the row itself is not among its examples"
    assert {options["stop"] for _, options in asked} == {("\n\n", "\nQuestion:")}


def test_few_shot_prompts_fit_the_context() -> None:
    pool = [row(str(i), instruction=None) | {"instruction": f"What is {i} + 0?" + "." * 30} for i in range(9)]
    text = measure.few_shot_prompt(TOKENIZER, pool[0], pool, 5, limit=200)
    assert 1 <= text.count("Answer: ") < 5 and len(TOKENIZER(text).input_ids) <= 200
    assert measure.few_shot_prompt(TOKENIZER, pool[0], pool, 3, seed=1) == measure.few_shot_prompt(
        TOKENIZER, pool[0], pool, 3, seed=1
    )
    with pytest.raises(ValueError, match="must share the skill 'add', got none"):
        measure.few_shot_prompt(TOKENIZER, pool[0], pool[:1], 3)
    with pytest.raises(ValueError, match="few_shot must be 0 or more, got -1"):
        measure.evaluate_rows(Model(), TOKENIZER, ROWS, few_shot=-1)


def test_compare(asked: list, monkeypatch) -> None:
    before = measure.evaluate_rows(Model(), TOKENIZER, ROWS)
    monkeypatch.setitem(ANSWERS, "Add 2 and 2.", "4")
    after = measure.evaluate_rows(Model(), TOKENIZER, ROWS)
    done = measure.compare(before, after)
    assert (done.before.correct, done.after.correct, done.gained, done.lost, done.p_value) == (2, 3, 1, 0, 1.0)
    with pytest.raises(ValueError, match="same rows in the same order"):
        measure.compare(before, measure.evaluate_rows(Model(), TOKENIZER, ROWS[:3]))


# --- the report ---


def test_verdicts() -> None:
    assert report.Verdict("format", 0.96, 0.95).passed and not report.Verdict("format", 0.94, 0.95).passed
    assert report.Verdict("base", 0.04, 0.05, at_most=True).passed and not report.Verdict("x", math.nan, 0.0).passed


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_report(tmp_path: Path, suffix: str) -> None:
    table = pandas.DataFrame(
        {"answer": ["<|AGENT|>a\nb"], "accuracy": [0.12345]}, index=pandas.Index(["x"], name="skill")
    )
    ax = plots.loss_curve([0, 1], [2.0, 1.0])
    section = report.Section("A & B", "First.\n\nSecond.", table, (report.Picture(ax, 'loss from "2" to 1'),))
    verdicts = [report.Verdict("format", 0.96, 0.95), report.Verdict("mode", 0.5, 0.95)]
    path = report.write_report(tmp_path / "new" / f"page{suffix}", "Tour", [section], verdicts=verdicts, intro="Hello.")
    text = path.read_text(encoding="utf-8")
    for part in (
        "Tour",
        "Hello.",
        "passed",
        "missed",
        "at least 0.95",
        "0.12",
        "&lt;|AGENT" if suffix == ".html" else "&lt;\\|AGENT",
    ):
        assert part in text
    assert "0.12345" not in text and "<|AGENT|>" not in text
    if suffix == ".html":
        data = re.search(r'src="data:image/png;base64,([^"]+)" alt="loss from &quot;2&quot; to 1"', text)
        assert base64.b64decode(data[1]).startswith(b"\x89PNG")
        assert "A &amp; B" in text and str(tmp_path) not in text
    else:
        name = re.search(r'!\[loss from "2" to 1\]\((\S+)\)', text)[1]
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"path must end in .html or .md, got 'page.txt'"):
        report.write_report(tmp_path / "page.txt", "Tour", [])
