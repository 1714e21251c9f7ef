"""Runs programs that nobody has read: three named levels, and the level in every result.

- `monty`: pydantic-monty, an interpreter in Rust for a part of Python, without files, network, processes or `input()`.
- `bwrap`: CPython in bubblewrap's namespaces, as an unprivileged user, with limits. Linux only.
- `process`: CPython with limits, only where the caller names it. **It is no boundary**: a program can read and write
  what this user can (or nobody, where this user is root), use the network, start any number of processes and leave a
  daemon behind.

Inside `bwrap` a program sees /usr and its interpreter read-only, an empty /tmp, /dev/null, zero and urandom, and no
more. It has at most 32 processes or threads; the limit of memory is for each process. What remains are faults of the
kernel.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path

from qftlab_course.agent_edit.monty import ask_monty, monty_state

READY = "ready"
TRYING = threading.Lock()  # sysconfig, by which monty finds its program, is not safe from threads at its first use
LEVELS = ("monty", "bwrap", "process")
STORAGE = 16 << 20  # bytes of /tmp, and of the largest file
PROCESSES = 32  # and threads, in bwrap
SYSTEM = ["--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"]
SYSTEM += [word for name in ("null", "zero", "urandom") for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
BWRAP = ["--unshare-all", "--die-with-parent", "--new-session", *SYSTEM, "--size", str(STORAGE), "--tmpfs", "/tmp"]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
# Limits are set inside: a function before exec is unsafe with threads, and processes are counted for a namespace.
BOOT = """import os, resource, sys
for name, most in %r.items():
    resource.setrlimit(getattr(resource, name), (most, most))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""
MODULES = "string re collections heapq bisect copy math random itertools functools operator typing"
# What the harness of LiveCodeBench puts before the solution of a functional problem, in short.
PRELUDE = "".join(f"import {name}\nfrom {name} import *\n" for name in MODULES.split())
FRAME, OWN_FRAME = re.compile(r'  File "(.*)", line \d+'), re.compile(r'  File "main.py", line \d+, in ')
MARKS = re.compile(r" +[~^][~^ ]*")


class SandboxError(OSError):
    """No level that may be used can run the program here."""


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Args:
        level: where it ran, of `LEVELS`.
        status: "ok"; "error", it raised, was killed or left with an exit code; "failed", a test of it; "timeout",
            "memory" and "output", the limit it met; "refused", it needs what the level does not have.
        stdout, stderr: what it wrote, each up to the limit; with tests, what it wrote is all in `stderr`.
        error: its traceback as a reader sees it, with the frames of main.py; or another reason, in words.
        failed: the first test that failed.
        seconds: by the clock.
    """

    level: str
    status: str
    stdout: str = ""
    stderr: str = ""
    error: str = ""
    failed: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ended well, and passed its tests where there were some."""
        return self.status == "ok"


