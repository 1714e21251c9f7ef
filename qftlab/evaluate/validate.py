"""Training data with mode tokens, judged: each row by itself (see `outputs`), and what only the whole set shows."""

from __future__ import annotations

import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qftlab.evaluate.near import near_duplicates
from qftlab.evaluate.outputs import FORMAT, REASONS, Fault, Format, Verdict, check_code, judge, mend, require
from qftlab.evaluate.split import prompt_key
from qftlab.rows.chat import DataError
from qftlab.settings import AGENT, EDIT, check_at_least

__all__ = ["FORMAT", "REASONS", "Case", "Report", "Verdict", "expected_mode", "judge", "mend", "read_cases", "validate"]
LAYOUTS = (("Query", "Output"), ("instruction", "output"))
MARKS = ("<|im_start|>", "<|im_end|>", "<tools>")
RUN = 80  # characters of a prompt that count as a leak; an output's own form has fewer
# An exception's name on a line of prose or at the end of a traceback: not indented, and not a statement of Python.
BLOCK = r"(?:class|def|elif|for|if|try|while|with)\b.*:[ \t]*(?:#.*)?$"
STATEMENT = r"(?:assert|except|import|print|raise|return)\b|from[ \t]+\S+[ \t]+import\b"
NAME = r"[A-Z][A-Za-z0-9_]*?(?:Error|Exception|Interrupt|Iteration)|SystemExit"
ERROR = re.compile(
    rf"^(?![ \t#@]|{BLOCK}|{STATEMENT}).*?(?<![A-Za-z0-9_])(?!AssertionError)(?:{NAME})(?![A-Za-z0-9_])", re.MULTILINE
)


@dataclass(frozen=True)
class Case:
    """A row as it is judged: its texts as the file has them, the mode token to be expected, and its kind of problem."""

    instruction: object
    output: object
    mode: str
    kind: str = ""


def expected_mode(instruction: object) -> str:
    """The mode that an instruction's evidence calls for: EDIT where it names an error, AGENT where it does not.

    An error is an exception's name in prose or at the end of a traceback. Names in code do not count, and neither does
    AssertionError: a failed test says that something is wrong, not what.
    """
    return EDIT if isinstance(instruction, str) and ERROR.search(instruction) else AGENT


def read_cases(rows: Iterable[object], source: str = "rows", format: Format = FORMAT) -> list[Case]:
    """Rows of one layout as cases: Query and Output, or instruction, input and output (Alpaca, a teacher's raw list).

    The mode to be expected is the row's `expected_type` or `mode`, or else `expected_mode` of its instruction.

    Raises:
        DataError: naming source and row (from 1), for a row of no layout or of another than the first, or a mode that
            is none.
    """
    modes = {token.strip("<|>").casefold(): token for token in format}
    cases: list[Case] = []
    first = None
    for number, row in enumerate(rows, 1):
        if isinstance(row, DataError):
            raise row
        names = next((pair for pair in LAYOUTS if isinstance(row, dict) and row.keys() >= set(pair)), None)
        first = first or names
        if names is None or names != first:
            shown = " and ".join(first) if first else "Query and Output, or instruction and output"
            got = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{source}, row {number} must have {shown}, got {got:.100}")
        instruction = row[names[0]]
        if isinstance(instruction, str) and row.get("input"):
            instruction = f"{instruction}\n{row['input']}"
        asked = row.get("expected_type") or row.get("mode") or expected_mode(instruction)
        if (mode := modes.get(str(asked).strip("<|>").casefold())) is None:
            raise DataError(f"{source}, row {number} must have a mode of {', '.join(modes)}, got {asked!r:.60}")
        kind = row.get("kind") or row.get("question_title") or row.get("skill") or ""
        cases.append(Case(instruction, row[names[1]], mode, str(kind)))
    return cases


@dataclass(frozen=True)
class Report:
    """The verdicts on a set of cases, in their order, and what they come to."""

    cases: Sequence[Case]
    verdicts: Sequence[Verdict]

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
                for name, meaning in REASONS.items()
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
    *,
    format: Format = FORMAT,
    prompts: Sequence[str] = (),
    max_length: int = 20_000,
    similarity: float = 0.95,
) -> Report:
    """Judges a set: each row by itself, then those that are right against each other.

    The time is linear in the number of rows.

    Args:
        cases: as `read_cases` gives them.
        format: mode token → (tool, names of its arguments).
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
        verdicts = [_judged(case, format, runs, max_length) for case in cases]
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
    return Report(cases, verdicts)


def _judged(case: Case, format: Format, runs: Sequence[str], max_length: int) -> Verdict:
    verdict = Verdict(False)
    try:
        for name in ("instruction", "output"):
            text = getattr(case, name)
            require(isinstance(text, str) and text.strip(), "schema", f"{name} must be a text, got {text!r:.60}")
            detail = f"{name} must have {max_length:,} characters at most, got {len(text):,}"
            require(len(text) <= max_length, "too-long", detail)
        shown = " ".join(case.output.split())
        leak = next((run for run in (*MARKS, *runs) if run in shown), None)
        require(leak is None, "leaked-prompt", f"must not repeat {leak!r:.60}")
        verdict = judge(case.output, format, case.mode)
        if verdict.ok:
            check_code(verdict.call, format[verdict.mode][1], case.instruction)
    except Fault as fault:
        return _refused(verdict, *fault.args)
    return verdict


def _refused(verdict: Verdict, reason: str, detail: str) -> Verdict:
    return Verdict(False, reason, detail, verdict.mode, verdict.call)
