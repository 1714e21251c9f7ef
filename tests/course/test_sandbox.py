"""The sandbox: what programs say of themselves, tests that cannot be forged, and 60 programs that mean harm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest

from qftlab_course.agent_edit import monty, sandbox
from qftlab_course.agent_edit.sandbox import SandboxError, best_level, levels, own_traceback, run_code, run_tests

ROOT = Path(__file__).resolve().parent.parent.parent


def level_or_skip(level: str) -> str:
    """Where .ci/run has installed and tried both (QFTLAB_SANDBOX=required), a level that cannot run is a failure."""
    state = levels()[level]
    if state != "ready":
        (pytest.fail if os.environ.get("QFTLAB_SANDBOX") == "required" else pytest.skip)(f"{level} cannot run: {state}")
    return level


@pytest.fixture(params=["monty", "bwrap", "process"])
def level(request: pytest.FixtureRequest) -> str:
    return level_or_skip(request.param)


@pytest.fixture(params=["bwrap", "process"])
def cpython(request: pytest.FixtureRequest) -> str:
    return level_or_skip(request.param)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A word in the environment of whatever a test starts."""
    name = f"QFTLAB_TEST_{os.getpid()}_{time.monotonic_ns()}"
    monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sandbox.ENVIRONMENT, name, "1")
    return name


def marked(name: str) -> list[str]:
    """Commands of the living processes that have the word in their environment, and of workers of monty of this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                name.encode() in (folder / "environ").read_bytes()
                or parent == os.getpid()
                and "monty" in command.split(" ")[0]
            ):
                found.append(command)
        except OSError:
            pass
    return found


def children(pid: int) -> list[Path]:
    """The folders in /proc of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found += [path.parent] if int(path.read_text().rpartition(")")[2].split()[1]) == pid else []
        except OSError:
            pass
    return found


def none_left(name: str) -> bool:
    """Whether all have ended, within two seconds: a namespace is taken down behind its first process."""
    end = time.monotonic() + 2
    while (left := marked(name)) and time.monotonic() < end:
        time.sleep(0.02)
    return not left


# What a program says of itself


CRASH = "def f(x):\n    return x + 1\n\nprint('so far')\nf('a')\n"
TRACEBACK = """Traceback (most recent call last):
  File "main.py", line 5, in <module>
    f('a')
  File "main.py", line 2, in f
    return x + 1
TypeError: can only concatenate str (not "int") to str"""


def test_a_program_ends_well_and_says_where_it_ran(level: str) -> None:
    result = run_code("import sys\nprint('a')\nprint('é', file=sys.stderr)", level=level)
    assert (result.level, result.status, result.passed) == (level, "ok", True)
    assert (result.stdout, result.stderr, result.error) == ("a\n", "é\n", "") and result.seconds > 0


def test_every_level_tells_the_same_error(level: str) -> None:
    result = run_code(CRASH, level=level)
    assert (result.status, result.stdout, result.error) == ("error", "so far\n", TRACEBACK)
    result = run_code("{}['k']", level=level)
    assert result.error.splitlines()[-1] == "KeyError: 'k'"
    assert run_code("x = 1\ny = ", level=level).error.splitlines()[0] == '  File "main.py", line 2'


def test_an_error_has_the_frames_of_main_alone(cpython: str) -> None:
    error = run_code("import json\n\njson.loads('{')", level=cpython).error.splitlines()
    assert error[:3] == [
        "Traceback (most recent call last):",
        '  File "main.py", line 3, in <module>',
        "    json.loads('{')",
    ]
    assert len(error) == 4 and error[3].startswith("json.decoder.JSONDecodeError: ")


def test_own_traceback_by_hand() -> None:
    text = """noise
Traceback (most recent call last):
  File "/x/main.py", line 1, in <module>
    a()
    ^^^
  File "/usr/lib/y.py", line 9, in a
    b
  [Previous line repeated 7 more times]
ValueError: one
    two"""
    lines = ["Traceback (most recent call last):", '  File "main.py", line 1, in <module>', "    a()"]
    assert own_traceback(text).splitlines() == [*lines, "ValueError: one", "    two"]
    assert own_traceback(text + "\n" + text) == own_traceback(text)
    assert own_traceback("killed") == "killed" and own_traceback("") == ""
    assert own_traceback('Traceback (most recent call last):\n  File "t", line 1, in t\nE: x') == "E: x"


