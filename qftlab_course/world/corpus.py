"""The pretraining corpus of `tiny`, generated document by document, and the tokenizer trained on it.

A document is text plus the spans to learn from. Random operands are not worth learning (nobody can predict them), so
in the skills only the answers are: with loss on every token the same run learned addition half as well
(benchmarks/LOG.md). One document in eight is learned whole, so that the base can also continue freely.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from qftlab.rows.countdown import random_problem as random_countdown
from qftlab_course.world import bugfix, facts
from qftlab_course.world.instructions import KNOWLEDGE, Problem, held_out_problem, random_problem, sum_steps

END = "<|endoftext|>"
# How often each kind of document is drawn.
MIXTURE = {
    "add": 12, "subtract": 13, "multiply": 4, "reverse": 4, "sort": 6, "maximum": 3, "minimum": 3, "spell": 4,
    "length": 2, "sum_to_n": 7, "capital": 3, "university": 6, "joke": 4,
    "sums": 9, "expression": 10, "program": 3, "transcript": 4, "institution": 4,
}  # fmt: skip
# Ways to put a question and its answer. A base that has met only one of them ties its skills to that one's last
# token, and fine-tuning cannot move them (benchmarks/LOG.md).
FORMATS = (
    ("Question: ", "\nAnswer: "),
    ("Q: ", "\nA: "),
    ("", "\n"),
    ("", "\n\n"),
    ("Exercise\n", "\nSolution\n"),
    ("Ann: ", "\nBob: "),
    ("Pupil:\n", "\nTeacher:\n"),
    ("- ", "\n- "),
    ("> ", "\n"),
)


MORE_SUMS = {**MIXTURE, "sums": 22, "university": 4, "joke": 2, "length": 1, "transcript": 3}


@dataclass(frozen=True)
class Phase:
    """What the corpus is like from one training step on.

    Args:
        start: the first step.
        asked: share of the skill documents that are questions and answers, not plain notation.
        formats: how those are put.
        mixture: how often each kind of document is drawn.
        sums: the kinds of longer calculation, as often as they are named.
    """

    start: int
    asked: float
    formats: tuple[tuple[str, str], ...]
    mixture: dict[str, int]
    sums: tuple[str, ...] = ("square", "half", "long", "three")


PHASES = (
    Phase(0, 0.25, FORMATS[:1], MIXTURE),
    Phase(1_250, 0.65, FORMATS, MIXTURE),
    # Long additions came last (3 % right at step 2,000 where two-digit ones stood at 93 %): more of them.
    Phase(2_250, 0.65, FORMATS, MORE_SUMS, ("square", "half", "long", "long", "long", "three")),
    # Of 98 sums "1 to n" the model had learned each, and not the way: a short last phase, with more and larger n.
    Phase(4_400, 0.65, FORMATS, {**MORE_SUMS, "sum_to_any": 30}, ("square", "half", "long", "long", "long", "three")),
)


@dataclass
class Document:
    """Text with the character spans that are trained on."""

    text: str = ""
    trained: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str, *, trained: bool) -> Document:
        """Appends text and returns the document."""
        if trained:
            self.trained.append((len(self.text), len(self.text) + len(text)))
        self.text += text
        return self


def _ask(rng: random.Random, phase: Phase) -> tuple[str, str] | None:
    """How to put the questions of a document, or None for plain notation."""
    if rng.random() >= phase.asked:
        return None
    return rng.choice(phase.formats) if len(phase.formats) > 1 else phase.formats[0]


def _add_answer(document: Document, question: str, plain: str, answer: str, form: tuple[str, str] | None) -> None:
    """Appends one problem; what the model is to say is trained, with the space before it if there is one."""
    lead = plain + " " if form is None else f"{form[0]}{question}{form[1]}"
    bare = lead.rstrip(" ")
    document.add(bare, trained=False).add(lead[len(bare) :] + answer, trained=True)


def _skill(rng: random.Random, skill: str, phase: Phase) -> Document:
    """One to four problems of a skill, in plain notation or as questions and answers."""
    document = Document()
    form = _ask(rng, phase)
    many = rng.choice((1, 2, 4)) if skill not in ("university", "sum_to_n") else rng.choice((1, 1, 2))
    for i in range(many):
        # Nobody infers a capital: what is knowledge is seen here, and held out from SFT alone.
        problem = random_problem(rng, skill, held_out=None if skill in KNOWLEDGE else False)
        if i:
            document.add("\n" if form is None else "\n\n", trained=False)
        _add_answer(document, problem.question, problem.plain, problem.answer, form)
    return document.add(END, trained=True)


def _sums(rng: random.Random, phase: Phase) -> Document:
    """The steps that longer calculations are made of: squares, halves, and sums of uneven length."""
    kind = rng.choice(phase.sums)
    if kind == "square":
        n = rng.randint(2, 110)
        return Document().add(f"{n} * {n} =", trained=False).add(f" {n * n}{END}", trained=True)
    if kind == "half":
        n = rng.randint(1, 6500)
        return Document().add(f"{2 * n} / 2 =", trained=False).add(f" {n}{END}", trained=True)
    # Above 99, so that no two-digit addition that is held out slips in.
    a, b = rng.randint(100, 12500 if kind == "long" else 999), rng.randint(1, 120 if kind == "long" else 999)
    return Document().add(f"{a} + {b} =", trained=False).add(f" {a + b}{END}", trained=True)


def _expression(rng: random.Random, phase: Phase) -> Document:
    """The value of an expression of two to three numbers (never a Countdown problem with its answer sought)."""
    while True:
        problem = random_countdown(rng, num_numbers=rng.choice((2, 3, 3)))
        # Sums of two numbers belong to the skills "add" and "subtract", which hold some of them out.
        if len(problem.numbers) == 3 or "*" in problem.solution or "/" in problem.solution:
            return Document().add(f"{problem.solution} =", trained=False).add(f" {problem.target}{END}", trained=True)


def _sum_to_any(rng: random.Random, phase: Phase) -> Document:
    """The worked sum of 1 to n as in `instructions`, for n up to 300; what is held out there is held out here."""
    while True:
        n = rng.randint(2, 300)
        question = f"What is the sum of the first {n} natural numbers? Please think step by step."
        problem = Problem("sum_to_n", f"sum {n}", question, f"sum 1 to {n} :", sum_steps(n))
        if not held_out_problem(problem):
            break
    document = Document()
    _add_answer(document, problem.question, problem.plain, problem.answer, _ask(rng, phase))
    return document.add(END, trained=True)


def _program(rng: random.Random, phase: Phase) -> Document:
    """A working program and what it prints."""
    bug = bugfix.random_bug(rng)
    name = bug.fixed.split("(")[0].removeprefix("def ")
    template = next(t for t in bugfix.TEMPLATES if name in t["names"].split())
    call = f"{name}({rng.choice(template['calls'])})"
    value, _ = bugfix.run_program(bug.fixed, call)
    return Document().add(f"{bug.fixed}\n\n>>> {call}\n{value!r}{END}", trained=True)


def _transcript(rng: random.Random, phase: Phase) -> Document:
    """A buggy program, what happened, and the corrected program."""
    bug = bugfix.random_bug(rng)
    document = Document().add(f"{bug.program}\n{bug.report}\n", trained=rng.random() < 0.3)
    note = f"Note: {bug.answer}" if rng.random() < 0.5 else f"Fixed:\n{bug.fixed}"
    return document.add(f"{note}{END}", trained=True)


def _institution(rng: random.Random, phase: Phase) -> Document:
    """An invented school or museum: what teaches the model to carry a name it has never seen into a sentence."""
    document = Document()
    name, text = facts.institution(rng)
    _add_answer(document, f"Give me a brief introduction to {name}.", f"{name}:", text, _ask(rng, phase))
    return document.add(END, trained=True)


KINDS = {
    "sum_to_any": _sum_to_any,
    "sums": _sums,
    "expression": _expression,
    "program": _program,
    "transcript": _transcript,
    "institution": _institution,
}


def random_document(rng: random.Random, phase: Phase = PHASES[0]) -> Document:
    """Draws one document as a phase of the corpus has them."""
    kind = rng.choices(tuple(phase.mixture), tuple(phase.mixture.values()))[0]
    document = KINDS[kind](rng, phase) if kind in KINDS else _skill(rng, kind, phase)
    if rng.random() < 0.125:
        document.trained = [(0, len(document.text))]
    return document


def documents(seed: int, step: int, count: int) -> list[Document]:
    """The `count` documents of one training step: a pure function of its arguments, which makes resuming exact."""
    rng = random.Random(f"corpus {seed} {step}")
    phase = [p for p in PHASES if p.start <= step][-1]
    return [random_document(rng, phase) for _ in range(count)]


def tokenizer_text(seed: int = 0, count: int = 30_000) -> Iterator[str]:
    """Text for training the tokenizer: the corpus, and the words that chats, Countdown and fixes are made of."""
    rng = random.Random(f"tokenizer {seed}")
    for i in range(count):
        yield random_document(rng).text.removesuffix(END)
        if i % 12 == 0:
            yield f"system\nYou are a helpful assistant.\nuser\n{rng.choice(facts.WORDS)}\nassistant\n"
            numbers = ", ".join(str(rng.randint(1, 20)) for _ in range(3))
            yield f"Use the numbers {numbers} once each to make {rng.randint(1, 99)}. <answer>1</answer>"
