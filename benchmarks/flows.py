"""Which files of the library a flow enters, in which order, and which calls which: a trace, a table, pictures.

    python -m benchmarks.flows            # prints the table, draws docs/flows/*.svg and their text in docs/flows.md
    python -m benchmarks.flows --table    # the table only

A file is entered when a function of it runs; imports do not count. Nothing here names a file of the library: what is
drawn is what the profiler of Python saw on a CPU, in the decoder's plain layout, with the model of data/tiny.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from xml.sax.saxutils import escape

import qftlab

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COMMAND = "python -m benchmarks.flows"


@dataclass(frozen=True)
class Flow:
    """One way through the library.

    Args:
        name: of its picture.
        call: what it calls, for people.
        start: what goes in.
        end: what comes out.
        run: does it.
    """

    name: str
    call: str
    start: str
    end: str
    run: Callable[[], object]


@dataclass
class Visit:
    """A file that was entered.

    Args:
        number: when, from 1.
        parent: the file that called it first; None is the flow itself.
        doors: its functions that were called from elsewhere, in order.
        callers: the other files that called it later, in order.
    """

    number: int
    parent: str | None
    doors: list[str] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)


def flows(folder: Path) -> list[Flow]:
    """The flows, ready to run; what they write goes into `folder`.

    Models, rows and settings are made here, so that a trace begins at the public function.
    """
    model_path = str(ROOT / "data" / "tiny")
    model, tokenizer = qftlab.load_model(model_path), qftlab.load_tokenizer(model_path)
    rows, pairs = some_rows("instructions/train.jsonl"), some_rows("countdown/pairs.jsonl")
    puzzles = some_rows("countdown/development.jsonl")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    short = qftlab.TrainConfig(max_steps=2, batch_size=4)
    policy = qftlab.PolicyConfig(num_generations=2, max_new_tokens=8)
    stage = qftlab.SFTConfig(model=model_path, data=str(file), output=str(folder), train=short, device="cpu")
    question = [{"role": "user", "content": rows[0]["instruction"]}]

    def solved(prompt: list[dict], completion_ids: list[int], text: str, row: dict) -> float:
        return qftlab.countdown_reward(text, row["numbers"], row["target"])

    return [
        Flow("row-to-step", "fit_rows", "rows", "steps", lambda: qftlab.fit_rows(model, tokenizer, rows, short)),
        Flow("prompt-to-text", "generate", "a prompt", "its text",
             lambda: qftlab.generate(model, tokenizer, [question], max_new_tokens=8)),
        Flow("pair-to-loss", "fit_pairs", "pairs", "losses and steps",
             lambda: qftlab.fit_pairs(model, tokenizer, pairs, short)),
        Flow("puzzle-to-update", "fit_policy", "puzzles", "updates",
             lambda: qftlab.fit_policy(model, tokenizer, puzzles, solved, short, policy)),
        Flow("file-to-stage", "sft", "a file of rows", "a run folder", lambda: qftlab.sft(stage)),
    ]  # fmt: skip


def some_rows(name: str, count: int = 8) -> list[dict]:
    """The first rows of a bundled file."""
    with (ROOT / "data" / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def make_ready(package=qftlab) -> None:
    """Loads a package whole and empties its caches, so that no flow depends on the one before it."""
    for door in getattr(package, "__all__", ()):
        getattr(package, door)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ImportError:  # kernels need a GPU's packages
                continue
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package.__name__}."):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


def trace(run: Callable[[], object], root: Path = Path(qftlab.__file__).parent) -> dict[str, Visit]:
    """Runs something and returns the files under `root` that it entered, by name, in the order of entry."""
    visits: dict[str, Visit] = {}
    names: dict[str, str | None] = {}

    def name_of(code: CodeType) -> str | None:
        if code.co_filename not in names:
            path = Path(code.co_filename)
            name = path.relative_to(root).with_suffix("").as_posix() if path.is_relative_to(root) else None
            names[code.co_filename] = name
        return names[code.co_filename]

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (name := name_of(frame.f_code)) is None or frame.f_code.co_name == "<module>":
            return
        back = frame.f_back
        while back is not None and name_of(back.f_code) is None:
            back = back.f_back
        if back is not None and back.f_code.co_name == "<module>":
            return  # called by an import
        caller = None if back is None else name_of(back.f_code)
        visit = visits.setdefault(name, Visit(len(visits) + 1, caller))
        if caller != name:
            door = door_of(frame)
            if door and door not in visit.doors:
                visit.doors.append(door)
            if caller and caller not in [visit.parent, *visit.callers]:
                visit.callers.append(caller)

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return visits


def door_of(frame: FrameType) -> str:
    """How a function is called from elsewhere: `pad`, `Step.forward`, `Step` for its `__init__`; none if unnamed."""
    name = frame.f_code.co_name
    if name.startswith("<"):
        return ""
    owner = frame.f_locals.get("cls") or type(frame.f_locals.get("self"))
    if owner is type(None):
        return name
    return owner.__name__ if name.startswith("__") else f"{owner.__name__}.{name}"


def tree(visits: Mapping[str, Visit]) -> Iterator[tuple[int, str, Visit]]:
    """Depth, name and visit of every file, each below the file that called it first."""

    def below(parent: str | None, depth: int) -> Iterator[tuple[int, str, Visit]]:
        for name, visit in visits.items():
            if visit.parent == parent:
                yield depth, name, visit
                yield from below(name, depth + 1)

    return below(None, 0)


def also(visit: Visit, visits: Mapping[str, Visit]) -> str:
    """The numbers of the files that called it later."""
    numbers = ", ".join(str(n) for n in sorted(visits[name].number for name in visit.callers))
    return f"also from {numbers}" if numbers else ""


def text_of(flow: Flow, visits: Mapping[str, Visit]) -> str:
    """A trace as lines: number, file (set in below its first caller), functions called, and later callers."""
    lines = [f"{flow.start} → {flow.call} → {flow.end}: {len(visits)} files"]
    for depth, name, visit in tree(visits):
        more = also(visit, visits)
        lines.append(f"{visit.number:>2} {'  ' * depth}{name}: {', '.join(visit.doors)}{more and f' ({more})'}")
    return "\n".join(lines)


LINE, INDENT, MARGIN, SIZE = 34, 26, 16, 16  # pixels; 16 of them are 12 points
MONO, LETTER = 9.7, 8.2  # width of a letter of each font, a little more than it needs
WIDEST = 46  # letters of a row's functions; the text form has them all


def picture_of(flow: Flow, visits: Mapping[str, Visit]) -> str:
    """A trace as SVG without CSS and without colour."""
    rows = list(tree(visits))
    box = MONO * max(len(f"{visit.number} {name}") for _, name, visit in rows) + 16
    column = MARGIN + INDENT * max(depth for depth, *_ in rows) + box + 14
    said = [shortened(", ".join(v.doors)) + (f"  ·  {also(v, visits)}" if v.callers else "") for *_, v in rows]
    width, height = column + LETTER * max(map(len, said)) + MARGIN, MARGIN * 2 + LINE * (len(rows) + 2)
    lines, shapes = [], [capsule(flow.start, MARGIN + LINE / 2), capsule(flow.end, height - MARGIN - LINE / 2)]
    middles: dict[str, float] = {}
    trunks: dict[str, str] = {}
    for i, (depth, name, visit) in enumerate(rows):
        x, y = MARGIN + INDENT * depth, MARGIN + LINE * (i + 1.5)
        middles[name] = y
        if visit.parent is None:
            lines.append(path(f"M{x + 13:.0f} {y - 21:.0f}V{y - 13:.0f}", arrow=True))
        else:
            lines.append(path(f"M{x - 13:.0f} {y:.0f}H{x:.0f}"))
            trunks[visit.parent] = path(f"M{x - 13:.0f} {middles[visit.parent] + 13:.0f}V{y:.0f}")  # the last one stays
        shapes.append(f'<rect x="{x}" y="{y - 13:.0f}" width="{box:.0f}" height="26" fill="white" stroke="black"/>')
        shapes.append(letters(f"{visit.number} {name}", x + 8, y, "monospace"))
        shapes.append(letters(said[i], column, y))
    size = f'width="{width:.0f}" height="{height:.0f}"'
    lines.append(path(f"M{MARGIN + 6} {MARGIN + LINE * 2}V{height - MARGIN - LINE + 4}", arrow=True, dashes="2 4"))
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" {size} role="img">',
        f"<title>{escape(flow.start)} → {escape(flow.end)}</title>",
        f"<desc>{escape(text_of(flow, visits))}</desc>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z"/></marker></defs>\n<rect {size} fill="white"/>',
    ]
    return "\n".join([*head, *lines, *trunks.values(), *shapes, "</svg>\n"])


def capsule(text: str, y: float) -> str:
    """What goes in or comes out, in a rounded frame."""
    width = LETTER * len(text) + 28
    return (
        f'<rect x="{MARGIN}" y="{y - 13:.0f}" width="{width:.0f}" height="26" rx="13" fill="white" stroke="black" '
        f'stroke-width="2"/>\n{letters(text, MARGIN + 14, y)}'
    )


def letters(text: str, x: float, y: float, family: str = "sans-serif") -> str:
    """A line of text whose middle is at y."""
    return f'<text x="{x:.0f}" y="{y + 5:.0f}" font-family="{family}" font-size="{SIZE}">{escape(text)}</text>'


def path(d: str, arrow: bool = False, dashes: str = "") -> str:
    """A line, with a tip or dashed where asked for."""
    more = (' marker-end="url(#tip)"' if arrow else "") + (f' stroke-dasharray="{dashes}"' if dashes else "")
    return f'<path d="{d}" fill="none" stroke="black"{more}/>'


def shortened(text: str) -> str:
    """A list of names, cut after a comma where it is too wide for the picture."""
    return text if len(text) <= WIDEST else text[:WIDEST].rpartition(",")[0] + ", …"


def with_text(page: str, flow: Flow, visits: Mapping[str, Visit]) -> str:
    """The page with a flow's text form behind its picture, in place of the one there."""
    block = re.compile(rf"(\]\(flows/{flow.name}\.svg\)\n\n```text\n).*?(\n```)", re.DOTALL)
    page, count = block.subn(lambda found: found[1] + text_of(flow, visits) + found[2], page)
    if count != 1:
        raise ValueError(f"flows.md must have one picture flows/{flow.name}.svg with a ```text block, got {count}")
    return page


