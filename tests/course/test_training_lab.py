"""Notebooks 03 and 05: their pictures hold what they are given, and the recorded LoRA runs are those of the lesson."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import records
from qftlab.files import bundled
from qftlab_course.lessons import training_plots


def test_rates_are_drawn_as_given() -> None:
    ax = training_plots.rates({"a": [0.5, 1.0], "b": [1.0, 0.0]})
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.5, 1.0], [1.0, 0.0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_documents_fill_their_rows() -> None:
    """Rows 3 + 2 and 4 of 6 tokens: solid 5 and 4, hatched 1 and 2, three quarters real."""
    (ax,) = training_plots.documents({"rows": ([[3, 2], [4]], 6)})
    solid = [p for p in ax.patches if not p.get_hatch()]
    hatched = [p for p in ax.patches if p.get_hatch()]
    assert [(p.get_x(), p.get_width()) for p in solid] == [(0, 3), (3, 2), (0, 4)]
    assert [(p.get_x(), p.get_width()) for p in hatched] == [(5, 1), (4, 2)]
    assert ax.get_title(loc="left") == "rows: 75% real"


def test_shares_and_distances_are_drawn_as_given() -> None:
    ax = training_plots.shares_by_rank({"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([0.25, 1.0])})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.5, 1.0], [0.25, 1.0]]
    assert ax.lines[0].get_xdata().tolist() == [1, 2]
    ax = training_plots.rows_moved({"full": torch.tensor([1.0, 2.0]), "two": torch.tensor([0.0, 3.0])})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 2.0], [0.0, 3.0]]


def test_paths_are_thin_and_their_mean_is_bold() -> None:
    """Two runs of one kind: (learned, forgotten) at (8, 0.2), (2, 0.4) and (8, 0.2), (1, 0.6); the start is not."""
    paths = torch.tensor([[[8.0, 0.2], [2.0, 0.4]], [[8.0, 0.2], [1.0, 0.6]]])
    ax = training_plots.trade_off({"kind": paths}, ("yours", paths[0]))
    thin, other, bold, stars, start = ax.lines
    assert (thin.get_xdata().tolist(), thin.get_ydata().tolist()) == ([pytest.approx(0.4)], [2.0])
    assert other.get_ydata().tolist() == [1.0] and bold.get_linewidth() > 2 > thin.get_linewidth()
    assert (bold.get_xdata().tolist(), bold.get_ydata().tolist()) == ([pytest.approx(0.5)], [1.5])
    assert stars.get_ydata().tolist() == [2.0] and start.get_xdata()[0] == pytest.approx(0.2)


def test_the_recorded_runs_are_those_of_the_lesson() -> None:
    text = bundled("records", "05_lora.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["settings"] == records.settings("05_lora") and "/" not in record["machine"]
    assert [(run["seed"], run["numerics"]) for run in record["runs"]] == records.DRAWS
    for run in record["runs"]:
        for name in record["settings"]["RUNS"]:
            path = run[name]["path"]
            assert len(path) == 1 + record["settings"]["STEPS"] // 8 and 0 <= run[name]["kept"] <= 1
            assert path[0] == pytest.approx(record["runs"][0]["full"]["path"][0], abs=1e-3), "all begin alike"
            assert path[0][0] > math.log(1024) > path[-1][0]
