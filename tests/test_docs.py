"""The site: how docstrings become Markdown, and that it builds without a warning and asks nothing of the network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

DOCSTRING = """Sums rows: all of them.

It is exact.

Args:
    rows: what is summed,
        in order.
    first, last: as in `slice`; text: with a colon.

Returns:
    A number: the sum.

    And a second paragraph.

Raises:
    ValueError: without rows.

Source: nobody, 2020."""

MARKDOWN = """Sums rows: all of them.

It is exact.

**Args**

- `rows`: what is summed,
    in order.
- `first, last`: as in `slice`; text: with a colon.

**Returns**

A number: the sum.

And a second paragraph.

**Raises**

- `ValueError`: without rows.

**Source:** nobody, 2020."""


def test_sections_become_lists(monkeypatch) -> None:
    """Without the Markdown parser, which the tests do not install."""
    monkeypatch.setitem(sys.modules, "myst_parser", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "myst_parser.sphinx_", SimpleNamespace(Parser=object))
    monkeypatch.delitem(sys.modules, "docstrings", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import docstrings

    sys.modules.pop("docstrings")
    assert docstrings.to_markdown(DOCSTRING) == MARKDOWN
    assert docstrings.to_markdown("One line.") == "One line."


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Where the extra `docs` is installed. A link is fine; a script, style, font or picture of another host is not."""
    pytest.importorskip("autodoc2")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = tmp_path.rglob("*.html")
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert {"index.html", "flows.html", "api/qftlab/qftlab.settings.html"} <= pages.keys()
    loads = r"<(?:script|img|iframe|source)[^>]* src=\"(?:https?:)?//|<link[^>]* href=\"(?:https?:)?//"
    assert not [name for name, text in pages.items() if re.search(loads, text)]
    assert "peak learning rate" in pages["api/qftlab/qftlab.settings.html"]
    assert all(f"{name}.svg" in pages["flows.html"] for name in ("row-to-step", "file-to-stage"))
