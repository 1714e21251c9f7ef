"""Training rows, judged: each by itself, by a judge that the caller brings, and what only the whole set shows."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qftlab.evaluate.split import prompt_key
from qftlab.settings import check_at_least
from qftlab_course.agent_edit.near import near_duplicates

# What is said of any set; who judges a row has reasons of its own.
SET_REASONS = {
    "schema": "instruction or output is no text, or an empty one",
    "too-long": "instruction or output has more characters than allowed",
    "leaked-prompt": "the output repeats the system prompt, or has marks of the chat template",
    "duplicate": "an earlier valid row has the same instruction, but for capitals and white space",
    "near-duplicate": "an earlier valid row has nearly the same instruction",
}
MARKS = ("<|im_start|>", "<|im_end|>", "<tools>")
RUN = 80  # characters of a prompt that count as a leak; an output's own form has fewer


@dataclass(frozen=True)
class Case:
    """A row as it is judged: texts as the file has them, the mode token to be expected, its kind of problem, and the
    reason for which whoever made it has refused it ("" if nobody has)."""

    instruction: object
    output: object
    mode: str
    kind: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Verdict:
    """What was found about one row.

    Args:
        ok: whether it is right.
        reason: a short name; "" where it is right.
        detail: what stands there instead, in words.
        mode: the output's mode token, as far as it was read.
        call: its call, as far as it was read: {"name": …, "arguments": {…}}.
    """

    ok: bool
    reason: str = ""
    detail: str = ""
    mode: str | None = None
    call: dict | None = None


class Fault(ValueError):
    """Why an output is refused: a name of `REASONS`, and the detail."""


def require(is_right: object, reason: str, detail: str) -> None:
    """Raises the fault where something is not right."""
    if not is_right:
        raise Fault(reason, detail)


@dataclass(frozen=True)
class Report:
    """The verdicts on a set of cases, in their order, what they come to, and what each reason means."""

    cases: Sequence[Case]
    verdicts: Sequence[Verdict]
    reasons: Mapping[str, str]

    @property
    def valid(self) -> list[Case]:
        """The cases that are right."""
        return [case for case, verdict in zip(self.cases, self.verdicts, strict=True) if verdict.ok]

    def to_json(self, examples: int = 5) -> dict:
        """Counts, shares in [0, 1] (None of nothing), lengths in characters, and the first examples of each reason."""
        total, valid = len(self.cases), self.valid
        modes = Counter(verdict.mode for verdict in self.verdicts if verdict.ok)
        faults: dict[str, list[dict]] = {}
        for number, verdict in enumerate(self.verdicts, 1):
            if not verdict.ok:
                faults.setdefault(verdict.reason, []).append({"row": number, "detail": verdict.detail})
        kinds, right = (Counter(case.kind for case in cases) for cases in (self.cases, valid))
        return {
            "total": total,
            "valid": len(valid),
            "share": len(valid) / total if total else None,
            "modes": {mode: {"valid": n, "share": n / len(valid)} for mode, n in sorted(modes.items())},
            "reasons": {
                name: {"meaning": meaning, "count": len(faults[name]), "examples": faults[name][:examples]}
                for name, meaning in self.reasons.items()
                if name in faults
            },
            "lengths": {name: _lengths(getattr(case, name) for case in valid) for name in ("instruction", "output")},
            "kinds": {kind: {"total": n, "valid": right[kind]} for kind, n in kinds.most_common() if kind},
        }

    def to_text(self, examples: int = 5) -> str:
        """The same as lines for a terminal or a file."""
        found = self.to_json(examples)
        if not self.cases:
            return "0 rows: there is nothing to judge"
        lines = [f"{found['total']:,} rows, {found['valid']:,} valid ({found['share']:.1%})"]
        lines += [f"  {mode}: {of['valid']:,} ({of['share']:.1%} of the valid)" for mode, of in found["modes"].items()]
        for name, of in found["lengths"].items():
            if of:
                lines.append(f"  {name}: {of['min']:,} to {of['max']:,} characters, half have {of['median']:,} or less")
        for name, of in found["reasons"].items():
            lines.append(f"{of['count']:,} × {name}: {of['meaning']}")
            lines += [f"  row {one['row']}: {one['detail']}" for one in of["examples"]]
        kinds = [f"kind {kind!r:.60}: {of['valid']:,} of {of['total']:,} valid" for kind, of in found["kinds"].items()]
        lines += [*kinds[:10], *([f"and {len(kinds) - 10:,} other kinds"] if len(kinds) > 10 else [])]
        return "\n".join(lines)


def _lengths(texts: Iterable[str]) -> dict[str, int]:
    sizes = [len(text) for text in texts]
    return {"min": min(sizes), "median": statistics.median_low(sizes), "max": max(sizes)} if sizes else {}


def validate(
    cases: Sequence[Case],
    judge: Callable[[Case], Verdict],
    reasons: Mapping[str, str] = SET_REASONS,
    *,
    prompts: Sequence[str] = (),
    max_length: int = 20_000,
    similarity: float = 0.95,
) -> Report:
    """Judges a set: each row by itself, then those that are right against each other.

    The time is linear in the number of rows.

    Args:
        cases: of one file or several.
        judge: a row by itself; it may raise `Fault`, and never runs code.
        reasons: what each reason means, those of `SET_REASONS` included, in the order of the report.
        prompts: system prompts that no output may repeat, in runs of `RUN` characters.
        max_length: the most characters of an instruction, and of an output.
        similarity: at and above this Jaccard similarity two instructions are near-duplicates; see `near_duplicates`.

    Raises:
        ValueError: for a limit out of range.
    """
    check_at_least(1, max_length=max_length)
    squeezed = [" ".join(prompt.split()) for prompt in prompts]
    runs = [text[at : at + RUN] for text in squeezed for at in range(0, len(text) - RUN + 1, RUN)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code that is parsed
        verdicts = [_judged(case, judge, runs, max_length) for case in cases]
    keys, firsts = {}, {}
    for number, (case, verdict) in enumerate(zip(cases, verdicts, strict=True)):
        if verdict.ok:
            key = prompt_key({"instruction": case.instruction})
            if firsts.setdefault(key, number) == number:
                keys[number] = key
            else:
                verdicts[number] = _refused(verdict, "duplicate", f"of row {firsts[key] + 1}")
    for number, (earlier, share) in near_duplicates(keys, similarity).items():
        verdicts[number] = _refused(verdicts[number], "near-duplicate", f"of row {earlier + 1}, similarity {share:.3f}")
    return Report(cases, verdicts, reasons)


def _judged(case: Case, judge: Callable[[Case], Verdict], runs: Sequence[str], max_length: int) -> Verdict:
    try:
        require(not case.refused, case.refused, "whoever made the row has said so")
        for name in ("instruction", "output"):
            text = getattr(case, name)
            require(isinstance(text, str) and text.strip(), "schema", f"{name} must be a text, got {text!r:.60}")
            detail = f"{name} must have {max_length:,} characters at most, got {len(text):,}"
            require(len(text) <= max_length, "too-long", detail)
        shown = " ".join(case.output.split())
        leak = next((run for run in (*MARKS, *runs) if run in shown), None)
        require(leak is None, "leaked-prompt", f"must not repeat {leak!r:.60}")
        return judge(case)
    except Fault as fault:
        return Verdict(False, *fault.args)


def _refused(verdict: Verdict, reason: str, detail: str) -> Verdict:
    return Verdict(False, reason, detail, verdict.mode, verdict.call)
