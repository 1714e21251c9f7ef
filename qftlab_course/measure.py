"""What the lab measures: the skills of `tiny` row by row, asked in a chat, as plain text, or as it was pretrained."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qftlab.decoding.engine import GREEDY, Completion, encode_prompts, generate
from qftlab.evaluate.answers import contained, mcnemar, normalised_match, wilson_interval
from qftlab.evaluate.split import prompt_text
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.examples import places_of
from qftlab.rows.schemas import row_to_prompt
from qftlab_course.scores import SkillScore, lenient_score, score_row, skill_of
from qftlab_course.world.style import ENDING, without_ending

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)
# Skills with a line of their own: they do not count towards instruction accuracy.
OWN_LINE = ("countdown", "bugfix")
UNLABELLED = "unlabelled"  # rows without a skill
PLAIN_STOP = ("\n\n", "\nQuestion:")
UNNAMED = 512  # new tokens where neither max_new_tokens nor a reference says how many


@dataclass(frozen=True)
class Rate:
    """`correct` of `n`, with the 95 % Wilson interval of the accuracy."""

    name: str
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """correct / n in [0, 1]; nan where n is 0."""
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) in [0, 1]."""
        return wilson_interval(self.correct, self.n)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: both instruction accuracies, and p of "no difference" (exact McNemar)."""

    before: Rate
    after: Rate
    gained: int
    lost: int
    p_value: float


def compare_marks(before: Sequence[bool | None], after: Sequence[bool | None], name: str = "right") -> Comparison:
    """Compares two lists of marks, row by row; rows that either has as None do not count.

    Raises:
        ValueError: if they are not equally long.
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must be equally long, got {len(before)} and {len(after)}")
    marked = [(bool(a), bool(b)) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    first, second = [a for a, _ in marked], [b for _, b in marked]
    gained, lost = sum(b and not a for a, b in marked), sum(a and not b for a, b in marked)
    rates = (Rate(name, sum(marks), len(marks)) for marks in (first, second))
    return Comparison(*rates, gained, lost, mcnemar(first, second))


@dataclass(frozen=True)
class Evaluation:
    """What a model answered to a set of rows, and how that was scored; all three in the order of the rows."""

    rows: tuple[dict, ...]
    completions: tuple[Completion, ...]
    scores: tuple[SkillScore, ...]
    few_shot: int = 0

    @property
    def skills(self) -> list[str]:
        """The skills of the rows, in order of appearance."""
        return list(dict.fromkeys(skill_of(row) or UNLABELLED for row in self.rows))

    def skill(self, name: str) -> Rate:
        """Accuracy of one skill over its rows that have a right answer ("bugfix": over the mode)."""
        marks = [s.correct for s in self._of(name) if s.correct is not None]
        return Rate(name, sum(marks), len(marks))

    @property
    def exact(self) -> Rate:
        """Share of the rows without a skill whose answer is the reference, after `normalise`."""
        return self._matched("exact", normalised_match)

    @property
    def contained(self) -> Rate:
        """Share of the rows without a skill whose answer holds the reference, as `contained` says."""
        return self._matched("contained", lambda said, answer: contained(answer, said))

    @property
    def instructions(self) -> Rate:
        """Accuracy over all rows with a right answer, Countdown and bugfix aside."""
        marks = [m for m in self.instruction_marks() if m is not None]
        return Rate("instructions", sum(marks), len(marks))

    @property
    def in_format(self) -> Rate:
        """Instruction accuracy as a chat counts it: the answer is right *and* the turn was ended as it should be."""
        pairs = zip(self.instruction_marks(), self.scores, strict=True)
        marks = [bool(mark and score.formatted) for mark, score in pairs if mark is not None]
        return Rate("instructions, in format", sum(marks), len(marks))

    @property
    def format(self) -> Rate:
        """Share of all rows whose format was kept."""
        return Rate("format", sum(s.formatted for s in self.scores), len(self.scores))

    @property
    def mode(self) -> Rate:
        """Share of bugfix rows that began with the right mode."""
        rate = self.skill("bugfix")
        return Rate("mode", rate.correct, rate.n)

    @property
    def fix(self) -> Rate:
        """Share of bugfix rows answered exactly as the reference."""
        marks = [s.fix_correct for s in self.scores if s.fix_correct is not None]
        return Rate("fix", sum(marks), len(marks))

    @property
    def countdown(self) -> Rate:
        """Share of Countdown rows solved."""
        return self.skill("countdown")

    def instruction_marks(self) -> list[bool | None]:
        """Right or wrong, row by row; None for rows outside the instruction accuracy. What a paired test takes."""
        return [None if skill_of(r) in OWN_LINE else s.correct for r, s in self._pairs()]

    def to_frame(self) -> pandas.DataFrame:
        """One line a skill, then the totals: n, correct, accuracy, low, high, format (rates in [0, 1]).

        Rows without a skill have two lines, exact and contained, and do not count in the totals.
        `format` is nan for few-shot answers in plain text, which have no format to keep.
        """
        import pandas

        lines = []
        for name in self.skills:
            rates = (self.exact, self.contained) if name == UNLABELLED else (self.skill(name),)
            lines += [self._line(rate, self._formatted(name)) for rate in rates]
        if self.instructions.n or self.skills != [UNLABELLED]:
            lines.append(self._line(self.instructions, self._formatted(None)))
        if self.fix.n:
            lines.append(self._line(self.fix, self._formatted("bugfix")))
        return pandas.DataFrame(lines).set_index("skill")

    def _pairs(self) -> list[tuple[dict, SkillScore]]:
        return list(zip(self.rows, self.scores, strict=True))

    def _of(self, name: str) -> list[SkillScore]:
        return [score for row, score in self._pairs() if (skill_of(row) or UNLABELLED) == name]

    def _matched(self, name: str, agree: Callable[[str, str], bool]) -> Rate:
        marks = [agree(score.answered, row["output"]) for row, score in self._pairs() if skill_of(row) is None]
        return Rate(name, sum(marks), len(marks))

    def _formatted(self, name: str | None) -> float:
        """Format of one skill, or (None) of what instruction accuracy is about and the open skills."""
        skills = {s for s in self.skills if s == name or (name is None and s not in OWN_LINE)}
        marks = [s.formatted for r, s in self._pairs() if (skill_of(r) or UNLABELLED) in skills]
        return math.nan if self.few_shot or not marks else sum(marks) / len(marks)

    def _line(self, rate: Rate, formatted: float) -> dict:
        low, high = rate.interval if rate.n else (math.nan, math.nan)
        return {"skill": rate.name, "n": rate.n, "correct": rate.correct, "accuracy": rate.accuracy,
                "low": low, "high": high, "format": formatted}  # fmt: skip


def evaluate_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    few_shot: int = 0,
    examples: Sequence[dict] | None = None,
    params: SamplingParams = GREEDY,
    max_new_tokens: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    sources: Mapping[str, int] | None = None,
) -> Evaluation:
    """Asks the model every row and scores its answers.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        rows: dicts with "instruction", "input", "output" and "skill", or with "messages" and "output", as
            `answered_row` makes them.
        few_shot: 0 asks through the chat template and scores strictly; k > 0 shows k solved examples of the same skill
            as plain text ("Question: … Answer: …") and reads the answer leniently: the fair way to ask a base model.
        examples: rows the few-shot examples come from; by default the other rows of `rows`.
        params: sampling, greedy by default.
        max_new_tokens: by default half as many again as the longest reference of the row's skill, plus 8 and a polite
            ending; fewer where the context ends.
        seed: of the sampling and of the choice of examples.
        batch_size: rows decoded together.
        sources: rows by source, as `load_wanted` gives them: messages then name the file as well.

    Raises:
        ValueError: if `few_shot` is negative, no other row of a skill is there to be shown, or a prompt fills the
            context.
    """
    completions: list[Completion | None] = [None] * len(rows)
    groups = plan_rows(model, tokenizer, rows, few_shot=few_shot, examples=examples, max_new_tokens=max_new_tokens,
                       seed=seed, sources=sources)  # fmt: skip
    for number, (members, _, asked, limits) in enumerate(groups):
        answers = generate(model, tokenizer, asked, max_new_tokens=limits, params=params, seed=seed + number,
                           stop=PLAIN_STOP if few_shot else (), batch_size=batch_size)  # fmt: skip
        for i, answer in zip(members, answers, strict=True):
            completions[i] = answer
    _say_cut(completions)
    return scored(tokenizer, rows, completions, few_shot)