def test_ends_that_are_no_exception(cpython: str) -> None:
    for code, status, error in (
        ("raise SystemExit(3)", "error", "the program ended with exit code 3"),
        ("import os\nos.kill(os.getpid(), 15)", "error", "the program was killed by SIGTERM"),
        ("import sys\nsys.exit()", "ok", ""),
    ):
        result = run_code(code, level=cpython)
        assert (result.status, result.error) == (status, error)


def test_a_strict_umask_hides_nothing_from_the_program(level: str) -> None:
    before = os.umask(0o077)
    try:
        assert run_code("print(1)", level=level).stdout == "1\n"
    finally:
        os.umask(before)


def test_standard_input(cpython: str) -> None:
    result = run_code("a, b = map(int, input().split())\nprint(a + b)", stdin="2 40\n", level=cpython)
    assert (result.stdout, result.passed) == ("42\n", True)
    assert run_code("input()", level=cpython).error.endswith("EOFError: EOF when reading a line")
    assert run_code("print(len(input()))", stdin="é" * 10**6, level=cpython).stdout == "1000000\n"


def test_limits(level: str) -> None:
    for code, status in (
        ("while True: pass", "timeout"),
        ("x = bytes(3 * 10**8)", "memory"),
        ("print('é' * 99)", "output"),
    ):
        result = run_code(code, level=level, timeout=1.0, memory=100 << 20, output=99)
        assert result.status == status and result.seconds < 3, (code, result)
        assert len(result.stdout.encode()) <= 99


@pytest.mark.parametrize("limit", [{"timeout": 0}, {"memory": -1}, {"output": float("nan")}, {"timeout": float("inf")}])
def test_limits_are_checked(limit: dict) -> None:
    with pytest.raises(ValueError, match=f"{[*limit][0]} must be positive and finite, got "):
        run_code("1", **limit)


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match='level must be one of monty, bwrap, process or auto, got "docker"'):
        run_code("1", level="docker")


# Which level


def test_auto_takes_monty_and_asks_cpython_of_all_it_does_not_pass() -> None:
    level_or_skip("monty")
    level_or_skip("bwrap")
    assert best_level() == "monty" and run_code("print(1)").level == "monty"
    for code in ("import heapq\nprint(heapq.nsmallest(1, [2, 1]))", "class A(list):\n    pass\nprint(A())"):
        result = run_code(code)
        assert (result.level, result.status) == ("bwrap", "ok")
        assert run_code(code, level="monty").status == "refused"
    result = run_code("print(input())", stdin="x")
    assert (result.level, result.stdout) == ("bwrap", "x\n")
    assert run_code(CRASH).level == "bwrap" and run_code(CRASH).error == TRACEBACK
    assert run_code("import nothing_of_that_name", level="monty").status == "error"


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    monty.monty_state.cache_clear()
    yield
    monty.monty_state.cache_clear()


def test_where_nothing_can_run_it_says_so_and_never_takes_a_plain_process(nothing_installed: None) -> None:
    assert levels()["bwrap"].startswith("bwrap is not on the PATH: apt-get install bubblewrap")
    assert levels()["monty"].startswith("pip install 'qftlab[sandbox]'")
    for ask in (
        best_level,
        lambda: run_code("1"),
        lambda: run_tests("a = 1", "assert a"),
        lambda: run_code("1", stdin="x"),
    ):
        with pytest.raises(
            SandboxError, match='monty: pip install .*; bwrap: bwrap is not .*; process: .*level="process"'
        ):
            ask()
    for name in ("bwrap", "monty"):
        with pytest.raises(SandboxError, match=f"level {name} cannot run here"):
            run_code("1", level=name)


def test_a_program_beyond_monty_says_so_where_there_is_no_bwrap(monkeypatch: pytest.MonkeyPatch) -> None:
    level_or_skip("monty")
    monkeypatch.setenv("PATH", "")
    assert best_level() == "monty" and run_code("print(1)").level == "monty"
    assert run_code(CRASH).error == TRACEBACK
    with pytest.raises(
        SandboxError, match="the program needs CPython .*No module named 'heapq'.*Levels: monty: ready; bwrap: "
    ):
        run_code("import heapq")


