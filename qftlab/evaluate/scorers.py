"""Scorers: what a response is worth. Each takes a row and a response; `SCORERS` has those that have a name.

A scorer gives True or False, a finite number, or None where the row has nothing to score by. By the row's "output":

- exact: the answer is the reference after `normalise`, by script, Chinese too; contained: the reference stands in it,
  in whole words. What a model thinks counts for neither;
- exact_match, contains_answer: the rule of the Tinker project's evaluate_model.py, equal or contained after strip and
  lower, of the whole response.

By "numbers" and "target", 0, 0.1 or 1: countdown and reasoned (`qftlab.maths.verify`), countdown_course and tinyzero.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence

from qftlab.evaluate.answers import answer_of, contained, normalised_match
from qftlab.maths.verify import CLOSE, MAX_CHARACTERS, OPEN, countdown_reward, reasoned_reward

Scorer = Callable[[Mapping, str], bool | float | None]
ALLOWED = re.compile(r"[\d+\-*/().\s]+")
MOST_BITS = 1 << 16  # of a power: 9**9**9 would take minutes


def countdown_course(response: str, numbers: Sequence[int], target: int) -> float:
    """The Countdown score of the 2026 CS224R course: the last `<answer>` that closes on its line, by Python's rules.

    Its digits must be the numbers, each once, and its characters digits, blanks and `+-*/().`: powers (`**`), floor
    division and signs pass. It is parsed, never evaluated, so past 512 characters, or with a power of more than 65,536
    bits, it is wrong here.

    Returns:
        1.0 within 1e-5 of the target, 0.1 for another answer, 0.0 without one.
    """
    answer = None
    for line in response.split("\n"):
        at = 0
        while (start := line.find(OPEN, at)) >= 0 and (end := line.find(CLOSE, start)) >= 0:
            answer, at = line[start + len(OPEN) : end].strip(), end + len(CLOSE)
    if answer is None:
        return 0.0
    if len(answer) > MAX_CHARACTERS or not ALLOWED.fullmatch(answer):
        return 0.1
    try:
        is_right = sorted(map(int, re.findall(r"\d+", answer))) == sorted(numbers)
        is_right = is_right and abs(_value(ast.parse(answer, mode="eval").body) - target) < 1e-5
    except (SyntaxError, ValueError, TypeError, ArithmeticError, KeyError, RecursionError, MemoryError):
        return 0.1
    return 1.0 if is_right else 0.1


def tinyzero(response: str, numbers: Sequence[int], target: int) -> float:
    """TinyZero's Countdown score: `countdown_course` of the last line alone.

    TinyZero scores what stands behind "Assistant:" or `<|im_start|>assistant`, which end the prompt; a response is
    taken to stand there.
    """
    return countdown_course(response.rpartition("\n")[2], numbers, target)


def _value(node: ast.expr) -> complex:
    """What Python makes of a tree of numbers and operators.

    Raises:
        KeyError, ValueError, ArithmeticError, TypeError: for any other tree, and where Python raises.
    """
    if isinstance(node, ast.UnaryOp):
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        raise ValueError(f"must be a number, got {type(node).__name__}")
    return node.value


def _power(base: complex, exponent: complex) -> complex:
    if type(base) is type(exponent) is int and abs(exponent) * base.bit_length() > MOST_BITS:
        raise OverflowError(f"a power must have {MOST_BITS} bits at most")
    return base**exponent


OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: _power, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def by_reference(agrees: Callable[[str, str], bool]) -> Scorer:
    """A scorer of `agrees(response, reference)`, for rows that have an output."""
    return lambda row, response: agrees(response, row["output"]) if row.get("output") else None


def by_problem(reward: Callable[[str, Sequence[int], int], float]) -> Scorer:
    """A scorer of `reward(response, numbers, target)`, for rows that have these."""
    return lambda row, said: reward(said, row["numbers"], row["target"]) if {"numbers", "target"} <= {*row} else None


SCORERS: dict[str, Scorer] = {
    "exact": by_reference(lambda said, wanted: normalised_match(answer_of(said), wanted)),
    "contained": by_reference(lambda said, wanted: contained(wanted, answer_of(said))),
    "exact_match": by_reference(lambda said, wanted: said.strip().lower() == wanted.strip().lower()),
    "contains_answer": by_reference(lambda said, wanted: wanted.strip().lower() in said.strip().lower()),
    "countdown": by_problem(countdown_reward),
    "reasoned": by_problem(reasoned_reward),
    "countdown_course": by_problem(countdown_course),
    "tinyzero": by_problem(tinyzero),
}
