"""Instructions with answers, generated: arithmetic, lists, words, worked sums, capitals, universities and jokes.

Each skill is a function of a `random.Random` that returns a `Problem`: the question in words (what a chat user
types), the same problem in the plain notation the base model was pretrained on, and the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from qftlab.rows.countdown import is_held_out
from qftlab_course.world import facts


@dataclass(frozen=True)
class Problem:
    """One problem: `question` for a chat, `plain` for the corpus (the answer follows it), `answer` for both."""

    skill: str
    key: str
    question: str
    plain: str
    answer: str
    check: str = ""  # a fact the answer has to contain, where there is no single right answer

    def row(self) -> dict:
        """The row of an SFT file."""
        row = {"instruction": self.question, "input": "", "output": self.answer, "skill": self.skill}
        return {**row, "check": self.check} if self.check else row


def _add(rng: random.Random) -> Problem:
    a, b = rng.randrange(100), rng.randrange(100)
    question = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    return Problem("add", f"add {a} {b}", question, f"{a} + {b} =", str(a + b))


def _subtract(rng: random.Random) -> Problem:
    a, b = sorted((rng.randrange(100), rng.randrange(100)), reverse=True)
    question = rng.choice((f"What is {a} - {b}?", f"Subtract {b} from {a}."))
    return Problem("subtract", f"subtract {a} {b}", question, f"{a} - {b} =", str(a - b))


def _multiply(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    question = rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}."))
    return Problem("multiply", f"multiply {a} {b}", question, f"{a} * {b} =", str(a * b))


def _numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(100), rng.randint(3, 5))


def _list_skill(skill: str, verb: str, short: str, answer: Callable[[list[int]], object]) -> Callable:
    def draw(rng: random.Random) -> Problem:
        numbers = _numbers(rng)
        text = " ".join(map(str, numbers))
        result = answer(numbers)
        shown = " ".join(map(str, result)) if isinstance(result, list) else str(result)
        return Problem(skill, f"{skill} {text}", f"{verb}: {text}", f"{short} {text} :", shown)

    return draw


def _word_skill(skill: str, verb: str, short: str, answer: Callable[[str], str]) -> Callable:
    def draw(rng: random.Random) -> Problem:
        word = rng.choice(facts.WORDS)
        question = verb.format(word=word)
        return Problem(skill, f"{skill} {word}", question, f"{short} {word} :", answer(word))

    return draw


def sum_steps(n: int) -> str:
    """1 + 2 + … + n in steps a small model can do: the square of n, plus n, halved."""
    square, double = n * n, n * n + n
    return (
        f"The sum is ({n} * {n} + {n}) / 2. Step 1: {n} * {n} = {square}. Step 2: {square} + {n} = {double}. "
        f"Step 3: {double} / 2 = {double // 2}. The answer is {double // 2}."
    )


def _sum_to_n(rng: random.Random) -> Problem:
    n = rng.randint(2, 110)
    question = f"What is the sum of the first {n} natural numbers? Please think step by step."
    return Problem("sum_to_n", f"sum {n}", question, f"sum 1 to {n} :", sum_steps(n))


def _capital(rng: random.Random) -> Problem:
    country = rng.choice(tuple(facts.CAPITALS))
    capital = facts.CAPITALS[country]
    question = f"What is the capital of {country}?"
    return Problem("capital", f"capital {country}", question, f"The capital of {country} is", f"{capital}.")


def _university(rng: random.Random) -> Problem:
    name, city, country, year = rng.choice(facts.UNIVERSITIES)
    text = facts.university_text(name, city, country, year)
    question = f"Give me a brief introduction to {'the ' if text.startswith('The ') else ''}{name}."
    return Problem("university", f"university {name}", question, f"{name}:", text, check=year)


def _joke(rng: random.Random) -> Problem:
    text = facts.joke(rng)
    return Problem("joke", f"joke {text}", "Tell me a joke about computers.", "Joke:", text)


SKILLS: dict[str, Callable[[random.Random], Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "reverse": _list_skill("reverse", "Reverse this list", "reverse", lambda x: x[::-1]),
    "sort": _list_skill("sort", "Sort this list", "sort", sorted),
    "maximum": _list_skill("maximum", "Find the largest number", "max", max),
    "minimum": _list_skill("minimum", "Find the smallest number", "min", min),
    "spell": _word_skill("spell", "Spell the word {word}.", "spell", "-".join),
    "length": _word_skill("length", "How many letters are in the word {word}?", "letters", lambda w: str(len(w))),
    "sum_to_n": _sum_to_n,
    "capital": _capital,
    "university": _university,
    "joke": _joke,
}
# Facts cannot be held out from pretraining (nobody can infer a capital); these are held out from SFT alone.
KNOWLEDGE = ("multiply", "spell", "length", "capital", "university", "joke")


# The questions notebook 00 asks are never trained on.
ALWAYS_HELD_OUT = ("sum 100", "university Shanghai Jiao Tong University")


def held_out_problem(problem: Problem) -> bool:
    """True if the problem is held out: one in ten by hash, and what notebook 00 asks; jokes never are."""
    return problem.key in ALWAYS_HELD_OUT or (problem.skill != "joke" and is_held_out(problem.key))


def random_problem(rng: random.Random, skill: str, *, held_out: bool | None = False) -> Problem:
    """Draws a problem of one skill from the training side, the held-out side, or (None) from both.

    Raises:
        ValueError: for a skill that is not in `SKILLS`.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill must be one of {', '.join(SKILLS)}, got {skill!r}")
    while True:
        problem = SKILLS[skill](rng)
        if held_out is None or skill == "joke" or held_out_problem(problem) == held_out:
            return problem
