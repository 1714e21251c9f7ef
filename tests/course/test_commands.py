"""The course's commands, which stand among the library's own."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qftlab import cli
from qftlab.cli import option_helps
from qftlab.commands import load_for
from qftlab.files import bundled
from qftlab.model.loading import load_model, save_model
from qftlab.rows.batches import pack
from qftlab.rows.chat import render_prompt
from qftlab.rows.examples import encode_rows
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.step import Step, no_grad_loss
from qftlab_course import measure
from qftlab_course.commands import COMMANDS, FEW, reference_lines

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_they_stand_among_the_librarys_own(capsys) -> None:
    """By the entry point of an installation, and by `python -m qftlab_course` in a checkout without one."""
    _, out, _ = run(capsys, "--help")
    code = "import sys, runpy; sys.argv = ['qftlab_course', '--help']; sys.path.insert(0, '.')\n"
    code += "runpy.run_module('qftlab_course', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for name, command in COMMANDS.items():
        for said in (out, done.stdout):
            assert f"  {name}" in said and f"python -m qftlab {command.example}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(capsys, name: str) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "Example: python -m qftlab" in " ".join(out.split())
    module, _, kind = COMMANDS[name].config.partition(":")
    config_class = getattr(sys.modules[module], kind)
    if name != "pretrain":  # its shape options explain themselves
        assert {f.name for f in dataclasses.fields(config_class)} <= set(option_helps(config_class))
    assert cli.parse(name, COMMANDS[name].example.split()[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["evaluate", "--output", "page.pdf"], "output must end in .html or .md"),
        (["evaluate", "--thinking", "off"], "thinking must be left at auto"),
        (["tour", "--preset", "huge"], "preset must be one of tiny"),
    ],
)
def test_a_mistake_gives_one_message_and_code_2(capsys, arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from qftlab.cli import main; main(['evaluate', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evaluate_prints_a_table_and_writes_a_page(capsys, tmp_path) -> None:
    rows = [r for r in load_rows(bundled("instructions", "heldout.jsonl")) if r["skill"] == "reverse"][:3]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    page = tmp_path / "page.md"
    code, out, _ = run(capsys, "evaluate", "--data", str(file), "--max_new_tokens", "4", "--output", str(page))
    assert code == 0 and "reverse" in out and "accuracy" in out and str(page) in out
    assert "reverse" in page.read_text(encoding="utf-8")
    assert run(capsys, "evaluate", "--data", str(file), "--limit", "1", "--max_new_tokens", "4")[0] == 0


ASK, SAY = {"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}
AND, SO = {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "4"}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_evaluate_measures_any_rows(capsys, tmp_path, monkeypatch) -> None:
    """A conversation, ShareGPT, prompt and completion, named columns: asked as they are, up to the last answer."""
    gpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "So?"},
           {"from": "gpt", "value": "4"}]  # fmt: skip
    write(tmp_path / "a.jsonl", {"messages": [ASK, SAY, AND, SO]}, {"conversations": gpt})
    write(tmp_path / "b.jsonl", {"prompt": ASK["content"], "completion": "9"})
    asked = []
    real = measure.generate
    monkeypatch.setattr(
        measure, "generate", lambda model, tok, ids, **o: asked.extend(ids) or real(model, tok, ids, **o)
    )
    page = tmp_path / "page.md"
    code, out, _ = run(capsys, "evaluate", "--data", str(tmp_path / "?.jsonl"), "--output", str(page))
    assert code == 0
    tiny = load_tokenizer("tiny")
    hello = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "So?"}]  # fmt: skip
    assert asked == [render_prompt(tiny, said) for said in ([ASK, SAY, AND], hello, [ASK])]
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert lines["exact"][0] == lines["contained"][0] == "3" and "instructions" not in lines
    loss = re.search(r"loss: ([\d.]+), perplexity: .* of 3 references, too few for an interval", out)
    mean = float(loss[1])
    examples, _ = encode_rows(tiny, load_rows(str(tmp_path / "?.jsonl")), train_on="last")
    assert mean == pytest.approx(no_grad_loss(Step(load_model("tiny")), [pack(examples)]), abs=6e-4), "it is rounded"
    assert loss[0] in page.read_text(encoding="utf-8")
    found = {
        name: {"mean": 2.0, "low": 1.5, "high": 2.5, "rows": FEW} for name in ("loss", "perplexity", "token_accuracy")
    }
    assert reference_lines(found)[0] == "loss: 2.000 nats a token of 10 references, 95 % interval 1.500 to 2.500"


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([{"messages": [ASK, SAY]}, {"messages": [ASK, SAY, AND]}], (), "rows.jsonl, row 2 must end with an answer"),
    ([{"instruction": "q", "output": ""}], (), "rows.jsonl, row 1 must end with an answer"),
    ([{"prompt": "q"}], ("--columns", "{output: a}"), "rows.jsonl, line 1 must have 'a'"),
    ([{"q": "x", "a": "y"}], ("--columns", "{prompt: q, output: b}"), "rows.jsonl, line 1 must have 'b'"),
    ([{"messages": [ASK, SAY, AND, SO]}] * 2, ("--few_shot", "1"), "few_shot must be 0 for conversations"),
    ([{"prompt": "x " * 3000, "completion": "y"}], (), "rows.jsonl, row 1): leave them out"),
])  # fmt: skip
def test_evaluate_names_the_row_that_it_cannot_ask(capsys, tmp_path, rows, options, message) -> None:
    code, _, err = run(capsys, "evaluate", "--data", write(tmp_path / "rows.jsonl", *rows), *options)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_evaluate_asks_with_thinking_as_it_is_told(capsys, tmp_path) -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n"
        "{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{%- endif %}{%- endif %}"
    )
    save_model(model, tokenizer, tmp_path / "m")
    rows = write(tmp_path / "rows.jsonl", {"prompt": ASK["content"], "completion": "9"})
    for mode, off in (("off", True), ("on", False), ("auto", False)):
        config = cli.parse("evaluate", ["--model", str(tmp_path / "m"), "--data", rows, "--thinking", mode])
        tokenizer = load_for(config)[1]
        assert tokenizer.decode(render_prompt(tokenizer, [ASK])).endswith("</think>") == off
    assert run(capsys, "evaluate", "--model", str(tmp_path / "m"), "--data", rows, "--thinking", "off")[0] == 0
