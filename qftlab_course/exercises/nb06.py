"""Exercises of notebook 06, teacher data: pauses, a journal that was cut off, a strict reading, and balance."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.outputs import FORMAT, judge
from qftlab_course.exercises import Exercise, Suspect

TRIES = "python def loop print editor return value".split()


def pause(attempt: int, draw: float, retry_after: float | None = None, base: float = 1.0, cap: float = 60.0) -> float:
    """Seconds before the next try: a share of a limit that doubles up to `cap`, and at least what the server asks."""
    return max(draw * min(cap, base * 2**attempt), retry_after or 0.0)


def _draw_pause(rng: random.Random, size: int) -> tuple:
    # Before and behind the cap; with a server that asks for less and for more than the draw.
    attempt = (0, 1, 3, 2, 9, 4, 12, 5)[size - 1]
    asked = (None, None, None, 30.0, None, 0.25, 90.0, 2.0)[size - 1]
    return attempt, round(rng.uniform(0.3, 0.95), 2), asked, (1.0, 0.25)[size % 2], (60.0, 20.0)[size % 2]


def _paused(grow=lambda base, n: base * 2**n, capped=min, jitter=lambda draw, limit: draw * limit, joined=max):
    def wait(attempt, draw, retry_after=None, base=1.0, cap=60.0):
        return joined(jitter(draw, capped(cap, grow(base, attempt))), retry_after or 0.0)

    return wait


def replay(text: str) -> tuple[dict, int]:
    """The answers of a journal by key, the first of each, and how many characters are whole lines."""
    whole = text[: text.rfind("\n") + 1]
    answers: dict = {}
    for line in whole.splitlines():
        record = json.loads(line)
        answers.setdefault(record["key"], record["answer"])
    return answers, len(whole)


def _draw_journal(rng: random.Random, size: int) -> tuple:
    keys = [f"k{i}" for i in range(1, size)]
    records = [{"key": key, "answer": rng.choice(TRIES)} for key in keys]
    if size > 3:  # asked twice, by a run that was not the last
        records.append({"key": keys[0], "answer": records[0]["answer"] + " again"})
    lines = [json.dumps(record) for record in records]
    last = json.dumps({"key": "last", "answer": rng.choice(TRIES)})
    # The file ends well; in the middle of a line; behind a whole line that has lost its newline only; with nothing.
    tail = ("", last[: len(last) // 2], last, "", last[:1], last, last[:-1], "")[size - 1]
    return ("".join(f"{line}\n" for line in lines) + tail,)


def _replayed(last: bool = False, tolerant: bool = False, dropped: int = 0):
    def load(text):
        answers, whole = {}, text if tolerant else text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        for line in lines[: len(lines) - dropped]:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if last or record["key"] not in answers:
                answers[record["key"]] = record["answer"]
        return answers, len(whole)

    return load


def _replayed_where_it_parses(text):
    """Keeps a last line that parses although it has no newline: the next one would be glued to it."""
    answers, kept = {}, 0
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        answers.setdefault(record["key"], record["answer"])
        kept += len(line)
    return answers, kept


def right_mode(output: str) -> str:
    """The mode token of an answer that is right by the strict reading; "" for any other."""
    verdict = judge(output)
    return verdict.mode if verdict.ok else ""


def _draw_output(rng: random.Random, size: int) -> tuple:
    word, number = rng.choice(TRIES), rng.randint(2, 99)
    code, fixed = f"def f(x):\n    return x + {number}  # {word}", f"def f(x):\n    return x * {number}  # {{{word}}}"
    edit = {"name": "editor", "arguments": {"original_code": code, "modified_code": fixed}}
    run = {"name": "python", "arguments": {"code": f"{code}\nprint(f({number}))"}}
    bare, short = {"name": "python", **run["arguments"]}, {"name": "editor", "arguments": {"code": fixed}}
    more = {"name": "python", "arguments": {**run["arguments"], "why": word}}
    think = f"<think>It is about {word}.</think>\n"
    answers = (
        f"{think}{EDIT}\nI fix it.{json.dumps(edit)}",
        f"{think}{AGENT}\nI run it.{json.dumps(run)}",
        f"{AGENT}\nI run it.{json.dumps(run)}",  # no thinking
        f"{think}I fix it.{json.dumps(edit)}",  # no token
        f"{think}I fix it.{json.dumps(edit)}\n{EDIT}",  # the token comes too late
        f"{think}{AGENT}\nI run it, because {EDIT} would guess.{json.dumps(run)}",  # both
        f"{think}{EDIT}\nI fix it.{json.dumps(edit)[:-1]}",  # never closed
        f"{think}{AGENT}\nI fix it.{json.dumps(edit)}",  # another mode's tool
        f"{think}{EDIT}\nI fix it.{json.dumps(short)}",  # other arguments
        f"{think}{AGENT}\nI run it.{json.dumps(more)}",  # one too many
        f"{think}{AGENT}\nI run it.{json.dumps(bare)}",  # no `arguments`
        f"<think> </think>\n{EDIT}\nI fix it.{json.dumps(edit)}",  # nothing was thought
        f"{think}{EDIT}\nI fix it.{json.dumps(edit)}{json.dumps(edit)}",  # two calls
        f"<think>Not {AGENT}: the error is named.</think>\n{EDIT}\nI fix it.{json.dumps(edit)}",  # named in thought
        f"{think}\n\n{AGENT}\n{json.dumps(run)}",  # blank lines, and no sentence
        f"{think}{EDIT}\nI fix it.{json.dumps(edit)} Done.",  # words behind the call
    )
    return (answers[size - 1],)


def _lenient(output):
    """The course's own checker: some thinking, some token, the right name somewhere."""
    thought = re.findall(r"<think>(.*?)</think>", output, re.DOTALL)
    rest = re.sub(r"<think>.*?</think>", "", output, flags=re.DOTALL)
    token = next((token for token in (EDIT, AGENT) if token in rest), None)
    named = re.search(r'\{\s*"name":\s*"(\w+)"', rest)
    is_right = any(t.strip() for t in thought) and token and named and named[1] == FORMAT[token][0]
    return token if is_right else ""


