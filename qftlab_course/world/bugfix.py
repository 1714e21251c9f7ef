"""Small Python programs with a bug, and what happened when they ran: the AGENT/EDIT data.

`EDIT` answers a *known* error: the program crashed inside its own code (the traceback names the line), or the user
names the faulty line. `AGENT` explores an *unknown* one: a wrong value, or a failed test, whose traceback points
into the test and says nothing of the cause. So both modes come with and without a traceback, and comments in both
carry misleading words. Tracebacks are real: every program is run here, once, by its generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from qftlab.rows.countdown import is_held_out

# Each template: lines with {f} function, {a} {b} parameters, {v} local names; a call; bugs as
# (line number, wrong line, what a reviewer would say, crashes); the first line is always the def.
TEMPLATES: tuple[dict, ...] = (
    {
        "names": "add_up total sum_all",
        "params": "xs items values",
        "v": "total result acc",
        "lines": ("def {f}({a}):", "    {v} = 0", "    for x in {a}:", "        {v} += x", "    return {v}"),
        "calls": ("[1, 2, 3]", "[4, 5]", "[7, 1, 9]"),
        "watch": (4, "{v}"),
        "bugs": (
            (2, "    {v} = 1", "starts at the wrong number", False),
            (4, "        {v} -= x", "has the wrong sign", False),
            (5, "    return {v}[0]", "indexes a number", True),
            (4, "        {v} += y", "has the wrong name", True),
        ),
    },
    {
        "names": "area size cover",
        "params": "w width wide",
        "b": "h height tall",
        "v": "r s out",
        "lines": ("def {f}({a}, {b}):", "    {v} = {a} * {b}", "    return {v}"),
        "calls": ("3, 4", "2, 5", "6, 7"),
        "watch": (2, "{v}"),
        "bugs": (
            (2, "    {v} = {a} + {b}", "has the wrong operator", False),
            (3, "    return {a}", "has the wrong name", False),
            (2, "    {v} = {a} * c", "has the wrong name", True),
            (2, "    {v} = {a}[{b}]", "indexes a number", True),
        ),
    },
    {
        "names": "mean average middle",
        "params": "xs data marks",
        "v": "total s acc",
        "lines": ("def {f}({a}):", "    {v} = sum({a})", "    return {v} // len({a})"),
        "calls": ("[2, 4]", "[3, 6, 9]", "[5, 7]"),
        "watch": (2, "{v}"),
        "bugs": (
            (2, "    {v} = max({a})", "calls the wrong function", False),
            (3, "    return {v} * len({a})", "has the wrong operator", False),
            (3, "    return {v} // 0", "divides by zero", True),
            (2, "    {v} = sam({a})", "has the wrong name", True),
        ),
    },
    {
        "names": "greet hello welcome",
        "params": "name who user",
        "v": "text msg line",
        "lines": ("def {f}({a}):", "    {v} = 'Hi ' + {a}", "    return {v} + '!'"),
        "calls": ("'Ann'", "'Bob'", "'Eve'"),
        "watch": (2, "{v}"),
        "bugs": (
            (2, "    {v} = {a} + 'Hi '", "has the wrong order", False),
            (3, "    return {v} + '?'", "has the wrong sign", False),
            (2, "    {v} = 7 + {a}", "adds a number to text", True),
            (3, "    return {v}.size + '!'", "has the wrong name", True),
        ),
    },
    {
        "names": "last final tail",
        "params": "xs items row",
        "v": "n k size",
        "lines": ("def {f}({a}):", "    {v} = len({a})", "    return {a}[{v} - 1]"),
        "calls": ("[4, 5, 6]", "[8, 2]", "[1, 3, 7]"),
        "watch": (2, "{v}"),
        "bugs": (
            (3, "    return {a}[{v} - 2]", "has the wrong index", False),
            (2, "    {v} = 1", "starts at the wrong number", False),
            (3, "    return {a}[{v}]", "has the wrong index", True),
            (2, "    {v} = {a}.len()", "has the wrong name", True),
        ),
    },
    {
        "names": "fact product grow",
        "params": "n k top",
        "v": "r p out",
        "lines": (
            "def {f}({a}):",
            "    {v} = 1",
            "    for i in range(1, {a} + 1):",
            "        {v} *= i",
            "    return {v}",
        ),
        "calls": ("3", "4", "5"),
        "watch": (4, "{v}"),
        "bugs": (
            (2, "    {v} = 0", "starts at the wrong number", False),
            (3, "    for i in range(1, {a}):", "stops too early", False),
            (4, "        {v} *= j", "has the wrong name", True),
            (3, "    for i in {a} + 1:", "loops over a number", True),
        ),
    },
    {
        "names": "price cost fee",
        "params": "key name item",
        "v": "table prices d",
        "lines": ("def {f}({a}):", "    {v} = {{'tea': 3, 'milk': 5}}", "    return {v}[{a}] * 2"),
        "calls": ("'tea'", "'milk'"),
        "watch": (2, "{v}"),
        "bugs": (
            (3, "    return {v}[{a}] - 2", "has the wrong operator", False),
            (3, "    return {v}['tea'] * 0", "has the wrong number", False),
            (3, "    return {v}[0] * 2", "has the wrong key", True),
            (3, "    return {v}({a}) * 2", "calls a table", True),
        ),
    },
    {
        "names": "gap distance diff",
        "params": "a x p",
        "b": "b y q",
        "v": "d g out",
        "lines": (
            "def {f}({a}, {b}):",
            "    {v} = {a} - {b}",
            "    if {v} < 0:",
            "        {v} = -{v}",
            "    return {v}",
        ),
        "calls": ("3, 8", "9, 4", "2, 6"),
        "watch": (2, "{v}"),
        "bugs": (
            (2, "    {v} = {a} + {b}", "has the wrong operator", False),
            (5, "    return {v} + 1", "has the wrong number", False),
            (2, "    {v} = {a} - z", "has the wrong name", True),
            (5, "    return {v}.abs()", "has the wrong name", True),
        ),
    },
)
COMMENTS = (
    "error|no error here|raises TypeError|Traceback goes to the log|ValueError was fixed|checked|main part|"
    "see the notes|please explore|edit me|KeyError is rare|fast|simple|agent"
).split("|")
REMARKS = (
    "There is an error.|I saw no error.|Please help.|What now?|Is it a TypeError?|It should work.|"
    "I fixed an error before.|I have no idea.|The log is empty.|"
).split("|")


@dataclass(frozen=True)
class Bug:
    """A buggy program, what the user saw, the mode that fits, and the answer."""

    program: str
    fixed: str
    report: str
    mode: str  # "AGENT" or "EDIT"
    kind: str  # "crash", "named line", "wrong value", "failed test"
    answer: str
    test: str  # what the fixed program passes

    @property
    def key(self) -> str:
        """The buggy program: what the split keeps on one side."""
        return f"bugfix {self.program}"

    def row(self) -> dict:
        """The row of an SFT file; `mode` is what evaluation compares the first token with."""
        return {
            "instruction": f"{self.program}\n{self.report}", "input": "", "output": f"<|{self.mode}|>{self.answer}",
            "skill": "bugfix", "mode": self.mode, "kind": self.kind,
        }  # fmt: skip


def run_program(program: str, call: str) -> tuple[object, str]:
    """Runs a program of this module's own making and evaluates one call.

    Returns:
        The value and "" — or None and the last frame of the real traceback, as `print_exc(limit=-1)` shows it.
    """
    namespace: dict = {}
    try:
        exec(compile(program, "main.py", "exec"), namespace)
        return eval(compile(call, "main.py", "eval"), namespace), ""
    except Exception as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        name = frame.tb_frame.f_code.co_name
        source = program.splitlines()[frame.tb_lineno - 1].strip()
        return None, _traceback("main.py", frame.tb_lineno, name, source, error)


def _traceback(file: str, line: int, name: str, source: str, error: Exception) -> str:
    head = f'Traceback (most recent call last):\n  File "{file}", line {line}, in {name}\n    {source}'
    message = str(error)
    return f"{head}\n{type(error).__name__}{': ' + message if message else ''}"


def _fill(rng: random.Random, template: dict) -> dict:
    names = {"f": rng.choice(template["names"].split()), "a": rng.choice(template["params"].split())}
    names["b"] = rng.choice(template.get("b", "b").split())
    names["v"] = rng.choice([v for v in template["v"].split() if v not in names.values()])
    return names


def _programs(rng: random.Random, template: dict, bug: tuple, names: dict) -> tuple[list[str], list[str]]:
    good = [line.format(**names) for line in template["lines"]]
    bad = list(good)
    bad[bug[0] - 1] = bug[1].format(**names)
    comment = f"  # {rng.choice(COMMENTS)}"
    spot = rng.randrange(len(good))
    if rng.random() < 0.7 and spot != bug[0] - 1:
        good[spot] += comment
        bad[spot] += comment
    return good, bad


def _report(rng: random.Random, kind: str, bad: str, call: str, bug: tuple, values: tuple, trace: str) -> str:
    got, want = values
    if kind == "crash":
        return trace
    if kind == "named line":
        return f"Line {bug[0]} {bug[2]}."
    if kind == "failed test":
        source = f"assert {call} == {want!r}"
        return _traceback("test.py", rng.randint(1, 5), "test", source, AssertionError(f"got {got!r}"))
    return f"{call} returns {got!r} but I expected {want!r}."


def random_bug(rng: random.Random, *, held_out: bool = False) -> Bug:
    """Draws a buggy program with its report; the two modes, and the two kinds within each, are equally likely."""
    while True:
        kind = rng.choice(("crash", "named line", "wrong value", "failed test"))
        template = rng.choice(TEMPLATES)
        bug = rng.choice([b for b in template["bugs"] if kind == "named line" or b[3] == (kind == "crash")])
        names = _fill(rng, template)
        good, bad = _programs(rng, template, bug, names)
        call = f"{names['f']}({rng.choice(template['calls'])})"
        got, trace = run_program("\n".join(bad), call)
        want, broken = run_program("\n".join(good), call)
        if broken or bool(trace) != bug[3] or (not bug[3] and got == want):
            continue
        mode = "EDIT" if kind in ("crash", "named line") else "AGENT"
        report = _report(rng, kind, "\n".join(bad), call, bug, (got, want), trace)
        remark = rng.choice(REMARKS)
        line, watch = template["watch"]
        edit = f"line {bug[0]}: {good[bug[0] - 1].strip()}"
        explore = f"run {call} and print {watch.format(**names)} after line {line}"
        result = Bug("\n".join(bad), "\n".join(good), f"{report}\n{remark}".strip(), mode, kind,
                     edit if mode == "EDIT" else explore, f"assert {call} == {want!r}")  # fmt: skip
        if is_held_out(result.key) == held_out:
            return result
