"""The course's commands, which stand among the library's own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qftlab import cli
from qftlab.cli import option_helps
from qftlab.files import bundled
from qftlab.rows.sources import load_rows
from qftlab_course.commands import COMMANDS

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
