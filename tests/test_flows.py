"""The flows of benchmarks/flows.py: how many files each may enter, and that the pictures are of this library."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from benchmarks import flows

# Files at most; where a flow gets shorter, lower its number.
MOST = {"row-to-step": 16, "prompt-to-text": 7, "pair-to-loss": 18, "puzzle-to-update": 24, "file-to-stage": 24}


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> dict[str, tuple[flows.Flow, dict[str, flows.Visit]]]:
    """Every flow with its trace."""
    found = {}
    for flow in flows.flows(tmp_path_factory.mktemp("flows")):
        flows.make_ready()
        found[flow.name] = flow, flows.trace(flow.run)
    return found


@pytest.mark.parametrize("name", MOST)
def test_a_flow_enters_few_files(traced, name: str) -> None:
    assert traced.keys() == MOST.keys()
    flow, visits = traced[name]
    assert len(visits) <= MOST[name], flows.text_of(flow, visits)


@pytest.mark.parametrize("name", MOST)
def test_a_picture_is_of_this_library(traced, name: str) -> None:
    flow, visits = traced[name]
    page, file = flows.DOCS / "flows.md", flows.DOCS / "flows" / f"{name}.svg"
    assert file.read_text(encoding="utf-8") == flows.picture_of(flow, visits), f"run {flows.COMMAND}"
    text = page.read_text(encoding="utf-8")
    assert flows.with_text(text, flow, visits) == text, f"run {flows.COMMAND}"


@pytest.mark.parametrize("name", MOST)
def test_a_picture_is_small_and_reads_without_css_and_colour(name: str) -> None:
    file = flows.DOCS / "flows" / f"{name}.svg"
    assert file.stat().st_size < 60_000
    nodes = list(ElementTree.parse(file).iter())
    assert {"title", "desc"} <= {node.tag.rpartition("}")[2] for node in nodes}
    assert not [node.tag for node in nodes if {"style", "class"} & set(node.keys()) or node.tag.endswith("style")]
    colours = {node.get(key) for node in nodes for key in ("fill", "stroke") if node.get(key)}
    assert colours <= {"black", "white", "none"}
    assert all(int(node.get("font-size")) >= 16 for node in nodes if node.tag.endswith("text")), "12 pt"


FILES = {
    "__init__": "",
    "door": """
        from functools import cache

        class Box:
            def __init__(self):
                self.kept = list(map(lambda n: inner(n), range(2)))

        @cache
        def once():
            from little.late import value
            return value

        def inner(n):
            from little.deep import work
            return work(n)

        def enter():
            return Box().kept, once()
    """,
    "deep": """
        from little import unused

        def back():
            from little.door import inner
            return inner

        def work(n):
            assert back()
            return n
    """,
    "late": "def at_import():\n    return 7\n\nvalue = at_import()\n",
    "unused": "def never():\n    return 0\n",
}


@pytest.fixture
def little(tmp_path: Path, monkeypatch):
    """A package of four files, imported from nowhere else."""
    folder = tmp_path / "little"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(re.sub("^        ", "", text, flags=re.MULTILINE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield SimpleNamespace(package=importlib.import_module("little"), folder=folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "little"]:
        del sys.modules[name]


def test_a_trace_by_hand(little) -> None:
    """`enter` is called from outside, `work` from door; what `late` does at its import does not count."""
    door = importlib.import_module("little.door")
    visits = flows.trace(door.enter, little.folder)
    assert visits == {
        "door": flows.Visit(1, None, ["enter"]),
        "deep": flows.Visit(2, "door", ["work"]),
    }
    assert [(depth, name) for depth, name, _ in flows.tree(visits)] == [(0, "door"), (1, "deep")]


def test_a_flow_does_not_depend_on_the_one_before(little) -> None:
    """Every module is loaded and every cache is empty."""
    flows.make_ready(little.package)
    door = importlib.import_module("little.door")
    assert "little.unused" in sys.modules and door.once() == 7
    assert door.once.cache_info().currsize == 1
    flows.make_ready(little.package)
    assert door.once.cache_info().currsize == 0


def test_who_calls_later_is_noted(little) -> None:
    """deep is called by the flow itself first and by door after that; both calls are of its function `work`."""
    door, deep = importlib.import_module("little.door"), importlib.import_module("little.deep")
    visits = flows.trace(lambda: (deep.work(1), door.enter()), little.folder)
    assert visits["deep"] == flows.Visit(1, None, ["work"], ["door"])
    flow = flows.Flow("name", "call", "in", "out", door.enter)
    assert flows.text_of(flow, visits).splitlines() == [
        "in → call → out: 2 files", " 1 deep: work (also from 2)", " 2 door: enter",
    ]  # fmt: skip
    assert flows.table({"name": visits}, [flow]).endswith("| in → out | `call` | 2 | 2 | 1 |")


def test_a_page_without_the_picture_is_refused() -> None:
    flow = flows.Flow("name", "call", "in", "out", list)
    with pytest.raises(ValueError, match="one picture flows/name.svg"):
        flows.with_text("# No picture", flow, {})
