"""A run's folder by hand: the picture it is judged by, and names within one second."""

from __future__ import annotations

import struct
import time

import pytest

from qftlab.evaluate.plots import draw_curves
from qftlab.train import run


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "reward": -0.5}, {"step": 2, "reward": 0.5}]], ids=["loss", "reward"]
)
def test_the_curve_is_840_by_480_dots(tmp_path, records: list[dict]) -> None:
    draw_curves(tmp_path / "curves.png", [1.0, 0.5], [(0, 1.1), (2, 0.6)], records)
    head = (tmp_path / "curves.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and struct.unpack(">II", head[16:]) == (840, 480)


def test_runs_of_one_second_are_numbered_from_2(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    assert [run.RunFolder(tmp_path, {}).path.name for _ in range(3)] == ["now", "now-2", "now-3"]
