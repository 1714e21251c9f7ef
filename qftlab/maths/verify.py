"""Rewards that a program can check: Countdown, parsed and never evaluated; a format, an exact answer, a first token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 512
OPEN, CLOSE = "<answer>", "</answer>"
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
# ASCII digits only, and no leading zero: "007" falls apart into three numbers, which is no expression.
_TOKEN = re.compile(r"(0|[1-9][0-9]*|[-+*/()])[ \t\r\n]*")


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


def parse_expression(text: str) -> Expression | None:
    """Reads numbers, binary `+ - * /` and parentheses in exact fractions, with the usual precedence.

    No signs (`-3`), no powers (`2**3`), no floor division (`7//2`), no names, no digits outside ASCII. Iterative
    (two stacks, Dijkstra 1961), so nested parentheses cannot exhaust Python's own stack.

    Args:
        text: the expression; blanks between tokens are free.

    Returns:
        The value and the numbers, or None if `text` is no such expression or is longer than 512 characters.
    """
    tokens = _tokens(text)
    if tokens is None:
        return None
    values: list[Fraction | None] = []
    operators: list[str] = []
    numbers: list[int] = []
    wants_operand = True
    for token in tokens:
        if token == "(" or token.isdigit():
            if not wants_operand:
                return None
            if token == "(":
                operators.append(token)
                continue
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            wants_operand = False
            continue
        if wants_operand:
            return None
        _reduce(values, operators, _RANK.get(token, 0))
        if token == ")":
            if not operators:
                return None
            operators.pop()
        else:
            operators.append(token)
            wants_operand = True
    if wants_operand or "(" in operators:
        return None
    _reduce(values, operators, 0)
    return Expression(values[0], tuple(numbers))


def _tokens(text: str) -> list[str] | None:
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.lstrip(" \t\r\n")
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match[1])
        at = match.end()
    return tokens


def _reduce(values: list[Fraction | None], operators: list[str], rank: int) -> None:
    """Applies the waiting operators that bind at least as tightly as `rank`, back to the last parenthesis."""
    while operators and operators[-1] != "(" and _RANK[operators[-1]] >= rank:
        operator, b, a = operators.pop(), values.pop(), values.pop()
        values.append(_apply(a, operator, b))


def _apply(a: Fraction | None, operator: str, b: Fraction | None) -> Fraction | None:
    if a is None or b is None or (operator == "/" and b == 0):
        return None
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    return a * b if operator == "*" else a / b


def countdown_reward(text: str, numbers: Sequence[int], target: int) -> float:
    """The Countdown reward of one completion.

    Args:
        text: the completion without its stop token.
        numbers: the numbers to use, each exactly once.
        target: the value to reach.

    Returns:
        1.0 for exactly one `<answer>` whose expression uses each number once and equals the target in exact fractions;
        0.1 for exactly one `<answer>` that parses but is wrong (a division by zero is wrong); 0.0 otherwise, and 0.0
        unread past 512 characters.
    """
    if len(text) > MAX_CHARACTERS:
        return 0.0
    answer = extract_answer(text)
    expression = None if answer is None else parse_expression(answer)
    if expression is None:
        return 0.0
    is_right = expression.value == target and sorted(expression.numbers) == sorted(numbers)
    return 1.0 if is_right else 0.1


def answer_reward(text: str) -> float:
    """1.0 if the text holds exactly one `<answer>…</answer>` with something in it, else 0.0."""
    return float(bool((extract_answer(text) or "").strip()))


def exact_reward(text: str, wanted: str) -> float:
    """1.0 if the text is the wanted one, blanks at both ends aside, else 0.0."""
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
