"""What makes a row of a teacher's answers: `whole`, it writes all; `reasoned`, it reasons and we write the call."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.outputs import FORMAT, validate_cases
from qftlab_course.agent_edit.problems import kind_of
from qftlab_course.agent_edit.prompts import ASKED, MEND, PLANT, REASON, SYSTEM, TOOLS, assembled
from qftlab_course.agent_edit.sandbox import READY, SandboxError, best_level, levels, run_tests
from qftlab_course.agent_edit.teacher import Asked, Problem, Recipe, Task
from qftlab_course.agent_edit.validate import Case

log = logging.getLogger(__name__)
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
RAISED = re.compile(r"(?!AssertionError)[\w.]*(?:Error|Exception|Exit|Interrupt|Iteration)\b")
DECIDED = re.compile(rf"\s*<think>(.+?)</think>\s*({re.escape(AGENT)}|{re.escape(EDIT)})\s*", re.DOTALL)


class _Miss(ValueError):
    """Why this try made no row, and what the teacher said, where that is not in the row."""


@dataclass(frozen=True)
class Shown:
    """A buggy program as a user shows it: the question, the program, and its mended form where it is known."""

    instruction: str
    program: str
    fixed: str


def code_in(text: str) -> str:
    """The first code block of an answer, or all of it where there is none."""
    found = CODE.search(text)
    return (found[1] if found else text).strip("\n")


def own_error(problem: Problem, program: str, level: str) -> str | None:
    """The error that a program raises on its tests ("TypeError: …"); "" for a wrong result, None if it is right."""
    try:
        result = run_tests(program, problem.tests, func_name=problem.func_name, level=level)
    except ValueError as error:
        log.warning("problem %s: its tests cannot be run: %s", problem.id, error)
        raise _Miss("tests-cannot-run") from error
    if result.passed:
        return None
    last = (result.error.strip().splitlines() or [""])[-1]
    return last if RAISED.match(last) else ""


def check_sandbox(problems: Sequence[Problem], level: str) -> None:
    """Refuses, before anything is asked and paid for, problems whose programs no level could run.

    Raises:
        SandboxError: naming each level and why it cannot run.
    """
    if level == "auto":
        best_level()
        if any(not isinstance(p.tests, str) for p in problems) and levels()["bwrap"] != READY:
            raise SandboxError("programs that read standard input need the level bwrap, which cannot run here: "
                               f"{levels()['bwrap']}; --sandbox process runs them with limits only")  # fmt: skip


def can_show(level: str) -> Callable[[Problem, str], bool]:
    """Whether a problem can show a mode: as its report says, or EDIT where its program raises an error."""
    errors: dict[str, str | None] = {}

    def fits(problem: Problem, mode: str) -> bool:
        if problem.mode or not problem.program:
            return problem.mode in ("", mode)
        if problem.id not in errors:
            with suppress(_Miss):  # its tests cannot be run, which was said: it fits nothing
                errors[problem.id] = None
                errors[problem.id] = own_error(problem, problem.program, level)
        return errors[problem.id] is not None and (mode == AGENT or bool(errors[problem.id]))

    return fits


def shown(ask: Asked, task: Task, language: str, level: str) -> Shown:
    """The program of a task, with a bug of the problem's own or one that the teacher plants, and how a user asks of it.

    Raises:
        ValueError: if a planted bug does not do what was asked for.
    """
    problem, program = task.problem, task.problem.program
    if problem.report:
        return Shown(f"{program}\n{problem.report}", program, problem.fixed)
    if not program:
        begin = f"\n\nBegin with this code:\n{problem.starter}" if problem.starter else ""
        program = code_in(ask([{"role": "user", "content": f"{PLANT[task.mode]}\n\n{problem.text}{begin}"}]))
    error = own_error(problem, program, level)
    is_planted_wrong = not problem.program and task.mode == AGENT and error
    if error is None or (task.mode == EDIT and not error) or is_planted_wrong:
        raise _Miss("bug-not-as-asked", program)
    question = task.choice(ASKED[language][task.mode])
    return Shown(question.format(error=error, code=program), program, problem.fixed)


def whole(language: str = "en", level: str = "auto") -> Recipe:
    """The teacher writes everything, as in the original; a fix counts only if the problem's tests pass."""

    def recipe(ask: Asked, task: Task) -> dict:
        def write(show: Shown) -> str:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": show.instruction}]
            return ask(messages, TOOLS)

        return _row(ask, task, language, level, write)

    return recipe


def reasoned(language: str = "en", level: str = "auto") -> Recipe:
    """The teacher only reasons; its thinking is kept if it comes to the mode wanted, and the program writes the call.

    Where the problem has no mended program the teacher writes one; either way it counts only if the tests pass.
    """

    def recipe(ask: Asked, task: Task) -> dict:
        def write(show: Shown) -> str:
            said = ask([{"role": "system", "content": REASON}, {"role": "user", "content": show.instruction}])
            decided = DECIDED.fullmatch(said)
            if not decided:
                raise _Miss("no-decision", said)
            if decided[2] != task.mode:
                raise _Miss("wrong-mode", said)
            fixed = show.fixed
            if task.mode == EDIT and not fixed:
                asked = f"{task.problem.text}\n\n{show.instruction}"
                fixed = code_in(ask([{"role": "system", "content": MEND}, {"role": "user", "content": asked}]))
            return assembled(task.mode, decided[1], show.program, fixed)

        return _row(ask, task, language, level, write)

    return recipe


def _row(ask: Asked, task: Task, language: str, level: str, write: Callable[[Shown], str]) -> dict:
    """A row, judged by itself: form, mode, code, and whether a fix passes the tests."""
    kind = kind_of(task.problem.text)
    row = {"instruction": "", "output": "", "buggy_code": "", "kind": kind, "issues": []}
    try:
        show = shown(ask, task, language, level)
        row |= {"instruction": show.instruction, "buggy_code": show.program}
        row["output"] = write(show)
        verdict = validate_cases([Case(row["instruction"], row["output"], task.mode)], prompts=[SYSTEM]).verdicts[0]
        if not verdict.ok:
            raise _Miss(verdict.reason)
        code = verdict.call["arguments"][FORMAT[task.mode][1][-1]]
        if task.mode == EDIT and task.problem.tests and own_error(task.problem, code, level) is not None:
            raise _Miss("fix-fails-tests")
    except _Miss as miss:
        row["issues"], row["output"] = [miss.args[0]], row["output"] or "".join(miss.args[1:])
    return row


RECIPES: dict[str, Callable[..., Recipe]] = {"whole": whole, "reasoned": reasoned}