def table(traces: Mapping[str, Mapping[str, Visit]], found: list[Flow]) -> str:
    """The counts: files entered, their functions called from other files, and pairs of files that call each other."""
    lines = ["| flow | call | files | functions | calls between files |", "|---|---|---|---|---|"]
    for flow in found:
        visits = traces[flow.name].values()
        edges = sum(len(v.callers) + (v.parent is not None) for v in visits)
        doors = sum(len(v.doors) for v in visits)
        lines.append(f"| {flow.start} → {flow.end} | `{flow.call}` | {len(visits)} | {doors} | {edges} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Traces, prints the table, and draws unless only the table is asked for."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Traces five flows and draws them.")
    parser.add_argument("--table", action="store_true", help="only print the counts")
    args = parser.parse_args(words)
    os.environ.setdefault("QFTLAB_LAYOUT", "plain")
    with tempfile.TemporaryDirectory() as folder:
        found, traces = flows(Path(folder)), {}
        for flow in found:
            make_ready()
            traces[flow.name] = trace(flow.run)
    print(table(traces, found))
    if not args.table:
        page = (DOCS / "flows.md").read_text(encoding="utf-8")
        for flow in found:
            (DOCS / "flows" / f"{flow.name}.svg").write_text(picture_of(flow, traces[flow.name]), encoding="utf-8")
            page = with_text(page, flow, traces[flow.name])
        (DOCS / "flows.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
