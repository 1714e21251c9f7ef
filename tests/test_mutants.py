"""The mutants of `benchmarks/mutants.py`: one token each, the same for a seed, and nothing that no test could see."""

from __future__ import annotations

import ast
import io
import json
import tokenize

import pytest
from test_house import CORE, ROOT

from benchmarks import mutants
from benchmarks.mutants import Mutant, draw_mutants, mutants_of

SOURCE = '''"""Text 1 < 2."""
__all__ = ["a" + "b"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """0 + 1"""

    x: tuple[int, 1] = 1


def f(a: Literal[1, 2], *rest: int, flag=False, **options) -> dict[0, 1]:
    for i in "ä", 2:
        log.info("%d", i + 1)
        a -= i * -3
    if a is None or (a not in rest and a < 0x10) and not flag:
        raise ValueError(f"a must be {a + 1}" + str(7))
    pairs = zip(a, rest, strict=True)
    return f"{a == 1}", pairs if a is not None or a in rest else 1.5
'''


def tokens(source: str) -> list[str]:
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline)]


def test_the_mutants_of_a_file_by_hand() -> None:
    found = {(m.line, m.old, m.new) for m in mutants_of("x.py", SOURCE)}
    assert found == {
        (6, "True", "False"), (10, "1", "0"), (10, "1", "2"), (13, "False", "True"), (14, "2", "1"), (14, "2", "3"),
        (16, "-=", "+="), (16, "*", "/"), (16, "-", "+"), (16, "3", "2"), (16, "3", "4"), (17, "is", "is not"),
        (17, "or", "and"), (17, "not", ""), (17, "and", "or"), (17, "<", "<="), (17, "<", ">"), (17, "0x10", "15"),
        (17, "0x10", "17"), (20, "not", ""), (20, "or", "and"), (20, "in", "not in"),
    }  # fmt: skip
    assert sum(m.line == 17 and m.old == "not" for m in mutants_of("x.py", SOURCE)) == 2  # `not in` and `not flag`
    assert mutants.code_size(SOURCE) == 13


@pytest.mark.long
def test_each_parses_and_differs_in_one_token() -> None:
    sources = {f"qftlab/{name}.py": (ROOT / f"qftlab/{name}.py").read_text(encoding="utf-8") for name in CORE}
    drawn = draw_mutants(sources, 80, 1) + mutants_of("x.py", SOURCE)
    assert {m.old for m in drawn} > {"<", "==", "+", "-", "*", "1", "True", "False", "and", "or", "not", "is", "in"}
    for mutant in drawn:
        source = sources.get(mutant.path, SOURCE)
        changed = mutant.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
        before, after = tokens(source), tokens(changed)
        first = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        ways = [(before[first + i :], after[first + j :]) for i, j in ((1, 1), (1, 0), (0, 1))]
        assert any(a == b for a, b in ways), mutant  # replaced, gone, or one more
        assert mutant.diff(source).count("\n") == 4 and mutant.lines(source)[0] != mutant.lines(source)[1]


def test_a_seed_gives_the_same_and_more_begin_with_fewer() -> None:
    sources = {"a.py": SOURCE, "b.py": "x = 1 < 2\n", "empty.py": "x = None\n"}
    twenty = draw_mutants(sources, 20, 0)
    assert twenty == draw_mutants(sources, 20, 0) != draw_mutants(sources, 20, 1)
    assert draw_mutants(sources, 9, 0) == twenty[:9] and len(set(twenty)) == 20
    with pytest.raises(ValueError, match="count must be at most 30, the number of mutants, got 31"):
        draw_mutants(sources, 31, 0)
    with pytest.raises(ValueError, match="a.py must hold '>' in line 1"):
        Mutant("a.py", 1, 0, ">", "<").apply(SOURCE)


def test_every_core_file_has_test_files_and_every_known_survivor_is_one() -> None:
    assert set(mutants.TESTS) == {*CORE, *mutants.BELOW}
    for name in mutants.TESTS:
        files = mutants.Bench.files_for(None, f"qftlab/{name}.py")
        assert files and all((ROOT / file).is_file() for file in files)
    known = mutants.equivalents(mutants.EQUIVALENT.read_text(encoding="utf-8"))
    for path, before, after in known:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert (before, after) in {m.lines(source) for m in mutants_of(path, source)}, f"{path}: {before} -> {after}"


def test_results_survive_a_cut_and_are_carried_over_where_the_mutant_is_the_same(tmp_path) -> None:
    chosen = mutants_of("x.py", SOURCE)[:3]
    outcomes = ["caught", "survived", "caught"]
    lines = [
        {"number": i, "path": m.path, "line": 1, "before": "b", "after": str(i), "diff": m.diff(SOURCE), "outcome": how}
        for i, (m, how) in enumerate(zip(chosen, outcomes, strict=True))
    ]  # fmt: skip
    lines[2]["diff"] = "another"
    path = tmp_path / "0.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"number": 7, "outc')
    records = mutants.read(path)
    assert list(records) == [0, 1, 2] and mutants.read(tmp_path / "none") == {}
    assert mutants.carried(chosen, {}, records, {"x.py": SOURCE}) == [lines[0]]
    assert mutants.carried(chosen, {0: lines[0]}, records, {"x.py": SOURCE}) == []
    assert "3 mutants: 2 caught, 0 timed out, 1 survived, 0 of them change nothing; 66.7 % settled" in (
        mutants.summary(records, {})
    )
    known = mutants.equivalents("# a remark\n\nx.py\n- b\n+ 1\n= why not\n")
    assert "1 of them change nothing; 100.0 % settled" in mutants.summary(records, known)
    with pytest.raises(ValueError, match="an entry must be path"):
        mutants.equivalents("x.py\n- b\n= why\n")
