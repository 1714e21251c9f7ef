"""The level `monty` of the sandbox: what pydantic-monty says of a program, in the words of `sandbox.SandboxResult`."""

from __future__ import annotations

import builtins
import math
import re
import sys
import traceback
from functools import cache

# A program could make an object that is equal to everything by a method of such a name, and give it one by these.
FORGES = re.compile(r"__(?!init__|name__|main__)\w+__")
GUARD = """
def only_ask(real):
    def type(value):
        return real(value)
    return type
type = only_ask(type)
def setattr(*args): raise NotImplementedError("a program with tests does not yet support setattr at level monty")
def exec(*args): raise NotImplementedError("a program with tests does not yet support exec at level monty")
"""
# What monty has not although Python may have it; a name that is caught is looked up there.
LACKS = re.compile(
    r"does not yet support|Internal error in monty|not supported in this environment|Permission denied"
    r"|module '\w+' has no attribute|No module named '(\w+)|name '(\w+)' is not defined"
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


def ask_monty(code: str, tests: str, timeout: float, memory: int, output: int) -> dict:
    """Runs a program, then its tests in the same session; gives the fields of a result.

    Monty has no way to look into the session, and a program that may bend the tests is refused: one that binds a name
    of Python's own which they use, or might have comparisons of its own.
    """
    import pydantic_monty as monty

    limits = {"max_feed_duration_secs": timeout, "max_total_sleep_secs": timeout, "max_memory": memory}
    options = {"limits": limits, "assert_message_annotations": False, "os_policy": {"sleep_system_max": math.inf}}
    heard, said = monty.CollectStreams(max_bytes=output + 1), {"status": "ok"}
    words = sorted(set(re.findall(r"\w+", tests)) & set(vars(builtins)))
    with monty.Monty(max_processes=1, request_timeout=timeout + 1) as pool, pool.checkout(**options) as session:
        try:
            session.feed_run(GUARD if tests else "None")
            means = [_meaning(session, word) for word in words]
            session.feed_run(code, print_callback=heard)
            changed = [word for word, was in zip(words, means, strict=True) if _meaning(session, word) != was]
            found = FORGES.search(code) if tests else None
            if changed or found:
                return {"status": "refused", "error": f"it could bend its tests by {found[0] if found else changed[0]}"}
            session.feed_run(tests, print_callback=heard)
        except (monty.MontyError, UnicodeError) as error:
            said = _told(error, output, *(f"<python-input-{n + 1}>" for n in (len(words), 2 * len(words) + 1)))
    wrote = ["".join(text for stream, text in heard.output if tests or stream == name) for name in ("stdout", "stderr")]
    return {"stdout": "" if tests else wrote[0], "stderr": wrote[1], **said}


def _meaning(session, word: str) -> str:
    """What a name of Python's own stands for in a session, or why it stands for nothing."""
    import pydantic_monty as monty

    try:
        return repr(session.feed_run(word))
    except monty.MontyError as error:
        return str(error)


def _told(error, output: int, main: str, tests: str) -> dict:
    """Status, text and failed test of what monty raised; `main` and `tests` are its names of the two texts."""
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
    places = [place for place in error.traceback() if place.filename == tests] if hasattr(error, "traceback") else []
    failed = (places[-1].source_line or "").strip() if places else ""
    status = "failed" if failed and status == "error" else status
    return {"status": status, "error": text.replace(f'"{main}"', '"main.py"'), "failed": failed}


def _is_pythons(module: str | None, name: str | None) -> bool:
    return module in sys.stdlib_module_names if module else not name or name in vars(builtins)
