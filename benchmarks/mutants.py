"""Whether the tests would notice: the core with one token changed, again and again, against its own test files.

    python -m benchmarks.mutants --count 200 --seed 0             # results in runs/mutants/COMMIT/SEED.jsonl
    python -m benchmarks.mutants --carry COMMIT                   # after new tests: only what survived there runs again

Mutants are those of HEAD, in a throw-away copy of it; a run that is stopped goes on where it was. A mutant is caught
if a test fails, or all take four times the CPU time that they should. Not mutated, because no test should see it:
docstrings, logs, texts and error messages, annotations, `__all__`, and `strict=` of a zip, which tells only where the
code is already wrong.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "benchmarks/equivalent_mutants.txt"
MARKS = "not slow and not gpu and not distributed and not browser"
SLACK, GRACE = 4, 30  # times as long as unmutated, and seconds on top
PATIENCE = 10  # wall seconds for a CPU second of the limit: what waits for ever uses none
# The core (tests/test_house.py has its list) and two files that it stands on, each with the test files of
# tests/qftlab that exercise it, the most telling first: the first failure ends a mutant.
TESTS = {
    "settings": "settings recipes train",
    "rows/chat": "text masks_trl",
    "rows/examples": "examples train dpo",
    "rows/batches": "data packing budgets answers",
    "model/attention": "packing families model rloo",
    "model/head": "logprobs lora model families decoder",
    "model/loading": "model families lora export cli",
    "maths/logprobs": "logprobs core losses",
    "maths/losses": "losses core dpo rloo",
    "train/step": "losses logprobs train families lora",
    "train/optimizer": "optimizer train checkpoint packing resume",
    "train/loop": "identity train checkpoint resume signals",
    "train/checkpoint": "identity checkpoint resume",
    "train/run": "runs train resume signals",
    "train/sft": "budgets train packing checkpoint resume",
    "train/dpo": "budgets answers dpo reward",
    "maths/sampling": "sampling core generate",
    "decoding/cache": "decoder generate beam",
    "decoding/decoder": "decoder generate beam layouts",
    "decoding/batch": "decoder generate",
    "decoding/engine": "generate decoder parity",
    "train/rollouts": "answers identity rloo sampler",
    "train/rloo": "answers rloo sampler",
}
EVERYWHERE = "signatures"  # of every file, and last
BELOW = ("model/loading",)  # not of the core itself: mutated where --files names them
SWAPS = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",),
    "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "//": ("*",), "%": ("//",), "**": ("*",),
    "+=": ("-=",), "-=": ("+=",), "*=": ("/=",), "/=": ("*=",),
    "and": ("or",), "or": ("and",), "is": ("is not",), "in": ("not in",), "True": ("False",), "False": ("True",),
}  # fmt: skip
LOGS = ("log", "logger")
NOT_OURS = 99  # exit status of a fork that imported the library from elsewhere


@dataclass(frozen=True)
class Mutant:
    """One token of one file changed: `old` at (line, column) becomes `new`, which is empty for a `not` that goes."""

    path: str
    line: int
    column: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        """The mutated file.

        Raises:
            ValueError: if the token does not stand there.
        """
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1]
        if not text.startswith(self.old, self.column):
            raise ValueError(f"{self.path} must hold {self.old!r} in line {self.line}, got {text.strip()!r}")
        rest = text[self.column + len(self.old) :]
        lines[self.line - 1] = text[: self.column] + self.new + (rest if self.new else rest.lstrip())
        return "".join(lines)

    def lines(self, source: str) -> tuple[str, str]:
        """The line before and after, which with the path are the mutant's name in equivalent_mutants.txt."""
        before, after = (text.splitlines()[self.line - 1].strip() for text in (source, self.apply(source)))
        return before, after

    def diff(self, source: str) -> str:
        """As `diff -u` shows it, without context."""
        before, after = (text.splitlines() for text in (source, self.apply(source)))
        return "\n".join(difflib.unified_diff(before, after, self.path, self.path, lineterm="", n=0))


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the text.

    Args:
        path: of the file, for the mutants.
        source: its text.
    """
    tree, lines = ast.parse(source), source.splitlines()

    def place(line: int, offset: int) -> tuple[int, int]:  # ast counts bytes
        return line, len(lines[line - 1].encode()[:offset].decode())

    def ends(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type in (1, 2, tokenize.OP)]
    found = set()
    for node in _seen(tree):
        for first, last in _gaps(node, ends):
            for token in (t for t in tokens if first <= t.start and t.end <= last):
                found |= {Mutant(path, *token.start, token.string, new) for new in _replacements(node, token.string)}
    return sorted(found, key=lambda m: (m.line, m.column, m.new))


def _gaps(node: ast.AST, ends) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the tokens stand that are an expression's own: between its operands, before its only one, or all of it."""
    if isinstance(node, ast.Compare | ast.BoolOp):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else node.values
        yield from ((ends(a)[1], ends(b)[0]) for a, b in zip(parts, parts[1:], strict=False))
    elif isinstance(node, ast.BinOp):
        yield ends(node.left)[1], ends(node.right)[0]
    elif isinstance(node, ast.AugAssign):
        yield ends(node.target)[1], ends(node.value)[0]
    elif isinstance(node, ast.UnaryOp):
        yield ends(node)[0], ends(node.operand)[0]
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        yield ends(node)