def _read(skip: str):
    """The strict reading without one of its rules."""

    def mode(output):
        thought, closed, rest = output.removeprefix("<think>").partition("</think>")
        token = next((token for token in (AGENT, EDIT) if rest.lstrip().startswith(token)), None)
        if not closed or token is None:
            return ""
        try:
            call, end = json.JSONDecoder().raw_decode(rest, rest.find("{"))
        except ValueError:
            return ""
        names = [found for found in (AGENT, EDIT) for _ in range(output.count(found))]
        tool, wanted = FORMAT[token]
        rules = {
            "empty-think": thought.strip(),
            "token-in-think": AGENT not in thought and EDIT not in thought,
            "two-tokens": len(names) == 1 or AGENT in thought or EDIT in thought,
            "wrong-tool": call["name"] == tool,
            "wrong-arguments": call.get("arguments", {}).keys() == set(wanted),
            "text-after-call": not rest[end:].strip(),
        }
        if skip == "wrong-tool":  # then its arguments are another tool's as well
            rules["wrong-arguments"] = call["arguments"].keys() == set(dict(FORMAT.values())[call["name"]])
        return token if all(is_kept for name, is_kept in rules.items() if name != skip) else ""

    return mode


def _unparsed(output):
    if not (found := re.fullmatch(r"<think>.*?\S.*?</think>\s*(<\|\w+\|>)[^{]*(\{.*)", output, re.DOTALL)):
        return ""
    return found[1] if output.count("<|") == 1 and f'"{FORMAT[found[1]][0]}"' in found[2] else ""


def balanced(modes: list[str]) -> list[int]:
    """The rows to keep, in order, so that each mode is there equally often: the first of each."""
    least = min(Counter(modes).values(), default=0)
    seen: Counter = Counter()
    kept = []
    for i, mode in enumerate(modes):
        seen[mode] += 1
        if seen[mode] <= least:
            kept.append(i)
    return kept


def _draw_modes(rng: random.Random, size: int) -> tuple:
    counts = ((1, 2), (3, 1), (2, 2), (1, 4), (5, 2), (3, 6), (4, 4), (7, 3))[size - 1]
    modes = ["AGENT"] * counts[0] + ["EDIT"] * counts[1]
    rng.shuffle(modes)
    if size > 3 and modes[0] == modes[-1]:  # the scarce mode not only at the end
        modes.reverse()
    return (modes,)


def _taken(modes, order=1):
    least = min(Counter(modes).values(), default=0)
    rows = {mode: [i for i, m in enumerate(modes) if m == mode][::order][:least] for mode in modes}
    return [i for group in rows.values() for i in group]


