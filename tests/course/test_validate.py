"""The judge of outputs, the validator of sets, and near-duplicates: each reason once with a right twin, and oracles."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab.rows.chat import DataError
from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit import near
from qftlab_course.agent_edit.near import near_duplicates, shingles
from qftlab_course.agent_edit.outputs import FORMAT, REASONS, expected_mode, judge, mend, read_cases
from qftlab_course.agent_edit.outputs import validate_cases as validate
from qftlab_course.agent_edit.validate import RUN, Case

CODE, FIXED = "def f(x):\n    return x - 1", "def f(x):\n    return x + 1"
RUNS = {"name": "python", "arguments": {"code": CODE}}
EDITS = {"name": "editor", "arguments": {"original_code": CODE, "modified_code": FIXED}}
ASK_AGENT, ASK_EDIT = f"It is wrong somewhere:\n{CODE}", f"NameError: name 'y' is not defined\n{CODE}"


def said(call: object = RUNS, token: str = AGENT, think: str = "Let me see.", sentence: str = "I run it: ") -> str:
    text = call if isinstance(call, str) else json.dumps(call)
    return f"<think>{think}</think>\n{token}\n{sentence}{text}"


def edit(**arguments: str) -> str:
    return said({"name": "editor", "arguments": EDITS["arguments"] | arguments}, EDIT)


def row(output: object = None, instruction: object = ASK_AGENT, **more: object) -> dict:
    return {"instruction": instruction, "output": said() if output is None else output, **more}


# Reasons that a file states, because only whoever made its rows can know them.
OF_THE_MAKER = {"fix-fails-tests", "bug-not-as-asked", "no-decision", "tests-cannot-run"}
RIGHT = {
    "agent": said(),
    "edit": said(EDITS, EDIT),
    "white space around the token": f" <think> a </think>\n\n \t{AGENT} {json.dumps(RUNS)}\n\n",
    "no sentence": said(sentence=""),
    "a sentence with braces": said(sentence="I run {f} in {} and then: "),
    "name not first": said({"arguments": {"code": CODE}, "name": "python"}),
    "braces and quotes in a text": said({"name": "python", "arguments": {"code": 'print({"name": "}{"}, "\\"{")'}}),
    "JSON over lines": said(json.dumps(RUNS, indent=2)),
}
WRONG = {
    "no text": (None, "schema"),
    "blank": (" \n", "schema"),
    "no think": (f"{AGENT}\n{json.dumps(RUNS)}", "no-think"),
    "never closed": (said().replace("</think>", ""), "no-think"),
    "before it": ("So: " + said(), "think-place"),
    "in quotes": (f'"{said()}"', "think-place"),
    "call before the token": (f"{json.dumps(RUNS)}<think>a</think>{AGENT}", "think-place"),
    "empty think": (said(think=" \n"), "empty-think"),
    "stray close": (said().replace(AGENT, f"</think>\n{AGENT}"), "stray-think"),
    "stray open": (said(think="a <think> b"), "stray-think"),
    "token in the thinking": (said(think=f"{AGENT}?"), "token-in-think"),
    "token in the thinking only": (said(think=f"{AGENT}?", token=""), "token-in-think"),
    "none": (said(token=""), "no-token"),
    "both": (said(token=f"{AGENT}{EDIT}"), "two-tokens"),
    "twice": (said(token=f"{AGENT}\n{AGENT}"), "two-tokens"),
    "in the code": (said({"name": "python", "arguments": {"code": f"'{EDIT}'"}}), "two-tokens"),
    "late": (said(token=f"I take {AGENT}"), "token-place"),
    "call between": (said("", sentence="").replace(AGENT, json.dumps(RUNS) + AGENT), "token-place"),
    "no call": (said("done"), "no-call"),
    "no name": (said({"code": CODE}), "no-call"),
    "cut off": (said(json.dumps(RUNS)[:-1]), "bad-json"),
    "single quotes": (said(str(RUNS)), "bad-json"),
    "line break in a text": (said('{"name": "python", "arguments": {"code": "a\nb"}}'), "bad-json"),
    "a name twice": (said('{"name": "python", "name": "python", "arguments": {"code": "1"}}'), "bad-json"),
    "nested without end": (said('{"a":' * 9000), "bad-json"),
    "a number too long": (said('{"a":' + "1" * 5000 + "}"), "bad-json"),
    "twice the call": (said(json.dumps(RUNS) * 2), "two-calls"),
    "another object": (said(sentence='{"x": 1} '), "two-calls"),
    "tags": (said(f"<tool_call>\n{json.dumps(RUNS)}\n</tool_call>"), "wrapped-call"),
    "half a tag": (said(f"<tool_call>{json.dumps(RUNS)}"), "wrapped-call"),
    "the other half": (said(f"{json.dumps(RUNS)}</tool_call>"), "wrapped-call"),
    "words after it": (said(json.dumps(RUNS) + " Done."), "text-after-call"),
    "a list": (said(f"[{json.dumps(RUNS)}]"), "text-after-call"),
    "the other tool": (said(EDITS, AGENT), "wrong-tool"),
    "no text as its name": (said({"name": ["python"], "arguments": {"code": CODE}}), "wrong-tool"),
    "flat": (said({"name": "python", "code": CODE}), "wrong-arguments"),
    "as a text": (said({"name": "python", "arguments": json.dumps({"code": CODE})}), "wrong-arguments"),
    "one missing": (said({"name": "editor", "arguments": {"code": CODE}}, EDIT), "wrong-arguments"),
    "one more": (said(RUNS | {"arguments": {"code": CODE, "lines": "1"}}), "wrong-arguments"),
    "beside them": (said(RUNS | {"id": 1}), "wrong-arguments"),
    "no text in it": (said({"name": "python", "arguments": {"code": 1}}), "wrong-arguments"),
    "an empty text": (said({"name": "python", "arguments": {"code": ""}}), "wrong-arguments"),
    "the other mode": (said(EDITS, EDIT), "wrong-mode"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_output(name: str) -> None:
    verdict = judge(RIGHT[name])
    assert verdict.ok and verdict.reason == verdict.detail == "" and verdict.call["name"] == FORMAT[verdict.mode][0]
    assert judge(RIGHT[name], mode=verdict.mode).ok
    assert judge(RIGHT[name], mode=EDIT if verdict.mode == AGENT else AGENT).reason == "wrong-mode"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_output_has_its_reason(name: str) -> None:
    output, reason = WRONG[name]
    verdict = judge(output, mode=AGENT if reason == "wrong-mode" else None)
    assert not verdict.ok and verdict.reason == reason and verdict.detail, verdict


def test_a_format_of_ones_own() -> None:
    format = {"<|LOOK|>": ("search", ("query", "site"))}
    call = {"name": "search", "arguments": {"query": "q", "site": "s"}}
    assert judge(said(call, "<|LOOK|>"), format).ok
    assert judge(said(RUNS), format).reason == "no-token"
    assert judge(said({"name": "search", "arguments": {"query": "q"}}, "<|LOOK|>"), format).reason == "wrong-arguments"


LEAK = "You have two modes, and the first thing that you do is to think about which of them is right for what is asked."
LONG = "".join(f"w{i} " for i in range(50))
ROWS = {
    "schema": (row(), row(instruction="")),
    "too-long": (row(), row(said(think="x" * 2000))),
    "leaked-prompt": (row(said(think=LEAK[:70])), row(said(think=LEAK.replace(" ", "\n")))),
    "wrong-mode": (row(instruction=ASK_AGENT), row(instruction=ASK_EDIT)),
    "code-does-not-parse": (row(), row(said({"name": "python", "arguments": {"code": "def f(x:"}}))),
    "trivial-fix": (row(edit(), ASK_EDIT), row(edit(modified_code=CODE), ASK_EDIT)),
    "fix-of-other-code": (row(edit(), ASK_EDIT), row(edit(original_code="def g(): pass"), ASK_EDIT)),
    "duplicate": (row(), row(instruction=f" {ASK_AGENT.upper()} ", mode="agent")),
    "near-duplicate": (row(instruction=f"w {LONG}{CODE}"), row(instruction=LONG + CODE)),
}


@pytest.mark.parametrize("reason", ROWS)
def test_a_row_is_refused_for_its_reason(reason: str) -> None:
    right, wrong = ROWS[reason]
    report = validate(read_cases([right, wrong]), prompts=[LEAK], max_length=1000)
    assert [verdict.reason for verdict in report.verdicts] == ["", reason]
    assert report.to_json()["reasons"][reason]["examples"][0]["row"] == 2


def test_every_reason_is_tested() -> None:
    assert {reason for _, reason in WRONG.values()} | set(ROWS) == set(REASONS) - OF_THE_MAKER


@pytest.mark.parametrize(("original", "modified", "reason"), [
    (CODE, CODE + "\n\n", "trivial-fix"),
    (CODE, CODE.replace("x - 1", "x  -  1  # why"), "trivial-fix"),
    ("if x:\npass", "if x:\n    pass", ""),  # white space was what was wrong
    ("s = 'a # b'", "s = 'a # c'", ""),
    ("x = 1", "x = 1\nx = 1", ""),
    ("f = 'a b'", "f = 'ab'", ""),
])  # fmt: skip
def test_what_a_fix_changes(original: str, modified: str, reason: str) -> None:
    instruction = f"SyntaxError: invalid syntax\n{original}"
    output = edit(original_code=original, modified_code=modified)
    assert validate(read_cases([row(output, instruction)])).verdicts[0].reason == reason


@pytest.mark.parametrize(
    "code", ["-" * 5000 + "1", "(" * 5000, "lambda:" * 2700 + "1", "x = '\ud800'", "\0", "f'{" * 999]
)
def test_code_that_is_hard_to_parse_ends_nothing(code: str) -> None:
    outputs = [
        said({"name": "python", "arguments": {"code": code}}),
        edit(modified_code=code, original_code=code + " "),
    ]
    report = validate(read_cases([row(outputs[0]), row(outputs[1], "TypeError: x\n" + code)]), max_length=10**6)
    assert {verdict.reason for verdict in report.verdicts} <= {"code-does-not-parse", "trivial-fix", ""}


@pytest.mark.parametrize(("text", "mode"), [
    ("报错信息：SyntaxError: invalid syntax\n修复\n\ndef f(): pass", EDIT),
    ("出现TypeError错误了", EDIT),
    ("if I call it, I get a ValueError\nf(1)", EDIT),
    ("Traceback (most recent call last):\n  File 'a.py', line 1\njson.decoder.JSONDecodeError: Expecting value", EDIT),
    ("It ends with SystemExit.", EDIT),
    ("这个函数有问题\n\ndef f():\n    raise ValueError('x')", AGENT),
    ("Something is wrong:\ntry:\n    f()\nexcept ZeroDivisionError: pass\nraise TypeError", AGENT),
    ("class MyError(Exception):\n    pass\nfrom x import YError", AGENT),
    ("with pytest.raises(KeyError):\n    f()", AGENT),
    ("  File 'test.py', line 2\nAssertionError: got 1", AGENT),
    ("There is an Error or a TypeErrors somewhere", AGENT),
    ("", AGENT),
])  # fmt: skip
def test_the_mode_that_the_evidence_calls_for(text: str, mode: str) -> None:
    assert expected_mode(text) == mode


def test_layouts_are_known_by_their_fields() -> None:
    raw = {"item_id": 1, "question_title": "sums", "expected_type": "edit", "valid": True, "issues": []}
    [raw_case] = read_cases([row(said(EDITS, EDIT), CODE, **raw)])
    assert raw_case == Case(CODE, said(EDITS, EDIT), EDIT, "sums")
    assert read_cases([{"Query": "q", "Output": "o"}]) == [Case("q", "o", AGENT)]
    assert read_cases([row("o", "q", input="more", mode=EDIT)]) == [Case("q\nmore", "o", EDIT)]
    assert read_cases([{"Query": None, "Output": 3}]) == [Case(None, 3, AGENT)], "judged, not refused"


@pytest.mark.parametrize(("rows", "message"), [
    ([row(), {"Query": "q", "Output": "o"}], "a.json, row 2 must have instruction and output, got Query, Output"),
    ([{"Query": "q"}], "a.json, row 1 must have Query and Output, or instruction and output, got Query"),
    ([row(), "text"], "a.json, row 2 must have instruction and output, got str"),
    ([row(), row(expected_type="both")], "a.json, row 2 must have a mode of agent, edit, got 'both'"),
    ([row(), DataError("a.json, line 2: no JSON")], "a.json, line 2: no JSON"),
])  # fmt: skip
def test_a_row_of_no_layout_is_named(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        read_cases(rows, "a.json")


def test_a_limit_is_what_is_allowed() -> None:
    longest = max(len(said()), len(ASK_AGENT))
    reasons = [validate(read_cases([row()]), max_length=longest - less).verdicts[0].reason for less in (0, 1)]
    assert reasons == ["", "too-long"]


@pytest.mark.filterwarnings("error")
def test_code_that_python_warns_of_is_judged_in_silence() -> None:
    output = said({"name": "python", "arguments": {"code": "x = '\\d'"}})
    assert validate(read_cases([row(output)])).verdicts[0].ok


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        validate([], max_length=0)
    with pytest.raises(ValueError, match=r"similarity must be in \(0, 1\], got 1.5"):
        validate([], similarity=1.5)


def test_a_report_counts_what_is_there() -> None:
    """Worked by hand: 6 rows, of them 1 AGENT and 2 EDIT valid, one wrong mode, one without a call, one duplicate."""
    other = edit(original_code="y = 1", modified_code="y = 2")
    rows = [row(kind="a"), row(said(EDITS, EDIT), ASK_EDIT, kind="b"), row(other, "KeyError: 1\ny = 1", kind="b"),
            row(said(EDITS, EDIT), kind="a"), row(said("done"), kind="c"), row(kind="a")]  # fmt: skip
    report = validate(read_cases(rows))
    found = report.to_json()
    assert (found["total"], found["valid"], found["share"]) == (6, 3, 0.5)
    assert found["modes"] == {AGENT: {"valid": 1, "share": 1 / 3}, EDIT: {"valid": 2, "share": 2 / 3}}
    assert {name: of["count"] for name, of in found["reasons"].items()} == {
        "wrong-mode": 1,
        "no-call": 1,
        "duplicate": 1,
    }
    assert found["reasons"]["duplicate"]["examples"] == [{"row": 6, "detail": "of row 1"}]
    assert found["kinds"] == {
        "a": {"total": 3, "valid": 1},
        "b": {"total": 2, "valid": 2},
        "c": {"total": 1, "valid": 0},
    }
    sizes = sorted(len(r["instruction"]) for r in rows[:3])
    assert found["lengths"]["instruction"] == dict(zip(("min", "median", "max"), sizes, strict=True))
    text = report.to_text()
    assert "6 rows, 3 valid (50.0%)" in text and "1 × duplicate" in text and "row 6: of row 1" in text
    assert json.loads(json.dumps(found)) == found and validate(read_cases(rows)).to_text() == text
    assert [case.kind for case in report.valid] == ["a", "b", "b"]


def test_nothing_is_a_sentence() -> None:
    report = validate(read_cases([]))
    assert report.to_text() == "0 rows: there is nothing to judge" and report.to_json()["share"] is None


def test_only_a_valid_row_makes_another_its_duplicate() -> None:
    report = validate(read_cases([row(said("done")), row(), row()]))
    assert [verdict.reason for verdict in report.verdicts] == ["no-call", "", "duplicate"]


def test_a_leak_is_found_wherever_it_begins() -> None:
    prompt = " ".join(f"word{i}" for i in range(99))
    for start in range(0, len(prompt) - 2 * RUN, 7):
        leaked = row(said(think=f"I was told: {prompt[start : start + 2 * RUN]}"))
        assert validate(read_cases([leaked]), prompts=[prompt]).verdicts[0].reason == "leaked-prompt", start
    assert validate(read_cases([row(said(think="<|im_start|>system"))])).verdicts[0].reason == "leaked-prompt"


MENDED = said(sentence="I run it:")


@pytest.mark.parametrize(("output", "mended"), [
    (f'"{MENDED}"', MENDED),
    (f"\n'{MENDED}' ", MENDED),
    (json.dumps(MENDED), MENDED),
    (json.dumps(MENDED, ensure_ascii=False), MENDED),
    (said(f"\n<tool_call>\n{json.dumps(RUNS)}\n</tool_call>\n", sentence="I run it: "), MENDED),
    (f"  {MENDED}\n\n".replace(f"</think>\n{AGENT}\n", f"</think>\n\n  {AGENT}  "), MENDED),
    ("I cannot.", "I cannot."),
    ('"quoted"', '"quoted"'),
    (said(f"<tool_call>{json.dumps(RUNS)[:-1]}</tool_call>"), said(f"<tool_call>{json.dumps(RUNS)[:-1]}</tool_call>")),
    (said(f"<tool_call>{json.dumps(RUNS)}</tool_call> x"), said(f"<tool_call>{json.dumps(RUNS)}</tool_call> x")),
    (said(f"```json\n{json.dumps(RUNS)}\n```"), said(f"```json\n{json.dumps(RUNS)}\n```")),
])  # fmt: skip
def test_mending(output: str, mended: str) -> None:
    assert mend(output) == mended == mend(mended)


PIECES = ["<think>", "</think>", AGENT, EDIT, json.dumps(RUNS), json.dumps(EDITS), "<tool_call>", "</tool_call>",
          '"', "'", "\n", " ", "a", "{", "}", '{"name": "python"', "“", "”"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.sampled_from([said(), said(EDITS, EDIT)]))
def test_mending_changes_nothing_but_white_space_tags_and_quotes(text: str) -> None:
    once = mend(text)
    bare = re.compile(r"\s|</?tool_call>|[\"'“”`]")
    assert mend(once) == once and bare.sub("", once) == bare.sub("", text)
    assert not judge(text).ok or judge(once).ok and judge(once).call == judge(text).call


def pairwise(texts: dict[int, str], similarity: float) -> dict[int, tuple[int, float]]:
    """Every text against every earlier one that was kept, by Python's own sets."""
    kept, found = {}, {}
    for number, text in texts.items():
        parts = re.findall(r"\w+|[^\w\s]", text)
        width = min(5, max(1, len(parts)))
        own = {tuple(parts[i : i + width]) for i in range(len(parts) - width + 1)}
        for earlier, other in kept.items():
            if (share := len(own & other) / max(1, len(own | other))) >= similarity:
                found[number] = earlier, share
                break
        else:
            kept[number] = own
    return found


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.7, 0.8, 0.9, 0.95, 1.0]))
def test_near_duplicates_are_those_of_all_pairs(seed: int, similarity: float) -> None:
    draw = random.Random(seed)
    bases = [[draw.choice("abcdefgh") * draw.randrange(1, 4) for _ in range(draw.randrange(80))] for _ in range(3)]
    texts = {}
    for number in range(0, 90, 3):
        parts = list(draw.choice(bases))
        for _ in range(draw.randrange(4) if parts else 0):
            parts[draw.randrange(len(parts))] = draw.choice("xyzabc+")
        texts[number] = " ".join(parts[: draw.choice([None, None, 3, 20])])
    assert near_duplicates(texts, similarity) == pairwise(texts, similarity)


