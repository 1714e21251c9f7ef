"""An offline teacher: an expert on the bug set that answers in OpenAI's protocol, with the faults of real ones.

It finds the bug by itself, from the program that stands in the question, so it can be asked about programs that nobody
has seen. What it gets wrong is drawn from a hash of the question and its own seed: the same question gets the same
answer, in whatever order and from however many threads it is asked. `qftlab_course.flaky` serves it, and breaks
connections besides.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.prompts import MEND, REASON, SAYS, call_of
from qftlab_course.world.bugfix import TEMPLATES

# Shares of answers, so that about as many pass as of 370 answers of Qwen3-8B to students' prompts: 79 % by the course's
# checker, 53 % by a strict reading.
FLAWS = {
    "two-tokens": 0.13, "wrong-arguments": 0.10, "bad-json": 0.04, "token-place": 0.04,
    "wrong-tool": 0.07, "refusal": 0.04, "no-token": 0.03, "no-think": 0.02,
}  # fmt: skip
LIES = 0.6  # of the bugs that nobody named, which it sees at once and mends at once: "I know the error"


@dataclass(frozen=True)
class Found:
    """A bug of the set, found in a text: the program as it stands there, mended, and the number of the faulty line."""

    program: str
    fixed: str
    line: int


@cache
def _patterns() -> list[tuple[re.Pattern, dict, tuple]]:
    """A pattern for every buggy program of the set, whatever its names and comments."""
    made = []
    for template in TEMPLATES:
        for bug in template["bugs"]:
            lines = list(template["lines"])
            lines[bug[0] - 1] = bug[1]
            text = "\n".join(lines).format(f="QfQ", a="QaQ", b="QbQ", v="QvQ")
            pattern = re.escape(text).replace(re.escape("\n"), r"(?:\ \ \#\ [^\n]*)?\n")
            for name in "fabv":
                pattern = pattern.replace(f"Q{name}Q", rf"(?P<{name}>[a-z_]\w*)", 1).replace(
                    f"Q{name}Q", f"(?P={name})"
                )
            made.append((re.compile(rf"(?m)^{pattern}(?:\ \ \#\ [^\n]*)?$"), template, bug))
    return made


def find_bug(text: str) -> Found | None:
    """The bug of the set whose program stands in a text; None if there is none."""
    for pattern, template, bug in _patterns():
        if match := pattern.search(text):
            names = {"a": "", "b": "", "v": "", **match.groupdict()}
            lines = match[0].split("\n")
            lines[bug[0] - 1] = template["lines"][bug[0] - 1].format(**names)
            return Found(match[0], "\n".join(lines), bug[0])
    return None


def evidence(said: str) -> tuple[str, str]:
    """The mode that fits what a user says of a program, and why, in a sentence."""
    if named := re.search(r"^Line (\d+) ", said, re.MULTILINE):
        return EDIT, f"The user names line {named[1]}."
    if crash := re.search(r'File "main.py", line (\d+)', said):
        return EDIT, f"The traceback names line {crash[1]}."
    if error := re.search(r"\b(?!Assertion)([A-Z]\w*(?:Error|Exception|Iteration)): ", said):
        return EDIT, f"The user names a {error[1]}."
    if "AssertionError" in said:
        return AGENT, "A test failed. Nobody names the faulty line."
    return AGENT, "Nobody names the faulty line."


@dataclass(frozen=True)
class Expert:
    """A teacher with stated faults.

    Args:
        seed: of its faults.
        flaws: share of answers with each fault of form (see `FLAWS`).
        lies: share of the bugs that nobody named which it mends at once, as if they had been named.
        wrong_fixes: share of its fixes that mend nothing.
    """

    seed: int = 0
    flaws: Mapping[str, float] = field(default_factory=lambda: FLAWS)
    lies: float = LIES
    wrong_fixes: float = 0.0

    def answer(self, path: str, body: Mapping) -> dict:
        """The answer to a chat request, as the protocol has it.

        Args:
            path: of the request, ending in chat/completions.
            body: with messages; the last one holds program and report.
        """
        asked = body["messages"][-1]["content"]
        rng = random.Random(int(hashlib.sha256(json.dumps([self.seed, body], sort_keys=True).encode()).hexdigest(), 16))
        system = "\n".join(m["content"] for m in body["messages"] if m["role"] == "system")
        text = self._say(asked, system, rng)
        given = sum(len(m["content"]) for m in body["messages"]) // 4
        return {
            "id": f"chatcmpl-{rng.getrandbits(64):016x}", "object": "chat.completion", "created": 0,
            "model": body.get("model", "expert"),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": given, "completion_tokens": len(text) // 4,
                      "total_tokens": given + len(text) // 4},
        }  # fmt: skip

    def flaw(self, rng: random.Random) -> str:
        """Which fault of form an answer has, or ""."""
        draw = rng.random()
        for name, share in self.flaws.items():
            draw -= share
            if draw < 0:
                return name
        return ""

    def _say(self, asked: str, system: str, rng: random.Random) -> str:
        found = find_bug(asked)
        if found is None:
            return "I cannot find a program that I know in this question."
        mode, why = evidence(asked.replace(found.program, ""))
        is_lie = mode == AGENT and rng.random() < self.lies
        if is_lie:
            mode, why = EDIT, f"I see the error in line {found.line}, so it is known."
        fixed = found.program + "\n" if rng.random() < self.wrong_fixes else found.fixed
        if system == MEND:
            return f"```python\n{fixed}\n```"
        if system == REASON:
            return f"<think>{why}</think>\n{mode}"
        return _written(self.flaw(rng), mode, why, found.program, fixed)


def _written(flaw: str, mode: str, why: str, program: str, fixed: str) -> str:
    """An answer with one fault of form, or none."""
    call, other = call_of(mode, program, fixed), AGENT if mode == EDIT else EDIT
    if flaw == "refusal":
        return "I am sorry, but I cannot help with that."
    if flaw == "wrong-tool":
        call = call_of(other, program, fixed)
    if flaw == "wrong-arguments":
        call["arguments"] = {"program": program} if mode == AGENT else {"code": fixed}
    text = json.dumps(call)
    if flaw == "bad-json":
        text = text[:-2]  # its brackets are never closed
    think = "" if flaw == "no-think" else f"<think>{why}</think>\n"
    if flaw == "no-token":
        return f"{think}{SAYS[mode]}{text}"
    if flaw == "token-place":
        return f"{think}{SAYS[mode]}{text}\n{mode}"
    if flaw == "two-tokens":
        return f"{think}{mode}\n{SAYS[mode]} {other} would not help.{text}"
    return f"{think}{mode}\n{SAYS[mode]}{text}"
