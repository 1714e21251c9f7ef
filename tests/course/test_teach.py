"""Rows by a teacher: problems, plan, both recipes against a server that fails, a run that is killed five times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from planted_teacher import PlantedTeacher, program, verdict_of

from qftlab.remote.client import BudgetError, ServerError, read_chat
from qftlab.rows.chat import DataError
from qftlab.settings import AGENT, EDIT
from qftlab_course import commands
from qftlab_course.agent_edit.expert import FLAWS, Expert, evidence, find_bug
from qftlab_course.agent_edit.problems import bug_problems, read_problems
from qftlab_course.agent_edit.recipes import can_show, own_error
from qftlab_course.agent_edit.sandbox import levels
from qftlab_course.agent_edit.tasks import TasksConfig, answer_tasks
from qftlab_course.agent_edit.teach import TeachConfig, make_set
from qftlab_course.agent_edit.teacher import Problem, plan
from qftlab_course.flaky import Flaky

assert commands
needs_cpython = pytest.mark.skipif(levels()["bwrap"] != "ready", reason=f"bwrap: {levels()['bwrap']}")
FAULTS = {"429": 0.06, "429-bare": 0.03, "500": 0.06, "reset": 0.05, "cut": 0.03, "html": 0.03, "empty": 0.04}


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


# Problems and plan


def test_problems_of_four_layouts(tmp_path: Path) -> None:
    rows = [
        {"question_id": "a", "question_title": "A", "question_content": "Add.", "starter_code": "class Solution:",
         "public_test_cases": '[{"input": "1\\n2", "output": "3", "testtype": "functional"}]',
         "metadata": '{"func_name": "add"}'},
        {"question_id": "b", "question_title": "B", "turns": ["### Instructions\nx\n### Question:\nDouble it.\n\n"
         "### Format\n```python\nclass Solution:\n    pass\n```\n"], "public_test_cases": "[]"},
        {"task_id": "c", "entry_point": "f", "docstring": "Half of x.", "declaration": "def f(x):\n",
         "buggy_solution": "    return x / 3\n", "canonical_solution": "    return x / 2\n",
         "test": "assert f(4) == 2"},
        {"id": "d", "program": "def g():\n    return 0", "fixed": "def g():\n    return 1", "tests": "assert g() == 1"},
    ]  # fmt: skip
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    a, b, c, d = read_problems([path])
    assert (a.text, a.func_name, a.starter, a.tests[0]["output"]) == ("Add.", "add", "class Solution:", "3")
    assert (b.text, b.starter) == ("Double it.", "class Solution:\n    pass")
    assert (c.program, c.fixed) == ("def f(x):\n    return x / 3\n", "def f(x):\n    return x / 2\n")
    assert (d.program, d.tests) == ("def g():\n    return 0", "assert g() == 1")
    path.write_text('{"question": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"problems.jsonl, line 1 must be of LiveCodeBench"):
        read_problems([path])


def test_livebench_is_read_from_parquet_as_the_original_did(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    original = {"question_content": "Triple it.", "starter_code": "class Solution:", "metadata": '{"func_name": "f"}'}
    rows = [{"question_id": "x", "question_title": "X", "turns": ["### Question:\nTriple it\n"], "task": "coding",
             "public_test_cases": '[{"input": "1", "output": "3", "testtype": "functional"}]',
             "original_json": original}]  # fmt: skip
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    [problem] = read_problems([path])
    assert (problem.id, problem.title, problem.text) == ("x", "X", "Triple it.")
    assert (problem.starter, problem.func_name, len(problem.tests)) == ("class Solution:", "f", 1)


def test_real_problems_are_read(real_data: Path) -> None:
    code = read_problems([real_data / "livecodebench" / "lcb_400.jsonl"])
    assert len(code) == 400 and all(p.text and p.tests for p in code)
    fixes = read_problems([real_data / "humanevalfix" / "humanevalpack_python.jsonl"])
    assert len(fixes) == 164 and all(p.program != p.fixed for p in fixes)
    assert own_error(fixes[0], fixes[0].program, "auto") == "" and own_error(fixes[0], fixes[0].fixed, "auto") is None


def test_a_plan_is_balanced_takes_each_once_and_can_be_drawn_again() -> None:
    problems = [Problem(str(i), "", "") for i in range(10)]
    tasks = plan(problems, 25, (AGENT, EDIT), seed=3)
    assert Counter(task.mode for task in tasks) == {AGENT: 13, EDIT: 12}
    assert Counter(Counter(task.problem.id for task in tasks).values()) == {3: 5, 2: 5}, (
        "none a third time before all twice"
    )
    assert tasks == plan(problems, 25, (AGENT, EDIT), seed=3) != plan(problems, 25, (AGENT, EDIT), seed=4)
    one = [task for task in plan([problems[0]], 14, (AGENT, EDIT)) if task.mode == AGENT]
    assert len({task.choice("abcdefg") for task in one}) == 7, "a problem is worded in all ways before one comes again"


def test_a_plan_gives_each_mode_problems_that_can_show_it() -> None:
    problems = [Problem(str(i), "", "", mode=AGENT if i % 5 else "") for i in range(10)]
    tasks = plan(problems, 8, (AGENT, EDIT))
    assert {task.problem.id for task in tasks if task.mode == EDIT} == {"0", "5"}
    assert not {"0", "5"} & {task.problem.id for task in tasks if task.mode == AGENT}, (
        "those first that fit nothing else"
    )
    with pytest.raises(ValueError, match=r"must have one that can show <\|EDIT\|>, got none"):
        plan(problems[1:3], 4, (AGENT, EDIT))


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": "said"}, "said"),
        ({"content": "said", "reasoning_content": "why\n"}, "<think>why</think>\nsaid"),
        ({"content": "<think>a</think>b", "reasoning": "a"}, "<think>a</think>b"),
        ({"content": None, "tool_calls": [{"function": {"name": "python", "arguments": '{"code": "1"}'}}]},
         '{"name": "python", "arguments": {"code": "1"}}'),
    ],
)  # fmt: skip
def test_what_a_server_took_out_of_an_answer_is_put_back(message: dict, text: str) -> None:
    assert read_chat({"choices": [{"message": message}]}) == text


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 3}}]}]
)
def test_an_answer_without_text_is_refused(answer: dict) -> None:
    with pytest.raises(ValueError, match="message of text"):
        read_chat(answer)


# The expert


def test_the_expert_finds_every_bug_and_the_mode_that_fits() -> None:
    for problem in bug_problems(300, 5):
        found = find_bug(f"Please help.\n\n{problem.program}\n{problem.report}")
        assert (found.program, found.fixed) == (problem.program, problem.fixed)
        assert evidence(problem.report)[0] == problem.mode


def test_without_faults_all_rows_are_right_at_once(tmp_path: Path) -> None:
    with Flaky(Expert(flaws={}, lies=0).answer) as server:
        for recipe in ("whole", "reasoned"):
            options = {"problems": 40, "samples": 40, "url": server.url, "recipe": recipe, "threads": 4}
            paths = make_set(TeachConfig(output=str(tmp_path / f"{recipe}.json"), **options))
            rows = read(paths[0])
            assert [row["item_id"] for row in rows] == list(range(40))
            assert all(row["valid"] and row["tries"] == 1 for row in rows)
            assert Counter(row["expected_type"] for row in rows) == {"AGENT": 20, "EDIT": 20}
    assert [row["output"].partition("</think>")[2][:10] for row in rows]
    assert set(read(paths[1])[0]) == {"instruction", "input", "output"} and not read(paths[2])


def test_a_run_against_faults_gives_the_same_set_as_one_without(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qftlab.remote.client.PAUSE", 0.01)
    sets = []
    for faults, threads in (({}, 1), (FAULTS, 16)):
        with Flaky(Expert(wrong_fixes=0.2).answer, faults, retry_after=0.02) as server:
            config = TeachConfig(problems=40, samples=60, url=server.url, threads=threads, retries=20, seed=2,
                                 output=str(tmp_path / f"{threads}.json"))  # fmt: skip
            sets.append([path.read_bytes() for path in make_set(config)[:3]])
    assert sets[0] == sets[1]
    reasons = Counter(reason for row in json.loads(sets[0][2]) for reason in row["issues"])
    assert reasons["wrong-mode"] and reasons["duplicate"], "60 samples of 40 problems"


def test_what_was_made_before_the_budget_ended_is_written_and_is_not_paid_again(tmp_path: Path) -> None:
    from qftlab.remote.client import Budget

    options = {"problems": 20, "samples": 20, "threads": 2, "output": str(tmp_path / "set.json")}
    with Flaky(Expert(flaws={}, lies=0).answer) as server:
        with pytest.raises(BudgetError, match="budget.requests must cover the next request, got 8"):
            make_set(TeachConfig(url=server.url, budget=Budget(requests=8), **options))
        assert 6 <= len(read(tmp_path / "set.json")) <= 8
        make_set(TeachConfig(url=server.url, **options))
        assert len(read(tmp_path / "set.json")) == 20 and set(server.requests.values()) == {1}


def test_a_server_that_is_down_ends_the_command_in_one_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    from qftlab import cli

    monkeypatch.setattr("qftlab.remote.client.PAUSE", 0.01)
    code = cli.main(["teach-data", "--problems", "4", "--samples", "4", "--retries", "1",
                     "--url", "http://127.0.0.1:9/v1", "--output", str(tmp_path / "x.json")])  # fmt: skip
    told = capsys.readouterr().err
    assert code == 2 and "must answer" in told and "Traceback" not in told
    with pytest.raises(ServerError):
        make_set(
            TeachConfig(problems=4, samples=4, url="http://127.0.0.1:9/v1", retries=0, output=str(tmp_path / "y.json"))
        )


def test_without_a_sandbox_nothing_is_asked(tmp_path: Path, monkeypatch, capsys) -> None:
    from qftlab import cli
    from qftlab_course.agent_edit import recipes

    monkeypatch.setattr(recipes, "levels", lambda: {"monty": "ready", "bwrap": "bwrap is not on the PATH"})
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps(as_livecodebench(Problem("a", "A", "Add.", ()))) + "\n", encoding="utf-8")
    with Flaky(Expert().answer) as server:
        words = ["--url", server.url, "--samples", "2", "--output", str(tmp_path / "x.json")]
        assert cli.main(["teach-data", "--data", str(data), *words]) == 2
    told = capsys.readouterr().err
    assert "bwrap is not on the PATH" in told and "Traceback" not in told and not server.requests


def test_a_problem_whose_tests_cannot_be_run_costs_its_rows_only(tmp_path: Path, caplog) -> None:
    good, bad = [p for p in bug_problems(40, 0) if p.title == "crash"][:2]
    rows = [{**vars(p), "mode": "", "report": ""} for p in (good, bad)]  # the recipe words both modes
    rows[1]["tests"] = "  "
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Flaky(Expert(flaws={}, lies=0).answer) as server:
        config = TeachConfig(data=(str(data),), samples=4, url=server.url, output=str(tmp_path / "x.json"))
        rows = read(make_set(config)[0])
    assert [row["valid"] for row in rows] == [True] * 4, [row["issues"] for row in rows]
    assert {row["question_id"] for row in rows} == {good.id} and "its tests cannot be run" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "data or problems must be given"),
        ({"problems": 4, "data": ("x",)}, "data or problems must be given"),
        ({"problems": 4, "output": "x.txt"}, "output must end in .json"),
        ({"problems": 4, "recipe": "other"}, "recipe must be one of whole, reasoned"),
        ({"problems": 4, "tries": 0}, "tries must be at least 1"),
    ],
)
def test_settings_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeachConfig(**options)
    with pytest.raises(ValueError, match="url must be given"):
        TeachConfig(problems=4).server()


def test_the_tasks_are_answered_by_a_server_in_order(tmp_path: Path) -> None:
    problems = bug_problems(6, 0)
    asked = [f"{p.program}\n{p.report}" for p in problems]
    data = tmp_path / "query_only.json"
    data.write_text(json.dumps([{"Query": text} for text in asked]), encoding="utf-8")
    with Flaky(Expert(flaws={}, lies=0).answer) as server:
        path = answer_tasks(TasksConfig(data=(str(data),), url=server.url, output=str(tmp_path / "hw3_2.json")))
    rows = read(path)
    assert [row["Query"] for row in rows] == asked
    assert [next(m for m in (AGENT, EDIT) if m in row["Output"]) for row in rows] == [p.mode for p in problems]
    data.write_text('[{"Query": "  "}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"query_only.json, row 1 must have a text as 'Query'"):
        answer_tasks(TasksConfig(data=(str(data),), url="http://127.0.0.1:9/v1"))


@pytest.mark.long
def test_the_tasks_are_answered_by_a_local_model(tmp_path: Path) -> None:
    """The course's own model answers bugs in its short form; the token is in the text, and the order is kept."""
    from qftlab_course.stages import stage

    folder = stage("sft").path
    problems = bug_problems(6, 0)
    data = tmp_path / "q.json"
    data.write_text(json.dumps([{"Query": f"{p.program}\n{p.report}"} for p in problems]), encoding="utf-8")
    (tmp_path / "system.txt").write_text("You help.", encoding="utf-8")
    config = TasksConfig(data=(str(data),), model=str(folder), output=str(tmp_path / "out.json"), max_new_tokens=24,
                         system=str(tmp_path / "system.txt"))  # fmt: skip
    rows = read(answer_tasks(config))
    assert [row["Query"] for row in rows] == [row["Query"] for row in read(data)]
    assert all("<|" in row["Output"] for row in rows)


