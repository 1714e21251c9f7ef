"""The level `monty` of the sandbox: what pydantic-monty says of a program, in the words of `sandbox.SandboxResult`."""

from __future__ import annotations

import builtins
import math
import re
import sys
import time
import traceback
from functools import cache

WORD = re.compile(r"[A-Za-z_]\w*")
# Names that a program binds anew, as far as its text shows.
BINDS = re.compile(r"(?:\b(?:def|class|as|import|global)|^[^#\n=()]*,)\s+(\w+)|^(\w+)(?=\s*[,:=])", re.MULTILINE)
# What monty has not although Python may have it; a name that is caught is looked up there.
LACKS = re.compile(
    r"does not yet support|Internal error in monty|not supported in this environment|Permission denied"
    r"|invalid return type|module '\w+' has no attribute|No module named '(\w+)|name '(\w+)' is not defined"
)


@cache
def monty_state() -> str:
    """ "ready", or why monty cannot run here; tried once in this process."""
    try:
        import pydantic_monty

        with pydantic_monty.Monty() as pool, pool.checkout() as session:
            session.feed_run("1 + 1")
        return "ready"
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a worker that does not start
        return f"pip install 'qftlab[sandbox]' ({error})"


def ask_monty(code: str, tests: str, func_name: str, timeout: float, memory: int, output: int) -> dict:
    """Runs a program, and its tests in a session of their own that calls it; gives the fields of a result."""
    import pydantic_monty as monty

    words, own = set(WORD.findall(tests)), {func_name}.union(*BINDS.findall(code))
    if shadowed := sorted(words & set(vars(builtins)) & own):
        return {"status": "refused", "error": f"its tests would call Python's own {', '.join(shadowed)}"}
    limits = {"max_feed_duration_secs": timeout, "max_total_sleep_secs": timeout, "max_memory": memory}
    options = {"limits": {**limits, "max_suspensions": 1 << 20}, "assert_message_annotations": False}
    options["os_policy"] = {"sleep_system_max": math.inf}
    heard, met = monty.CollectStreams(max_bytes=output + 1), []  # what the program met while it was tested
    said = {"status": "ok"}
    with monty.Monty(max_processes=2, request_timeout=timeout + 1) as pool, pool.checkout(**options) as program:
        try:
            program.feed_run(code, print_callback=heard)
        except (monty.MontyError, UnicodeError) as error:
            said = _told(error, output)
        if tests and said["status"] == "ok":
            calls = {word: _call(program, word, met, time.monotonic() + timeout, output) for word in words}
            try:
                with pool.checkout(**options) as judge:
                    judge.feed_run(tests, print_callback=heard, external_lookup=calls)
            except monty.MontyError as error:
                said = _told(error, output)
                said = next((problem for problem in met if problem["name"] == said["name"]), said)
                if said["status"] == "error":
                    said = {**said, "status": "failed", "failed": _line(error)}
            # A limit counts, whatever the tests made of it.
            said = next((problem for problem in met if problem["status"] != "error"), said)
    wrote = ["".join(text for stream, text in heard.output if tests or stream == name) for name in ("stdout", "stderr")]
    return {"stdout": "" if tests else wrote[0], "stderr": wrote[1], "error": "", **said}


def _line(error) -> str:
    frames = error.traceback() if hasattr(error, "traceback") else []
    return (frames[-1].source_line or "").strip() if frames else ""


def _call(program, name: str, met: list[dict], deadline: float, output: int):
    """The tests' function for one of the program's."""

    def call(*args, **kwargs):
        if time.monotonic() > deadline:
            met.append({"status": "timeout", "error": "its tests took too long"})
            raise TimeoutError
        try:
            asked = {"_args": args, "_kwargs": kwargs}
            value, *after = program.feed_run(f"({name}(*_args, **_kwargs), _args, _kwargs)", inputs=asked)
        except Exception as error:  # any but MontyError is about a value that does not cross
            met.append(_told(error, output))
            raise (error.exception() if hasattr(error, "exception") else error) from None
        if repr(after) != repr([args, kwargs]):
            met.append({"status": "refused", "error": "what a program does to its arguments does not cross in monty"})
        return value

    return call


def _told(error, output: int) -> dict:
    """Status, text and name of what monty raised."""
    raised = error.exception() if hasattr(error, "exception") else error
    name = "".join(traceback.format_exception_only(raised)).strip()  # CPython's words: monty has KeyError: k
    text = f"{error.display().removesuffix(error.display('type-msg'))}{name}" if hasattr(error, "display") else name
    lacks = LACKS.search(name)
    if getattr(error, "timed_out", False) or isinstance(raised, TimeoutError) and "limit exceeded" in name:
        status = "timeout"
    elif isinstance(raised, MemoryError):
        status = "output" if name.endswith(f"> {output + 1} bytes") else "memory"
    elif isinstance(error, UnicodeError) or lacks and _is_pythons(lacks[1], lacks[2]):
        status = "refused"
    else:
        status = "error"
    return {"status": status, "error": text, "name": name}


def _is_pythons(module: str | None, name: str | None) -> bool:
    return module in sys.stdlib_module_names if module else not name or name in vars(builtins)