@dataclass(frozen=True)
class _Job:
    """A program, what it reads or the tests it must pass, and its limits."""

    code: str
    stdin: str
    tests: str
    func_name: str
    prelude: str
    timeout: float
    memory: int
    output: int

    def __post_init__(self) -> None:
        for name in ("timeout", "memory", "output"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


def levels() -> dict[str, str]:
    """For each level "ready", or why it cannot run here; each was tried once in this process."""
    path = os.environ.get("PATH", "")
    with TRYING:
        return {"monty": monty_state(), **{level: _python(level, path)[1] for level in ("bwrap", "process")}}


def best_level() -> str:
    """The level in force where none is named: monty, or else bwrap.

    Raises:
        SandboxError: naming each level and why it cannot run, if there is neither. `process` is never a substitute.
    """
    found = [level for level in LEVELS[:2] if levels()[level] == READY]
    if not found:
        raise SandboxError(_nowhere("no level can run programs here"))
    return found[0]


def run_code(
    code: str,
    *,
    stdin: str = "",
    level: str = "auto",
    timeout: float = 10.0,
    memory: int = 256 << 20,
    output: int = 64 << 10,
) -> SandboxResult:
    """Runs a program in a sandbox, from any number of threads at once; it and all it started have ended on return.

    Args:
        code: the text of main.py.
        stdin: what it can read; monty refuses such a program.
        level: one of `LEVELS`, or "auto": monty, and whatever does not end well there again in bwrap where that can
            run, because CPython alone knows a program's true error.
        timeout: seconds by the clock, at each level that is tried: "auto" may take twice as long.
        memory: bytes, for each process of it.
        output: bytes of stdout and of stderr that are kept; a program that writes more has the status "output".

    Raises:
        SandboxError: naming each level and why it cannot run, where the program needs one that cannot.
        ValueError: for a level that is none, or a limit that is not positive.
    """
    return _by_level(level, _Job(code, stdin, "", "", "", timeout, memory, output))


def run_tests(
    code: str,
    tests: str | Sequence[dict],
    *,
    func_name: str = "",
    level: str = "auto",
    timeout: float = 10.0,
    memory: int = 256 << 20,
    output: int = 64 << 10,
) -> SandboxResult:
    """Whether a program passes its tests (status "ok"), or the first that fails, in `failed`.

    The tests run in another process (or session of monty) than the program, call its functions, and see the plain
    values that these return: numbers, texts, lists, tuples, dicts, sets, and those of collections, datetime, decimal
    and fractions. So a program cannot pass by printing, exiting, patching Python, or an `__eq__` of its own. A test
    that needs an object of the program's own class fails (but in monty). Still possible: to know the tests and answer
    just these; and, at level `process`, what one process of a user can do to another.

    Args:
        code: the text of main.py; `if __name__ == "__main__"` does not hold in it, but for cases with standard input.
        tests: asserts as text, as HumanEvalFix has them; or cases as LiveCodeBench has them, each a dict of "input",
            "output" and "testtype": "stdin", whose output is compared outside, line by line and number by number; or
            "functional", whose input has a JSON value a line.
        func_name: for functional cases the function or method of `Solution`; for asserts only needed where it has the
            name of a builtin.
        level, timeout, memory, output: as for `run_code`; the time is for all asserts, or for each case of stdin.

    Raises:
        SandboxError, ValueError: as `run_code`; also for no tests, or cases that are not as above.
    """
    if not tests or isinstance(tests, str) and not tests.strip():
        raise ValueError(f"tests must hold an assert or a case, got {tests!r}")
    limits = (timeout, memory, output)
    if isinstance(tests, str):
        return _by_level(level, _Job(code, "", tests, func_name, "", *limits))
    kinds = {case.get("testtype") for case in tests}
    if kinds == {"functional"} and func_name:
        path = f"Solution().{func_name}" if re.search(r"^class Solution\b", code, re.MULTILINE) else func_name
        lines = "\n".join(_functional(path, case) for case in tests)
        return _by_level(level, _Job(code, "", lines, func_name, PRELUDE, *limits))
    if kinds != {"stdin"}:
        raise ValueError(f'testtype must be all "stdin", or all "functional" and func_name given, got {kinds}')
    for number, case in enumerate(tests, 1):
        result = _by_level("bwrap" if level == "auto" else level, _Job(code, case["input"], "", "", "", *limits))
        if not result.passed or not _same_output(result.stdout, case["output"]):
            status = "failed" if result.passed else result.status
            failed = f"case {number}: of {case['input']!r:.200} must come {case['output']!r:.200}, got "
            return replace(result, status=status, failed=f"{failed}{result.stdout!r:.200}")
    return result


def _functional(path: str, case: dict) -> str:
    args = ", ".join(repr(json.loads(line)) for line in case["input"].splitlines())
    return f"assert __solution__({path!r})({args}) == {json.loads(case['output'])!r}"


def _same_output(got: str, wanted: str) -> bool:
    """As LiveCodeBench compares: stripped lines, each equal as text or as numbers."""
    pairs = [[line.strip() for line in text.strip().split("\n")] for text in (got, wanted)]
    same = [a == b or _numbers(a) == _numbers(b) for a, b in zip(*pairs, strict=False)]
    return len(pairs[0]) == len(pairs[1]) and all(same)


def _numbers(line: str) -> list[Decimal] | float:
    with suppress(InvalidOperation):
        return [Decimal(word) for word in line.split()]
    return math.nan  # equal to nothing


def _by_level(level: str, job: _Job) -> SandboxResult:
    if level not in (*LEVELS, "auto"):
        raise ValueError(f'level must be one of {", ".join(LEVELS)} or auto, got "{level}"')
    states, result = levels(), None
    for name in LEVELS[:2] if level == "auto" else (level,):
        if states[name] == READY and not (result and result.passed):
            result = _in_monty(job) if name == "monty" else _in_cpython(name, job)
    if result is None or result.status == "refused" and level == "auto":
        why = result.error.rpartition("\n")[2] if result else ""
        needs = f"the program needs CPython ({why})" if result else f"level {level} cannot run here"
        raise SandboxError(_nowhere(needs))
    return result


def _nowhere(problem: str) -> str:
    states = "; ".join(f"{level}: {state}" for level, state in levels().items())
    return f'{problem}. Levels: {states}. level="process" is used only where you name it: it is no boundary'


def _in_monty(job: _Job) -> SandboxResult:
    began = time.monotonic()
    if job.stdin or job.prelude:
        said = {"status": "refused", "error": "monty has no standard input, and few of the modules of LiveCodeBench"}
    else:
        said = ask_monty(job.code, job.tests, job.timeout, job.memory, job.output)
        said["error"] = own_traceback(said.get("error", ""))
    return SandboxResult("monty", **said, seconds=time.monotonic() - began)


@cache
def _python(level: str, path: str) -> tuple[str, str]:
    """The interpreter that a level runs, or "", and "ready" or why there is none; `path` is the PATH that it is for."""
    if level == "bwrap" and not shutil.which("bwrap", path=path):
        return "", "bwrap is not on the PATH: apt-get install bubblewrap (Linux only)"
    job, why = _Job("print(1)", "", "", "", "", 20.0, 256 << 20, 1 << 16), ""
    for python in dict.fromkeys((os.path.realpath(sys.executable), "/usr/bin/python3")):
        try:
            code, out, err, _ = _run(level, python, ["main.py"], job, "")
        except (SandboxError, OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
            code, out, err = -1, b"", str(error).encode()
        if out == b"1\n":
            return python, READY
        why = why or f"it does not run {python}: {err.decode(errors='replace').strip()[-200:] or code}"
    return "", why


def _run(level: str, python: str, args: list[str], job: _Job, stdin: str) -> tuple[int | None, bytes, bytes, float]:
    """Exit code (128 + the signal; None: out of time), stdout and stderr, cut beyond the limit, and seconds."""
    limits = {"RLIMIT_AS": job.memory, "RLIMIT_CPU": math.ceil(job.timeout) + 1, "RLIMIT_FSIZE": STORAGE}
    limits |= {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, **({"RLIMIT_NPROC": PROCESSES} if level == "bwrap" else {})}
    flags = ["-I", "-S", "-u", "-X", "utf8"]
    command = [python, *flags, "-c", BOOT % limits, *flags, *args]
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    with ExitStack() as stack:
        # Files rather than pipes: nothing blocks, and no program fills this process's memory.
        read, text, out, err, told = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(5))
        for file, content in ((read, stdin), (text, job.code)):
            file.write(content.encode("utf-8", "surrogatepass"))
            file.seek(0)
        options = {"stdin": read, "stdout": out, "stderr": err, "env": ENVIRONMENT, "start_new_session": True}
        if level == "bwrap":
            folder, prefix = "/tmp", os.path.dirname(os.path.dirname(python))
            own = [] if prefix.startswith("/usr") else ["--ro-bind", prefix, prefix]
            own += ["--as-pid-1"] if job.tests else []  # so that only the tests' process holds the verdict's file
            own += ["--json-status-fd", str(told.fileno()), "--file", str(text.fileno()), "/tmp/main.py"]
            command = [shutil.which("bwrap"), *BWRAP, *own, "--remount-ro", "/", "--chdir", folder, *command]
            options |= {"cwd": "/", "pass_fds": [text.fileno(), told.fileno()]}
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            Path(folder, "main.py").write_bytes(text.read())
            for path in (folder, f"{folder}/main.py") if nobody else ():
                os.chown(path, 65534, 65534)
        began = time.monotonic()
        process = subprocess.Popen(command, **{"cwd": folder, **options, **nobody})
        try:
            ended = process.wait(job.timeout)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds, most = time.monotonic() - began, max(job.output + 1, 1 << 16)
        here = f"{folder}/main.py".encode()
        texts = [os.pread(file.fileno(), most, 0).replace(here, b"main.py") for file in (out, err)]
        if level == "bwrap" and ended is not None and b'"exit-code"' not in os.pread(told.fileno(), 4096, 0):
            raise SandboxError(f"bwrap could not start the program: {texts[1].decode(errors='replace')[-500:]}")
        return ended if ended is None or ended >= 0 else 128 - ended, *texts, seconds


def _in_cpython(level: str, job: _Job) -> SandboxResult:
    python, nonce, args = _python(level, os.environ.get("PATH", ""))[0], secrets.token_hex(16), ["main.py"]
    stdin = job.stdin
    if job.tests:
        args = ["-c", Path(__file__).with_name("judge.py").read_text(encoding="utf-8"), job.prelude]
        stdin = json.dumps({"nonce": nonce, "tests": job.tests, "func_name": job.func_name})
    code, *texts, seconds = _run(level, python, args, job, stdin)
    out, err = (text.decode("utf-8", "replace") for text in texts)
    said = {"status": "ok" if code == 0 and not job.tests else "error", "failed": "", "error": err}
    is_told = False
    if job.tests:
        with suppress(ValueError, KeyError, TypeError):
            is_told = json.loads(out)["nonce"] == nonce
        said, out = json.loads(out) if is_told else said, ""
    status, error = said["status"], "" if said["status"] == "ok" else own_traceback(said["error"])
    killed = {128 + signum: f"was killed by {signum.name}" for signum in signal.Signals}
    if code is None:
        status, error = "timeout", f"it ran for more than {job.timeout:g} seconds"
    elif status != "ok" and error.rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    elif max(len(text) for text in texts) > job.output and not job.tests:
        status, error = "output", f"it wrote more than {job.output} bytes"
    elif status == "error" and not is_told and (code in killed or not re.search(r"^\w+Error\b|  File", error, re.M)):
        error = f"the program {killed.get(code, f'ended with exit code {code}')}"
    kept = [text.encode()[: job.output].decode("utf-8", "ignore") for text in (out, err)]
    return SandboxResult(level, status, *kept, error, said["failed"], seconds)


def own_traceback(text: str) -> str:
    """The last traceback in a text as a reader of main.py sees it: its own frames, without marks below the lines.

    A text without one is given back as it is.
    """
    own, kept = True, []
    start = [
        0,
        *(found.start() for found in re.finditer(r"^Traceback \(most recent call last\):$", text, re.MULTILINE)),
    ]
    for line in text[start[-1] :].strip("\n").splitlines():
        frame = FRAME.match(line)
        if frame:
            own = frame[1].rpartition("/")[2] == "main.py"
            line = line.replace(frame[1], "main.py", 1)
        elif not line.startswith(" "):
            own = True
        if own and not MARKS.fullmatch(line):
            kept.append(line)
    if len(start) > 1 and not (len(kept) > 1 and OWN_FRAME.match(kept[1])):  # a SyntaxError's place is no frame
        del kept[0]
    return "\n".join(kept)
