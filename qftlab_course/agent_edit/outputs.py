"""Rows with a mode token, judged: the output's form, its call, and the code of its call.

A format is a mapping of mode tokens to the tool that must be called and its arguments. `judge` reads strictly, `mend`
repairs what is safe to repair. Code is parsed, never run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from qftlab.rows.chat import DataError
from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.validate import Case, Fault, Report, Verdict, require, validate

Format = Mapping[str, tuple[str, tuple[str, ...]]]
FORMAT: Format = {AGENT: ("python", ("code",)), EDIT: ("editor", ("original_code", "modified_code"))}
# Why an output is refused; the first that applies, in this order.
REASONS = {
    "schema": "instruction or output is no text, or an empty one",
    "too-long": "instruction or output has more characters than allowed",
    "leaked-prompt": "the output repeats the system prompt, or has marks of the chat template",
    "no-think": "there is no <think> block that is closed",
    "think-place": "something stands before the <think> block",
    "empty-think": "the <think> block is empty",
    "stray-think": "<think> or </think> stands there a second time",
    "token-in-think": "a mode token stands in the <think> block",
    "no-token": "there is no mode token",
    "two-tokens": "there are several mode tokens",
    "token-place": "the mode token is not right after </think>",
    "no-call": "there is no call: no JSON object with a name",
    "bad-json": "the call does not parse as JSON",
    "two-calls": "there are several JSON objects",
    "wrapped-call": "the call stands in <tool_call> tags",
    "text-after-call": "something stands after the call",
    "wrong-tool": "the call is of another tool than the mode's",
    "wrong-arguments": "the call's arguments are not exactly the tool's, as texts under the name arguments",
    "wrong-mode": "the mode is not the one that was asked for, or that the evidence calls for",
    "code-does-not-parse": "the code that the call brings is no Python",
    "trivial-fix": "the fix is the original code, or differs in white space and comments only",
    "fix-of-other-code": "the code to be fixed is not in the instruction",
    "fix-fails-tests": "the mended program does not pass the problem's tests",
    "bug-not-as-asked": "the teacher's bug raises no error where one was wanted, or one where none was",
    "no-decision": "the teacher gave no thinking with one mode behind it",
    "tests-cannot-run": "the problem's tests cannot be run",
    "duplicate": "an earlier valid row has the same instruction, but for capitals and white space",
    "near-duplicate": "an earlier valid row has nearly the same instruction",
}
OBJECT = re.compile(r"\{\s*[\"']")
TAG = re.compile("</?think>")
IGNORED = re.compile(r"#.*|\s+")


LAYOUTS = (("Query", "Output"), ("instruction", "output"))
# An exception's name on a line of prose or at the end of a traceback: not indented, not a statement of Python, and not
# a guess ("Is it a TypeError?"); or the faulty line ("Line 3 has the wrong name").
BLOCK = r"(?:class|def|elif|for|if|try|while|with)\b.*:[ \t]*(?:#.*)?$"
STATEMENT = r"(?:assert|except|import|print|raise|return)\b|from[ \t]+\S+[ \t]+import\b"
NAME = r"[A-Z][A-Za-z0-9_]*?(?:Error|Exception|Interrupt|Iteration)|SystemExit"
GUESS = r"(?:Is|Was|Could|Might|May)[ \t]+(?:it|this|that|there)\b"
ERROR = re.compile(
    rf"^Line \d+ \w|^(?![ \t#@]|{BLOCK}|{STATEMENT}|{GUESS}).*?"
    rf"(?<![A-Za-z0-9_])(?!AssertionError)(?:{NAME})(?![A-Za-z0-9_])",
    re.MULTILINE,
)


def judge(output: object, format: Format = FORMAT, mode: str | None = None) -> Verdict:
    """The strict reading of one output.

    It must be `<think>` … `</think>`, white space, one mode token, any sentence, and one JSON call
    `{"name": tool, "arguments": {…}}` of that mode's tool, with exactly its arguments, all of them texts.

    Args:
        output: what a model or teacher wrote.
        format: mode token → (tool, names of its arguments).
        mode: the token that was asked for; None takes any.
    """
    token = call = None
    try:
        token, rest = _token(output, format)
        call = _call(rest)
        _check_call(call, *format[token])
        require(mode in (None, token), "wrong-mode", f"must be {mode}, got {token}")
    except Fault as fault:
        return Verdict(False, *fault.args, mode=token, call=call)
    return Verdict(True, mode=token, call=call)


def _token(output: object, format: Format) -> tuple[str, str]:
    """The mode token, and the text behind it."""
    require(isinstance(output, str) and output.strip(), "schema", f"output must be a text, got {output!r:.60}")
    before, _, inside = output.partition("<think>")
    thought, closed, rest = inside.partition("</think>")
    require(closed, "no-think", f"must begin with <think> … </think>, got {output!r:.60}")
    require(not before.strip(), "think-place", f"<think> must come first, got {before!r:.60} before it")
    require(thought.strip(), "empty-think", "the thinking must have a text, got none")
    require(not TAG.search(thought + rest), "stray-think", "<think> and </think> must stand there once")
    early = [token for token in format if token in thought]
    require(not early, "token-in-think", f"the thinking must have no mode token, got {', '.join(early)}")
    counts = {token: rest.count(token) for token in format if token in rest}
    require(counts, "no-token", f"must have one of {', '.join(format)}, got {rest.strip()!r:.60}")
    require(sum(counts.values()) == 1, "two-tokens", f"must have one mode token, got {counts}")
    token, rest = next(iter(counts)), rest.lstrip()
    require(rest.startswith(token), "token-place", f"</think> must be followed by {token}, got {rest!r:.60}")
    return token, rest.removeprefix(token)


def _call(text: str) -> dict:
    """The one JSON object of a text, which ends with it."""
    calls, end = [], 0
    while found := OBJECT.search(text, end):
        start = found.start()
        try:
            call, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise Fault("bad-json", f"the call must be JSON, got {text[start:]!r:.60} ({error})") from None
        calls.append(call)
    require(any("name" in call for call in calls), "no-call", f"must have a call with a name, got {text!r:.60}")
    require(len(calls) == 1, "two-calls", f"must have one JSON object, got {len(calls)}")
    before, after = text[:start].strip(), text[end:].strip()
    is_bare = not (before.endswith("<tool_call>") or after.startswith("</tool_call>"))
    require(is_bare, "wrapped-call", "the call must stand there without <tool_call> tags")
    require(not after, "text-after-call", f"the call must be the end, got {after!r:.60} after it")
    return calls[0]


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _check_call(call: dict, tool: str, names: tuple[str, ...]) -> None:
    require(call["name"] == tool, "wrong-tool", f"must call {tool}, got {call['name']!r:.60}")
    given = call.get("arguments")
    is_right = isinstance(given, dict) and call.keys() == {"name", "arguments"} and given.keys() == set(names)
    is_right = is_right and all(isinstance(value, str) and value.strip() for value in given.values())
    inner = list(given) if isinstance(given, dict) else type(given).__name__
    shown = f"{tool} must have name and arguments ({', '.join(names)}: texts)"
    require(is_right, "wrong-arguments", f"{shown}, got {list(call)!r:.80} (arguments: {inner!s:.80})")


def check_code(call: dict, names: tuple[str, ...], instruction: str) -> None:
    """Refuses code that is no Python, and a fix that changes nothing or is of other code than the instruction's.

    Args:
        call: as `judge` gives it.
        names: of its arguments: the last is the code that it brings, one before it what that code replaces.
        instruction: what was asked.

    Raises:
        Fault: with the reason.
    """
    *before, code = (call["arguments"][name] for name in names)
    require(_tree(code) is not None, "code-does-not-parse", f"{names[-1]} must be Python, got {code!r:.60}")
    for text in before:
        is_near = IGNORED.sub("", text) == IGNORED.sub("", code)  # and white space may still be what was wrong
        old = _tree(text, ast.dump) if is_near else None
        is_same = text == code or old is not None and old == _tree(code, ast.dump)
        require(not is_same, "trivial-fix", f"{names[-1]} must change something")
        is_there = "".join(text.split()) in "".join(instruction.split())
        require(is_there, "fix-of-other-code", f"{names[0]} must be in the instruction, got {text!r:.60}")


def _tree(code: str, form: Callable[[ast.Module], object] = bool) -> object:
    """What `form` makes of the syntax tree; None for what is no Python, or nested too deep."""
    try:
        return form(ast.parse(code))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def judge_case(case: Case) -> Verdict:
    """A row by itself: `judge`, and `check_code` of what the call brings.

    Raises:
        Fault: as `check_code`.
    """
    verdict = judge(case.output, mode=case.mode)
    if verdict.ok:
        try:
            check_code(verdict.call, FORMAT[verdict.mode][1], case.instruction)
        except Fault as fault:
            return Verdict(False, *fault.args, mode=verdict.mode, call=verdict.call)
    return verdict


def validate_cases(cases: Sequence[Case], **options) -> Report:
    """`validate` with `judge_case`; `options` are its."""
    return validate(cases, judge_case, REASONS, **options)


def mend(output: str, format: Format = FORMAT) -> str:
    """The output without white space, quotes and `<tool_call>` tags around it or its parts; its words stay as they are.

    The think block and the mode token come on lines of their own. A quoted JSON text is read as JSON.
    """
    text = _unquoted(output.strip())
    head, closed, rest = text.partition("</think>")
    token = next((token for token in format if rest.lstrip().startswith(token)), "")
    if not closed or not token:
        return text
    said = rest.lstrip().removeprefix(token).strip()
    sentence, _, wrapped = said.partition("<tool_call>")
    call, tag, after = wrapped.rpartition("</tool_call>")
    if tag and not after and isinstance(_read(call), dict):
        said = sentence.rstrip() + call.strip()
    return f"{head}{closed}\n{token}\n{said}"


def _unquoted(text: str) -> str:
    """What stands in quotes around the whole text, if that begins with thinking."""
    read = _read(text) if text.startswith('"') else None
    inner = read if isinstance(read, str) else text[1:-1]
    is_quoted = len(text) > 1 and text[0] + text[-1] in ('""', "''", "``", "“”", "‘’")
    return inner.strip() if is_quoted and inner.strip().startswith("<think>") else text


def _read(text: str) -> object:
    """What a JSON text holds; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def expected_mode(instruction: object) -> str:
    """The mode that an instruction's evidence calls for: EDIT where it names an error, AGENT where it does not.

    An error is an exception's name in prose or at the end of a traceback, or a line that is named as faulty. Names in
    code do not count, nor guesses, and neither does AssertionError: a failed test says that something is wrong, not
    what.
    """
    return EDIT if isinstance(instruction, str) and ERROR.search(instruction) else AGENT


def read_cases(rows: Iterable[object], source: str = "rows", format: Format = FORMAT) -> list[Case]:
    """Rows of one layout as cases: Query and Output, or instruction, input and output (Alpaca, a teacher's raw list).

    The mode to be expected is the row's `expected_type` or `mode`, or else `expected_mode` of its instruction. A row
    that says of itself that it is not valid stays so, with its first issue.

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
        issues = row.get("issues") if row.get("valid") is False else None
        refused = str(issues[0]) if isinstance(issues, list) and issues else ""
        cases.append(Case(instruction, row[names[1]], mode, str(kind), refused if refused in REASONS else ""))
    return cases
