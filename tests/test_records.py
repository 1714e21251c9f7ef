"""Recorded runs: whole, of the lesson's own settings, and made by the functions that the lesson shows."""

from __future__ import annotations

import json

import pytest

from benchmarks import records

LESSON = """
# %% tags=["recorded"]
import math

# %% tags=["parameters"]
STEPS, SEED = 3, 0

# %% tags=["recorded"]
def run(steps, seed):
    return {"curve": [math.pi * seed] * steps}

# %%
raise RuntimeError("a cell without a tag is not run")
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A lesson of three lines and its record, in an empty folder."""
    (tmp_path / "97_demo.py").write_text(LESSON, encoding="utf-8")
    monkeypatch.setattr(records, "SOURCES", tmp_path)
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setitem(records.RECORDS, "97_demo", "run(STEPS, SEED)")
    return tmp_path / "97_demo.json"


def test_a_draw_runs_the_tagged_cells_with_its_seed(lesson) -> None:
    assert records.rounded(records.draw("97_demo", 2)) == {"curve": [6.2832] * 3}
    assert records.settings("97_demo") == {"STEPS": 3}


def test_what_is_there_is_not_made_again(lesson, monkeypatch) -> None:
    """Draws of other settings are refused; of a file that lacks one draw, one is made."""
    made = []

    def one(command, env, **_):
        made.append((int(command[-1]), env["ATEN_CPU_CAPABILITY"]))
        done = type("Done", (), {"stdout": json.dumps({"curve": []})})
        return done

    monkeypatch.setattr(records.subprocess, "run", one)
    runs = [{"seed": seed, "numerics": name} for seed, name in records.DRAWS if (seed, name) != (0, "avx2")]
    lesson.write_text(json.dumps({"settings": {"STEPS": 3}, "machine": "", "runs": runs}), encoding="utf-8")
    records.make("97_demo")
    records.make("97_demo")
    assert made == [(0, "avx2")]
    lesson.write_text(json.dumps({"settings": {"STEPS": 4}, "machine": "", "runs": runs}), encoding="utf-8")
    with pytest.raises(ValueError, match="delete it"):
        records.make("97_demo")


@pytest.mark.parametrize("name", records.RECORDS)
def test_a_record_is_whole(name: str) -> None:
    text = (records.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["settings"] == records.settings(name), f"delete it and run `python -m benchmarks.records {name}`"
    assert [(run["seed"], run["numerics"]) for run in record["runs"]] == records.DRAWS
    assert sum(numerics == "plain" for _, numerics in records.DRAWS) >= 8, "other numerics are no further draws"
    assert record["machine"] and "NaN" not in text and "Infinity" not in text
    assert "/root" not in text and "/home" not in text and "/work" not in text
