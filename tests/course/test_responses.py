"""Responses: the same bytes however often a run was killed, one evaluation a folder, and summaries worked by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qftlab.evaluate.statistics import clustered_interval, detectable_difference, smallest_difference
from qftlab_course import responses
from qftlab_course.responses import collect, response_folder, score, summarise

ROOT = Path(__file__).resolve().parents[2]


class Asked:
    """Answers by the place of row and sample alone, and counts the batches."""

    def __init__(self, num_samples: int = 2, stop_after: int = 10**9) -> None:
        self.num_samples, self.stop_after, self.batches = num_samples, stop_after, []

    def __call__(self, prompts: Sequence, numbers: Sequence[int]) -> list[dict]:
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        assert list(prompts) == [f"Q{number} 问" for number in numbers]
        self.batches.append(list(numbers))
        return [{"response": f"{number}.{sample} 答\ud800", "token_ids": [number], "finish_reason": "stop"}
                for number in numbers for sample in range(self.num_samples)]  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(responses, "BATCH", 6)


PROMPTS = [f"Q{i} 问" for i in range(8)]


def test_what_is_collected(tmp_path: Path) -> None:
    ask = Asked()
    found = collect(PROMPTS, ask, 2, tmp_path / "r.jsonl")
    assert ask.batches == [[0, 1, 2], [3, 4, 5], [6, 7]], "batches are cut by row number"
    assert [(one["row"], one["sample"]) for one in found] == [(row, sample) for row in range(8) for sample in (0, 1)]
    assert found[5] == {"row": 2, "sample": 1, "prompt": "Q2 问", "response": "2.1 答\ud800", "token_ids": [2],
                        "finish_reason": "stop"}  # fmt: skip
    lines = (tmp_path / "r.jsonl").read_bytes().decode().splitlines()
    assert list(map(json.loads, lines)) == found and "答\\ud800" in lines[0]
    assert collect(PROMPTS, Asked(stop_after=0), 2, tmp_path / "r.jsonl") == found, "nothing is asked again"
    assert collect(PROMPTS, Asked(), 2) == found, "without a file"
    assert collect([], Asked(), 2, tmp_path / "none.jsonl") == []


def test_a_file_that_was_cut_anywhere_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    collect(PROMPTS, Asked(), 2, path)
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in {*range(0, len(whole), 17), *ends, *(end - 1 for end in ends[1:])}:
        path.write_bytes(whole[:cut])
        ask = Asked()
        collect(PROMPTS, ask, 2, path)
        kept = sum(end <= cut for end in ends) - 1  # whole lines
        first = 8 if kept == 16 else kept // 6 * 3
        assert path.read_bytes() == whole and ask.batches == [[0, 1, 2], [3, 4, 5], [6, 7]][-(-first // 3) :], cut


def test_a_file_that_was_stopped_goes_on(tmp_path: Path) -> None:
    collect(PROMPTS, Asked(), 2, tmp_path / "whole.jsonl")
    for stop_after, lines in ((1, 6), (0, 6), (1, 12)):
        with pytest.raises(KeyboardInterrupt):
            collect(PROMPTS, Asked(stop_after=stop_after), 2, tmp_path / "r.jsonl")
        assert len((tmp_path / "r.jsonl").read_bytes().splitlines()) == lines
    collect(PROMPTS, Asked(), 2, tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"row": 1, "sample": 0}', b'{"row": 0}', b"\0\0\0"])
def test_a_line_that_is_no_response_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "r.jsonl"
    collect(PROMPTS, Asked(), 2, path)
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([line, *others, b""]))
    with pytest.raises(ValueError, match=r"r.jsonl, line 1 must be response 0 to row 0, got .*: remove the file"):
        collect(PROMPTS, Asked(), 2, path)
    assert path.read_bytes().startswith(line), "and left as it is"


def test_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="ask must give 3 x 2 responses, got 9"):
        collect(PROMPTS, Asked(num_samples=3), 2)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        collect(PROMPTS, Asked(), 0)


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch) -> None:
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(responses, "flush", full)
    with pytest.raises(OSError, match="r.jsonl must be written, got: No space left on device"):
        collect(PROMPTS, Asked(), 2, tmp_path / "r.jsonl")


PROGRAM = """
import sys, time
from itertools import combinations
from pathlib import Path
from qftlab_course import responses
responses.BATCH = 8

