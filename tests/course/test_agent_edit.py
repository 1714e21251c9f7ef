"""The project of the two tokens: the course's checker against a second reading of its rules, and the commands."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qftlab import cli
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.settings import AGENT, EDIT
from qftlab_course.agent_edit.check import check_file, course_verdict
from qftlab_course.agent_edit.outputs import FORMAT, judge
from qftlab_course.agent_edit.tokens import token_tasks

ROOT = Path(__file__).resolve().parents[2]
CODE, FIXED = "def f(x):\n    return x - 1", "def f(x):\n    return x + 1"
RUNS = json.dumps({"name": "python", "arguments": {"code": CODE}})
EDITS = json.dumps({"name": "editor", "arguments": {"original_code": CODE, "modified_code": FIXED}})
AGENT_SAID, EDIT_SAID = f"<think>a</think>\n{AGENT}\nI run it{RUNS}", f"<think>a</think>\n{EDIT}\nI fix it{EDITS}"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def second_reading(output: str) -> tuple[bool, str | None, bool]:
    """The rules of the course's checker, read a second time: (has thinking, mode, calls the mode's tool).

    Character by character, without regular expressions: what stands between the first <think> and the next </think> is
    a block; of the rest, `{` white space `"name"` white space `:` white space and a text in quotes is a call, and the
    search goes on behind it.
    """
    thoughts, rest = without_thoughts(output)
    mode = "EDIT" if EDIT in rest else "AGENT" if AGENT in rest else None
    names, at = [], 0
    while at < len(rest):
        end = named_object(rest, at) if rest[at] == "{" else None
        if end:
            names.append(rest[: end - 1].rpartition('"')[2])
        at = end or at + 1
    return bool(thoughts.strip()), mode, {"EDIT": "editor", "AGENT": "python", None: None}[mode] in names


def without_thoughts(text: str) -> tuple[str, str]:
    """The thoughts, and the text without their blocks."""
    head, opened, tail = text.partition("<think>")
    block, closed, after = tail.partition("</think>")
    if not opened or not closed:
        return "", text
    thoughts, rest = without_thoughts(after)
    return block + thoughts, head + rest


def named_object(text: str, at: int) -> int | None:
    """Where the text in quotes of an object that starts with a name ends, its `{` being at `at`; None if it is none."""
    at += 1
    for sign in ('"name"', ":", '"'):
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(sign, at):
            return None
        at += len(sign)
    end = text.find('"', at)
    return end + 1 if end > at else None


PIECES = [
    *("<think>", "</think>", "<think>a</think>", "<think> \n</think>", AGENT, EDIT, "<|AGENT", "|>"),
    *(
        RUNS,
        EDITS,
        RUNS.replace("{", "{\n ", 1),
        '{"name" :\t"editor"',
        "{'name': 'python'}",
        '{"name": ""}',
        '{"name": "x{',
    ),
    *('{"arguments": {}, "name": "python"}', '{"name": "pyth', "{", "}", '"', "\n", " ", "a", "\u3000", "<tool_call>"),
]


def mutated(draw: random.Random) -> str:
    """A right output with a few changes: parts cut out, doubled, moved, put in or replaced."""
    parts = list(draw.choice([["<think>", "a", "</think>", "\n", AGENT, "\n", "I run it", RUNS],
                              ["<think>", "a", "</think>", "\n", EDIT, "\n", "I fix it", EDITS]]))  # fmt: skip
    for _ in range(draw.randrange(5)):
        at, kind = draw.randrange(len(parts)), draw.randrange(5)
        if kind == 0 and len(parts) > 1:
            del parts[at]
        elif kind == 1:
            parts.insert(draw.randrange(len(parts)), parts[at])
        elif kind == 2:
            parts.insert(draw.randrange(len(parts)), parts.pop(at))
        elif kind == 3:
            parts.insert(at, draw.choice(PIECES))
        else:
            cut = draw.randrange(len(parts[at]) + 1)
            parts[at] = parts[at][:cut] + draw.choice(["", *PIECES]) + parts[at][cut:]
    return "".join(parts)


@settings(max_examples=2000)
@given(st.randoms(use_true_random=False).map(mutated) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_course_level_is_the_checker_described(output: str) -> None:
    verdict = course_verdict(output)
    assert (verdict.has_think, verdict.mode, verdict.calls_right) == second_reading(output)
    assert verdict.passed == (verdict.has_think and verdict.mode is not None and verdict.calls_right)
    assert verdict.passed == (not verdict.issues)
    if judge(output).ok and '{"name"' in output.replace("\n", "").replace(" ", ""):
        assert verdict.passed, "what is strictly right passes the course's checker, if its name comes first"


@pytest.mark.parametrize(("output", "passed"), [
    (AGENT_SAID, True),
    (EDIT_SAID, True),
    (AGENT_SAID.replace('"}}', ""), True),  # does not parse
    ('<think>a</think><|AGENT|>{"name": "python"', True),  # no arguments
    (f"{RUNS}<think>a</think>{AGENT}", True),  # the call before the token
    (f"<think>a</think>{AGENT}{EDIT}{RUNS}", False),  # both: EDIT is looked for first
    (f"<think>a</think>{AGENT}{EDIT}{EDITS}", True),
    (f"<think>a</think>{AGENT}{EDITS}{RUNS}", True),  # one of several calls is enough
    (f"<think></think><think>b</think>{AGENT}{RUNS}", True),
    (f"<think> </think>{AGENT}{RUNS}", False),
    (f"<think>{AGENT}{RUNS}</think>", False),  # the thinking is cut out
    (f"<think>a</think></think>{AGENT}{RUNS}", True),  # a stray tag
    (f'"{AGENT_SAID}"', True),
    (f"<think>a</think>{AGENT}<tool_call>{RUNS}</tool_call>", True),
    ('<think>a</think><|AGENT|>{"arguments": {"code": "1"}, "name": "python"}', False),
    (f"<think>a</think>{AGENT}{RUNS}".replace('"', "'"), False),
    ('<think>a</think><|AGENT|>{"name": "{"name": "python"}', False),  # the first object ends behind its quotes
])  # fmt: skip
def test_what_the_course_takes_and_refuses(output: str, passed: bool) -> None:
    assert course_verdict(output).passed is passed
    has_think, mode, is_called = second_reading(output)
    assert (has_think and mode is not None and is_called) is passed


def test_many_open_tags_take_linear_time() -> None:
    assert not course_verdict("<think>" * 200_000).has_think


def test_the_files_of_the_course(real_data: Path) -> None:
    folder = real_data / "agent_edit"
    report = check_file(folder / "hw3_2.json")
    assert (report.passed, report.points, report.is_right) == (10, 8, True)
    strict = check_file(folder / "hw3_2.json", "strict")
    faults = {n: found[0].partition(":")[0] for n, found in enumerate(strict.issues) if found}
    assert faults == {0: "wrong-arguments", 1: "wrong-mode", 4: "wrong-arguments", 9: "wrong-arguments"}
    assert strict.points == 8, "the official points do not depend on the level"
    for level in ("course", "strict"):
        assert check_file(folder / "query_and_output.json", level).passed == 20
    first = check_file(folder / "hw3_1.json")
    assert (first.kind, first.passed, first.points) == ("hw3_1", 20, 2)


@pytest.mark.long
def test_tokens_writes_the_file_of_the_course(real_data: Path, capsys, tmp_path: Path) -> None:
    """Byte by byte; and the folder's tokenizer has the tokens."""
    data = real_data / "agent_edit"
    output, folder = tmp_path / "tasks/hw3_1.json", tmp_path / "tokenizer"
    asked = ("--data", data / "query_and_output.json", "--output", output, "--tokenizer", folder)
    code, out, _ = run(capsys, "tokens", "--model", real_data / "qwen3-0.6b", *asked)
    assert code == 0 and "<|AGENT|>: id 151669, new" in out
    assert output.read_bytes() == (data / "hw3_1.json").read_bytes()
    tokenizer = load_tokenizer(folder)
    assert tokenizer(EDIT, add_special_tokens=False).input_ids == [151670]
    assert run(capsys, "check", "--data", output)[0] == 0
    assert run(capsys, "tokens", "--model", folder, *asked[:4], "--tokenizer", folder)[0] == 2, "its own folder"
    code, out, _ = run(capsys, "tokens", "--model", real_data / "qwen3-0.6b", *asked)
    assert code == 0, "a tokenizer alone is replaced"