def scored(tokenizer, rows: Sequence[dict], completions: Sequence[Completion], few_shot: int = 0) -> Evaluation:
    """What the rows' completions are worth by the rules of their skills; leniently where examples were shown."""
    score = (
        (lambda row, answer: lenient_score(row, answer.text)) if few_shot else partial(score_row, tokenizer=tokenizer)
    )
    return Evaluation(tuple(rows), tuple(completions), tuple(map(score, rows, completions)), few_shot)


def plan_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    few_shot: int = 0,
    examples: Sequence[dict] | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    sources: Mapping[str, int] | None = None,
) -> Iterator[tuple[list[int], list, list[list[int]], list[int]]]:
    """What is asked, skill by skill: places of rows, their prompts, ids, and the most new tokens of each.

    Args as in `evaluate_rows`; without any reference an answer may have 512 tokens.

    Raises:
        ValueError: as `evaluate_rows`.
    """
    if few_shot < 0:
        raise ValueError(f"few_shot must be 0 or more, got {few_shot}")
    skills = [skill_of(row) or UNLABELLED for row in rows]
    for skill in dict.fromkeys(skills):
        members = [i for i, name in enumerate(skills) if name == skill]
        budget = max_new_tokens or _budget(tokenizer, [rows[i]["output"] for i in members if rows[i].get("output")])
        prompts = [row_to_prompt(rows[i]) for i in members]
        context = getattr(model.config, "max_position_embeddings", None)
        if few_shot:
            pool, limit = rows if examples is None else examples, context and context - budget
            prompts = [few_shot_prompt(tokenizer, rows[i], pool, few_shot, seed=seed + i, limit=limit) for i in members]
        asked = encode_prompts(tokenizer, prompts)
        yield members, prompts, asked, _limits(asked, budget, context, [i + 1 for i in members], sources or {})