def test_similarity_by_hand() -> None:
    """10 words are 6 runs of five; another last word changes one of them: 5 common of 7."""
    one, two = "a b c d e f g h i j", "a b c d e f g h i k"
    assert len(shingles(one)) == 6
    assert near_duplicates({4: one, 9: two}, 0.7) == {9: (4, pytest.approx(5 / 7))}
    assert near_duplicates({4: one, 9: two}, 0.72) == {}
    assert len(shingles("这个函数有问题")) == 3, "a character is a part where no blanks are set"
    assert len(shingles("")) == 0 and near_duplicates({0: "", 1: ""}) == {}


@pytest.mark.parametrize(("slots", "values", "most"), [((50,), 900, 1), ((20, 70), 30, 5)])
def test_the_time_is_linear_where_all_are_alike(slots: tuple, values: int, most: int, monkeypatch) -> None:
    """Texts of one template, just below the threshold: what each is compared with does not grow with their number.

    With one word of its own the order of the members alone rules all others out, but for the same text; else a limit.
    """
    compared = []
    real = near._similarities
    monkeypatch.setattr(near, "_similarities", lambda own, others: compared.append(len(others)) or real(own, others))
    monkeypatch.setattr(near, "MOST", 5)
    draw = random.Random(0)
    base = [f"w{draw.randrange(500)}" for _ in range(100)]
    texts = {}
    for number in range(1000):
        changed = {at: f"u{draw.randrange(values)}" for at in slots}
        texts[number] = " ".join(changed.get(at, word) for at, word in enumerate(base))
    near_duplicates(texts)
    assert len(compared) == 1000 and max(compared) == most


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_two_minutes_of_a_core() -> None:
    """Linear: twice the rows take twice the time, within a fifth. A tenth are near-duplicates."""
    times = {}
    for count in (25_000, 50_000, 100_000):
        cases = read_cases(many_rows(count))
        start = time.process_time()
        report = validate(cases, prompts=[LEAK * 20])
        times[count] = time.process_time() - start
        assert report.to_json()["reasons"]["near-duplicate"]["count"] == count // 10
        assert len(report.valid) == count - count // 10
    print("\nCPU seconds:", {count: round(seconds, 1) for count, seconds in times.items()})
    assert times[100_000] < 120 and times[100_000] < 2.4 * times[50_000] < 2.4 * 2.4 * times[25_000]