def test_tokens_on_tiny(tmp_path: Path, capsys) -> None:
    tokenizer = load_tokenizer("tiny")
    changes = extend_tokenizer(tokenizer)
    found = token_tasks(tokenizer, [{"Query": " q \n", "Output": f"\n{AGENT}x "}])
    [task] = found["tasks"]
    assert task["text"] == f"q\n{AGENT}x" and changes.tokens[0].id in task["token_ids"]
    assert task["decoded_text"] == tokenizer.decode(task["token_ids"], skip_special_tokens=False)
    assert [token["id"] for token in found["special_tokens"]] == [token.id for token in changes.tokens]
    data = write(tmp_path / "rows.json", [{"Query": "q", "Output": "o"}, {"Query": "q"}])
    asked = ("tokens", "--data", data, "--output", tmp_path / "o.json", "--tokenizer", tmp_path / "t")
    code, _, err = run(capsys, *asked)
    assert code == 2 and "rows.json, row 2 must have the texts Query and Output, got Query" in err
    assert not (tmp_path / "t").exists() and not (tmp_path / "o.json").exists(), "nothing is half written"
    (tmp_path / "t").mkdir()
    (tmp_path / "t/config.json").write_text("{}")
    code, _, err = run(capsys, *asked)
    assert code == 2 and "config.json" in err and "choose another --tokenizer" in err
    code, _, err = run(capsys, "tokens", "--data", data, "--output", data)
    assert code == 2 and "output must be another file than data" in err


