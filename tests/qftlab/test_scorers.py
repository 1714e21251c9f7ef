"""Scorers: by hand, against the courses' rules written plainly, on recorded solutions, and against hostile answers."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qftlab.evaluate.scorers import SCORERS, countdown_course, tinyzero

ROW = {"numbers": [3, 4], "target": 12}


def score(name: str, row: dict, response: str) -> bool | float | None:
    return SCORERS[name](row, response)


@pytest.mark.parametrize(("response", "wanted"), [  # exact, contained, exact_match, contains_answer
    ("Paris", (True, True, True, True)),
    (" PARIS\n", (True, True, True, True)),
    ("Paris.", (True, True, False, True)),
    ("It is Paris, I think", (False, True, False, True)),
    ("Parisian", (False, False, False, True)),
    ("<think>\nRome\n</think>\n\nParis", (True, True, False, True)),
    ("<think>\nParis?", (False, False, False, True)),
    ("", (False, False, False, False)),
])  # fmt: skip
def test_references(response: str, wanted: tuple) -> None:
    names = ("exact", "contained", "exact_match", "contains_answer")
    assert tuple(score(name, {"output": "Paris"}, response) for name in names) == wanted
    assert [score(name, row, response) for name in names for row in ({}, {"output": ""})] == [None] * 8


def test_references_in_chinese() -> None:
    row = {"output": "答案是１５"}
    assert score("exact", row, "答案 是15。") and score("contained", row, "所以答案是15，对吗？")
    assert not score("exact_match", row, "答案 是15。") and not score("contained", row, "答案是155")


@pytest.mark.parametrize(("response", "course", "tiny"), [
    ("<answer>3 * 4</answer>", 1.0, 1.0),
    ("so\n<answer> 4*3 </answer>", 1.0, 1.0),
    ("<answer>3 * 4</answer>\nDone.", 1.0, 0.0),  # TinyZero reads the last line alone
    ("<answer>3 * 4</answer> <answer>3 + 4</answer>", 0.1, 0.1),  # the last answer counts
    ("<answer>3 + 4</answer> <answer>3 * 4</answer>", 1.0, 1.0),
    ("<answer>3 * 4\n</answer>", 0.0, 0.0),  # an answer closes on its line
    ("<answer>3 * 4", 0.0, 0.0),
    ("3 * 4", 0.0, 0.0),
    ("", 0.0, 0.0),
    ("<answer></answer>", 0.1, 0.1),
    ("<answer>12</answer>", 0.1, 0.1),  # other digits
    ("<answer>3 * 4 = 12</answer>", 0.1, 0.1),  # a sign that is not allowed
    ("<answer>3 * 4 * 1</answer>", 0.1, 0.1),
    ("<answer>(4)(3)</answer>", 0.1, 0.1),  # a call
    ("<answer>-(-3) * +4</answer>", 1.0, 1.0),  # signs pass
    ("<answer>3 / (4 - 4)</answer>", 0.1, 0.1),
    ("<answer>３ * 4</answer>", 0.1, 0.1),  # a digit to `re`, none to Python
    ("<answer>03 * 4</answer>", 0.1, 0.1),
    ("<answer>3 * 4 # so</answer>", 0.1, 0.1),  # a comment
    (f"<answer>3 *{' ' * 600}4</answer>", 0.1, 0.1),  # too long to be read
])  # fmt: skip
def test_the_courses_countdown(response: str, course: float, tiny: float) -> None:
    assert (score("countdown_course", ROW, response), score("tinyzero", ROW, response)) == (course, tiny)


def test_powers_and_floor_division_pass_there_alone() -> None:
    for answer, numbers, target in (("3 ** 4", [3, 4], 81), ("9 // 2", [9, 2], 4), ("9 ** (1 / 2)", [9, 1, 2], 3)):
        row = {"numbers": numbers, "target": target}
        scores = {name: score(name, row, f"<answer>{answer}</answer>") for name in ("countdown_course", "countdown")}
        assert scores == {"countdown_course": 1.0, "countdown": 0.0}, answer
    near, row = "<answer>1000 / 999 * 1000 / 1001</answer>", {"numbers": [999, 1000, 1000, 1001], "target": 1}
    assert score("countdown_course", row, near) == 1.0 and score("countdown", row, near) == 0.1, "1e-6 away"
    assert countdown_course("<answer>100 / 99 * 100 / 101</answer>", [99, 100, 100, 101], 1) == 0.1, "1e-4 away"


def plainly(text: str, numbers: list[int], target: int) -> float:
    """The rule as the courses' programs have it, on answers of a few small numbers, which are safe to evaluate."""
    found = re.findall("<answer>(.*?)</answer>", text)
    if not found:
        return 0.0
    answer = found[-1].strip()
    if sorted(int(digits) for digits in re.findall(r"\d+", answer)) != sorted(numbers):
        return 0.1
    if not re.match(r"^[\d+\-*/().\s]+$", answer):
        return 0.1
    assert len(answer) < 60 and answer.count("**") < 3 and numbers == [2, 3, 4]
    try:
        return 1.0 if abs(eval(answer, {"__builtins__": {}}) - target) < 1e-5 else 0.1
    except Exception:
        return 0.1