def _say_cut(completions: Sequence[Completion]) -> None:
    if cut := sum(completion.finish_reason == "length" for completion in completions):
        logger.info("%d of %d answers were cut off: --max_new_tokens gives them more room", cut, len(completions))


def _limits(asked: Sequence[list[int]], budget: int, context: int | None, numbers: Sequence[int], sources) -> list[int]:
    """New tokens of each prompt: the budget, or what the context leaves."""
    limits = [min(budget, (context or math.inf) - len(ids)) for ids in asked]
    if full := [number for number, limit in zip(numbers, limits, strict=True) if limit < 1]:
        raise ValueError(f"prompts must leave room in the context of {context} tokens, got {len(full)} that fill it "
                         f"({places_of(full[:5], sources)}): leave them out")  # fmt: skip
    return limits


def is_thinking(tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends by opening the thinking of the answer."""
    return tokenizer.decode(list(prompt_ids[-16:])).rstrip().endswith("<think>")


def _budget(tokenizer, outputs: Sequence[str]) -> int:
    if not outputs:
        return UNNAMED
    *asked, ending = tokenizer([*outputs, ENDING], add_special_tokens=False).input_ids
    longest = max(map(len, asked))
    return longest + longest // 2 + 8 + len(ending)


def _question(row: dict) -> str:
    if len(row.get("messages", ())) > 2:
        raise ValueError(f"few_shot must be 0 for conversations, got one of {len(row['messages'])} turns")
    return prompt_text(row)


def few_shot_prompt(
    tokenizer, row: dict, pool: Sequence[dict], k: int, *, seed: int = 0, limit: int | None = None
) -> str:
    """Plain text: k solved questions of the row's skill, then its own question, ending in "Answer:".

    Args:
        tokenizer: counts the tokens.
        row: the row to ask; a row of `pool` with its question and answer is never shown.
        pool: where the examples come from.
        k: how many, fewer where the pool has fewer or `limit` is reached (a log line says so).
        seed: of the choice.
        limit: the most tokens the prompt may have.

    Raises:
        ValueError: if the pool has no other row of this skill.
    """
    # Jokes share their question, so it takes question and answer to know a row.
    asked = _question(row), row["output"]
    others = [r for r in pool if skill_of(r) == skill_of(row) and (_question(r), r["output"]) != asked]
    if not others:
        raise ValueError(f"few-shot examples must share the skill {row.get('skill')!r}, got none: pass examples=")
    shots = random.Random(seed).sample(others, min(k, len(others)))
    solved = [f"Question: {_question(r)}\nAnswer: {r['output']}\n\n" for r in shots]
    final = f"Question: {_question(row)}\nAnswer:"
    while limit is not None and solved and len(tokenizer("".join(solved) + final).input_ids) > limit:
        solved = solved[1:]
    if len(solved) < k:
        logger.info("%d of %d examples fit in front of a %s question", len(solved), k, row.get("skill"))
    return "".join(solved) + final


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Compares instruction accuracy row by row.

    Raises:
        ValueError: if the two were asked different rows.
    """
    if [_question(r) for r in before.rows] != [_question(r) for r in after.rows]:
        raise ValueError("compare needs the same rows in the same order on both sides, got different questions")
    return compare_marks(before.instruction_marks(), after.instruction_marks(), "instructions")


def evaluate_kept(model, tokenizer, rows: Sequence[dict], *, batch_size: int = 128) -> Rate:
    """Share of rows whose plain form ("47 + 38 =") is continued with the right answer, greedily, without any chat.

    A polite ending is taken off, as everywhere in scoring.

    Args:
        model: a causal transformers model, base or fine-tuned.
        tokenizer: its tokenizer.
        rows: rows with "plain" and "output"; rows without "plain" are left out.
        batch_size: rows decoded together.

    Raises:
        ValueError: if no row has a plain form.
    """
    asked = [row for row in rows if row.get("plain")]
    if not asked:
        raise ValueError('rows must have a "plain" form, got none: use data/instructions/heldout.jsonl')
    longest = max(len(ids) for ids in tokenizer([row["output"] + ENDING for row in asked]).input_ids)
    answers = generate(
        model,
        tokenizer,
        [row["plain"] for row in asked],
        max_new_tokens=longest + 2,
        stop=("\n",),
        batch_size=batch_size,
    )
    right = sum(without_ending(a.text.strip()) == row["output"] for a, row in zip(answers, asked, strict=True))
    return Rate("kept", right, len(asked))
