"""`evaluate`: what its folder holds, what a killed or changed run does, leaderboards, servers, references."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qftlab import cli
from qftlab.files import bundled
from qftlab.model.loading import load_model, save_model
from qftlab.remote import client as client_module
from qftlab.rows.examples import encode_rows
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab_course import measure
from qftlab_course import responses as responses_module
from qftlab_course.asking import ServerModel, read_answer
from qftlab_course.commands import EvaluateConfig
from qftlab_course.evaluation import evaluate, scorers_for
from qftlab_course.flaky import Flaky, _write
from qftlab_course.references import measure_references
from qftlab_course.results import last_expression, official_score, tinker_results
from qftlab_course.scores import SCORERS, score_row

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-Canary/0123456789+abcdef"
FILES = {
    "settings.json",
    "rows.jsonl",
    "responses.jsonl",
    "scores.jsonl",
    "evaluation_results.json",
    "submission.jsonl",
}


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


QUESTIONS = [{"instruction": f"What is {a} + {b}?", "input": "", "output": str(a + b)} for a in (1, 2) for b in (3, 4)]
SAMPLED = ("--num_samples", 3, "--sampling.temperature", 0.6, "--sampling.top_k", 20, "--sampling.top_p", 0.95,
           "--max_new_tokens", 6)  # fmt: skip


@pytest.fixture
def few(monkeypatch) -> None:
    """Two rows of three samples a batch."""
    monkeypatch.setattr(responses_module, "BATCH", 6)


@pytest.fixture
def never(monkeypatch):
    """Makes asking a mistake."""
    return lambda: monkeypatch.setattr(measure, "generate", lambda *_, **__: pytest.fail("it asked"))


def test_what_a_folder_holds(capsys, tmp_path: Path, few) -> None:
    data, folder = write(tmp_path / "q.jsonl", *QUESTIONS), tmp_path / "out/name"
    code, out, _ = run(capsys, "--data", data, "--output", folder, "--pass_k", "[1,3]", *SAMPLED)
    assert code == 0 and "exact, pass@3" in out
    assert "with this many prompts you can see a difference of" in out and "points of contained (4 prompts)" in out
    assert files(folder).keys() == FILES
    assert lines(folder / "rows.jsonl") == QUESTIONS
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["model"], settings["data"], settings["seed"], settings["num_samples"]) == ("tiny", [data], 0, 3)
    assert settings["sampling"]["top_k"] == 20 and settings["scorers"] == ["exact", "contained"]
    said = lines(folder / "responses.jsonl")
    assert [(one["row"], one["sample"]) for one in said] == [(row, sample) for row in range(4) for sample in range(3)]
    assert list(said[0]) == ["row", "sample", "prompt", "response", "token_ids", "finish_reason"]
    assert said[4]["prompt"] == [{"role": "user", "content": QUESTIONS[1]["instruction"]}]
    assert {one["finish_reason"] for one in said} <= {"stop", "length"} and len({one["response"] for one in said}) > 4
    scores = lines(folder / "scores.jsonl")
    assert [list(one) for one in scores] == [["row", "sample", "exact", "contained"]] * 12
    results = json.loads((folder / "evaluation_results.json").read_text())
    assert (results["model"], results["num_rows"], results["num_samples"], results["failed"]) == ("tiny", 4, 3, 0)
    exact = results["scores"]["exact"]
    assert exact["mean"] == sum(one["exact"] for one in scores) / 12 and (exact["rows"], exact["answers"]) == (4, 12)
    assert list(exact["pass_at_k"]) == ["1", "3"] and {"mean", "low", "high"} <= exact.keys()
    assert results["total"] == 12 and results["loss"]["rows"] == 4


def test_what_is_there_is_scored_anew_and_not_asked_again(capsys, tmp_path: Path, never) -> None:
    data, folder = write(tmp_path / "q.jsonl", *QUESTIONS), tmp_path / "out"
    assert run(capsys, "--data", data, "--output", folder, *SAMPLED)[0] == 0
    before = files(folder)
    never()
    assert run(capsys, "--data", data, "--output", folder, *SAMPLED)[0] == 0 and files(folder) == before
    code, _, err = run(capsys, "--data", data, "--output", folder, *SAMPLED, "--scorers", "[exact_match,math:dist]")
    assert code == 2 and "scorer math:dist must score row 1, got ValueError" in err
    code, out, _ = run(capsys, "--data", data, "--output", folder, *SAMPLED, "--scorers", "contains_answer")
    assert code == 0 and "contains_answer" in out
    after = files(folder)
    assert [list(one) for one in lines(folder / "scores.jsonl")] == [["row", "sample", "contains_answer"]] * 12
    assert {name for name in FILES if before[name] != after[name]} == {"settings.json", "scores.jsonl",
                                                                       "evaluation_results.json"}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    (["--seed", 1], "seed must be 0, with which the responses in"),
    (["--max_new_tokens", 7], "max_new_tokens must be 6"),
    (["--sampling.top_k", 0], "sampling must be {'temperature': 0.6, 'top_k': 20"),
    (["--model", bundled("stages/sft")], "model must be 'tiny'"),
    (["--limit", 2], "limit must be None"),
])  # fmt: skip
def test_another_setting_is_named(capsys, tmp_path: Path, never, change: list, message: str) -> None:
    data, folder = write(tmp_path / "q.jsonl", *QUESTIONS), tmp_path / "out"
    assert run(capsys, "--data", data, "--output", folder, *SAMPLED)[0] == 0
    before = files(folder)
    never()
    code, _, err = run(capsys, "--data", data, "--output", folder, *SAMPLED, *change)
    assert code == 2 and message in err and "choose another output" in err and len(err.strip().splitlines()) == 1
    assert files(folder) == before


def test_other_rows_under_the_same_name_are_refused(capsys, tmp_path: Path) -> None:
    data, folder = write(tmp_path / "q.jsonl", *QUESTIONS), tmp_path / "out"
    assert run(capsys, "--data", data, "--output", folder, *SAMPLED)[0] == 0
    write(tmp_path / "q.jsonl", *QUESTIONS[:3])
    code, _, err = run(capsys, "--data", data, "--output", folder, *SAMPLED)
    assert code == 2 and "data must hold the rows of" in err


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path, monkeypatch, few) -> None:
    """`latest` may point elsewhere by the time a killed evaluation goes on."""
    (tmp_path / "m").symlink_to(bundled("stages/sft"))
    config = EvaluateConfig(model=str(tmp_path / "m"), data=write(tmp_path / "q.jsonl", *QUESTIONS), max_new_tokens=4,
                            output=str(tmp_path / "out"))  # fmt: skip
    evaluate(config)
    (tmp_path / "m").unlink()
    (tmp_path / "m").symlink_to(bundled("stages/warm"))
    with pytest.raises(ValueError, match="weights must be '"):
        evaluate(config)


def test_a_stopped_evaluation_ends_as_one_that_was_left_alone(tmp_path: Path, monkeypatch, few) -> None:
    data = write(
        tmp_path / "q.jsonl",
        *QUESTIONS,
        *({**row, "instruction": row["instruction"] + " Say it."} for row in QUESTIONS),
    )
    config = EvaluateConfig(data=data, output=str(tmp_path / "whole"), num_samples=3, max_new_tokens=6,
                            sampling=dataclasses.replace(EvaluateConfig().sampling, temperature=1.0))  # fmt: skip
    whole = evaluate(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"), batch_size=2)
    real, calls = measure.generate, []

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(measure, "generate", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(stopped)
    assert evaluate(stopped).results == whole.results
    assert len(calls) == 4 + 2, "four batches, two of them asked twice"
    assert files(tmp_path / "stopped") == files(tmp_path / "whole"), "answers decoded together do not matter"


@pytest.mark.slow
def test_a_thousand_rows_of_sixteen_samples_killed_and_left_alone(tmp_path: Path) -> None:
    """Two runs, one of them killed three times in the middle of its work: the same bytes in every file."""
    from qftlab.rows.countdown import fresh_problems

    problems = [{"num": row["numbers"], "target": row["target"]} for row in fresh_problems(1000, 5)]
    data = write(tmp_path / "q.jsonl", *problems)
    options = "--num_samples 16 --pass_k [16] --max_new_tokens 16 --sampling.temperature 1 --batch_size 256".split()
    start = [sys.executable, "-m", "qftlab_course", "evaluate", "--data", data, *options, "--output"]
    subprocess.run([*start, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True)
    path, sizes = tmp_path / "killed/responses.jsonl", []
    for part in (0.1, 0.4, 0.8):
        with subprocess.Popen(
            [*start, tmp_path / "killed"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while not path.exists() or path.stat().st_size < part * (tmp_path / "whole/responses.jsonl").stat().st_size:
                time.sleep(0.01)
                assert process.poll() is None, "it ended before it was killed"
            process.send_signal(signal.SIGKILL)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    subprocess.run([*start, tmp_path / "killed"], cwd=ROOT, check=True, capture_output=True)
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert len(whole["responses.jsonl"].splitlines()) == 16_000
    assert {name for name in whole if whole[name] != killed.get(name)} == set() and whole.keys() == killed.keys()


def test_few_shot_answers_are_kept_with_their_prompt_and_read_leniently(tmp_path: Path) -> None:
    rows = [row for row in load_rows(bundled("instructions", "development.jsonl")) if row["skill"] == "maximum"][:12]
    config = EvaluateConfig(data=write(tmp_path / "q.jsonl", *rows), output=str(tmp_path / "out"), few_shot=3, limit=6)
    done = evaluate(config)
    assert all(one["prompt"].startswith("Question: ") and one["prompt"].endswith("\nAnswer:") for one in done.responses)
    assert [one["skill"] for one in done.scores] == [score.correct for score in done.evaluation.scores]
    assert any(one["skill"] for one in done.scores) and done.evaluation.few_shot == 3


def test_solved_examples_are_scored_leniently() -> None:
    row = {"instruction": "Add 8 and 97.", "input": "", "output": "105", "skill": "add"}
    for few_shot, right in ((2, True), (0, False)):
        [scorer] = scorers_for(EvaluateConfig(data="x", few_shot=few_shot), [row]).values()
        assert scorer(row, " It is 105, I think.") is right


def test_without_a_reference_an_answer_has_512_tokens_or_what_the_context_leaves() -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    [(members, _, [ids], limits)] = measure.plan_rows(model, tokenizer, [{"prompt": "Q"}])
    assert members == [0] and limits == [512 - len(ids)] and model.config.max_position_embeddings == 512
    model.config.max_position_embeddings = 4096
    assert next(measure.plan_rows(model, tokenizer, [{"prompt": "Q"}]))[3] == [512]


def test_thinking_that_the_prompt_opened_stands_in_the_response(tmp_path: Path) -> None:
    """So the file says alone that an answer which was cut off is thinking and no answer."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{%- endif %}"
    )
    save_model(model, tokenizer, tmp_path / "m")
    done = evaluate(
        EvaluateConfig(model=str(tmp_path / "m"), data=write(tmp_path / "q.jsonl", {"prompt": "Q"}), max_new_tokens=2)
    )
    [said] = done.responses
    assert said["response"] == "<think>" + tokenizer.decode(said["token_ids"])