def test_a_bwrap_that_cannot_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that allows no namespaces, from the start or from some time on."""
    level_or_skip("bwrap")
    fake, works = tmp_path / "bwrap", tmp_path / "works"
    fake.write_text(
        f"#!/bin/sh\n[ -e '{works}' ] && exec {shutil.which('bwrap')} \"$@\"\n"
        "echo 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "bwrap: No permissions to create new namespace" in levels()["bwrap"]
    works.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    assert run_code("print(1)", level="bwrap").stdout == "1\n"
    works.unlink()
    with pytest.raises(SandboxError, match="bwrap could not start the program: bwrap: No permissions to create"):
        run_code("print(1)", level="bwrap")


# Tests of a program


GOOD = "def double(x):\n    return 2 * x\n"
BAD = "def double(x):\n    return x * x\n"
ASSERTS = "def check(f):\n    assert f(2) == 4\n    assert f(3) == 6\ncheck(double)\n"


def test_asserts(level: str) -> None:
    assert run_tests(GOOD, ASSERTS, level=level).passed
    result = run_tests(
        "print('loud')\n" + GOOD.replace("  return", "  print('and louder')\n    return"), ASSERTS, level=level
    )
    assert (result.status, result.stdout, result.stderr) == ("ok", "", "loud\nand louder\nand louder\n")
    result = run_tests(BAD, ASSERTS, level=level)
    assert (result.status, result.failed, result.error) == ("failed", "assert f(3) == 6", "AssertionError")
    result = run_tests("def double(x):\n    return y\n", ASSERTS, level=level)
    frames = "  File \"main.py\", line 2, in double\n    return y\nNameError: name 'y' is not defined"
    assert (result.status, result.failed) == ("failed", "assert f(2) == 4")
    assert result.error == f"Traceback (most recent call last):\n{frames}"
    result = run_tests("1 / 0", ASSERTS, level=level)
    assert (result.status, result.failed, result.error.splitlines()[-1]) == (
        "error",
        "",
        "ZeroDivisionError: division by zero",
    )
    assert run_tests("while True: pass", ASSERTS, level=level, timeout=1).status == "timeout"
    assert run_tests("def double(x):\n    while True: pass", ASSERTS, level=level, timeout=1).status == "timeout"


def test_what_crosses_between_program_and_tests(cpython: str) -> None:
    code = """
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date
from decimal import Decimal
from fractions import Fraction
class Odd(ValueError): pass
def same(x): return x
def fill(x): x += [1]; return None
def many(): return [1, 2.5, "a", b"b", None, True, (1,), {2}, {"k": [3]}, 1j, range(3), float("inf"), frozenset([4])]
def kinds(): return [Counter("aab"), deque([1]), OrderedDict(a=1), Decimal("1.5"), Fraction(1, 3), date(2020, 1, 2)]
def default(): d = defaultdict(list); d[1].append(2); return d
def wrong(): raise Odd("why", 3)
def keys(a, *, b): return (a, b)
def leave(): import os; os._exit(0)
def long(): raise ValueError("é" * 10**6)
class Own: pass
def own(): return Own()
"""
    for tests in (
        "assert many() == [1, 2.5, 'a', b'b', None, True, (1,), {2}, {'k': [3]}, 1j, range(3), float('inf'), {4}]",
        "from collections import *\nfrom decimal import *\nfrom fractions import *\nfrom datetime import *\n"
        "assert kinds() == [Counter('aab'), deque([1]), {'a': 1}, Decimal('1.5'), Fraction(1, 3), date(2020, 1, 2)]",
        "assert default() == {1: [2]}",
        "x = [0]\nassert fill(x) is None and x == [0, 1]",
        "try:\n    wrong()\n    assert False\nexcept ValueError as error:\n    assert error.args == ('why', 3)",
        "assert keys(1, b=2) == (1, 2)",
    ):
        result = run_tests(code, tests, level=cpython)
        assert result.passed, (tests, result)
    result = run_tests(code, "assert own()", level=cpython)
    assert (result.status, result.error) == ("failed", "TypeError: only plain values cross, got the program's Own")
    result = run_tests(code, "long()", level=cpython)
    assert (result.status, result.failed) == ("failed", "long()") and 7000 < len(result.error) <= 8000
    assert result.error.startswith('Traceback (most recent call last):\n  File "main.py", line ')
    result = run_tests(code, "try:\n    leave()\nexcept Exception:\n    pass", level=cpython)
    assert (result.status, result.failed) == ("failed", "leave()") and "ended its own process" in result.error


def test_a_function_with_the_name_of_a_builtin(level: str) -> None:
    code = "def sum(x):\n    return 7\n"
    assert not run_tests(code, "assert sum([3]) == 3", level=level).passed
    if level != "monty":
        assert "the program defines anew" in run_tests(code, "assert sum([3]) == 3", level=level).error
        assert run_tests(code, "assert sum([3]) == 7", func_name="sum", level=level).passed
        assert run_tests(code, "assert sum([3]) == 3", func_name="sum", level=level).status == "failed"


STDIN = [
    {"input": "2\n1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "1\n5\n", "output": "5.0", "testtype": "stdin"},
]
FUNCTIONAL = [
    {"input": '["a", "b"]\n1', "output": '["b"]', "testtype": "functional"},
    {"input": "[]\n0", "output": "[]", "testtype": "functional"},
]


def test_cases_with_standard_input(cpython: str) -> None:
    right = "n = int(input())\nprint(sum(map(int, input().split())), ' ')\n"
    assert run_tests(right, STDIN, level=cpython).passed
    result = run_tests("print(3)", STDIN, level=cpython)
    assert result.status == "failed"
    assert result.failed == "case 2: of '1\\n5\\n' must come '5.0', got '3\\n'"
    assert run_tests("print(3, 3)", STDIN, level=cpython).failed.startswith("case 1: ")
    assert run_tests("print(3)\nprint()\nprint(3)", STDIN, level=cpython).status == "failed"
    late = "n = int(input())\nprint({2: 3, 1: 5}[n], flush=True)\nif n == 2:\n    1 / 0\n"
    assert run_tests(late, STDIN, level=cpython).status == "error"


def test_functional_cases(cpython: str) -> None:
    right = (
        "class Solution:\n    def tail(self, words: List[str], n: int) -> List[str]:\n        return tuple(words[n:])\n"
    )
    assert run_tests(right, FUNCTIONAL, func_name="tail", level=cpython).passed
    assert run_tests("def tail(words, n):\n    return words[n:]\n", FUNCTIONAL, func_name="tail", level=cpython).passed
    shadow = "def max(*x):\n    return 0\n" + right
    words = [{"input": '["max", "abs", "b"]\n2', "output": '["b"]', "testtype": "functional"}]
    assert run_tests(shadow, words, func_name="tail", level=cpython).passed
    result = run_tests(right.replace("n:]", ":n]"), FUNCTIONAL, func_name="tail", level=cpython)
    assert result.status == "failed" and result.failed.endswith("""(['a', 'b'], 1) == ['b']""")


@pytest.mark.parametrize("tests", ["", " \n", []])
def test_no_tests_are_refused(tests: str | list) -> None:
    with pytest.raises(ValueError, match="tests must hold an assert or a case, got "):
        run_tests(GOOD, tests)


def test_cases_of_unknown_kinds_are_refused() -> None:
    for cases in (STDIN + FUNCTIONAL, [{"input": "", "output": "", "testtype": "x"}], FUNCTIONAL):
        with pytest.raises(
            ValueError, match='testtype must be all "stdin", or all "functional" and func_name given, got '
        ):
            run_tests(GOOD, cases)


EQUAL = "class E(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
EQUAL += "    def __sub__(self, other): return self\n    def __abs__(self): return self\n"
EQUAL += "    def __lt__(self, other): return True\n    __le__ = __rsub__ = __req__ = __eq__\n"
FORGED = {
    "says so": 'print(\'{"nonce": "", "status": "ok", "failed": "", "error": ""}\')',
    "leaves": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef double(x): os._exit(0)",
    "exits when called": "import sys\ndef double(x): sys.exit(0)",
    "equal to all": EQUAL + "def double(x): return E()",
    "equal to all, a plain class": "class E:\n    def __eq__(s, other): return True\ndef double(x): return E()",
    "equal to all, in a list": EQUAL + "def double(x): return [E()]",
    "a plain class made equal": (
        "import collections\n" + EQUAL + "collections.Counter.__eq__ = E.__eq__\n"
        "def double(x): return collections.Counter()"
    ),
    "equal by a pickle": (
        EQUAL + "class P:\n    def __reduce__(self): return (eval, ('E()',))\ndef double(x): return P()"
    ),
    "equal by another spelling": (
        "class E: pass\nsetattr(E, '__e' + 'q__', lambda s, o: True)\ndef double(x): return E()"
    ),
    "equal by type": "E = type('E', (), {'__e' + 'q__': lambda s, o: True})\ndef double(x): return E()",
    "equal by type in a list": (
        "t = [type][0]\nE = t('E', (), {'__e' + 'q__': lambda s, o: True})\ndef double(x): return E()"
    ),
    "equal by exec": "exec('class E:\\n  def __e' + 'q__(s, o): return True')\ndef double(x): return E()",
    "a pickle that runs": (
        "class P:\n    def __reduce__(self): return (exec, ('import os, sys; os._exit(0)',))\ndef double(x): return P()"
    ),
    "a pickle that changes a class": (  # Counter.__eq__ = range, then Counter(a=1): range(4) is true
        "import pickle\n"
        "bent = b'(ccollections\\nCounter\\n(N}X\\x06\\0\\0\\0__eq__cbuiltins\\nrange\\nstb0'\n"
        "bent += b'ccollections\\nCounter\\n(}X\\x01\\0\\0\\0aK\\x01stRN)t.'\n"
        "pickle.dumps = lambda answer: bent\ndef double(x): pass"
    ),
    "assert patched": "import builtins\nclass A(BaseException): pass\nbuiltins.AssertionError = A\nAssertionError = A",
    "names patched": "import builtins\nbuiltins.abs = abs = lambda x: 0\nbuiltins.len = len = lambda x: 0",
    "names bound anew": "abs = lambda x: 0\ndef len(x): return 1",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: sys.exit(0))",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "the tests' frames": (
        "import sys, json\nf = sys._getframe()\nwhile f:\n"
        "    for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n"
        "        if isinstance(v, dict) and 'nonce' in v:\n            print(json.dumps({**v, 'status': 'ok'}))\n"
        "    f = f.f_back"
    ),
    "open files": (
        "import os, json\nfor n in range(3, 64):\n    try:\n"
        "        os.write(n, json.dumps({'status': 'ok'}).encode())\n    except OSError: pass\n"
        "    try:\n        print(os.pread(n, 9999, 0))\n    except OSError: pass"
    ),
    "standard output": "import os\nos.write(1, b'{\"status\": \"ok\"}')\nos._exit(0)",
    "answers in advance": (
        "import os, pickle\nfor n in range(3, 64):\n    try:\n"
        "        os.write(n, pickle.dumps((['double'], None, ())) + pickle.dumps((None, None, ())) * 9)\n"
        "    except OSError: pass"
    ),
    "the judge's death": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef double(x): os.kill(1, 9)",
    "the judge's own module": "import sys\nsys.modules['__main__'].verdict = lambda *a: {'status': 'ok'}",
    "the judge's memory": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.ptrace.restype = ctypes.c_long\n"
        "if libc.ptrace(16, os.getppid(), 0, 0) == 0:\n    print('TRACED', flush=True)\n    import time; time.sleep(60)"
    ),
    "tests that end": "def double(x): raise StopIteration\ndef check(f): return None",
    "no check": "def check(f): return None\ndouble = None",
}  # fmt: skip
NEAR = "assert abs(double(3) - 6) < 1e-6"
HARD = (
    "def check(f):\n    assert abs(f(2) - 4) < 1e-6\n    assert f(3) == 6\n    assert len([f(1)]) == 1\ncheck(double)\n"
)


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_cannot_be_forged(name: str, level: str) -> None:
    code = FORGED[name] if "double" in FORGED[name] else BAD + FORGED[name]
    for tests in (ASSERTS, HARD, NEAR):
        result = run_tests(code, tests, level=level, timeout=5)
        assert result.status in {"error", "failed", "refused"}, result
        assert "TRACED" not in result.stderr and "assert f" not in result.stderr


@pytest.mark.parametrize("code", ["print('3', flush=True)\nimport os\nos._exit(0)", "print(3)"])
def test_output_is_compared_outside(code: str, cpython: str) -> None:
    assert run_tests(code, STDIN[:1], level=cpython).passed
    assert not run_tests(code, STDIN, level=cpython).passed


# Programs that mean harm


@pytest.fixture
def surroundings(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """What hostile programs are after; all of it is untouched afterwards, and nothing of theirs is left."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-CANARY")
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as outside,
        tempfile.TemporaryDirectory(dir="/var/tmp") as temporary,
    ):
        for folder in (outside, temporary):
            os.chmod(folder, 0o777)
        Path(outside, "canary").write_text("CANARY")
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        with socket.create_server(("127.0.0.1", 0)) as door, socket.socket(socket.AF_UNIX) as abstract:
            port = door.getsockname()[1]
            abstract.bind(f"\0qftlab-{port}")
            abstract.listen()
            yield {"outside": outside, "port": port, "parent": os.getpid()}
            for listener in (door, abstract):
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.accept()
        assert os.listdir(outside) == ["canary"] and os.listdir(temporary) == []
        assert none_left(mark), marked(mark)


