"""Scores one answer against its row: right or wrong by the skill's own rule, and whether the format was kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qftlab.decoding.engine import END_OF_TURN, Completion, known_id
from qftlab.evaluate.answers import answer_of, normalise, normalised_match
from qftlab.evaluate.split import prompt_text
from qftlab.maths.verify import countdown_reward, extract_answer
from qftlab_course.agent_edit.check import course_verdict
from qftlab_course.agent_edit.outputs import expected_mode, judge
from qftlab_course.world.style import without_ending

MODES = ("AGENT", "EDIT")
# No single right answer: without a fact to check ("check" in the row) these rows are not marked right or wrong.
OPEN_SKILLS = ("joke", "university")
NEEDED = {"countdown": ("numbers", "target"), "bugfix": ("mode",)}  # fields that a skill is scored by
_CONTROL = re.compile(r"<\|\w+\|>")
_FINAL = re.compile(r"the answer is\s*(-?\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class SkillScore:
    """How one completion did.

    `correct` is None where no single answer is right; for a bugfix row it is about the mode (first token), and
    `fix_correct` says whether the whole answer equals the reference (None for other skills). `formatted` says whether
    the format was kept; `answered` is the answer that was read, "" if none.
    """

    correct: bool | None
    formatted: bool
    answered: str
    fix_correct: bool | None = None


def skill_of(row: dict) -> str | None:
    """The skill that a row is scored by; None if it names none, or lacks what scoring that needs."""
    name = row.get("skill")
    is_known = isinstance(name, str) and all(row.get(field) is not None for field in NEEDED.get(name, ()))
    return name if is_known else None


def mode_of(token_ids: Sequence[int], tokenizer) -> str | None:
    """The mode ("AGENT" or "EDIT") whose token id comes first, else None; ids, because text can imitate a token."""
    modes = {known_id(tokenizer, f"<|{mode}|>"): mode for mode in MODES}
    return modes.get(token_ids[0]) if token_ids else None


def end_token_id(tokenizer) -> int | None:
    """The token that has to end a turn: `<|im_end|>`, or the end of sequence for a tokenizer without it."""
    end = known_id(tokenizer, END_OF_TURN)
    return tokenizer.eos_token_id if end is None else end


def spoken(completion: Completion, tokenizer) -> str:
    """What a completion says without its thinking, which some prompts open."""
    is_open = tokenizer.decode(completion.prompt_ids[-16:]).rstrip().endswith("<think>")
    return answer_of(f"{'<think>' if is_open else ''}{completion.text}")


def is_formatted(row: dict, completion: Completion, tokenizer) -> bool:
    """Whether a completion keeps its row's format.

    All must be ended by the turn's own end token. Countdown: exactly one `<answer>…</answer>`. Bugfix: a mode token,
    then text. Others: text without control tokens, on one line where the reference is on one.
    """
    if not completion.token_ids or completion.token_ids[-1] != end_token_id(tokenizer):
        return False
    text = completion.text.strip() if skill_of(row) else spoken(completion, tokenizer)
    if skill_of(row) == "countdown":
        return extract_answer(text) is not None
    if skill_of(row) == "bugfix":
        mode = mode_of(completion.token_ids, tokenizer)
        rest = text.removeprefix(f"<|{mode}|>").strip()
        return mode is not None and bool(rest) and not _CONTROL.search(rest)
    is_on_one_line = "\n" not in text or "\n" in row["output"].strip()
    return bool(text) and not _CONTROL.search(text) and is_on_one_line


def final_number(text: str) -> str | None:
    """The number behind the last "The answer is", or None."""
    found = _FINAL.findall(text)
    return found[-1] if found else None


def score_row(row: dict, completion: Completion, tokenizer) -> SkillScore:
    """Scores a chat completion against its row; a polite ending (`style.ENDING`) is taken off first.

    Args:
        row: a row with "output" and "skill" (without a skill nothing is marked right or wrong). Countdown rows have
            "numbers" and "target", bugfix rows "mode". Any row may have "check", a text the answer must contain; for
            "university" it must also name its subject, the reference's words before " is ".
        completion: what the model wrote.
        tokenizer: the model's tokenizer; the end of turn and the mode are read from token ids.
    """
    skill, text = skill_of(row), without_ending(completion.text.strip())
    formatted = is_formatted(row, completion, tokenizer)
    if skill is None:
        text = spoken(completion, tokenizer)
    correct = _correct(row, text, mode_of(completion.token_ids, tokenizer))
    if skill == "countdown":
        return SkillScore(correct, formatted, (extract_answer(text) or "").strip())
    if skill == "bugfix":
        return SkillScore(correct, formatted, text, fix_correct=text == row["output"].strip() and formatted)
    return SkillScore(correct, formatted, (final_number(text) or "") if skill == "sum_to_n" else text)


def skill_scorer(row: dict, response: str) -> bool | None:
    """`score_row` as a scorer: right or wrong by the skill's own rule, read from the text alone."""
    text = without_ending(response.strip())
    return _correct(row, text, next((mode for mode in MODES if text.startswith(f"<|{mode}|>")), None))