def test_every_batch_draws_anew(tmp_path: Path, few) -> None:
    """The same question in three batches of two rows; another seed gives others still."""
    config = EvaluateConfig(data=write(tmp_path / "q.jsonl", *[QUESTIONS[0]] * 6), num_samples=3, max_new_tokens=8,
                            sampling=dataclasses.replace(EvaluateConfig().sampling, temperature=1.0))  # fmt: skip
    said = [[one["response"] for one in evaluate(dataclasses.replace(config, seed=seed)).responses] for seed in (0, 1)]
    parts = [tuple(texts[start : start + 6]) for texts in said for start in (0, 6, 12)]
    assert len(set(parts)) == 6 and said[0] == [one["response"] for one in evaluate(config).responses]


def test_a_folder_hangs_on_no_clock(capsys, tmp_path: Path, monkeypatch) -> None:
    """Which layout of the weights is the fastest differs from process to process, and its bits with it."""
    monkeypatch.delenv("QFTLAB_LAYOUT", raising=False)
    data = write(tmp_path / "q.jsonl", *QUESTIONS)
    long = ("--data", data, "--max_new_tokens", 100, "--num_samples", 2, "--sampling.temperature", 1)

    def measured(model) -> str:
        raise AssertionError("a layout was chosen by the clock")

    monkeypatch.setattr("qftlab.decoding.layouts.layout_for", measured)
    assert run(capsys, *long, "--output", tmp_path / "box")[0] == 0
    with pytest.raises(AssertionError, match="by the clock"):  # where nothing is kept, the faster one is welcome
        run(capsys, *long)


