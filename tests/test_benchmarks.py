"""The benchmarks: their arithmetic, their fairness checks, and every workload at a tiny size on the CPU."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import generation, harness, preference, rivals, run, training
from benchmarks.harness import Benchmark, MismatchError, Options, Side
from benchmarks.models import bench_config, half_billion_config, random_model, random_prompts, word_tokenizer
from qftlab.maths.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
QUICK = Options(rounds=2, quick=True)


def row_of(sides: list[Side], options: Options = QUICK, **settings) -> dict:
    settings = {"count": len, "same": rivals.same_tokens, **settings}
    return harness.compare("row", sides, options, **settings)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Time that only passes when a side says so; returns a maker of such sides."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    log = []

    def side(name: str, seconds: list[float], answer: list, **settings) -> Side:
        durations = iter([0.0, *seconds])  # the first call is the untimed check

        def work() -> list:
            now[0] += next(durations)
            log.append(name)
            return answer

        return Side(name, work, **settings)

    side.log = log
    return side


def test_rounds_alternate_and_ratios_are_of_each_round(clock) -> None:
    """Ours takes 1, 2, 4 s and the other 3, 4, 20 s: ratios 3, 2, 5, median 3; the check is not timed."""
    sides = [clock("ours", [1, 2, 4], [[7]]), clock("theirs", [3, 4, 20], [[7]], bar=2.5, aim=4.0)]
    row = row_of(sides, Options(rounds=3))
    assert clock.log == ["ours", "theirs"] * 4
    assert [side["rounds"] for side in row["sides"]] == [[1, 2, 4], [3, 4, 20]]
    assert row["sides"][0]["seconds"] == {"median": 2, "min": 1, "max": 4}
    ratio = row["judged"][0]
    assert (ratio["median"], ratio["min"], ratio["max"], ratio["reached"]) == (3, 2, 5, "bar")


def test_a_ratio_is_per_unit_and_slow_sides_are_timed_less(clock) -> None:
    """Ours makes 1 token in 1 s, the other 2 tokens in 6 s: 3 times, not 6."""
    sides = [clock("ours", [1, 1], [[7]]), clock("theirs", [6], [[7], [7]], rounds=1)]
    row = row_of(sides, same=lambda a, b: "not compared")
    assert row["judged"][0]["median"] == 3
    assert [len(side["rounds"]) for side in row["sides"]] == [2, 1]


def test_a_server_runs_only_around_its_own_side(clock) -> None:
    @contextmanager
    def server():
        clock.log.append("up")
        yield
        clock.log.append("down")

    other = clock("theirs", [2, 2], [[7]], server=server())
    row = row_of([clock("ours", [1, 1], [[7]]), other])
    assert clock.log == ["ours", "up", "theirs", "theirs", "theirs", "down", "ours", "ours"]
    assert row["judged"][0]["median"] == 2


@pytest.mark.parametrize(
    ("value", "at_most", "reached"),
    [(3.0, False, "aim"), (2.0, False, "bar"), (1.9, False, "below"), (1.5, True, "aim"), (3.1, True, "below")],
)
def test_judging(value: float, at_most: bool, reached: str) -> None:
    bar, aim = (2.0, 3.0) if not at_most else (3.0, 2.0)
    assert harness.judge("x", [value], bar, aim, at_most=at_most)["reached"] == reached


def test_without_a_bar_or_in_a_quick_run_nothing_is_judged() -> None:
    assert harness.judge("x", [9.0], None, None)["reached"] == "not judged"
    assert harness.judge("x", [9.0], 1.0, 2.0, is_judged=False)["reached"] == "not judged"
    assert harness.judge("x", [9.0], 1.0, None)["reached"] == "aim"


def test_different_answers_are_never_timed(clock) -> None:
    sides = [clock("ours", [1], [[7, 8]]), clock("theirs", [1], [[7, 9]])]
    with pytest.raises(MismatchError, match=r"row 0 differs at token 1: ours \[8\], theirs \[9\]"):
        row_of(sides)
    with pytest.raises(MismatchError, match="differ in length"):
        rivals.same_lengths([[1]], [[1, 2]])


def test_a_rival_that_fails_is_named_and_the_rest_measured(clock) -> None:
    def broken() -> None:
        raise RuntimeError(f"no kernel in {ROOT / 'x' / 'y.py'}")

    row = row_of([clock("ours", [1, 1], [[7]]), Side("broken", broken), clock("theirs", [2, 2], [[7]])])
    assert row["skipped"] == [{"name": "broken", "reason": "RuntimeError: no kernel in y.py"}]
    assert [one["what"] for one in row["judged"]] == ["times theirs"]


def test_past_the_deadline_no_rival_is_begun(clock) -> None:
    late = Options(rounds=3, deadline=time.monotonic() - 1)
    row = row_of([clock("ours", [1, 1, 1], [[7]]), clock("theirs", [1], [[7]])], late)
    assert clock.log == ["ours", "ours"] and "used up" in row["skipped"][0]["reason"]


def test_a_killed_or_failing_benchmark_keeps_its_rows(tmp_path: Path) -> None:
    """The file already holds the first row when the second one fails."""

    def rows(options: Options):
        yield row_of([Side("ours", lambda: [[7]])], options)
        found = json.loads(next(tmp_path.glob("*-X1.json")).read_text())
        assert found["status"] == "partial" and len(found["rows"]) == 1
        raise MismatchError("they differ")

    record = harness.measure("X1", Benchmark("title", "someone", rows), QUICK, tmp_path)
    assert record["status"] == "failed" and record["problems"] == ["MismatchError: they differ"]
    assert json.loads(next(tmp_path.glob("*-X1.json")).read_text()) == record


@pytest.mark.parametrize(("field", "value", "message"), [("rounds", 0, "1 or more, got 0"), ("device", "tpu", "'tpu'")])
def test_options_are_checked(field: str, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{field: value})


def test_the_models_have_the_stated_sizes() -> None:
    assert sum(p.numel() for p in random_model(bench_config()).parameters()) == 4_460_800
    with torch.device("meta"):
        from transformers import Qwen2ForCausalLM

        large = Qwen2ForCausalLM(half_billion_config())
    head = large.lm_head.weight.numel()
    total = sum(p.numel() for p in large.parameters())
    assert (round(head / 1e6, 1), round((total - head) / 1e6, 1)) == (136.1, 357.9)
    assert generation.CACHE_BYTES == 24 * 2 * 2 * 64 * 2
    assert word_tokenizer(2048).decode([5, 2047]) == "5 2047"
    assert random_prompts([3, 5], 2048) == random_prompts([3, 5], 2048)
    assert [len(p) for p in random_prompts([3, 5], 2048)] == [3, 5]


def test_greedy_tokens_of_the_bench_model_prove_something() -> None:
    """A random model that repeats one token would make equal tokens worthless."""
    model = random_model(bench_config())
    for row in rivals.generate(model, random_prompts([32] * 4, 2048), 64, SamplingParams(temperature=0.0)):
        assert len(set(row)) > 16


def test_rows_end_where_they_are_told_to() -> None:
    model, prompts = random_model(bench_config()), random_prompts([4, 9], 2048)
    params = SamplingParams()
    rows = rivals.generate(model, prompts, 12, params, lengths=[3, 8, 12, 1], num_return_sequences=2)
    assert list(map(len, rows)) == [3, 8, 12, 1]
    greedy = rivals.generate(model, prompts, 12, SamplingParams(temperature=0.0))
    stop = greedy[0][5]
    stopped = rivals.generate(model, prompts, 12, SamplingParams(temperature=0.0), eos_token_id=[stop])
    assert stopped[0] == greedy[0][: greedy[0].index(stop) + 1]


def test_the_check_of_distributions_can_fail() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 300) * 3
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9)
    assert "0 of 4 rows" in rivals.same_distribution(logits, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "warp", lambda scores, params: scores / 0.69)
        with pytest.raises(MismatchError, match="processed distributions differ"):
            rivals.same_distribution(logits, params)


def test_ties_of_fp32_are_no_difference_and_all_else_is() -> None:
    """Two rows of the head a millionth apart: either may come first, and nothing else may."""
    model, prompt = random_model(bench_config()), random_prompts([32], 2048)
    [ours] = rivals.generate(model, prompt, 8, SamplingParams(temperature=0.0))
    is_tie, wrong = rivals.Ties(model, prompt), [*ours[:5], (ours[5] + 1) % 2048, 7, 7]
    with pytest.raises(MismatchError, match="row 0 differs at token 5"):
        rivals.same_tokens([ours], [wrong], is_tie)
    with pytest.raises(MismatchError, match="row 0 differs at token 6"):
        rivals.same_tokens([ours], [ours[:6]], is_tie)
    for share, is_equal in ((1e-7, True), (1e-3, False)):
        with torch.no_grad():
            model.lm_head.weight[wrong[5]] = model.lm_head.weight[ours[5]] * (1 - share)
        assert is_tie(0, ours, wrong) == is_equal
    assert rivals.same_tokens([ours], [ours], is_tie) == "8 tokens equal"
    beams, other = rivals.Ties(model, prompt, is_beam=True), [*ours[:7], (ours[7] + 1) % 2048]
    assert beams(0, ours, ours) and not beams(0, ours, other)


def test_losses_are_compared_in_units_of_rounding() -> None:
    """Six steps of DPO: a little over 1e-5 (an Intel machine's) is rounding; a hundredth more β is not.

    A pair's answers have about 100 tokens of 8 nats each: 0.1 · √2 · 8 · √100 is 11 nats.
    """
    work = preference.PairWorkload(
        bench_config(), preference.lognormal_pairs(24, prompt=50, answer=100, longest=512, vocabulary=2048), 4
    )
    size = preference.summed_size(work)
    assert 8 < size < 16
    # The losses of both sides on this workload; those of another β are log-sigmoids of its margins.
    losses = [0.6931472, 0.7106994, 0.6630213, 0.6838418, 0.7278018, 0.7069952]
    margins = [-math.log(math.expm1(loss)) for loss in losses]
    found = training.same_losses(losses, [losses[0], *(loss + 1.2e-5 for loss in losses[1:])], size)
    assert found.startswith("losses of 6 steps within 1.2e-05, 0.")
    with pytest.raises(MismatchError, match="losses of 6 steps differ by 0.00035, 8.4 x"):
        training.same_losses(losses, [math.log1p(math.exp(-1.01 * m)) for m in margins], size)


def test_losses_of_tokens_are_compared_at_their_own_size() -> None:
    """8 nats a token: 7.6e-6 a step, which twelve steps add up."""
    losses = [8.0] * 12
    assert training.rounding(8.0, 1) == pytest.approx(8 * 2**-23 * 8)
    training.same_losses(losses, [8 + 7e-6 * step for step in range(1, 13)])
    for wrong in ([8 + 1e-5, *losses[1:]], [*losses[1:], 8 + 1e-4], [*losses[1:], math.nan]):
        with pytest.raises(MismatchError):
            training.same_losses(losses, wrong)


def test_a_difference_in_fp32_fails_after_the_figures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(generation, "compare_in_fp32", lambda options: f"fp32: {generation.DIFFERENT}: row 0")
    record = harness.measure("G3", generation.BENCHMARKS["G3"], Options(rounds=1, quick=True), tmp_path)
    assert record["status"] == "failed" and "row 0" in record["problems"][0]
    assert len(record["rows"]) == 4


def test_selection_of_ids() -> None:
    assert run.selection(["cpu"]) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C9"]
    assert run.selection(["g3", "C1", "C1"]) == ["C1", "G3"]
    assert run.selection(["all"]) == run.IDS and len(run.IDS) == 15
    with pytest.raises(ValueError, match="got 'C8'"):
        run.selection(["C8"])


def test_every_registered_id_is_found_or_explained() -> None:
    for name in run.IDS:
        found = run.find(name)
        assert isinstance(found, Benchmark) or re.search(r"^benchmarks/\w+\.py (is not there|does not measure)", found)
        if isinstance(found, Benchmark):
            assert found.device == ("cuda" if name[0] == "G" else "cpu")
    assert {name for name in run.IDS if name in run.MODULES["generation"]} == set(generation.BENCHMARKS)


def check_schema(record: dict, name: str) -> None:
    assert set(record) == {
        "id", "title", "against", "machine", "device", "clock", "threads", "date", "commit", "versions", "quick",
        "status", "rows", "problems",
    }  # fmt: skip
    assert record["id"] == name and record["status"] == "complete" and not record["problems"], record["problems"]
    assert record["rows"] and record["versions"]["torch"] == torch.__version__
    for row in record["rows"]:
        assert {"name", "unit", "checked", "sides", "judged", "skipped"} <= set(row)
        assert row["judged"] and not row["skipped"], row
        for side in row["sides"]:
            assert side["count"] > 0 and side["seconds"]["min"] <= side["seconds"]["median"] <= side["seconds"]["max"]
        for one in row["judged"]:
            assert one["reached"] == "not judged" and one["min"] <= one["median"] <= one["max"]
    text = json.dumps(record)
    assert str(ROOT) not in text and platform.node() not in text


@pytest.mark.long
@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C7", "G3", "G4", "G5"])
def test_every_benchmark_of_generation_runs(name: str, tmp_path: Path) -> None:
    """Real sides at tiny sizes; those of the GPU on the CPU, by the same code."""
    threads = torch.get_num_threads()
    assert run.main([name, "--quick", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    (path,) = tmp_path.glob(f"*-{name}.json")
    check_schema(json.loads(path.read_text()), name)


@pytest.mark.long
def test_the_documented_command_runs_from_anywhere(tmp_path: Path) -> None:
    """As a script, with sys.path as Python sets it, and without the ids that nobody measures yet."""
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "C7", "--quick", "--rounds", "1", "--out", "out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "times transformers: bar 10, aim 15: not judged" in done.stdout
    assert len(list((tmp_path / "out").glob("*-C7.json"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["G3", "--device", "cpu"], "must come with --quick"),
        (["C1", "--device", "cuda"], "G ids only"),
        (["nonsense"], "got 'nonsense'"),
        (["C1", "--rounds", "-1"], "rounds must be 1 or more"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_benchmarks_are_skipped_with_the_way_out(capsys: pytest.CaptureFixture, tmp_path) -> None:
    assert run.main(["G3", "--out", str(tmp_path)]) == 0
    assert "needs a CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