def lenient_scorer(row: dict, response: str) -> bool | None:
    """`lenient_score` as a scorer, for answers behind solved examples."""
    return lenient_score(row, response).correct


def agent_edit_course(row: dict, response: str) -> bool:
    """A scorer: the verdict of the AGENT/EDIT course's own checker."""
    return course_verdict(response).passed


def agent_edit_strict(row: dict, response: str) -> bool:
    """A scorer: the strict reading, in the row's mode or else the one that its instruction calls for."""
    return judge(response, mode=_mode_wanted(row)).ok


def _mode_wanted(row: dict) -> str:
    mode = row.get("mode") or row.get("expected_type")
    return f"<|{mode.strip('<|>')}|>" if isinstance(mode, str) else expected_mode(prompt_text(row))


SCORERS = {"skill": skill_scorer, "agent_edit_course": agent_edit_course, "agent_edit_strict": agent_edit_strict}


def _correct(row: dict, text: str, mode: str | None) -> bool | None:
    """Right or wrong by the rule of the row's skill; None without one, and where no single answer is right."""
    skill = skill_of(row)
    if skill == "countdown":
        return countdown_reward(text, row["numbers"], row["target"]) == 1.0
    if skill == "bugfix":
        return mode == row["mode"]
    if skill == "sum_to_n":
        number = final_number(text)
        return number is not None and number == final_number(row["output"])
    return _open_or_matched(row, text)


def _open_or_matched(row: dict, text: str) -> bool | None:
    if isinstance(row.get("check"), str) and row["check"]:
        # The fact alone could be another university's: the answer has to be about the one asked for.
        subject = row["output"].split(" is ")[0] if skill_of(row) == "university" else ""
        return normalise(row["check"]) in normalise(text) and normalise(subject) in normalise(text)
    if skill_of(row) in (None, *OPEN_SKILLS):
        return None
    return normalised_match(text, row["output"])


def lenient_score(row: dict, text: str) -> SkillScore:
    """Scores the plain text a base model wrote after "Answer:", in the kindest reading that is not a guess.

    The first line that is not empty counts, blanks and punctuation trimmed. Where the reference is a number the line's
    first number is taken (for `sum_to_n` the last one), where it is a list its first list, commas allowed; a spelled
    word may be spaced in any way; Countdown needs no tags; a mode is read from its text. `formatted` only says that
    something was answered: plain text has no format to keep.
    """
    line = without_ending(next((part.strip() for part in text.splitlines() if part.strip()), ""))
    skill, output = skill_of(row), row["output"].strip()
    numbers = _NUMBER.findall(line)
    if skill == "countdown":
        tagged = line if extract_answer(line) is not None else f"<answer>{line.split('=')[0].strip(' .')}</answer>"
        return SkillScore(countdown_reward(tagged, row["numbers"], row["target"]) == 1.0, bool(line), line)
    if skill == "bugfix":
        return SkillScore(line.startswith(f"<|{row['mode']}|>"), bool(line), line, normalised_match(line, output))
    if skill == "sum_to_n":
        last = numbers[-1] if numbers else ""
        return SkillScore(last == final_number(output), bool(line), last)
    if skill == "spell":
        spelled = re.sub(r"[\s,-]+", "-", line.strip(" .,"))
        return SkillScore(normalised_match(spelled, output), bool(line), spelled)
    if re.fullmatch(r"-?\d+( -?\d+)*", output):
        run = re.search(r"-?\d+([ ,]+-?\d+)*", line)
        read = _NUMBER.findall(run[0]) if run else []
        read = read if " " in output else read[:1]
        return SkillScore(read == output.split(), bool(line), " ".join(read))
    return SkillScore(_open_or_matched(row, line), bool(line), line)