def ask(prompts, numbers):
    time.sleep(0.01)
    return [{"response": f"{n} {s} " + "x" * 3000, "token_ids": None, "finish_reason": "stop"} for n in numbers for s in range(4)]

with responses.response_folder(sys.argv[1], {"seed": 0}, [{"prompt": "Q"}] * 60) as folder:
    print("begun", flush=True)
    responses.collect([f"Q{i}" for i in range(60)], ask, 4, folder / responses.RESPONSES)
"""  # noqa: E501


@pytest.mark.long
def test_a_killed_process_leaves_nothing_that_is_not_mended(tmp_path: Path) -> None:
    """SIGKILL at several moments, then once to the end: the bytes of a run that was left alone."""
    start = [sys.executable, "-c", PROGRAM]
    subprocess.run([*start, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True)
    for wait in (0.02, 0.05, 0.09, 0.0):
        with subprocess.Popen([*start, tmp_path / "killed"], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"begun\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        if wait:
            assert len((tmp_path / "killed/responses.jsonl").read_bytes().splitlines()) < 240
    subprocess.run([*start, tmp_path / "killed"], cwd=ROOT, check=True, capture_output=True)
    for name in ("responses.jsonl", "rows.jsonl", "settings.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- the folder ---

SETTINGS, ROWS = {"model": "m", "seed": 0, "sampling": {"top_k": 20}, "scorers": ["exact"]}, [{"prompt": "Q 问"}]


def test_a_folder_keeps_settings_and_rows(tmp_path: Path) -> None:
    with response_folder(tmp_path / "a/b", SETTINGS, ROWS, free=["scorers"]) as folder:
        assert folder == tmp_path / "a/b"
        assert json.loads((folder / "settings.json").read_text()) == SETTINGS
        assert (folder / "rows.jsonl").read_text(encoding="utf-8") == '{"prompt": "Q 问"}\n'
    with response_folder(tmp_path / "a/b", SETTINGS | {"scorers": ["contained"]}, ROWS, free=["scorers"]):
        assert json.loads((folder / "settings.json").read_text())["scorers"] == ["contained"]


@pytest.mark.parametrize(("settings", "rows", "message"), [
    ({"seed": 1}, ROWS, "seed must be 0, with which the responses in .*box were asked, got 1: choose another output"),
    ({"sampling": {"top_k": 0}}, ROWS, "sampling must be {'top_k': 20}, .*, got {'top_k': 0}"),
    ({"new": "x"}, ROWS, "new must be None, .*, got 'x'"),
    ({}, [{"prompt": "other"}], "data must hold the rows of .*rows.jsonl, got others: choose another output"),
    ({}, ROWS * 2, "data must hold the rows of"),
])  # fmt: skip
def test_another_evaluation_is_refused(tmp_path: Path, settings: dict, rows: list, message: str) -> None:
    with response_folder(tmp_path / "box", SETTINGS, ROWS, free=["scorers"]) as folder:
        (folder / "responses.jsonl").write_text("{}\n")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        pytest.raises(ValueError, match=message),
        response_folder(tmp_path / "box", SETTINGS | settings, rows, free=["scorers"]),
    ):
        pytest.fail("it was opened")
    assert {name: (folder / name).read_bytes() for name in before} == before
    with response_folder(tmp_path / "box", SETTINGS, ROWS, free=["scorers"]):
        """The lock is free again."""


def test_a_setting_that_is_gone_is_named(tmp_path: Path) -> None:
    with response_folder(tmp_path, SETTINGS, ROWS) as folder:
        (folder / "journal.jsonl").write_text("{}\n")
    with (
        pytest.raises(ValueError, match="seed must be 0, .*, got None"),
        response_folder(tmp_path, {"model": "m", "sampling": {"top_k": 20}, "scorers": ["exact"]}, ROWS),
    ):
        pytest.fail("it was opened")


def test_a_folder_without_a_response_takes_other_settings(tmp_path: Path) -> None:
    """A server that answered nothing leaves an empty journal: the same folder serves the mended command."""
    with response_folder(tmp_path, SETTINGS, ROWS) as folder:
        (folder / "journal.jsonl").touch()
    with response_folder(tmp_path, SETTINGS | {"seed": 1}, ROWS * 2):
        assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1
        assert (tmp_path / "rows.jsonl").read_text().count("\n") == 2 * len(ROWS)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    program = "import sys; from qftlab_course.responses import response_folder as f\n"
    program += f"with f(sys.argv[1], {SETTINGS!r}, {ROWS!r}): print('in')"
    with response_folder(tmp_path, SETTINGS, ROWS):
        done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "must have one writer, got two: another process has it open" in done.stderr


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    (tmp_path / "responses.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="settings.json must hold a JSON object"), response_folder(tmp_path, {}, []):
        pytest.fail("it was opened")


@pytest.mark.skipif(os.name == "nt", reason="folders have no such rights there")
def test_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"), response_folder(tmp_path / "file", {}, []):
        pytest.fail("it was opened")


# --- scores ---


def answers(*texts: str, each: int = 1) -> list[dict]:
    return [{"row": i // each, "sample": i % each, "response": text} for i, text in enumerate(texts)]


def test_scores_are_rows_of_values() -> None:
    rows = [{"output": "ab"}, {"output": "abc"}]
    scorers = {"length": lambda row, said: len(said) / len(row["output"]), "none": lambda row, said: None}
    assert score(answers("a", "abc"), rows, scorers) == [
        {"row": 0, "sample": 0, "length": 0.5, "none": None}, {"row": 1, "sample": 0, "length": 1.0, "none": None},
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), [
    (math.nan, "scorer odd must give a finite number, got nan for row 2"),
    (-math.inf, "scorer odd must give a finite number, got -inf for row 2"),
    ("right", "scorer odd must score row 2, got TypeError"),
    ([1], "scorer odd must score row 2, got TypeError"),
])  # fmt: skip
def test_a_value_that_is_no_score_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(answers("a", "b"), [{}, {}], {"odd": lambda row, said: value if said == "b" else 1})


def test_a_scorer_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match=r"scorer odd must score row 1, got KeyError\('output'\)"):
        score(answers("a"), [{}], {"odd": lambda row, said: said == row["output"]})


def marks(*values, each: int = 1) -> list[dict]:
    return [{"row": i // each, "sample": i % each, "s": value} for i, value in enumerate(values)]


def test_a_summary_by_hand() -> None:
    """Two prompts × 4 answers with 2 and 0 right: mean 1/4, pass@2 = (1 − C(2, 2)/C(4, 2)) / 2 = 5/12."""
    found = summarise(marks(True, True, False, False, *[False] * 4, each=4), "s", ["a", "b"], [1, 2, 4])
    assert (found["mean"], found["rows"], found["answers"], found["prompts"]) == (0.25, 2, 8, 2)
    assert {k: v["mean"] for k, v in found["pass_at_k"].items()} == pytest.approx({"1": 1 / 4, "2": 5 / 12, "4": 1 / 2})
    # se² = ¼² for prompt means ½ and 0, so as many independent answers as 3/16 ÷ 1/16 = 3, with t of one degree.
    t = stats.t.ppf(0.975, 1)
    centre, reach = 0.25 + t**2 / 6, t * math.sqrt(3 / 16 / 3 + t**2 / 36)
    low, high = (centre - reach) / (1 + t**2 / 3), (centre + reach) / (1 + t**2 / 3)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_a_summary_counts_prompts_and_not_rows() -> None:
    values = [1, 0] * 10
    apart = summarise(marks(*values), "s", range(20))
    alike = summarise(marks(*values), "s", [i // 4 for i in range(20)])
    assert (apart["prompts"], alike["prompts"], alike["rows"], alike["answers"]) == (20, 5, 20, 20)
    assert apart["mean"] == alike["mean"] == 0.5
    uneven = summarise(marks(1, 1, 1, 0), "s", "aaab")
    assert uneven["mean"] == uneven["pass_at_k"]["1"]["mean"] == 0.75, "the plain mean, whatever shares a prompt"
    same = summarise(marks(*[1] * 10, *[0] * 10), "s", [i // 5 for i in range(20)])
    assert same["high"] - same["low"] > apart["high"] - apart["low"], "answers to one prompt tell less"


def test_pass_at_k_is_by_row_and_its_interval_by_prompt() -> None:
    values = marks(*[1, 0] * 4, *[0, 0] * 4, each=2)  # eight rows: four with one of two right, four with none
    apart, alike = (summarise(values, "s", keys, [1, 2])["pass_at_k"] for keys in (range(8), "aaaabbbb"))
    for found in (apart, alike):
        assert (found["1"]["mean"], found["2"]["mean"]) == (0.25, 0.5)
    for k in ("1", "2"):
        assert alike[k]["high"] - alike[k]["low"] > 1.3 * (apart[k]["high"] - apart[k]["low"])


def test_the_interval_of_pass_at_k_by_hand() -> None:
    """2 of 4, 1 of 4 and 0 of 2 right: of pairs drawn, 1 − 1/6, 1 − 3/6 and 0 hold a right one, 4/9 on average."""
    own = ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0])
    scores = [{"row": row, "sample": i, "s": mark} for row, each in enumerate(own) for i, mark in enumerate(each)]
    found = summarise(scores, "s", "abc", [1, 2])["pass_at_k"]
    pairs = [[any(pair) for pair in combinations(each, 2)] for each in own]
    assert found["2"]["mean"] == pytest.approx(4 / 9) == np.mean([np.mean(each) for each in pairs])
    wanted = clustered_interval([5 / 6, 1 / 2, 0], [0, 1, 2], method="wilson")
    assert tuple(found["2"].values()) == pytest.approx(wanted)
    rates = clustered_interval([1 / 2, 1 / 4, 0], [0, 1, 2], method="wilson")  # pass@1 is the rate
    assert tuple(found["1"].values()) == pytest.approx(rates)
    with pytest.raises(ValueError, match="1 <= k <= n, got n=1, c=1, k=2"):
        summarise([*marks(1, 0, each=2), {"row": 1, "sample": 0, "s": 1}], "s", "ab", [2])


def test_rows_without_a_score_do_not_count() -> None:
    found = summarise(marks(1, None, 0, None), "s", "abcd")
    assert (found["mean"], found["rows"], found["answers"]) == (0.5, 2, 2)
    nothing = summarise(marks(None, None), "s", "ab")
    assert nothing["mean"] is nothing["low"] is nothing["smallest_difference"] is None and nothing["answers"] == 0


def test_other_numbers_have_a_mean_alone() -> None:
    found = summarise(marks(-18.5, 2.5, 4.0), "s", "abc")
    ends = stats.t.interval(0.95, 2, -4, stats.sem([-18.5, 2.5, 4.0]))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((-4, *ends))
    assert found["pass_at_k"] == {} and found["smallest_difference"] is None


def test_shares_count_as_right_at_one_only() -> None:
    found = summarise(marks(1.0, 0.1, 0.1, 0.0), "s", "abcd")
    assert found["mean"] == pytest.approx(0.3) and found["pass_at_k"]["1"]["mean"] == 0.25
    assert 0 <= found["low"] and found["high"] <= 1


def test_one_prompt_has_no_interval_and_json_can_hold_it() -> None:
    found = summarise(marks(1, 0, each=2), "s", ["a"])
    assert found["low"] is found["high"] is found["smallest_difference"] is None and found["mean"] == 0.5
    json.dumps([found, summarise(marks(1, 1), "s", "ab"), summarise(marks(0, 1), "s", "ab")], allow_nan=False)


def test_too_few_responses_for_k() -> None:
    with pytest.raises(ValueError, match="pass_at_k needs"):
        summarise(marks(1, 0, each=2), "s", ["a"], [3])


# --- what difference can be seen ---


def test_the_smallest_difference_of_single_answers_is_that_of_their_rate() -> None:
    wanted = detectable_difference(100, rate=0.3)
    assert smallest_difference([1] * 30 + [0] * 70, range(100)) == pytest.approx(wanted)
    assert smallest_difference([0] * 30 + [1] * 70, range(100)) == pytest.approx(wanted), "from either end"
    alike = smallest_difference([1] * 30 + [0] * 70, range(100), correlation=0.5)
    assert alike == pytest.approx(detectable_difference(100, rate=0.3, correlation=0.5)) and alike < wanted


def test_answers_that_agree_within_a_prompt_count_once() -> None:
    prompts = [i // 8 for i in range(800)]
    alike = smallest_difference([i // 8 % 2 for i in range(800)], prompts)
    apart = smallest_difference([i % 2 for i in range(800)], prompts)
    assert alike == pytest.approx(detectable_difference(100, rate=0.5, within=1, answers=8))
    assert alike == pytest.approx(detectable_difference(100, rate=0.5), rel=1e-6)
    assert apart == pytest.approx(detectable_difference(100, rate=0.5, within=0, answers=8)) and apart < alike
    none = smallest_difference([0] * 800, prompts)
    assert none == pytest.approx(detectable_difference(100, rate=0)), "no spread is seen: each prompt counts once"