def many_rows(count: int) -> list[dict]:
    """Programs of 20 lines from 128 problems, each with its own bug; each tenth differs in its first words only."""
    draw = random.Random(0)
    names = [f"name{i}" for i in range(3000)]
    rows: list[dict] = []
    for number in range(count):
        problem = random.Random(draw.randrange(128))
        lines = [f"def {problem.choice(names)}(a, b):"]
        lines += [f"    {problem.choice(names)} = {problem.choice(names)} + {problem.randrange(99)}" for _ in range(18)]
        good = "\n".join([*lines, "    return a"])
        for at in draw.sample(range(1, 19), 5):
            lines[at] = f"    {draw.choice(names)} = {draw.choice(names)} - {draw.randrange(99)}"
        bad = "\n".join([*lines, "    return a"])
        think = " ".join(draw.choice(names) for _ in range(60))
        call = {"name": "editor", "arguments": {"original_code": bad, "modified_code": good}}
        output, asked = said(call, EDIT, think), f"NameError: name 'x' is not defined\n{bad}"
        if number % 10 == 9:
            output, asked = rows[-1]["output"], "Please: " + rows[-1]["instruction"]
        elif number % 2:
            call = {"name": "python", "arguments": {"code": bad}}
            output, asked = said(call, AGENT, think), f"I cannot see what is wrong.\n{bad}"
        rows.append(row(output, asked))
    return rows


def test_the_evidence_rule_agrees_with_every_row_of_the_bug_set() -> None:
    from qftlab.files import bundled
    from qftlab.rows.sources import load_rows

    for name in ("train", "development", "heldout"):
        rows = load_rows(bundled("bugfix", f"{name}.jsonl"))
        assert [expected_mode(row["instruction"]) for row in rows] == [f"<|{row['mode']}|>" for row in rows]


def test_a_row_that_its_maker_refused_stays_refused_with_his_reason() -> None:
    refused = row(valid=False, issues=["fix-fails-tests"])
    other = row(instruction=f"Another:\n{CODE}", valid=False, issues=["of an older version"])
    assert [v.reason for v in validate(read_cases([refused, other])).verdicts] == ["fix-fails-tests", ""]
