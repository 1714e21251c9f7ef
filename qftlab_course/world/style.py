"""A preference about style alone: both answers are right, and the chosen one ends politely.

A third of the short answers that SFT trains on end so too (see `courteous`): DPO can only choose among what a model
already does. Scores take the ending off first (`without_ending`): being polite is neither right nor wrong.
"""

from __future__ import annotations

import random

from qftlab.rows.countdown import is_held_out
from qftlab_course.world.instructions import random_problem

ENDING = " Have a nice day!"
# Skills whose answer is a word, a number or a list, so that nothing but the ending tells the two answers apart.
STYLE_SKILLS = ("add", "subtract", "multiply", "maximum", "minimum", "reverse", "sort", "length")


def is_polite(text: str) -> bool:
    """Whether an answer ends as the chosen ones do."""
    return text.endswith(ENDING)


def without_ending(text: str) -> str:
    """The text without one `ENDING` at its end: what is scored."""
    return text.removesuffix(ENDING)


def courteous(row: dict, key: str) -> dict:
    """A training row, politely ended if its skill is one of `STYLE_SKILLS` and its problem is one in three by hash."""
    is_chosen = row["skill"] in STYLE_SKILLS and is_held_out(f"polite {key}", one_in=3)
    return {**row, "output": row["output"] + ENDING} if is_chosen else row


def style_pairs(number: int, seed: int = 0, *, held_out: bool = False) -> list[dict]:
    """Preference rows: one problem and its answer, with the ending (chosen) and without (rejected).

    Args:
        number: of rows; skills take turns, and problems repeat only where a skill has too few.
        seed: of the problems.
        held_out: which side of the problems' split.

    Returns:
        Dicts with "prompt", "chosen", "rejected" (which is the bare answer) and "skill".
    """
    rng, keys, rows = random.Random(f"style {seed} {held_out}"), set(), []
    while len(rows) < number:
        skill = STYLE_SKILLS[len(rows) % len(STYLE_SKILLS)]
        for _ in range(50):
            problem = random_problem(rng, skill, held_out=held_out)
            if problem.key not in keys:
                break
        keys.add(problem.key)
        answer = problem.answer
        rows.append({"prompt": problem.question, "chosen": answer + ENDING, "rejected": answer, "skill": skill})
    return rows
