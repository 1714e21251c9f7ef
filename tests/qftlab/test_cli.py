"""The command line: help at once, the same dataclasses from flags and YAML, one message for a user's mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qftlab import cli, commands
from qftlab.cli import option_helps
from qftlab.files import bundled
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.sources import load_rows
from qftlab.serve import ExportConfig
from qftlab.serve.handover import dtype_of_run
from qftlab.settings import SamplingConfig, SFTConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_shows_every_command_with_an_example(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and run(capsys)[1] == out
    for name, command in commands.COMMANDS.items():
        assert f"  {name}" in out and f"python -m qftlab {command.example}" in out


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_option_is_explained(capsys, name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "Example: python -m qftlab" in " ".join(out.split())
    module, _, kind = commands.COMMANDS[name].config.partition(":")
    config_class = getattr(sys.modules[module], kind)
    helps = option_helps(config_class)
    assert {f.name for f in dataclasses.fields(config_class)} <= set(helps)


@pytest.mark.parametrize("arguments", [["--help"], ["sft", "--help"], ["generate", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"import sys; from qftlab.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_examples_are_valid() -> None:
    for name, command in commands.COMMANDS.items():
        import shlex

        assert shlex.split(command.example)[0] == name
        cli.parse(name, shlex.split(command.example)[1:])


def test_flags_and_yaml_build_the_same_dataclass(tmp_path, capsys) -> None:
    wanted = SFTConfig(data=("a.jsonl", "b.csv"), max_length=99, train=TrainConfig(lr=5e-4, packing=False))
    flags = ["--data", "[a.jsonl, b.csv]", "--max_length", "99", "--train.lr", "5e-4", "--train.packing", "false"]
    assert cli.parse("sft", flags) == wanted
    _, out, _ = run(capsys, "sft", *flags, "--print_config")
    assert yaml.safe_load(out)["train"]["lr"] == 5e-4
    file = tmp_path / "sft.yaml"
    file.write_text(out)
    assert cli.parse("sft", ["--config", str(file)]) == wanted
    changed = dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, seed=7))
    assert cli.parse("sft", ["--config", str(file), "--train.seed", "7"]) == changed
    assert cli.parse("sft", ["--data", "a.jsonl"]).data == ("a.jsonl",)


def test_sampling_options_are_those_of_the_library() -> None:
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    assert [field.name for field in dataclasses.fields(SamplingConfig)] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "'bogus' is no command; there are sft, dpo"),
        (["sft"], "data must name at least one file of rows"),
        (["sft", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["sft", "--data", "a", "--train.lr", "abc"], 'Parser key "train.lr"'),
        (["sft", "--data", "a", "--train.lr", "-1"], "lr must be positive and finite, got -1.0"),
        (["sft", "--data", "a", "--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["sft", "--config", "none.yaml"], "none.yaml"),
        (["generate", "--prompt", "hi", "--model", "/none"], "/none is no folder"),
        (["generate", "--prompt", "hi", "--sampling.top_p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["generate", "--prompt", "hi", "--max_new_tokens", "100000"], "must fit the context of 512 tokens"),
    ],
)
def test_a_mistake_gives_one_message_and_code_2(capsys, arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_a_bad_row_is_named(capsys, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n')
    code, _, err = run(capsys, "sft", "--data", str(file))
    assert code == 2 and "rows.jsonl, line 2" in err and "Traceback" not in err


def test_verbose_shows_where_an_error_came_from(caplog, capsys) -> None:
    with caplog.at_level("DEBUG"):
        assert cli.main(["sft", "--data", "none.jsonl", "--verbose"]) == 2
    assert any(record.exc_info for record in caplog.records)


def test_generate_answers_lines_of_standard_input(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("47 + 38 =\n\nreverse 1 2 3 :\n"))
    code, out, _ = run(capsys, "generate", "--raw", "true", "--max_new_tokens", "4", "--format", "jsonl",
                       "--num_generations", "2", "--sampling.temperature", "1")  # fmt: skip
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["prompt"] for r in records] == ["47 + 38 ="] * 2 + ["reverse 1 2 3 :"] * 2
    assert all(r["finish_reason"] in ("stop", "length") for r in records)


def test_generate_without_a_prompt_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = run(capsys, "generate")
    assert code == 2 and "prompt must be given, got none" in err


def test_chat_keeps_its_history(capsys, monkeypatch) -> None:
    """Each turn is asked with all turns before it; /new forgets them, /quit ends."""
    seen = []

    def fake(model, tokenizer, prompts, **options):
        seen.append([m["content"] for m in prompts[0]])
        return [type("Answer", (), {"text": f"answer {len(seen)}"})()]

    monkeypatch.setattr("qftlab.decoding.engine.generate", fake)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n/new\nthree\n/quit\nfour\n"))
    code, out, _ = run(capsys, "chat", "--system", "Be brief.", "--max_new_tokens", "8")
    assert code == 0 and out.splitlines() == ["answer 1", "answer 2", "answer 3"]
    assert seen == [["Be brief.", "one"], ["Be brief.", "one", "answer 1", "two"], ["Be brief.", "three"]]


def test_chat_forgets_the_oldest_turn_when_it_must() -> None:
    from qftlab.model.loading import load_model
    from qftlab.rows.tokenizer import load_tokenizer

    roles = ["system", *["user", "assistant"] * 10, "user"]
    messages = [{"role": role, "content": f"{i} " + "word " * 40} for i, role in enumerate(roles)]
    kept = commands.fit_context(load_model("tiny"), load_tokenizer("tiny"), messages, 1, 32)
    assert kept[0] == messages[0] and kept[-1] == messages[-1] and 2 < len(kept) < len(messages)
    assert [m["role"] for m in kept[1:3]] == ["user", "assistant"] and kept[1:] == messages[-len(kept) + 1 :]


def test_chat_through_a_pipe() -> None:
    command = [sys.executable, "-m", "qftlab", "chat", "--max_new_tokens", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, input="hello\nagain\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "Traceback" not in done.stderr and "Loading weights" not in done.stderr


def test_sft_and_then_generate_from_latest(capsys, tmp_path) -> None:
    rows = load_rows(bundled("instructions", "train.jsonl"))[:32]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, out, _ = run(capsys, "sft", "--data", str(file), "--output", str(tmp_path / "runs"), "--train.max_steps", "2",
                       "--train.batch_size", "8", "--device", "cpu")  # fmt: skip
    assert code == 0 and "model, metrics and curves:" in out
    code, out, _ = run(capsys, "generate", "--prompt", "What is 1 + 1?", "--max_new_tokens", "4",
                       "--model", str(tmp_path / "runs" / "latest"))  # fmt: skip
    assert code == 0 and out.strip()


def test_export_takes_the_dtype_in_which_the_run_trained(capsys, tmp_path) -> None:
    """`tiny` is stored in bf16: adapters trained on it in fp32 are merged in fp32, from wherever the run is named."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, load_rows(bundled("instructions", "train.jsonl"))[:8])), encoding="utf-8")
    code, *_ = run(capsys, "sft", "--data", str(file), "--output", str(tmp_path / "runs"), "--train.max_steps", "1",
                   "--train.batch_size", "4", "--lora.rank", "2", "--device", "cpu")  # fmt: skip
    assert code == 0
    for number, name in enumerate(("latest", "latest/checkpoints/final", "latest/checkpoints/initial")):
        out = tmp_path / f"out-{number}"
        code, said, _ = run(capsys, "export", "--model", str(tmp_path / "runs" / name), "--output", str(out))
        assert code == 0 and "greedy tokens as before" in said
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize(("trained", "wanted"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("auto", "auto")])
def test_the_dtype_of_a_run_is_that_of_its_settings(trained: str, wanted: str, tmp_path) -> None:
    """Training loads fp16 as fp32; the dtype in the config.json of a model, above or below, says nothing of a run."""
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    assert dtype_of_run(ExportConfig(model=str(model))) == "auto", "no run"
    (tmp_path / "run" / "config.json").write_text('{"dtype": "bfloat16"}', encoding="utf-8")
    assert dtype_of_run(ExportConfig(model=str(model))) == "auto", "adapters in the folder of their base"
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"dtype": trained}}), encoding="utf-8")
    assert dtype_of_run(ExportConfig(model=str(tmp_path / "run"))) == wanted
    assert dtype_of_run(ExportConfig(model=str(model), dtype="float16")) == "float16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("generate --prompt hi --model tiny --device gpu", "device must be one that torch finds here, got 'gpu'"),
        ("sft --data x.jsonl --resume last --output nowhere", "looked for metrics.jsonl in nowhere"),
        ("sft --resume last", "last is no run to resume: looked for metrics.jsonl in runs/sft"),
        ("sft --data PAIRS", "must have an answer to train on"),
        ("dpo --data BAD", "bad.jsonl, line 2"),
        ("dpo --data [PAIRS,CALLS]", "calls.jsonl, row 1, 'chosen': "),
        ("chat --model SCORER", "is a reward model: it scores answers (rloo --reward_model) and writes none"),
        ("export --model SCORER", "is a reward model: it scores answers"),
        ("rloo --problems 3 --reward_model x", "add it, as in --rewards [countdown,model]"),
        ("rloo --data PAIRS", "rewards countdown wants numbers and target in each row, got prompt"),
        ("rloo --data PAIRS --rewards exact", "rewards exact wants output in each row, got prompt"),
        ("rloo --problems 4 --rewards mode", "in row 1: add it, or name another of --rewards"),
        ("sft --data ROWS --lora.rank 2 --lora.tokens [nonsense]", "lora.tokens must be tokens of the tokenizer"),
    ],
)
def test_a_newcomers_slips_get_one_clear_line(arguments: str, message: str, tmp_path, capsys, monkeypatch) -> None:
    pair = '{"prompt": "1?", "chosen": "1", "rejected": "2"}\n'
    row = '{"instruction": "1?", "input": "", "output": "1"}\n'
    call = {"prompt": [{"role": "assistant", "content": "", "tool_calls": [{}]}], "chosen": "1", "rejected": "2"}
    files = {"pairs": pair, "rows": row, "bad": pair + '{"prompt": "1?"}\n', "calls": json.dumps(call)}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        arguments = arguments.replace(name.upper(), str(tmp_path / f"{name}.jsonl"))
    monkeypatch.chdir(tmp_path)
    # The handler of transformers may hold the stream of an earlier test, which is closed.
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [])
    if "nowhere" in arguments:
        (tmp_path / "x.jsonl").write_text(row, encoding="utf-8")
    if "SCORER" in arguments:
        save_scorer(tmp_path / "scorer")
    assert cli.main(arguments.replace("SCORER", str(tmp_path / "scorer")).split()) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err


def save_scorer(folder: Path) -> None:
    """A reward model, as `reward` leaves it."""
    from random_models import random_model

    from qftlab.model.loading import save_model
    from qftlab.rows.tokenizer import load_tokenizer
    from qftlab.train.reward import reward_model

    tokenizer = load_tokenizer("tiny")
    save_model(reward_model(random_model(), tokenizer), tokenizer, folder)


def test_several_answers_at_temperature_0_are_warned_of(capsys, caplog) -> None:
    for temperature, is_warned in (("0", True), ("0.7", False)):
        caplog.clear()
        code, out, _ = run(capsys, "generate", "--prompt", "hello", "--max_new_tokens", "2", "--num_generations", "3",
                           "--sampling.temperature", temperature)  # fmt: skip
        assert code == 0 and out.count("\n") == 3
        assert ("3 answers to a prompt are all the same at temperature 0" in caplog.text) is is_warned
