"""Our docstrings as Markdown: the sections of Google's style become lists under a heading in bold."""

from __future__ import annotations

import re
from textwrap import dedent

from myst_parser.sphinx_ import Parser as MystParser

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:    .*(?:\n|\Z)|\n)+)", re.MULTILINE)
ITEM = re.compile(r"^(?=\S)(?:([\w, ]+): )?", re.MULTILINE)


class Parser(MystParser):
    """Markdown whose Google sections are lists."""

    def parse(self, inputstring: str, document) -> None:
        """Parses a docstring into a document of docutils."""
        super().parse(to_markdown(inputstring), document)


def to_markdown(docstring: str) -> str:
    """A docstring with each section as a bold heading and, but for what is returned, a list."""
    text = re.sub(r"^Source: ", "**Source:** ", docstring, flags=re.MULTILINE)
    return SECTION.sub(lambda found: f"**{found[1]}**\n\n{_body(*found.groups())}\n\n", text)


def _body(title: str, text: str) -> str:
    text = dedent(text).strip()
    if title == "Returns":
        return text
    return ITEM.sub(lambda found: f"- `{found[1]}`: " if found[1] else "- ", text)