def test_check_prints_counts_points_and_items(capsys, tmp_path: Path) -> None:
    """Worked by hand: 2 of 6 pass; one lacks its thinking and its marker, two call wrongly, one has no text."""
    both = f"<think>a</think>{AGENT}{EDIT}{RUNS}"
    outputs = [AGENT_SAID, EDIT_SAID, "done", both, f"<think>a</think>{EDIT}", None]
    file = write(tmp_path / "hw3_2.json", [{"Query": "q", "Output": output} for output in outputs])
    code, out, _ = run(capsys, "check", "--data", file)
    assert code == 1 and "total 6, passed 2, failed 4, pass rate 33.3%" in out
    assert "missing think 1, missing marker 1, wrong call 2, no Output that is a text 1" in out
    assert "official points for hw3_2: 2 of 8" in out and "item 1: passed\n" in out
    assert "item 3: missing think, missing marker\nitem 4: wrong call: EDIT needs editor, got ['python']" in out
    code, out, _ = run(capsys, "check", "--data", file, "--level", "strict")
    assert code == 1 and "item 1: passed\nitem 2: wrong-mode" in out and "item 4: two-tokens" in out
    assert run(capsys, "check", "--data", write(tmp_path / "right.json", [{"Output": EDIT_SAID}]))[0] == 0
    code, out, _ = run(capsys, "check", "--data", write(tmp_path / "none.json", []))
    assert code == 1 and out.startswith("0 items: there is nothing to check")
    many = [{"Output": AGENT_SAID}] * 11
    assert check_file(write(tmp_path / "many.json", many)).points == 8


@pytest.mark.parametrize(("content", "points"), [
    ({"special_tokens": [{"token": AGENT, "id": 9}], "tasks": [{"token_ids": [1, 9]}]}, 2),
    ({"special_tokens": [{"token": AGENT, "id": 9}], "tasks": [{"token_ids": [1, 9]}, {"token_ids": [1]}]}, 0),
    ({"special_tokens": [{"token": AGENT, "id": 9}], "tasks": []}, 0),
    ({"special_tokens": [], "tasks": [{"token_ids": [1, 9]}]}, 0),
    ({"tasks": [{"token_ids": [1, 9]}]}, 0),
    ({"special_tokens": "x", "tasks": [3, {"token_ids": 9}, {}]}, 0),
])  # fmt: skip
def test_points_of_the_first_homework(capsys, tmp_path: Path, content: dict, points: int) -> None:
    code, out, _ = run(capsys, "check", "--data", write(tmp_path / "hw3_1.json", content))
    assert f"official points for hw3_1: {points} of 2" in out and code == (0 if points else 1)


