"""The tour's page, with the base model in the place of every stage: what is measured, said and written."""

from __future__ import annotations

import dataclasses

import pytest

from qftlab import cli
from qftlab.rows.sources import load_rows
from qftlab_course import stages, tour

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def said_and_page(tmp_path_factory):
    """What the tour says and the page it writes, on every eighth held-out row."""
    folder, said = tmp_path_factory.mktemp("tour"), []
    base = stages.stage("base")
    records = [{"step": i, "loss": 2.0 - 0.1 * i, "reward": 0.1 * i} for i in range(1, 9)]

    def fake(name: str, **options) -> stages.Stage:
        if name == "extended":
            return stages.stage(name)
        assert options["root"] == folder / "page" / "stages" and options["seed"] == 3, "it trains in its own folder"
        return dataclasses.replace(base, name=name, metrics=records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tour, "stage", fake)
        patch.setattr(tour, "load_rows", lambda path: load_rows(path)[::8])
        with pytest.raises(tour.MissedError) as missed:
            tour.main(tour.TourConfig(output=str(folder / "page"), seed=3), say=said.append)
    return "\n".join([*said, str(missed.value)]), folder / "page" / "report.html"


def test_every_stage_has_its_column_and_every_question_its_answer(said_and_page) -> None:
    said, page = said_and_page
    text = (page.parent / "report.md").read_text(encoding="utf-8")
    for title in tour.TITLES.values():
        assert title in said and title in text
    for question in tour.QUESTIONS:
        assert f"You:   {question}" in said and question in text
    assert page.name == "report.html" and page.stat().st_size > 20_000
    assert len(list(page.parent.glob("*.png"))) == 4


def test_equal_models_gain_nothing_and_the_bars_say_so(said_and_page) -> None:
    said, _ = said_and_page
    assert "RLOO: 0 of 50 puzzles gained, 0 lost, sampled (exact McNemar p = 1)" in said
    assert "DPO:  0 of 38 answers became polite, 0 ceased to be, sampled (exact McNemar p = 1)" in said
    verdicts = {line.split("  ")[0]: line.rsplit(" ", 1)[1] for line in said.splitlines() if ": " in line}
    assert verdicts["base: format kept in chat"] == "passed"
    assert verdicts["RLOO: Countdown gained, sampled"] == verdicts["DPO: polite answers gained, sampled"] == "missed"


def test_a_missed_bar_is_an_error_that_names_it(said_and_page) -> None:
    said, _ = said_and_page
    last = said.splitlines()[-1]
    assert last.startswith("missed: SFT: format kept; ") and "RLOO: Countdown gained, sampled" in last
    assert "base: format kept" not in last and "Open next" not in said


def test_a_missed_bar_is_exit_code_one(monkeypatch, capsys) -> None:
    def missed(config) -> None:
        raise tour.MissedError("missed: DPO")

    monkeypatch.setattr(tour, "main", missed)
    assert cli.main(["tour"]) == 1 and "tour: missed: DPO" in capsys.readouterr().err