# A run that is killed, as in the original's world


def killed_run(folder: Path, data: Path, teacher: PlantedTeacher, samples: int, kills: int, threads: int, faults: dict):
    """Server, output, and how many answers the kills lost, of a `teach-data` that was killed -9 so many times."""
    output = folder / "training_data" / "set.json"
    journal = output.with_suffix(".journal.jsonl")
    flags = f"--samples {samples} --tries 1 --threads {threads} --retries 40 --timeout 5".split()
    command = [sys.executable, "-m", "qftlab", "teach-data", "--data", str(data), "--output", str(output), *flags]
    env = {**os.environ, "QFTLAB_LAYOUT": "plain"}
    kept, lost = set(), 0

    def lines() -> list[str]:
        text = journal.read_text(encoding="utf-8") if journal.exists() else ""
        return [json.loads(line)["key"] for line in text[: text.rfind("\n") + 1].splitlines()]

    with Flaky(teacher.answer, faults, latency=0.05, retry_after=0.05, burst=0.1, seed=1) as server:
        for kill in range(kills):
            run = subprocess.Popen([*command, "--url", server.url], env=env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
            goal = (kill + 1) * 2 * samples // (kills + 2)
            while len(lines()) < goal and run.poll() is None:
                time.sleep(0.01)
            assert run.poll() is None, "it ended before it was killed"
            run.send_signal(signal.SIGKILL)
            run.wait()
            time.sleep(0.3)  # what was under way is answered to nobody
            before, kept, lost = lost, set(lines()), sum(server.answered.values()) - len(lines())
            assert lost - before <= threads, "only what was under way was answered without a line"
        done = subprocess.run([*command, "--url", server.url], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(lines()) == len(set(lines())) and kept <= set(lines())
    return server, output, lost


def check_killed(
    folder: Path, problems: list[Problem], data: Path, samples: int, kills: int, threads: int, faults: dict
):
    server, output, lost = killed_run(folder, data, PlantedTeacher(problems), samples, kills, threads, faults)
    rows = read(output)
    assert [row["item_id"] for row in rows] == list(range(samples)), "each exactly once"
    planted = {row["item_id"]: verdict_of(row["question_id"], f"<|{row['expected_type']}|>") for row in rows}
    assert {row["item_id"]: (row["issues"] or [""])[0] for row in rows} == planted
    assert sum(count - 1 for count in server.answered.values()) == lost, "the last run asked for nothing twice"
    return server


@needs_cpython
@pytest.mark.long
def test_a_run_killed_twice_asks_for_nothing_that_it_has(tmp_path: Path) -> None:
    cases = [({"input": f"{i}\n", "output": f"{2 * i}\n", "testtype": "stdin"},) for i in range(24)]
    problems = [Problem(f"p{i}", f"P{i}", f"Problem {i}: print the double.", case) for i, case in enumerate(cases)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(as_livecodebench(p)) + "\n" for p in problems), encoding="utf-8")
    check_killed(tmp_path, problems, data, 24, 2, 6, {"500": 0.1, "reset": 0.05})


def as_livecodebench(problem: Problem) -> dict:
    return {"question_id": problem.id, "question_title": problem.title, "question_content": problem.text,
            "public_test_cases": json.dumps(problem.tests), "metadata": "{}", "starter_code": ""}  # fmt: skip


@needs_cpython
@pytest.mark.slow
def test_128_problems_of_livecodebench_and_five_kills(tmp_path: Path, real_data: Path) -> None:
    """A third of the requests fails, in every way."""
    found = read_problems([real_data / "livecodebench" / "lcb_400.jsonl"])
    rows = [json.loads(line) for line in (real_data / "livecodebench" / "lcb_400.jsonl").open(encoding="utf-8")]
    chosen = [i for i, p in enumerate(found) if own_error(p, program(p), "auto") is None][:128]
    assert len(chosen) == 128
    data = tmp_path / "lcb.jsonl"
    data.write_text("".join(json.dumps(rows[i]) + "\n" for i in chosen), encoding="utf-8")
    faults = {"429": 0.04, "429-bare": 0.02, "500": 0.05, "503": 0.02, "reset": 0.04, "slow": 0.02, "cut": 0.03,
              "truncated": 0.03, "html": 0.02, "empty": 0.02, "huge": 0.01}  # fmt: skip
    server = check_killed(tmp_path, [found[i] for i in chosen], data, 128, 5, 32, faults)
    valid = Counter(row["expected_type"] for row in read(tmp_path / "training_data" / "set.json") if row["valid"])
    assert 0.45 <= valid["AGENT"] / sum(valid.values()) <= 0.55, valid
    assert set(server.faults_made) >= set(faults)


# What is learned


@pytest.mark.slow
def test_a_model_that_learned_the_set_picks_the_mode_and_still_does_so_merged_and_exported(tmp_path: Path) -> None:
    """Adapters on the bare base, from rows of the offline teacher; 300 programs that nobody has seen."""
    from qftlab import bundled, cli, generate, load_model, load_rows, load_tokenizer

    with Flaky(Expert().answer, {"500": 0.05}) as server:
        config = TeachConfig(
            problems=600, samples=600, url=server.url, recipe="reasoned", output=str(tmp_path / "set.json")
        )
        rows = make_set(config)[1]
    assert len(read(rows)) >= 400
    train = ["--train.lr", "3e-3", "--train.epochs", "3", "--train.batch_size", "8", "--train.log_every", "1000"]
    assert cli.main(["sft", "--data", str(rows), "--output", str(tmp_path / "runs"), "--lora.rank", "16",
                     "--lora.tokens", "[<|im_start|>,<|im_end|>]", *train]) == 0  # fmt: skip
    run = str(tmp_path / "runs" / "latest")
    assert cli.main(["export", "--model", run, "--output", str(tmp_path / "exported")]) == 0
    held_out = load_rows(bundled("bugfix", "heldout.jsonl"))
    prompts = [[{"role": "user", "content": row["instruction"]}] for row in held_out]
    for folder in (Path(run) / "model", tmp_path / "exported"):
        model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
        said = [a.text for a in generate(model, tokenizer, prompts, max_new_tokens=32, batch_size=150)]
        right = sum(f"<|{row['mode']}|>" in text for row, text in zip(held_out, said, strict=True))
        assert right >= 0.95 * len(held_out), f"{folder.name}: {right} of {len(held_out)}"


def test_flaws_are_shares() -> None:
    assert 0 < sum(FLAWS.values()) < 1 and can_show("auto")(Problem("", "", ""), AGENT)


def test_balance_leaves_the_surplus_of_one_mode_out_and_says_so(tmp_path: Path) -> None:
    with Flaky(Expert(flaws={}, lies=1).answer) as server:
        options = {"problems": 30, "samples": 30, "url": server.url, "tries": 1, "threads": 4}
        plain = make_set(TeachConfig(output=str(tmp_path / "plain.json"), **options))
        assert len(read(plain[1])) == 15 and "are not balanced" in plain[3].read_text(encoding="utf-8")
    with Flaky(Expert(flaws={}, lies=0.5).answer) as server:
        paths = make_set(TeachConfig(output=str(tmp_path / "set.json"), balance=True, **options | {"url": server.url}))
    rows, kept = read(paths[0]), read(paths[1])
    modes = Counter(row["expected_type"] for row in rows if row["valid"])
    assert modes["AGENT"] < modes["EDIT"] == 15 and len(kept) == 2 * modes["AGENT"]
    first = [row["instruction"] for row in rows if row["valid"] and row["expected_type"] == "EDIT"][: modes["AGENT"]]
    assert [row["instruction"] for row in kept if EDIT in row["output"]] == first
    assert sum(row.get("surplus", False) for row in rows) == modes["EDIT"] - modes["AGENT"]


@pytest.mark.long
def test_the_key_is_in_no_file_log_or_error_of_any_command(tmp_path: Path, monkeypatch, capfd, caplog) -> None:
    """The server echoes it in answers, errors, headers and redirects; commands that ask no server run beside."""
    from qftlab import cli

    key = "sk-canary-5d1f0e7a9c3b"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr("qftlab.remote.client.PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("q.json").write_text(json.dumps([{"Query": "It is wrong: x = 1"}] * 4), encoding="utf-8")
    Path("s.txt").write_text("Help.", encoding="utf-8")
    told: list[str] = []

    def run(*words: str) -> int:
        code = cli.main([*words, "--verbose"])
        told.extend(capfd.readouterr())
        return code

    faults = {"echo": 0.2, "echo-error": 0.1, "500": 0.1, "reset": 0.05}
    with Flaky(Expert(flaws={}).answer, faults, key=key) as server:
        some = ("--url", server.url, "--threads", "4")
        assert (
            run("teach-data", "--problems", "16", "--samples", "16", "--output", "set.json", "--retries", "20", *some)
            == 0
        )
        assert run("tasks", "--data", "q.json", "--output", "hw3_2.json", *some) in (0, 2)
        assert any(f"Bearer {key}" in headers.get("authorization", "") for headers in server.headers), "it was sent"
    for fault in ("redirect", "quota", "echo-error", "hang"):
        with Flaky(Expert(flaws={}).answer, {fault: 1.0}, key=key) as server:
            words = (
                "teach-data",
                "--problems",
                "2",
                "--samples",
                "2",
                "--retries",
                "1",
                "--timeout",
                "0.3",
                "--output",
            )
            assert run(*words, f"{fault}.json", "--url", server.url) == 2
    with Flaky(Expert(flaws={}).answer, key="another") as server:  # the key is wrong, and the server quotes it
        assert (
            run("teach-data", "--problems", "2", "--samples", "2", "--output", "wrong.json", "--url", server.url) == 2
        )
    url = f"http://user:{key}@127.0.0.1:9/v1"
    assert run("teach-data", "--problems", "2", "--samples", "2", "--output", "url.json", "--url", url) == 2
    run("validate", "--data", "set.json", "--output", "outputs")
    run("check", "--data", "hw3_2.json")
    few = ("--train.max_steps", "1", "--train.batch_size", "2", "--output", "runs")
    assert run("sft", "--data", "set_alpaca.json", *few) == 0
    assert run("generate", "--prompt", "x", "--model", "runs/latest", "--max_new_tokens", "2") == 0
    assert run("rloo", "--model", "runs/latest", "--problems", "2", "--server.url", "http://127.0.0.1:9/v1",
               "--server.retries", "0", *few) == 2  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [path for path in files if key.encode() in path.read_bytes()]
    assert key not in "".join(told) and key not in caplog.text and len("".join(told)) > 1000


def test_half_a_surrogate_pair_in_an_answer_loses_no_set(tmp_path: Path) -> None:
    def answer(path: str, body: dict) -> dict:
        return {"choices": [{"message": {"content": "<think>\ud83d"}}], "usage": {}}

    with Flaky(answer) as server:
        config = TeachConfig(problems=2, samples=2, tries=1, url=server.url, output=str(tmp_path / "set.json"))
        assert [row["output"] for row in read(make_set(config)[0])] == ["<think>\ud83d"] * 2