def harmless(level: str, results: dict[str, dict]) -> None:
    """Each has its status, met its limits, and got nothing."""
    assert len(results) == len(hostile.PROGRAMS) > 60
    more = {"refused", "error", "ok", "memory", "output"} if level == "monty" else set()
    for name, result in results.items():
        assert result["level"] == level and result["status"] in hostile.PROGRAMS[name][1] | more, (name, result)
        assert "LEAK" not in result["stdout"] and "CANARY" not in result["wrote"], (name, result)
        assert "uid=0" not in result["wrote"] and "root:" not in result["wrote"], (name, result)
        assert len(result["stdout"].encode()) <= hostile.OUTPUT, name
        assert result["seconds"] < hostile.TIMEOUT + 5, (name, result["seconds"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["monty", "bwrap"])
def test_hostile_programs(name: str, surroundings: dict) -> None:
    harmless(level_or_skip(name), hostile.run_all(name, surroundings))


@pytest.mark.long
@pytest.mark.parametrize("name", ["monty", "bwrap"])
def test_hostile_programs_that_an_unprivileged_user_runs(name: str, surroundings: dict) -> None:
    """In a process of nobody's, where this is root: `Popen` need not change the user there."""
    level_or_skip(name)
    if name == "monty":
        from pydantic_monty._binary import find_monty_binary
    if os.geteuid() != 0:
        pytest.skip("this user has no privileges: the test above was it")
    python = sandbox._python("process", os.environ["PATH"])[0]
    paths = [str(ROOT), str(ROOT / "tests/course"), *(path for path in sys.path if path.endswith("site-packages"))]
    binary = find_monty_binary() if name == "monty" else ""
    given = json.dumps({**surroundings, "level": name, "temporary": tempfile.gettempdir()})
    done = subprocess.run(
        [python, str(ROOT / "tests/course/hostile.py"), given], cwd="/", user=65534, group=65534, extra_groups=[],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "MONTY_BIN": binary},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode and "Permission denied" in done.stderr + done.stdout:
        pytest.skip(f"nobody cannot read this checkout: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    harmless(name, json.loads(done.stdout))


def test_a_plain_process_has_limits_all_the_same(mark: str) -> None:
    level_or_skip("process")
    names = ["memory, one list", "endless output", "sleep", "loop, errors caught", "signals ignored", "stopped"]
    names += ["limits lifted", "import theirs", "exit code", "disk, root", "write into the library"]
    for name in names:
        code, statuses = hostile.PROGRAMS[name]
        result = run_code(code, level="process", timeout=1.0, memory=100 << 20, output=99)
        assert (result.level, result.status in statuses) == ("process", True), (name, result)
        assert "LEAK" not in result.stdout
    run_code("import os, time\nif os.fork() == 0:\n    time.sleep(60)", level="process")
    assert none_left(mark)


def test_a_file_of_the_machine_is_out_of_reach_of_bwrap_and_within_that_of_a_process(tmp_path: Path) -> None:
    """The difference between a boundary and none."""
    level_or_skip("bwrap")
    code = "print(open('/etc/passwd').read())"
    assert "root:" in run_code(code, level="process").stdout
    assert run_code(code, level="bwrap").error.splitlines()[-1].startswith("FileNotFoundError")


# Threads, and ends from outside


def test_32_threads_at_once(level: str, mark: str) -> None:
    gate = threading.Barrier(32)

    def one(number: int) -> tuple[str, str]:
        gate.wait(60)
        result = run_code(f"print({number})\nassert {number} % 2", level=level, timeout=60)
        return result.stdout, result.status

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(32)))
    assert found == [(f"{number}\n", "ok" if number % 2 else "error") for number in range(32)]
    assert none_left(mark)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("name", ["bwrap", "monty"])