@pytest.mark.parametrize(("text", "message"), [
    ('[{"Query": "q"}]', "must have rows with Output, as hw3_2.json has"),
    ("{", "is not JSON"),
    ('{"a": 1}', "must hold a list of rows"),
])  # fmt: skip
def test_what_cannot_be_checked_is_a_mistake_of_the_users(capsys, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hw3_2.json").write_text(text)
    code, _, err = run(capsys, "check", "--data", tmp_path / "hw3_2.json")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert run(capsys, "check", "--data", tmp_path / "none.json")[0] == 2
    assert run(capsys, "check", "--level", "lenient")[0] == 2


def rows() -> list[dict]:
    wrapped = EDIT_SAID.replace(EDITS, f"\n<tool_call>\n{EDITS}\n</tool_call>")
    return [
        {"instruction": f"Wrong: {CODE}", "output": AGENT_SAID, "expected_type": "agent", "question_title": "sums"},
        {"instruction": f"TypeError: x\n{CODE}", "input": "more", "output": wrapped, "question_title": "sums"},
        {"instruction": "Hm.", "output": "I cannot \ud800.", "question_title": "trees \udcff"},
    ]


def test_validate_writes_the_right_rows_and_a_report(capsys, tmp_path: Path) -> None:
    file = write_raw(tmp_path / "teacher.json", rows())
    before, out_folder = file.read_bytes(), tmp_path / "outputs"
    code, out, _ = run(capsys, "validate", "--data", file, "--output", out_folder, "--keep_invalid", "true")
    assert code == 1 and "3 rows, 1 valid (33.3%)" in out and file.read_bytes() == before
    places = {path.relative_to(out_folder).as_posix() for path in out_folder.rglob("*") if path.is_file()}
    assert places == {"reports/teacher_quality_report.txt", "reports/teacher_quality_report.json",
                      "reports/teacher_quality_report.html", "validation/teacher_valid_alpaca.json",
                      "validation/teacher_invalid.json"}  # fmt: skip
    assert all(str(out_folder / place) in out for place in places)
    right = json.loads((out_folder / "validation/teacher_valid_alpaca.json").read_text(encoding="utf-8"))
    assert right == [{"instruction": f"Wrong: {CODE}", "input": "", "output": AGENT_SAID}]
    refused = json.loads((out_folder / "validation/teacher_invalid.json").read_text(encoding="utf-8"))
    assert [(one["quality"]["row"], one["quality"]["reason"]) for one in refused] == [
        (2, "wrapped-call"),
        (3, "no-think"),
    ]
    assert {k: v for k, v in refused[1].items() if k != "quality"} == rows()[2]
    found = json.loads((out_folder / "reports/teacher_quality_report.json").read_text(encoding="utf-8"))
    assert found["kinds"] == {"sums": {"total": 2, "valid": 1}, "trees \udcff": {"total": 1, "valid": 0}}
    page = (out_folder / "reports/teacher_quality_report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == page.count('alt="') == 2 and "wrapped-call" in page and "trees" in page


def write_raw(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_fix_mends_into_a_new_file(capsys, tmp_path: Path) -> None:
    file = write_raw(tmp_path / "rows.json", rows()[:2])
    before = file.read_bytes()
    code, out, _ = run(capsys, "validate", "--data", file, "--output", tmp_path, "--fix", "true")
    assert code == 0 and "1 outputs were mended" in out and file.read_bytes() == before
    right = json.loads((tmp_path / "validation/rows_valid_alpaca.json").read_text(encoding="utf-8"))
    assert right[1] == {"instruction": f"TypeError: x\n{CODE}", "input": "more", "output": EDIT_SAID}
    assert not (tmp_path / "validation/rows_invalid.json").exists()


def test_validate_takes_limits_and_prompts(capsys, tmp_path: Path) -> None:
    told = "The first thing that you do is to think about which of the two modes fits what you are asked to do now."
    (tmp_path / "system.txt").write_text(told)
    leaky = AGENT_SAID.replace("<think>a", f"<think>{told}")
    file = write_raw(tmp_path / "rows.json", [rows()[0], rows()[0] | {"output": leaky}])
    asked = ("validate", "--data", file, "--output", tmp_path)
    code, out, _ = run(capsys, *asked, "--prompts", tmp_path / "system.txt")
    assert code == 1 and "1 × leaked-prompt" in out
    assert "2 × too-long" in run(capsys, *asked, "--max_length", "20")[1]
    assert run(capsys, *asked, "--similarity", "0")[0] == 2


def test_validate_of_nothing_is_a_sentence(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "validate", "--data", write(tmp_path / "none.json", []), "--output", tmp_path)
    assert code == 1 and out.startswith("0 rows: there is nothing to judge")
    assert json.loads((tmp_path / "validation/none_valid_alpaca.json").read_text()) == []


@pytest.mark.parametrize(("content", "message"), [
    ([{"Query": "q", "Output": "o"}, rows()[0]], "rows.json, row 2 must have Query and Output"),
    ([{"a": 1}], "rows.json, row 1 must have Query and Output, or instruction and output, got a"),
])  # fmt: skip
def test_validate_names_the_row_that_it_does_not_know(capsys, tmp_path: Path, content: list, message: str) -> None:
    code, _, err = run(
        capsys, "validate", "--data", write_raw(tmp_path / "rows.json", content), "--output", tmp_path / "o"
    )
    assert code == 2 and message in err and not (tmp_path / "o").exists()


def test_validate_never_writes_over_its_data(capsys, tmp_path: Path) -> None:
    """Not even where a link makes one of the other."""
    file = write_raw(tmp_path / "rows.json", rows())
    place = tmp_path / "validation/rows_valid_alpaca.json"
    place.parent.mkdir()
    place.hardlink_to(file)
    code, _, err = run(capsys, "validate", "--data", file, "--output", tmp_path)
    assert code == 2 and "output must not be the data itself" in err and json.loads(file.read_text()) == rows()


def test_the_formats_agree() -> None:
    """The checker's tools are those of the validator's format."""
    from qftlab_course.agent_edit.check import TOOLS

    assert {f"<|{mode}|>": tool for mode, tool in TOOLS.items()} == {token: tool for token, (tool, _) in FORMAT.items()}


@pytest.mark.parametrize("name", ["tokens", "check", "validate"])
def test_help_does_not_wait_for_torch(name: str) -> None:
    code = f"import sys; from qftlab.cli import main; main(['{name}', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr
