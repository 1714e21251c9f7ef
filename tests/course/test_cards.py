"""The cards under data/ name every bundled file with its sha256, and the README stays short."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"


def test_every_bundled_file_is_on_the_card_with_its_sha256():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    files = {p.relative_to(DATA).as_posix(): p for p in DATA.rglob("*") if p.is_file() and p.suffix != ".md"}
    # The stages have a card of their own, which tests/test_stages.py holds; records change with their lessons.
    files = {name: path for name, path in files.items() if name.split("/")[0] not in ("stages", "records")}
    assert set(listed) == set(files)
    wrong = [name for name, path in files.items() if hashlib.sha256(path.read_bytes()).hexdigest() != listed[name]]
    assert not wrong, f"changed since the card was written: {wrong}"


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
