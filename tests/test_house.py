"""The house: rooms import one way, files and functions stay small, and a core can be read in an evening.

Sizes are counted in lines of code: without docstrings, comments and blank lines, after the formatter, and without its
`fmt: skip`, which would squeeze them. A test with -s prints the figures.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "qftlab").rglob("*.py"))
COURSE = sorted((ROOT / "qftlab_course").rglob("*.py"))
SCRIPTS = [ROOT / "lab.py", ROOT / "notebooks/build.py"]
ROOMS = "settings files maths rows model decoding evaluate remote train serve commands cli".split()
# In the order in which they are read; README.md says a sentence on each.
CORE = """
    settings rows/chat rows/batches rows/examples model/attention model/head maths/logprobs maths/losses train/step
    train/optimizer train/checkpoint train/loop train/run train/sft train/dpo maths/sampling decoding/cache
    decoding/decoder decoding/batch decoding/engine train/rollouts train/rloo
""".split()
FILE, FUNCTION = 300, 45
CORE_LINES, CORE_FILES = 4_400, 24
LIBRARY_LINES, WHOLE_LINES = 7_600, 9_500  # without and with what stands apart
APART = ("remote", "serve", "evaluate")


@cache
def formatted(path: Path) -> str:
    """A file as the formatter writes it where nothing is exempt."""
    source = re.sub(r" *# fmt: skip$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "--stdin-filename", path.name, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True, encoding="utf-8").stdout


def code_lines(source: str, start: int = 1, end: int = sys.maxsize) -> int:
    """Lines that hold code, of those from `start` to `end`."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [
        node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and ast.get_docstring(node)
    ]
    no_code = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len([line for line in found - no_code if start <= line <= end])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path, top_only: bool = False) -> list[str]:
    """Full names of the modules a file imports, relative ones resolved; `top_only`: not inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree, names = ast.parse(path.read_text(encoding="utf-8")), []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_rooms_import_one_way(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("qftlab_course")], "the course stands on the library"
    room = path.relative_to(ROOT / "qftlab").with_suffix("").parts[0]
    ours = [name.split(".")[1] for name in imported(path) if name.startswith("qftlab.")]
    if room == "__init__":
        assert not ours, "qftlab/__init__.py imports nothing at import"
    elif room != "__main__":
        assert room in ROOMS, f"{room} is no room; the rooms are {ROOMS}"
        allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"} - ({"settings"} if room == "files" else set())
        assert set(ours) <= allowed, f"{path.name} in {room} imports {sorted(set(ours) - allowed)}"


@pytest.mark.parametrize("path", [*LIBRARY, *COURSE, *SCRIPTS], ids=named)
def test_files_and_functions_stay_small(path: Path) -> None:
    source = formatted(path)
    assert code_lines(source) <= FILE, f"{code_lines(source)} lines of code; a file has one subject and {FILE} at most"
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {f"{f.name} (line {f.lineno})": code_lines(source, f.lineno, f.end_lineno) for f in functions}
    assert not {name: size for name, size in sizes.items() if size > FUNCTION}, f"functions have {FUNCTION} at most"


def test_the_core_is_an_evening() -> None:
    sizes = {name: code_lines(formatted(ROOT / f"qftlab/{name}.py")) for name in CORE}
    print("\ncore:", ", ".join(f"{name} {size}" for name, size in sizes.items()), "=", sum(sizes.values()))
    assert len(sizes) <= CORE_FILES and sum(sizes.values()) <= CORE_LINES, sum(sizes.values())


def test_the_core_imports_the_rest_where_it_needs_it() -> None:
    """At their head, core files import core files and what is below it all: files, tokenizers, schemas, loading."""
    below = set(
        "files maths/verify rows/tokenizer rows/schemas rows/sources rows/countdown model/loading model/lora "
        "train/distributed train/meter decoding/layouts".split()
    )
    known = {str(path.relative_to(ROOT / "qftlab").with_suffix("")): path for path in LIBRARY}
    for name in CORE:
        names = {found.removeprefix("qftlab.").replace(".", "/") for found in imported(known[name], top_only=True)
                 if found.startswith("qftlab.")}  # fmt: skip
        modules = {module for module in known for found in names if found == module or found.startswith(module + "/")}
        assert modules <= {*CORE, *below}, f"{name} imports {sorted(modules - {*CORE, *below})} at its head"


def test_the_library_is_thin() -> None:
    sizes = {str(path.relative_to(ROOT / "qftlab")): code_lines(formatted(path)) for path in LIBRARY}
    others = sum(size for name, size in sizes.items() if name.startswith(APART))
    whole = sum(sizes.values())
    course = sum(code_lines(formatted(path)) for path in COURSE)
    print(f"\nlibrary {whole - others} in {len(sizes)} files, with remote, serve, evaluate {whole}; course {course}")
    assert whole - others <= LIBRARY_LINES and whole <= WHOLE_LINES


@pytest.mark.parametrize("path", [*LIBRARY, *COURSE, *SCRIPTS], ids=named)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named_here = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    methods = [node for owner in named_here if isinstance(owner, ast.ClassDef) for node in owner.body]
    public = [n for n in [*named_here, *methods] if isinstance(n, kinds) and not n.name.startswith("_")]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare, f"{path.name}: no docstring on {bare}"
    assert ast.get_docstring(tree) or not tree.body, f"{path.name}: no docstring of the module"


def test_only_commands_and_the_tour_print() -> None:
    """Their work is to speak to a terminal."""
    talkers = {"cli.py", "commands.py", "tour.py"}
    for path in (path for path in [*LIBRARY, *COURSE] if path.name not in talkers):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints, f"{named(path)} prints on lines {prints}; log or return instead"


def test_the_doors_are_there_and_lazy() -> None:
    """Each public name is its file's own, and none is loaded before it is asked for."""
    code = "import sys, qftlab; assert 'torch' not in sys.modules; [getattr(qftlab, name) for name in qftlab.__all__]"
    code += "; import qftlab.decoding.engine as e; from qftlab import generate; assert generate is e.generate"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def first_cell(path: Path) -> ast.Module:
    """The cell of imports of a lesson's text form: the first that takes something of ours."""
    cells = re.split(r"^# %%.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next(ast.parse(cell) for cell in cells if re.search("^from qftlab", cell, flags=re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/source").rglob("[0-9]*.py")), ids=lambda p: p.stem)
def test_a_lesson_begins_with_few_imports(path: Path) -> None:
    nodes = [node for node in first_cell(path).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module.startswith("qftlab")]
    names = [alias.name for node in ours for alias in node.names]
    assert len(ours) <= 9 and len(names) <= 14, f"{len(ours)} imports of ours, {len(names)} names"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/source").glob("[0-9]*.py")), ids=lambda p: p.stem)
def test_a_lesson_asserts_against_the_library(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert any(isinstance(n, ast.ImportFrom) and n.module == "qftlab" for n in ast.walk(tree)), "from qftlab import ..."
    assert sum(isinstance(n, ast.Assert) for n in ast.walk(tree)) > 5
