"""The generated data is right, balanced, held out where it says so, and rebuilt byte for byte."""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from countdown_solver import solve

from qftlab.rows import countdown
from qftlab_course.world import bugfix, bundle, corpus, facts, instructions
from qftlab_course.world.style import without_ending

DATA = Path(__file__).resolve().parents[2] / "data"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def value(expression: str) -> Fraction:
    """Exact value through Python's own parser: shares no code with the generator."""

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        a, b = walk(node.left), walk(node.right)
        if isinstance(node.op, ast.Div):
            return a / b
        return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(node.op)]

    return walk(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_countdown_solutions_use_each_number_once_and_reach_the_target(num_numbers):
    rng = random.Random(num_numbers)
    for _ in range(300):
        problem = countdown.random_problem(rng, num_numbers=num_numbers)
        assert value(problem.solution) == problem.target
        assert sorted(map(int, re.findall(r"\d+", problem.solution))) == sorted(problem.numbers)


def test_countdown_solver_finds_what_exists_and_only_that():
    assert value(solve([3, 7, 8, 8], 24)) == 24
    assert value(solve([3, 3, 8, 8], 24)) == 24  # the classic that needs fractions: 8 / (3 - 8 / 3)
    assert solve([1, 1, 1], 50) is None
    rng = random.Random(1)
    for _ in range(50):
        problem = countdown.random_problem(rng)
        assert value(solve(list(problem.numbers), problem.target)) == problem.target


def test_problems_refuse_bad_arguments():
    with pytest.raises(ValueError, match="num_numbers must be at least 2, got 1"):
        countdown.random_problem(random.Random(0), num_numbers=1)
    with pytest.raises(ValueError, match="skill must be one of add"):
        instructions.random_problem(random.Random(0), "divide")


def expected(row: dict) -> str | None:
    """What the question asks for, read from its text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", row["instruction"])]
    skill = row["skill"]
    if skill in ("add", "subtract", "multiply"):
        if row["instruction"].startswith("Subtract"):
            numbers.reverse()
        return str({"add": sum, "subtract": lambda x: x[0] - x[1], "multiply": lambda x: x[0] * x[1]}[skill](numbers))
    if skill in ("reverse", "sort"):
        return " ".join(map(str, numbers[::-1] if skill == "reverse" else sorted(numbers)))
    if skill in ("maximum", "minimum"):
        return str(max(numbers) if skill == "maximum" else min(numbers))
    word = re.findall(r"[a-z]+", row["instruction"])[-1]
    return {"spell": "-".join(word), "length": str(len(word))}.get(skill)


@pytest.mark.parametrize("name", ["train", "development", "heldout"])
def test_instruction_answers_are_right(name):
    checked = 0
    for row in rows(f"instructions/{name}.jsonl"):
        want = expected(row)
        if want is not None:
            assert without_ending(row["output"]) == want, row
            checked += 1
        if row["skill"] == "sum_to_n":
            n = int(re.search(r"first (\d+) natural", row["instruction"])[1])
            assert row["output"].endswith(f"The answer is {sum(range(n + 1))}.")
    assert checked > 200


def test_what_is_held_out_is_never_trained_on():
    for folder, train in (("instructions", "train"), ("countdown", "demonstrations"), ("bugfix", "train")):
        seen = {r["instruction"] for r in rows(f"{folder}/{train}.jsonl") if r["skill"] != "joke"}
        tuned, held = ({r["instruction"] for r in rows(f"{folder}/{file}.jsonl") if r["skill"] != "joke"}
                       for file in ("development", "heldout"))  # fmt: skip
        assert not seen & held and not seen & tuned and not tuned & held and len(held) >= 300
    trained = {r["instruction"] for r in rows("instructions/train.jsonl")}
    assert not any("Shanghai Jiao Tong" in q or "first 100 natural" in q for q in trained)


def test_the_corpus_holds_no_held_out_calculation():
    rng = random.Random(3)
    held = set()
    for skill in ("add", "subtract", "reverse", "sort", "maximum", "minimum", "sum_to_n"):
        held |= {instructions.random_problem(rng, skill, held_out=True).plain for _ in range(300)}
    text = "\n".join(d.text for step in range(40) for d in corpus.documents(0, step, 128))
    lines = {line[: line.rindex(mark) + 1] for line in text.splitlines() for mark in "=:" if mark in line}
    assert not held & lines
    assert len(lines) > 2_000


def test_documents_are_a_pure_function_of_seed_and_step():
    first, again, other = corpus.documents(0, 7, 50), corpus.documents(0, 7, 50), corpus.documents(0, 8, 50)
    assert [d.text for d in first] == [d.text for d in again] != [d.text for d in other]
    for document in first:
        assert document.text.endswith(corpus.END)
        assert all(0 <= a < b <= len(document.text) for a, b in document.trained) and document.trained


def test_bugs_are_real_and_the_named_line_repairs_them():
    rng = random.Random(2)
    for _ in range(400):
        bug = bugfix.random_bug(rng)
        if bug.mode == "EDIT":
            number, line = re.fullmatch(r"line (\d+): (.*)", bug.answer).groups()
            lines = bug.program.splitlines()
            old = lines[int(number) - 1]
            lines[int(number) - 1] = old[: len(old) - len(old.lstrip())] + line
            assert "\n".join(lines) == bug.fixed
        if bug.kind == "crash":
            error = re.search(r"^(\w+Error)", bug.report, re.M)[1]
            with pytest.raises(__builtins__[error] if isinstance(__builtins__, dict) else getattr(__builtins__, error)):
                namespace: dict = {}
                exec(bug.program, namespace)  # a program of our own generator
                name = bug.program.split("(")[0].removeprefix("def ")
                template = next(t for t in bugfix.TEMPLATES if name in t["names"].split())
                for call in template["calls"]:
                    eval(f"{name}({call})", namespace)


def test_modes_are_balanced_and_key_words_do_not_give_them_away():
    held = rows("bugfix/heldout.jsonl")
    modes = Counter(r["mode"] for r in held)
    assert abs(modes["AGENT"] - modes["EDIT"]) < 0.15 * len(held)
    for word in ("Traceback", "rror", "edit", "expected", "AssertionError"):
        guesses = [("EDIT" if word in r["instruction"] else "AGENT") == r["mode"] for r in held]
        accuracy = sum(guesses) / len(guesses)
        assert max(accuracy, 1 - accuracy) < 0.85, f"{word!r} alone decides {accuracy:.0%}"


def test_bundled_files_are_rebuilt_byte_for_byte(tmp_path):
    for name in bundle.write_bundle(tmp_path):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run python -m qftlab data"


def test_facts_agree_with_themselves():
    assert len({u[0] for u in facts.UNIVERSITIES}) == len(facts.UNIVERSITIES)
    assert all(1000 < int(u[3]) < 2000 for u in facts.UNIVERSITIES)
    assert facts.university_text("Shanghai Jiao Tong University", "Shanghai", "China", "1896").endswith("19th century.")
    assert len({facts.joke(random.Random(i)) for i in range(400)}) > 200