EXERCISES = (
    Exercise(
        id="06.1",
        title="How long to wait",
        dots=1,
        minutes=6,
        reference=pause,
        draw=_draw_pause,
        instead="multiply and compare; nothing has to be slept",
        suspects=(
            Suspect("the limit grows without end: past `cap` it stays there", like=_paused(capped=lambda cap, x: x)),
            Suspect("the limit has to double with every attempt", like=_paused(grow=lambda base, n: base * (n + 1))),
            Suspect(
                "the first attempt is number 0, so its limit is `base`",
                like=_paused(grow=lambda b, n: b * 2 ** (n + 1)),
            ),
            Suspect("`base` is not used", like=_paused(grow=lambda base, n: 2.0**n)),
            Suspect("without the draw all threads come back in the same instant", like=_paused(jitter=lambda d, x: x)),
            Suspect(
                "half of the pause is fixed here; the draw goes over all of it, from 0",
                like=_paused(jitter=lambda d, x: x / 2 + d * x / 2),
            ),
            Suspect("`retry_after` is not used: the server knows best", like=_paused(joined=lambda a, b: a)),
            Suspect(
                "a pause that is longer than `retry_after` stays: take the longer one",
                like=_paused(joined=lambda a, b: b or a),
            ),
            Suspect("the two pauses are not added: take the longer one", like=_paused(joined=lambda a, b: a + b)),
            Suspect(
                "the draw is of the limit with its cap, not cut off afterwards",
                like=lambda n, d, r=None, base=1.0, cap=60.0: max(min(cap, d * base * 2**n), r or 0.0),
            ),
        ),
    ),
    Exercise(
        id="06.2",
        title="Read a journal that was cut off",
        dots=2,
        minutes=10,
        reference=replay,
        draw=_draw_journal,
        instead="split the text into lines and read each with json.loads",
        suspects=(
            Suspect(
                "a line without its newline is not whole, even if it can be read: the next one would be glued to it",
                like=_replayed_where_it_parses,
            ),
            Suspect(
                "the count must leave out the piece of a line at the end, or the next line is glued to it",
                like=_replayed(tolerant=True),
            ),
            Suspect(
                "of two answers with one key the first counts: it was given out already", like=_replayed(last=True)
            ),
            Suspect(
                "the last whole line is lost: a file that ends well has no piece of a line", like=_replayed(dropped=1)
            ),
            Suspect(
                "the piece of a line at the end was read as JSON: leave it out first",
                when=lambda args, got, wanted: isinstance(got, json.JSONDecodeError),
            ),
        ),
    ),
    Exercise(
        id="06.3",
        title="The strict reading",
        dots=3,
        minutes=15,
        reference=right_mode,
        draw=_draw_output,
        instead="take the text apart with partition and read the call with json.loads",
        forbidden=("qftlab_course.agent_edit.outputs.judge",),
        sizes=16,
        repeats=3,
        suspects=(
            Suspect(
                "that is the lenient checker: it looks for names, and takes whatever stands around them", like=_lenient
            ),
            Suspect("the call was never read: json.loads finds what a pattern does not", like=_unparsed),
            Suspect(
                "the arguments are not looked at: exactly those of the tool, under `arguments`",
                like=_read("wrong-arguments"),
            ),
            Suspect("the tool is not compared with the mode's", like=_read("wrong-tool")),
            Suspect("a token may stand there once in the whole answer", like=_read("two-tokens")),
            Suspect("the thinking must have a text", like=_read("empty-think")),
            Suspect("a mode must not be named in the thinking either", like=_read("token-in-think")),
            Suspect("behind the call there must be nothing", like=_read("text-after-call")),
        ),
    ),
    Exercise(
        id="06.4",
        title="Balance",
        dots=1,
        minutes=6,
        reference=balanced,
        draw=_draw_modes,
        instead="count the modes first, then go through the rows once",
        suspects=(
            Suspect("rows stay in their order: sort the numbers, not the modes", like=_taken),
            Suspect("of the mode that is there too often the *first* rows stay", like=lambda m: sorted(_taken(m, -1))),
            Suspect("nothing was left out", like=lambda modes: list(range(len(modes)))),
            Suspect(
                "the first rows of all are not balanced: count each mode by itself",
                like=lambda modes: list(range(2 * min(Counter(modes).values(), default=0))),
            ),
        ),
    ),
)