def test_rows_that_share_a_prompt_get_the_table_that_counts_prompts(capsys, tmp_path: Path) -> None:
    data = write(tmp_path / "q.jsonl", *QUESTIONS, QUESTIONS[0])
    code, out, _ = run(capsys, "--data", data, "--max_new_tokens", 4)
    [exact] = [line.split() for line in out.splitlines() if line.startswith("exact")]
    assert code == 0 and exact[-2:] == ["5", "4"], "answers, prompts"


def test_stopping_says_that_it_goes_on(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "generate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    data = write(tmp_path / "q.jsonl", *QUESTIONS)
    code, _, err = run(capsys, "--data", data, "--output", tmp_path / "out")
    assert code == 130 and "stopped: the same command goes on" in err


# --- the Tinker project's keys ---


def test_the_tinker_keys_by_its_rule() -> None:
    long = "x" * 101
    rows = [
        {"instruction": "Q", "output": "Paris"},
        {"instruction": long, "output": long},
        {"prompt": [{"role": "user", "content": "?"}]},
    ]
    said = [(0, " PARIS "), (0, "It is paris."), (1, long + "y"), (2, "anything"), (0, "")]
    found = tinker_results(rows, [{"row": row, "sample": 0, "response": text} for row, text in said])
    assert (found["exact_match"], found["contains_answer"], found["total"]) == (1, 3, 4), (
        "the last was refused: it counts"
    )
    assert (found["exact_match_accuracy"], found["contains_accuracy"]) == (0.25, 0.75)
    assert found["examples"][0] == {"instruction": "Q", "expected": "Paris", "predicted": "PARIS", "exact_match": True,
                                    "contains_answer": True}  # fmt: skip
    cut = "x" * 100 + "..."
    assert [found["examples"][2][key] for key in ("instruction", "expected", "predicted")] == [cut] * 3
    assert tinker_results(rows[2:], [{"row": 0, "sample": 0, "response": "a"}]) == {}, "nothing to be measured by"


# --- the leaderboards ---

BOARD = [{"num": [3, 4], "target": 12}, {"prompt": "Say hello."},
         {"prompt": "Make 7 [3 4]", "nums": [3, 4], "target": 7},
         {"prompt": "Make 1.", "ground_truth": {"numbers": [3, 4], "target": 1}}]  # fmt: skip
SAID = {"Use the numbers 3, 4 once each to make 12.": "<answer>3 + 4</answer> so <answer> 3 * 4 </answer>",
        "Say hello.": "Hello 世界", "Make 7 [3 4]": "7", "Make 1.": "<answer>3 + 4</answer>"}  # fmt: skip


def says(path: str, body: dict) -> dict:
    text = SAID.get(body["messages"][-1]["content"], "?")
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def test_leaderboard_rows_and_submissions(capsys, tmp_path: Path, caplog) -> None:
    data, folder = write(tmp_path / "q.jsonl", *BOARD), tmp_path / "out"
    caplog.set_level("INFO")
    with Flaky(says) as server:
        asked = ("--server.url", server.url, "--server.model", "m", "--threshold", 0.45)
        code, out, _ = run(capsys, "--data", data, "--output", folder, *asked)
    assert code == 0 and "fields that no template shows: ground_truth (1)" in caplog.text
    assert lines(folder / "submission.jsonl") == [
        {"num": [3, 4], "target": 12, "response": "3 * 4"}, {"prompt": "Say hello.", "response": "Hello 世界"},
        {"num": [3, 4], "target": 7, "response": ""}, {"num": [3, 4], "target": 1, "response": "3 + 4"},
    ]  # fmt: skip
    assert lines(folder / "course_responses.jsonl")[1] == {
        "prompt": "Make 7 [3 4]", "target": 7, "nums": [3, 4], "ground_truth": {"numbers": [3, 4], "target": 7},
        "response": ["7"], "scores": [0.0],
    }  # fmt: skip
    scores = lines(folder / "scores.jsonl")
    assert [one["countdown_course"] for one in scores] == [1.0, None, 0.0, 0.1]
    assert [one["reasoned"] for one in scores] == [0.0, None, 0.0, 0.1], "two answers are none by the stricter rule"
    results = json.loads((folder / "evaluation_results.json").read_text())
    official = {"accuracy": pytest.approx(1 / 3), "threshold": 0.45, "score": pytest.approx(1 / 3 / 0.45)}
    assert results["official_score"] == {"scorer": "countdown_course", **official}
    assert "official score: min(0.3333 / 0.45, 1) = 0.7407, by countdown_course" in out
    assert "exact_match" not in results and "loss" not in results and results["model"] == "m"


def test_the_official_score() -> None:
    assert [official_score(a, 0.45) for a in (0.0, 0.225, 0.45, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert last_expression("<answer>1</answer> <answer>\n2 <answer> 3</answer> <answer>4") == "3"
    assert last_expression("none") == last_expression("<answer>") == ""


def test_what_is_scored_by_what_where_rows_differ(tmp_path: Path) -> None:
    """A skill, a problem without a reference, a reference, a prompt; and each goes by the first sample to a board."""
    rows = [{"instruction": "Add 1 and 2.", "input": "", "output": "3", "skill": "add"}, *BOARD[:2], QUESTIONS[0]]
    sampling = dataclasses.replace(EvaluateConfig().sampling, temperature=1.0)
    data, output = write(tmp_path / "q.jsonl", *rows), str(tmp_path / "out")
    done = evaluate(EvaluateConfig(data=data, output=output, max_new_tokens=4, num_samples=2, sampling=sampling))
    names = ("skill", "countdown_course", "reasoned", "exact", "contained")
    scored = [{name for name in names if one[name] is not None} for one in done.scores[::2]]
    assert scored == [{"skill"}, {"countdown_course", "reasoned"}, set(), {"exact", "contained"}]
    board = lines(tmp_path / "out/submission.jsonl")
    assert len(board) == 4 and board[2] == {"prompt": "Say hello.", "response": done.responses[4]["response"]}
    [line] = lines(tmp_path / "out/course_responses.jsonl")
    assert line["response"] == [one["response"] for one in done.responses[2:4]] and line["scores"] == [
        one["countdown_course"] for one in done.scores[2:4]
    ]


def test_prompts_alone_are_asked_and_not_scored(capsys, tmp_path: Path) -> None:
    data, folder = write(tmp_path / "q.jsonl", {"prompt": "Say hello."}), tmp_path / "out"
    code, out, _ = run(capsys, "--data", data, "--output", folder, "--max_new_tokens", 3)
    assert code == 0 and "nothing was scored" in out and lines(folder / "scores.jsonl") == [{"row": 0, "sample": 0}]
    assert len(lines(folder / "submission.jsonl")) == 1
    code, _, err = run(capsys, "--data", data, "--threshold", 0.4, "--max_new_tokens", 3)
    assert code == 2 and "threshold must go with a scorer of marks from 0 to 1, got none" in err


# --- servers ---


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(client_module, "PAUSE", 0.01)
    monkeypatch.setattr(client_module, "PATIENCE", 5.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Told:
    """Answers with seed and prompt, and remembers the requests."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def __call__(self, path: str, body: dict) -> dict:
        self.asked.append(body)
        text = f"{body['messages'][-1]['content']} {body['seed']}"
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length",
            "token_ids": [1],
        }
        return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def test_a_server_that_fails_and_a_killed_evaluation_leave_the_same_files(capsys, tmp_path: Path, quick, few) -> None:
    data = write(tmp_path / "q.jsonl", *QUESTIONS)
    whole, broken = Told(), Told()
    options = (
        "--data",
        data,
        "--num_samples",
        3,
        "--sampling.temperature",
        1,
        "--server.model",
        "m",
        "--server.threads",
        4,
    )
    with Flaky(whole, key=KEY) as server:
        url = server.url
        assert run(capsys, *options, "--server.url", url, "--output", tmp_path / "whole")[0] == 0
        port = server.port
    with Flaky(broken, {"500": 0.1, "reset": 0.1, "echo": 0.2}, key=KEY, retry_after=0.01, port=port):
        real = responses_module._append
        written = []

        def stops(path: Path, content: bytes) -> None:
            if len(written) == 1:
                written.append(path)
                raise KeyboardInterrupt
            written.append(path)
            real(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(responses_module, "_append", stops)
            assert (
                run(capsys, *options, "--server.url", url, "--output", tmp_path / "broken", "--server.retries", 8)[0]
                == 130
            )
        assert (
            run(capsys, *options, "--server.url", url, "--output", tmp_path / "broken", "--server.retries", 8)[0] == 0
        )
    one, two = files(tmp_path / "whole"), files(tmp_path / "broken")
    journals = [sorted(kept.pop("journal.jsonl").splitlines()) for kept in (one, two)]
    assert one == two and len(journals[1]) == 12, "what was journaled is not asked again"
    assert one.keys() == FILES and not any(KEY.encode() in content for content in [*one.values(), *journals[1]])
    seeds = [body["seed"] for body in whole.asked]
    assert len(set(seeds)) == 12 and {body["temperature"] for body in whole.asked} == {1.0}
    assert all("top_k" not in body and body["max_tokens"] == 33 for body in whole.asked)
    assert json.loads(one["settings.json"])["server"] == url
    [first, *_] = lines(tmp_path / "whole/responses.jsonl")
    assert first["finish_reason"] == "length" and first["token_ids"] == [1]


def test_samplings_and_thinking_reach_the_server(tmp_path: Path, quick) -> None:
    told = Told()
    with Flaky(told) as server:
        sampling = dataclasses.replace(EvaluateConfig().sampling, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1)
        config = EvaluateConfig(
            data=write(tmp_path / "q.jsonl", QUESTIONS[0]), sampling=sampling, thinking="off", max_new_tokens=9
        )
        evaluate(dataclasses.replace(config, server=dataclasses.replace(config.server, url=server.url, model="m")))
    [body] = told.asked
    wanted = {"model": "m", "top_k": 20, "top_p": 0.95, "min_p": 0.1, "temperature": 0.6, "max_tokens": 9,
              "chat_template_kwargs": {"enable_thinking": False}, "skip_special_tokens": False}  # fmt: skip
    assert wanted.items() <= body.items() and "repetition_penalty" not in body


class Picky(Flaky):
    """Takes no field of vLLM's, and no long question."""

    async def _reply(self, path: str, headers: dict, body: bytes, writer) -> None:
        request = json.loads(body)
        if "skip_special_tokens" in request or "long" in request["messages"][-1]["content"]:
            return await _write(writer, 422, {"error": {"message": "unfit"}})
        return await super()._reply(path, headers, body, writer)


def test_a_refused_question_counts_as_wrong_and_is_said(tmp_path: Path, quick, caplog) -> None:
    data = write(tmp_path / "q.jsonl", QUESTIONS[0], {"instruction": "long", "input": "", "output": "x"}, QUESTIONS[1])
    with Picky(Told()) as server:
        config = EvaluateConfig(data=data, output=str(tmp_path / "out"), scorers=("exact",))
        config = dataclasses.replace(config, server=dataclasses.replace(config.server, url=server.url, threads=1))
        done = evaluate(config)
    assert done.responses[1] | {"prompt": 0} == {"row": 1, "sample": 0, "prompt": 0, "response": "", "token_ids": None,
                                                 "finish_reason": "error"}  # fmt: skip
    assert done.results["failed"] == 1 and done.results["scores"]["exact"]["answers"] == done.results["total"] == 3
    assert "q.jsonl, row 2 was refused and counts as an empty response" in caplog.text
    assert "1 of 3 answers failed; they count as wrong" in caplog.text
    assert caplog.text.count("refuses to give token ids and tokens such as <|AGENT|> in its texts: asked without") == 1


def test_tools_stand_beside_the_messages(tmp_path: Path, quick) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    told, row = (
        Told(),
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "tools": tools},
    )
    with Flaky(told) as server:
        config = EvaluateConfig(data=write(tmp_path / "q.jsonl", row))
        evaluate(dataclasses.replace(config, server=dataclasses.replace(config.server, url=server.url)))
    assert told.asked[0]["tools"] == tools and told.asked[0]["messages"] == [{"role": "user", "content": "Q"}]


def test_a_server_that_gives_special_tokens_and_no_ids(tmp_path: Path, quick, caplog) -> None:
    """What it knows is asked of it still."""

    class NoIds(Flaky):
        async def _reply(self, path: str, headers: dict, body: bytes, writer) -> None:
            if "return_token_ids" in json.loads(body):
                return await _write(writer, 422, {"error": {"message": "extra field"}})
            return await super()._reply(path, headers, body, writer)

    told = Told()
    with NoIds(told) as server:
        config = EvaluateConfig(data=write(tmp_path / "q.jsonl", *QUESTIONS))
        evaluate(dataclasses.replace(config, server=dataclasses.replace(config.server, url=server.url, threads=1)))
    assert [body.get("skip_special_tokens") for body in told.asked] == [False] * 4
    assert caplog.text.count("the server refuses to give token ids: asked without") == 1


def test_a_server_that_refuses_everything_is_an_error(capsys, tmp_path: Path, quick) -> None:
    data = write(tmp_path / "q.jsonl", {"prompt": "long"})
    with Picky(Told()) as server:
        code, _, err = run(capsys, "--data", data, "--server.url", server.url)
    assert code == 2 and "HTTP 422" in err
    with Flaky(Told(), key="another-key-of-theirs") as server:
        code, _, err = run(capsys, "--data", data, "--server.url", server.url)
    assert code == 2 and "HTTP 401" in err and KEY not in err


def test_reading_an_answer() -> None:
    def answer(reason: str = "stop", **message) -> dict:
        return {"choices": [{"message": {"content": "4", **message}, "finish_reason": reason}]}

    assert read_answer(answer()) == {"response": "4", "token_ids": None, "finish_reason": "stop"}
    assert read_answer(answer("length", content=None))["response"] == ""
    assert read_answer(answer("length"))["finish_reason"] == "length"
    assert read_answer(answer(reasoning_content="so"))["response"] == "<think>\nso\n</think>\n\n4"
    for bad in ({}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {}, "finish_reason": "stop"}]},
                {"choices": None}, {"choices": [{"message": "4", "finish_reason": "stop"}]}):  # fmt: skip
        with pytest.raises(ValueError, match="must have one choice with a message and a finish_reason"):
            read_answer(bad)
    with pytest.raises(ValueError, match="must have a message of text"):
        read_answer(answer(content=[{"type": "text"}]))


