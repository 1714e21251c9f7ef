"""Rewards that a program can check: Countdown, parsed and never evaluated; a format, an exact answer, a first token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub, truediv

MAX_CHARACTERS = 512
OPEN, CLOSE = "<answer>", "</answer>"
OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv}
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
_CHARACTERS = frozenset("0123456789+-*/() \t\r\n")
# No leading zero: "007" falls apart into three numbers, which is no expression.
_TOKEN = re.compile(r"0|[1-9][0-9]*|[-+*/()]")


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its exact value (None where it divides by zero) and its numbers in reading order."""

    value: Fraction | None
    numbers: tuple[int, ...]


def extract_answer(text: str) -> str | None:
    """What stands between `<answer>` and `</answer>`; None unless there is exactly one of each, in this order."""
    start, end = text.find(OPEN), text.find(CLOSE)
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or end < start:
        return None
    return text[start + len(OPEN) : end]


def parse_expression(text: str, signed: bool = False) -> Expression | None:
    """Reads numbers, binary `+ - * /` and parentheses in exact fractions, with the usual precedence.

    No signs (`-3`) unless asked for, no powers (`2**3`), no floor division (`7//2`), no names, no digits outside ASCII.
    Iterative (two stacks, Dijkstra 1961), so nested parentheses cannot exhaust Python's own stack.

    Args:
        text: the expression; blanks between tokens are free.
        signed: whether a number may have a minus of its own, where an operand is wanted.

    Returns:
        The value and the numbers, or None if `text` is no such expression or is longer than 512 characters.
    """
    if len(text) > MAX_CHARACTERS or not _CHARACTERS.issuperset(text):
        return None
    values: list[Fraction | None] = []
    operators: list[str] = []
    numbers: list[int] = []
    wants_operand, sign = True, 1
    for token in _TOKEN.findall(text):
        if token == "-" and signed and wants_operand and sign == 1:
            sign = -1
        elif (token == "(" or token.isdigit()) != wants_operand or (sign < 0 and not token.isdigit()):
            return None
        elif token.isdigit():
            numbers.append(sign * int(token))
            values.append(Fraction(numbers[-1]))
            sign, wants_operand = 1, False
        elif token == "(":
            operators.append(token)
        else:
            _reduce(values, operators, _RANK.get(token, 0))
            if token != ")":
                operators.append(token)
                wants_operand = True
            elif not operators:
                return None
            else:
                operators.pop()
    if wants_operand or "(" in operators:
        return None
    _reduce(values, operators, 0)
    return Expression(values[0], tuple(numbers))


def _reduce(values: list[Fraction | None], operators: list[str], rank: int) -> None:
    """Applies the waiting operators that bind at least as tightly as `rank`, back to the last parenthesis."""
    while operators and operators[-1] != "(" and _RANK[operators[-1]] >= rank:
        operator, b, a = operators.pop(), values.pop(), values.pop()
        values.append(combine(a, operator, b))


def combine(a: Fraction | None, operator: str, b: Fraction | None) -> Fraction | None:
    """`a operator b` in exact fractions; None for a division by zero, and for what is made of one."""
    if a is None or b is None or (operator == "/" and b == 0):
        return None
    return OPERATORS[operator](a, b)


def countdown_reward(text: str, numbers: Sequence[int], target: int) -> float:
    """The Countdown reward of one completion, the whole of which is read: for models that answer at once.

    A model that thinks first, or says more than 512 characters, earns 0 here for right answers as well: of 800 recorded
    rollouts of a Qwen that thinks this agrees with 124 of the scores, `reasoned_reward` with 778.

    Args:
        text: the completion without its stop token.
        numbers: the numbers to use, each exactly once; with a negative one among them, numbers may have a minus.
        target: the value to reach.

    Returns:
        1.0 for exactly one `<answer>` whose expression uses each number once and equals the target in exact fractions;
        0.1 for exactly one `<answer>` that parses but is wrong (a division by zero is wrong); 0.0 otherwise, and 0.0
        unread past 512 characters.
    """
    if len(text) > MAX_CHARACTERS:
        return 0.0
    answer = extract_answer(text)
    expression = None if answer is None else parse_expression(answer, signed=min(numbers, default=0) < 0)
    if expression is None:
        return 0.0
    is_right = expression.value == target and sorted(expression.numbers) == sorted(numbers)
    return 1.0 if is_right else 0.1


def reasoned_reward(text: str, numbers: Sequence[int], target: int) -> float:
    """The Countdown reward of what follows the last `</think>`: for models that think before they answer.

    Thinking may be of any length and hold answers of its own; behind it all rules of `countdown_reward` hold, 512
    characters and one `<answer>` among them, so that rambling on after the answer is not paid. A text without
    `</think>` is read whole.
    """
    return countdown_reward(text.rpartition("</think>")[2], numbers, target)


def answer_reward(text: str) -> float:
    """1.0 if the text holds exactly one `<answer>…</answer>` with something in it, else 0.0."""
    return float(bool((extract_answer(text) or "").strip()))


def exact_reward(text: str, wanted: str) -> float:
    """1.0 if the text is the wanted one, blanks at both ends aside, else 0.0.

    Word for word: capitals, a full stop, a full-width form (５ for 5) or a blank in between make another text. What
    `evaluate` calls exact forgives these (`qftlab.evaluate.answers.normalised_match`).
    """
    return float(text.strip() == wanted.strip())


def first_token_reward(completion_ids: Sequence[int], wanted: int, others: Sequence[int] = ()) -> float:
    """1.0 if a completion begins with the wanted token, such as `<|AGENT|>`, else 0.0.

    Ids are compared, not text: decoding with `skip_special_tokens` drops the token, and plain text can imitate it.

    Args:
        completion_ids: the sampled ids.
        wanted: the id that must come first.
        others: ids that must not come after it, such as the other mode's.
    """
    is_right = len(completion_ids) > 0 and completion_ids[0] == wanted
    return float(is_right and not {wanted, *others} & set(completion_ids[1:]))


def is_finite(value: object) -> bool:
    """Whether a reward is a number that can be averaged: a float, a tensor of one, not nan, not None, not 10**400."""
    try:
        return math.isfinite(value)
    except Exception:  # a tensor of two has one of its own
        return False