SIGNS = ["+", "-", "*", "/", "**", "//"]
PIECES = st.sampled_from([*"2342343((()))) .=-", *SIGNS, "+", "*", "<answer>", "</answer>", "\n"])
PARTS = st.lists(st.sampled_from(["2", "3", "4", " * ", " + ", *SIGNS, "(", ")"]), max_size=11).map("".join)
SUMS = st.tuples(st.permutations("234"), st.sampled_from(SIGNS), st.sampled_from(SIGNS)).flatmap(
    lambda t: st.sampled_from(["{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})", "-{}{}{}{}{}"]).map(
        lambda form: form.format(t[0][0], t[1], t[0][1], t[2], t[0][2])
    )
)
ANSWERS = st.lists(st.one_of(PARTS, SUMS).map("<answer>{}</answer>".format), max_size=2).map(" ".join)
TEXTS = st.one_of(st.lists(PIECES, max_size=22).map("".join), ANSWERS, SUMS.map("<answer> {} </answer>".format))


@settings(max_examples=600)
@given(TEXTS, st.integers(-2, 70))
def test_the_courses_countdown_equals_its_rule_written_plainly(text: str, target: int) -> None:
    if text.count("**") < 3:
        assert countdown_course(text, [2, 3, 4], target) == plainly(text, [2, 3, 4], target)
        assert tinyzero(text, [2, 3, 4], target) == plainly(text.split("\n")[-1], [2, 3, 4], target)


@pytest.mark.parametrize("answer", [
    "9**9**9**9", "(9**9)**(9**9)", "-" * 100_000 + "9", "(" * 5_000 + "9" + ")" * 5_000, "9" * 5_000, "9" * 400,
    "-" * 400 + "9", "(" * 199 + "9" + ")" * 199, "__import__('os')", "9.9.9", "9**-9999", "0**-1", "(-9)**0.5", "...",
    "9\x00", "9**65536.0", "().__class__",
])  # fmt: skip
def test_hostile_answers_cost_nothing_and_run_nothing(answer: str) -> None:
    start = time.perf_counter()
    numbers = [int(n) for n in re.findall(r"\d+", answer) if len(n) < 400]
    assert countdown_course(f"<answer>{answer}</answer>", numbers, 7) == 0.1
    assert time.perf_counter() - start < 0.5


def test_a_thousand_open_tags_take_no_time() -> None:
    start = time.perf_counter()
    assert countdown_course("<answer>" * 100_000, [3], 3) == 0.0
    assert countdown_course("<answer>" * 50_000 + "3</answer>" * 50_000, [3], 3) == 0.1
    assert time.perf_counter() - start < 1


def test_recorded_solutions_are_right_by_every_rule(real_data: Path) -> None:
    """The 1,024 solutions that UFT's Countdown test set records, each behind its thinking."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(real_data / "countdown/uft_countdown_test.parquet").to_pylist()
    assert len(rows) == 1024
    for row in rows:
        problem = {"numbers": row["nums"], "target": row["target"]}
        for name in ("tinyzero", "countdown_course", "reasoned"):
            assert score(name, problem, row["answer"]) == 1.0, (name, row["answer"])
            assert score(name, problem | {"target": row["target"] + 1}, row["answer"]) == 0.1
        assert score("tinyzero", problem, row["answer"] + "\n") == 0.0


def test_problems_without_numbers_are_not_scored() -> None:
    for name in ("countdown", "reasoned", "countdown_course", "tinyzero"):
        assert score(name, {"output": "x"}, "<answer>3</answer>") is None
        assert score(name, {"target": 3}, "<answer>3</answer>") is None
        assert score(name, {"numbers": [3], "target": 3}, "<answer>3</answer>") == 1.0
