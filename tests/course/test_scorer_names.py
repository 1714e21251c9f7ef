"""Scorers by name: the library's, the course's, and anybody's as module:function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qftlab.evaluate.scorers import SCORERS
from qftlab_course.evaluation import named_scorers


def mine(row: dict, response: str) -> float:
    return len(response)


def test_names(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    found = named_scorers(["exact", f"{Path(__file__).stem}:mine", "other"], {"other": mine})
    assert list(found) == ["exact", "test_scorer_names:mine", "other"]
    assert found["exact"] is SCORERS["exact"] and found["test_scorer_names:mine"]({}, "abc") == 3
    assert "other" not in SCORERS


@pytest.mark.parametrize(("name", "message"), [
    ("exakt", "scorers must be of exact, contained, .*tinyzero, or module:function, got 'exakt'"),
    ("none_such:f", "got 'none_such:f': No module named 'none_such'"),
    ("math:none_such", "got 'math:none_such': module 'math' has no attribute"),
    ("math:pi", "scorers must name a function, got 'math:pi', which is a float"),
    (":f", "got ':f': Empty module name"),
    ("math:", "got 'math:'"),
])  # fmt: skip
def test_a_name_that_is_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_scorers([name])
    assert "none_such" not in sys.modules