def test_the_program_ends_with_its_parent(name: str, how: signal.Signals, mark: str, tmp_path: Path) -> None:
    level_or_skip(name)
    code = f"""
from qftlab_course.agent_edit import sandbox
sandbox.ENVIRONMENT[{mark!r}] = "1"
sandbox.levels()
sandbox.run_code("print(1)", level={name!r})
print("now", flush=True)
sandbox.run_code("while True: pass", level={name!r}, timeout=2.5 if {name!r} == "monty" else 300)
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=-1, stderr=-1) as parent:
        assert parent.stdout.readline() == b"now\n"
        time.sleep(0.3)
        started = children(parent.pid)
        assert len(started) == 1
        began = time.monotonic()
        parent.send_signal(how)
        error = parent.communicate(timeout=60)[1]
        assert time.monotonic() - began < 4
    assert (b"KeyboardInterrupt" in error) == (how == signal.SIGINT)
    while any(folder.exists() for folder in started) and time.monotonic() < began + 6:
        time.sleep(0.05)
    assert not any(folder.exists() for folder in started) and none_left(mark), marked(mark)
    assert os.listdir(tmp_path) == []


# Real data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bwrap", "auto"])
def test_humanevalfix_has_the_verdicts_of_cpython(name: str, real_data: Path) -> None:
    """All 164 good programs pass, and none of the 164 that have a bug."""
    level_or_skip("bwrap")
    lines = (real_data / "humanevalfix/humanevalpack_python.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = ("canonical_solution", "buggy_solution")
    for row in rows:
        good, bad = (run_tests(row["prompt"] + row[kind], row["test"], level=name, timeout=5) for kind in kinds)
        assert good.passed, (row["task_id"], good)
        assert bad.status in {"failed", "timeout"}, (row["task_id"], bad)
    assert len(rows) == 164


@pytest.mark.long
def test_humanevalfix_at_monty(real_data: Path) -> None:
    """Of the good programs 162 pass, no other fails than for what monty says it has not; no bug passes."""
    level_or_skip("monty")
    lines = (real_data / "humanevalfix/humanevalpack_python.jsonl").read_text(encoding="utf-8").splitlines()
    refused = []
    for row in map(json.loads, lines):
        good = run_tests(row["prompt"] + row["canonical_solution"], row["test"], level="monty")
        bad = run_tests(row["prompt"] + row["buggy_solution"], row["test"], level="monty", timeout=1)
        assert good.status in {"ok", "refused"} and bad.status in {"failed", "timeout", "refused"}, row["task_id"]
        refused += [row["task_id"]] if good.status == "refused" else []
    assert refused == ["Python/38", "Python/50"]


@pytest.mark.parametrize("right", [True, False])
def test_livecodebench_public_tests(right: bool, real_data: Path) -> None:
    level_or_skip("bwrap")
    lines = (real_data / "livecodebench/lcb_400.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["question_title"]: row for row in map(json.loads, lines)}
    swap = "for _ in range(int(input())):\n    wrong = sum(a != b for a, b in zip(input(), 'abc'))\n"
    swap += "    print('YES' if wrong < 3 else 'NO')"
    senior = "class Solution:\n    def countSeniors(self, details: List[str]) -> int:\n"
    senior += "        return sum(int(d[11:13]) > 60 for d in details)\n"
    row = rows["A. Short Sort"]
    result = run_tests(swap if right else swap.replace("< 3", "< 2"), json.loads(row["public_test_cases"]))
    assert (result.status, result.level) == ("ok" if right else "failed", "bwrap")
    row = next(row for row in rows.values() if "countSeniors" in row["starter_code"])
    cases, name = json.loads(row["public_test_cases"]), json.loads(row["metadata"])["func_name"]
    result = run_tests(senior if right else senior.replace("> 60", "> 80"), cases, func_name=name)
    assert (result.status, result.level) == ("ok" if right else "failed", "bwrap")


@pytest.mark.long
def test_public_tests_of_livecodebench_can_be_put(real_data: Path) -> None:
    """Every sixth of the 181 functional problems: a wrong solution fails at a case and at nothing before."""
    level_or_skip("bwrap")
    lines = (real_data / "livecodebench/lcb_400.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["starter_code"]]
    assert len(rows) == 181
    for row in rows[::6]:
        code = f"{row['starter_code'].rstrip()}\n        return NotImplemented.__class__\n"
        cases, name = json.loads(row["public_test_cases"]), json.loads(row["metadata"])["func_name"]
        result = run_tests(code, cases, func_name=name)
        assert (result.status, result.level) == ("failed", "bwrap"), (row["question_id"], result)