def test_the_draws_hang_on_seed_row_and_sample(tmp_path: Path, quick) -> None:
    """The seed of a request is the same wherever its row stands in a batch."""
    told = Told()
    config = EvaluateConfig(
        data="x", num_samples=2, sampling=dataclasses.replace(EvaluateConfig().sampling, temperature=1.0)
    )

    class Client:
        def map(self, function, items):
            return [(i, function(item)) for i, item in enumerate(items)]

        def ask(self, path, body, read, sample):
            return read(told(path, body))

    model = ServerModel(config, QUESTIONS, {}, Client())
    prompts = model.prompts()
    together, alone = model.ask(prompts, range(4)), model.ask(prompts[2:3], [2])
    assert together[4:6] == alone and len({one["response"] for one in together}) == 8


# --- mistakes ---


@pytest.mark.parametrize(("arguments", "message"), [
    (["--output", "x.jsonl"], "output must end in .html or .md, or be a folder, got 'x.jsonl'"),
    (["--pass_k", "[1,4]"], "pass_k must be from 1 to num_samples 1, got 4: --num_samples 4"),
    (["--pass_k", "[0]"], "pass_k must be from 1 to num_samples 1, got 0"),
    (["--num_samples", "4"], "num_samples must be 1 at temperature 0, where all answers are alike, got 4"),
    (["--num_samples", "0"], "num_samples must be at least 1, got 0"),
    (["--threshold", "0"], "threshold must be above 0 and at most 1, got 0.0"),
    (["--threshold", "1.5"], "threshold must be above 0 and at most 1, got 1.5"),
    (["--scorers", "exakt"], "scorers must be of exact, contained"),
    (["--scorers", "[exact,none.such:f]"], "got 'none.such:f': No module named 'none'"),
    (["--few_shot", "2", "--server.url", "http://localhost:1/v1"], "few_shot must be 0 with a server"),
    (["--model", "m", "--server.url", "http://localhost:1/v1"], "model must be left out with a server"),
    (["--server.adapters", "x"], "server.adapters must be left out of an evaluation"),
    (["--server.url", "localhost:1"], "server.url must begin with http"),
])  # fmt: skip
def test_a_mistake_gives_one_message(capsys, arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


# --- skills, modes ---


def test_the_skill_scorer_agrees_with_the_table(tmp_path: Path) -> None:
    """On what a course model says to bundled rows of every kind, the marks of `score_row`."""
    kinds = {"instructions": slice(None, None, 40), "countdown": slice(6), "bugfix": slice(6)}
    rows = [row for kind, some in kinds.items() for row in load_rows(bundled(kind, "development.jsonl"))[some]]
    done = evaluate(EvaluateConfig(model=str(bundled("stages/sft")), data=write(tmp_path / "q.jsonl", *rows),
                                   output=str(tmp_path / "out")))  # fmt: skip
    table = [score.correct for score in done.evaluation.scores]
    assert [one["skill"] for one in done.scores] == table and {True, False} <= set(table)
    assert list(done.results["scores"]) == ["skill"]
    tokenizer = load_tokenizer(str(bundled("stages/sft")))
    assert table == [
        score_row(row, c, tokenizer).correct
        for row, c in zip(done.evaluation.rows, done.evaluation.completions, strict=True)
    ]
    assert done.evaluation.format.accuracy > 0.8


@pytest.mark.parametrize(("row", "response", "right"), [
    ({"skill": "bugfix", "mode": "EDIT", "output": "<|EDIT|>x"}, "<|EDIT|>y", True),
    ({"skill": "bugfix", "mode": "EDIT", "output": "<|EDIT|>x"}, "<|AGENT|>x", False),
    ({"skill": "bugfix", "mode": "EDIT", "output": "<|EDIT|>x"}, "x <|EDIT|>", False),
    ({"skill": "sum_to_n", "output": "So the answer is 55."}, "Then the answer is 55.", True),
    ({"skill": "sum_to_n", "output": "So the answer is 55."}, "55", False),
    ({"skill": "countdown", "numbers": [3, 4], "target": 12, "output": ""}, "<answer>3 + 4</answer>", False),
    ({"skill": "joke", "output": "Ha."}, "Ho.", None),
    ({"output": "x"}, "x", None),
])  # fmt: skip
def test_the_skill_scorer_by_hand(row: dict, response: str, right: bool | None) -> None:
    assert SCORERS["skill"](row, response) is right


def test_a_folder_and_no_folder_give_one_table(capsys, tmp_path: Path) -> None:
    rows = load_rows(bundled("instructions", "development.jsonl"))[::30]
    options = ("--model", bundled("stages/sft"), "--data", write(tmp_path / "q.jsonl", *rows))
    plain, kept = (run(capsys, *options, *more)[1] for more in ((), ("--output", tmp_path / "out")))
    again = run(capsys, *options, "--output", tmp_path / "out")[1]
    assert kept == again == plain + f"responses, scores and results: {tmp_path / 'out'}\n"


def test_agent_edit_scorers_are_the_checkers(real_data: Path) -> None:
    from qftlab_course.agent_edit.check import check_file

    file = real_data / "agent_edit/hw3_2.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    for level in ("course", "strict"):
        marks = [SCORERS[f"agent_edit_{level}"]({"instruction": row["Query"]}, row["Output"]) for row in rows]
        assert marks == [not found for found in check_file(file, level).issues]
    said = next(
        row["Output"] for row in rows if SCORERS["agent_edit_strict"]({"instruction": row["Query"]}, row["Output"])
    )
    own, other = ("EDIT", "AGENT") if "<|EDIT|>" in said else ("AGENT", "EDIT")
    for mode, right in ((own, True), (other, False), (f"<|{own}|>", True)):
        assert SCORERS["agent_edit_strict"]({"instruction": "q", "mode": mode}, said) is right


# --- references ---


def test_references_against_transformers() -> None:
    """Loss and token accuracy of packed rows equal those of transformers' logits, a row at a time."""
    rows = load_rows(bundled("instructions", "development.jsonl"))[:12]
    model, tokenizer = load_model(str(bundled("stages/sft"))), load_tokenizer(str(bundled("stages/sft")))
    plain = AutoModelForCausalLM.from_pretrained(bundled("stages/sft"), dtype=torch.float32).eval()
    nats = hits = count = 0
    for example in encode_rows(tokenizer, rows, train_on="last")[0]:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = plain(ids).logits[0, :-1].double()
        keep = torch.tensor(example.loss_mask[1:])
        targets = ids[0, 1:][keep]
        nats -= logits[keep].log_softmax(-1).gather(1, targets[:, None]).sum().item()
        hits += (logits[keep].argmax(-1) == targets).sum().item()
        count += len(targets)
    found = measure_references(model, tokenizer, rows, batch_size=5)
    assert found.loss[0] == pytest.approx(nats / count, abs=1e-5) and found.token_accuracy[0] == pytest.approx(
        hits / count
    )
    assert 0 < hits < count and found.rows == 12
    assert found.perplexity == tuple(map(math.exp, found.loss)) and found.loss[1] < found.loss[0] < found.loss[2]
    assert found.token_accuracy[1] < found.token_accuracy[0] < found.token_accuracy[2]
    assert found.to_dict()["perplexity"] == {
        **dict(zip(("mean", "low", "high"), found.perplexity, strict=True)),
        "rows": 12,
    }


def test_an_environment_is_left_as_it_was() -> None:
    assert os.environ.get("OPENAI_API_KEY") != KEY
