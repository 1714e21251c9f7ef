"""A teacher who knows LiveCodeBench's examples by heart, and whose mistakes are planted: what a run must find is known.

Its programs look the answers up. The bug that it plants is a wrong name (EDIT) or a wrong answer (AGENT). What is wrong
with its row is drawn from the problem and the mode alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.expert import _written
from qftlab_course.agent_edit.prompts import PLANT
from qftlab_course.agent_edit.teacher import Problem

# Reasons that a row of each mode can get, and a share of rows without any.
PLANTED = {
    EDIT: ["two-tokens", "wrong-arguments", "bad-json", "token-place", "wrong-tool", "no-token", "no-think",
           "wrong-mode", "trivial-fix", "fix-fails-tests", "bug-not-as-asked", "fix-of-other-code",
           "code-does-not-parse"],
    AGENT: ["two-tokens", "wrong-arguments", "bad-json", "token-place", "wrong-tool", "no-token", "no-think",
            "wrong-mode", "bug-not-as-asked", "code-does-not-parse"],
}  # fmt: skip
GOOD = 3  # of four rows


def verdict_of(problem_id: str, mode: str) -> str:
    """The reason that is planted for a problem in a mode, or ""."""
    draw = int(hashlib.sha256(f"{problem_id} {mode}".encode()).hexdigest(), 16)
    return "" if draw % 4 < GOOD else PLANTED[mode][draw // 4 % len(PLANTED[mode])]


def program(problem: Problem, bug: str = "") -> str:
    """A program that passes the problem's examples, or one with a "crash" or a "wrong" answer in it."""
    table = "tabel" if bug == "crash" else "table"
    if problem.func_name:
        asked = {
            repr([json.loads(line) for line in t["input"].splitlines()]): json.loads(t["output"]) for t in problem.tests
        }
        answer = f"{table}[repr(list(given))]"
        answer = f"['wrong', {answer}]" if bug == "wrong" else answer
        return (f"# problem {problem.id}\ntable = {asked!r}\n\n\nclass Solution:\n"
                f"    def {problem.func_name}(self, *given):\n        return {answer}")  # fmt: skip
    asked = {t["input"]: t["output"] for t in problem.tests}
    answer = f"{table}[sys.stdin.read()]"
    answer = f"'wrong ' + {answer}" if bug == "wrong" else answer
    return f"# problem {problem.id}\nimport sys\n\ntable = {asked!r}\nprint({answer})"


class PlantedTeacher:
    """Answers what the recipe `whole` asks about some problems; `answer` is for `flaky.Flaky`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = {problem.id: problem for problem in problems}
        self.texts = {problem.text: problem for problem in problems}

    def answer(self, path: str, body: Mapping) -> dict:
        """The answer of the protocol."""
        asked = body["messages"][-1]["content"]
        mode = next((mode for mode, words in PLANT.items() if asked.startswith(words)), None)
        text = self.planted(asked.removeprefix(PLANT[mode]), mode) if mode else self.said(asked)
        usage = {"prompt_tokens": len(asked) // 4, "completion_tokens": len(text) // 4}
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": usage}  # fmt: skip

    def planted(self, asked: str, mode: str) -> str:
        """A program with the bug that was asked for; or without one, where that is what is planted."""
        text = asked.strip().partition("\n\nBegin with this code:")[0]
        problem = next(p for t, p in self.texts.items() if t.strip() == text.strip())
        is_right = verdict_of(problem.id, mode) == "bug-not-as-asked"
        return (
            f"Here it is.\n```python\n{program(problem, '' if is_right else 'crash' if mode == EDIT else 'wrong')}\n```"
        )

    def said(self, asked: str) -> str:
        """An answer in the form of the two modes, with what is planted."""
        problem = self.problems[re.search(r"# problem (\S+)", asked)[1]]
        mode = EDIT if "tabel" in asked else AGENT
        reason, shown = verdict_of(problem.id, mode), program(problem, "crash" if mode == EDIT else "wrong")
        fixed = program(problem)
        if reason == "wrong-mode":
            mode = AGENT if mode == EDIT else EDIT
        if reason == "trivial-fix":
            fixed = shown + "\n# mended"
        if reason == "fix-fails-tests":
            fixed = program(problem, "wrong")
        if reason == "fix-of-other-code":
            shown = "print('another program')"
        if reason == "code-does-not-parse":
            shown, fixed = (shown + "\n)", fixed) if mode == AGENT else (shown, fixed + "\n)")
        return _written(reason, mode, "The words of the user decide.", shown, fixed)