def _replacements(node: ast.AST, text: str) -> Sequence[str]:
    """What a token of this expression may become; nothing for its brackets."""
    if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
        return [str(n) for n in (node.value - 1, node.value + 1) if n >= 0]
    if isinstance(node, ast.Compare) and any(isinstance(op, ast.IsNot | ast.NotIn) for op in node.ops):
        return {"is": (), "in": (), "not": ("",)}.get(text, SWAPS.get(text, ()))
    return ("",) if text == "not" else SWAPS.get(text, ())


def _seen(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it but what is not mutated."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns") and not _is_hidden(child):
                yield from _seen(child)


def _is_hidden(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in LOGS
    if isinstance(node, ast.Assign):
        return any(getattr(target, "id", "") == "__all__" for target in node.targets)
    return isinstance(node, ast.JoinedStr | ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "strict")


def code_size(source: str) -> int:
    """Lines that hold code: no docstrings, comments or blanks."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [n.body[0] for n in ast.walk(ast.parse(source)) if isinstance(n, kinds) and ast.get_docstring(n)]
    docs = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type in (1, 2, 3, tokenize.OP) for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docs)


def draw_mutants(sources: dict[str, str], count: int, seed: int) -> list[Mutant]:
    """Different mutants, a file drawn by its lines of code and then a token of it; fewer of them are a prefix of more.

    Args:
        sources: the text of each file by its path.
        count: how many.
        seed: of the draw.

    Raises:
        ValueError: if there are not so many.
    """
    every = {path: mutants_of(path, text) for path, text in sources.items()}
    if count > sum(map(len, every.values())):
        raise ValueError(f"count must be at most {sum(map(len, every.values()))}, the number of mutants, got {count}")
    chance, sizes, chosen = random.Random(f"mutants {seed}"), list(map(code_size, sources.values())), {}
    while len(chosen) < count:
        [path] = chance.choices(list(sources), sizes)
        if every[path]:
            chosen[chance.choice(every[path])] = None
    return list(chosen)


def equivalents(text: str) -> dict[tuple[str, str, str], str]:
    """Why a mutant changes nothing, by its path and its line before and after.

    Args:
        text: blocks of four lines, the path, `- line`, `+ line` and `= why`, with blank lines between them.
    """
    blocks = [b.splitlines() for b in re.split(r"\n\s*\n", text.strip()) if not b.startswith("#")]
    wrong = [b for b in blocks if [line[:2] for line in b[1:]] != ["- ", "+ ", "= "]]
    if wrong:
        raise ValueError(f"an entry must be path, '- line', '+ line' and '= why', got {wrong[0]}")
    return {(b[0], b[1][2:], b[2][2:]): b[3][2:] for b in blocks}


class Bench:
    """A copy of HEAD in which mutants are tested, each in a fork that finds torch and transformers imported.

    Args:
        folder: for the copy.
        times: a file that keeps how long each test file takes unmutated.
    """

    def __init__(self, folder: Path, times: Path) -> None:
        self.folder, self.times = folder, times
        self.seconds = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)

    def files_for(self, path: str) -> list[str]:
        """The test files of a core file."""
        names = [*TESTS[path.removeprefix("qftlab/").removesuffix(".py")].split(), EVERYWHERE]
        return [f"tests/qftlab/test_{name}.py" for name in names]

    def limit(self, path: str) -> int:
        """CPU seconds after which a mutant of this file counts as caught; times test files that are new, unmutated.

        Raises:
            RuntimeError: if one fails unmutated.
        """
        for file in self.files_for(path):
            if file not in self.seconds:
                outcome, said, seconds = self.run([file], 3_600)
                if outcome != "survived":
                    raise RuntimeError(f"{file} must pass unmutated, but {outcome}: {said}")
                self.seconds[file] = seconds
                self.times.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")
        return int(SLACK * sum(self.seconds[file] for file in self.files_for(path)) + GRACE)

    def try_out(self, mutant: Mutant) -> dict:
        """What became of a mutant: outcome, the test that saw it, CPU seconds."""
        path, limit = self.folder / mutant.path, self.limit(mutant.path)
        source = path.read_text(encoding="utf-8")
        try:
            self._write(path, mutant.apply(source))
            outcome, said, seconds = self.run(self.files_for(mutant.path), limit)
        finally:
            self._write(path, source)
        return {"outcome": outcome, "by": said, "seconds": seconds}

    def run(self, files: list[str], limit: int) -> tuple[str, str, float]:
        """Runs test files to the first failure.

        Args:
            files: in this order.
            limit: in CPU seconds, which do not depend on who else uses the machine.

        Returns:
            "survived", "caught", "timed out" or, where hardly any CPU time was to be had, "stalled"; the line that says
            by what; and the CPU seconds of the process and of what it waited for.
        """
        output = self.folder / "mutant.log"
        child = os.fork()
        if child == 0:
            self._in_child(files, output, limit)
        done, late = 0, time.monotonic() + PATIENCE * limit
        try:
            while not done and time.monotonic() < late:
                done, status, usage = os.wait4(child, os.WNOHANG)
                time.sleep(0 if done else 0.05)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what its tests started
        if not done:
            _, status, usage = os.wait4(child, 0)
        seconds = round(usage.ru_utime + usage.ru_stime, 1)
        code = os.waitstatus_to_exitcode(status)
        if not done or code == -signal.SIGXCPU:
            waits = not done and os.getloadavg()[1] > os.cpu_count()
            return "stalled" if waits else "timed out", f"after {seconds:.0f} s", seconds
        text = output.read_text(encoding="utf-8", errors="replace")
        if code in (NOT_OURS, 5):  # pytest's 5: no test at all
            raise RuntimeError(f"{files} did not test the copy: {text[-2000:]}")
        seen = re.findall(r"^(?:FAILED|ERROR) (.*)$", text, flags=re.MULTILINE) or text.strip().splitlines()[-1:]
        return ("caught", seen[0][:300], seconds) if code else ("survived", "", seconds)

    def _in_child(self, files: list[str], output: Path, limit: int) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        with open(output, "wb") as log, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = 1
        try:
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.path[:] = [str(self.folder), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
            for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "conftest")]:
                del sys.modules[name]
            import pytest

            code = int(pytest.main([*files, "-x", "-q", "-p", "no:cacheprovider", "-m", MARKS]))
            where = [getattr(m, "__file__", "") or "" for n, m in sys.modules.items() if n.split(".")[0] == "qftlab"]
            if not all(Path(file).resolve().is_relative_to(self.folder.resolve()) for file in where if file):
                code = NOT_OURS
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            cached.unlink()  # within one second, Python takes it for the new text's


def preload() -> None:
    """Imports what all tests import, for the forks; nothing of ours."""
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "QFTLAB_LAYOUT": "plain"}.items():
        os.environ.setdefault(name, value)
    import accelerate  # noqa: F401
    import hypothesis  # noqa: F401
    import jsonargparse  # noqa: F401
    import nbval.plugin  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch.utils.checkpoint  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )
    from trl import DPOTrainer, RLOOTrainer, SFTTrainer  # noqa: F401


def read(path: Path) -> dict[int, dict]:
    """Results so far by number; a line that was cut off is left out."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["outcome"] != "stalled":
            records[record["number"]] = record
    return records


def carried(chosen: list[Mutant], records: dict[int, dict], earlier: dict[int, dict], sources: dict) -> list[dict]:
    """Results of an earlier commit that still hold: the same mutant, caught there by tests that are still run."""
    kept = []
    for number, mutant in enumerate(chosen):
        old = earlier.get(number, {})
        same = [old.get("path"), old.get("diff")] == [mutant.path, mutant.diff(sources[mutant.path])]
        if number not in records and same and old["outcome"] != "survived":
            kept.append(old)
    return kept


def work(mutants: dict[int, Mutant], sources: dict[str, str], results: Path, minutes: float) -> None:
    """Tests mutants one after the other and appends a line each to the results."""
    late = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(Path(folder), results.with_name("unmutated.json"))
        for number, mutant in mutants.items():
            if time.monotonic() > late:
                return
            before, after = mutant.lines(sources[mutant.path])
            record = {"number": number, "path": mutant.path, "line": mutant.line, "before": before, "after": after}
            record |= bench.try_out(mutant) | {"diff": mutant.diff(sources[mutant.path])}
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            say(f"{number:4} {record['outcome']:9} {record['seconds']:6.1f} s  {mutant.path}:{mutant.line}  {after}")


def say(text: str) -> None:
    """To the terminal, at once."""
    print(text, flush=True)


def summary(records: dict[int, dict], known: dict[tuple[str, str, str], str]) -> str:
    """Counts, and the mutants that survived without a known reason."""
    survived = [r for _, r in sorted(records.items()) if r["outcome"] == "survived"]
    why = [known.get((r["path"], r["before"], r["after"])) for r in survived]
    lines = []
    for record, reason in zip(survived, why, strict=True):
        head = "equivalent" if reason else "SURVIVED"
        lines += [f"{head} {record['number']} {record['path']}:{record['line']}", f"  - {record['before']}"]
        lines += [f"  + {record['after']}", *([f"  = {reason}"] if reason else [])]
    counts, equal = Counter(r["outcome"] for r in records.values()), len(why) - why.count(None)
    share = 100 * (len(records) - why.count(None)) / max(1, len(records))
    lines.append(
        f"{len(records)} mutants: {counts['caught']} caught, {counts['timed out']} timed out, {len(survived)} survived,"
        f" {equal} of them change nothing; {share:.1f} % settled"
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__.splitlines()[0])
    made.add_argument("--count", type=int, default=200, help="mutants in all (200)")
    made.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    made.add_argument("--jobs", type=int, default=1, help="processes, each with a copy of its own (1)")
    made.add_argument("--minutes", type=float, default=1e9, help="begin no further mutant after so many minutes")
    made.add_argument("--files", nargs="+", default=[], metavar="ROOM/FILE", help="these and not the core")
    made.add_argument("--carry", metavar="COMMIT", help="take over what was caught there, for the same mutants")
    made.add_argument("--show", action="store_true", help="the summary of what is there already")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 unless a mutant survived without a reason."""
    told = parser().parse_args(arguments)
    names = told.files or [name for name in TESTS if name not in BELOW]
    shown = {f"qftlab/{name}.py": ["git", "show", f"HEAD:qftlab/{name}.py"] for name in names}
    sources = {path: subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
               for path, command in shown.items()}  # fmt: skip
    chosen = draw_mutants(sources, told.count, told.seed)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    name = f"{told.seed}{'-' + '-'.join(names).replace('/', '.') if told.files else ''}.jsonl"
    results = ROOT / "runs/mutants" / head.stdout.strip() / name
    results.parent.mkdir(parents=True, exist_ok=True)
    if told.carry:
        kept = carried(chosen, read(results), read(results.parent.parent / told.carry / name), sources)
        with open(results, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    left = {n: mutant for n, mutant in enumerate(chosen) if n not in read(results)}
    if left and not told.show:
        preload()
        parts = [dict(list(left.items())[i :: told.jobs]) for i in range(told.jobs)]
        children = [_forked(part, sources, results, told.minutes) for part in parts[1:]]
        work(parts[0], sources, results, told.minutes)
        if any(os.waitpid(child, 0)[1] for child in children):
            return 2
    records = {n: r for n, r in read(results).items() if n < told.count}
    known = equivalents(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.is_file() else {}
    say(summary(records, known))
    unknown = [r for r in records.values() if (r["path"], r["before"], r["after"]) not in known]
    return int(any(r["outcome"] == "survived" for r in unknown))


def _forked(part: dict[int, Mutant], sources: dict[str, str], results: Path, minutes: float) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        work(part, sources, results, minutes)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
