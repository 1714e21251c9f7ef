"""Tests a program that lives in a process of its own: plain values cross between the two, never code or a verdict.

`sandbox.run_tests` hands this text to the sandboxed interpreter; nothing imports it. It forks: the child runs main.py
and answers calls, the parent holds the tests and alone can write the verdict. So a program cannot say that it passed,
nor return an object that is equal to everything. It can only return values.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import pickle
import sys
import traceback
import types

# The classes that cross, beside those that pickle writes without a name.
PLAIN = {f"builtins.{name}" for name in "bool bytearray complex dict float int list range set str tuple".split()}
PLAIN |= {f"collections.{name}" for name in "Counter OrderedDict defaultdict deque".split()}
PLAIN |= {f"datetime.{name}" for name in "date datetime time timedelta".split()} | {"decimal.Decimal"}
PLAIN |= {"fractions.Fraction"}


class Gone(BaseException):
    """The program's process has ended; no `except Exception` of a test catches it."""


class Reader(pickle.Unpickler):
    """Makes plain values only."""

    def find_class(self, module: str, name: str):
        """A function in a plain class's place, so that no pickle can change the class."""
        if f"{module}.{name}" not in PLAIN:
            raise TypeError(f"only plain values cross, got the program's {name}")
        kind = getattr(importlib.import_module(module), name)
        return lambda *args: kind(*args)


def receive(args: tuple = ()) -> object:
    """The program's answer, or its error raised; lists, dicts and sets in `args` become what the call made of them."""
    try:
        value, error, after = Reader(answers).load()
    except EOFError as end:
        raise Gone("the program ended its own process") from end
    for old, new in zip(args, after):  # noqa: B905
        if type(old) in (dict, set):
            old.clear()
            old.update(new)
        elif type(old) is list:
            old[:] = new
    if error:
        base, details, text = error
        kind = getattr(builtins, base, None)
        raised = kind(*details) if isinstance(kind, type) and issubclass(kind, BaseException) else Gone(base)
        raised.program = text
        raise raised
    return value


def remote(name: str):
    """The tests' function for one of the program's."""

    def call(*args, **kwargs):
        pickle.dump((name, args, kwargs), calls)
        calls.flush()
        return receive(args)

    return call


def solution(path: str):
    """`remote` for a case in JSON: it has no tuples, so one that is returned counts as a list."""

    def call(*args):
        got = remote(path)(*args)
        return list(got) if type(got) is tuple else got

    return call


def serve(prelude: str, calls, answers) -> None:
    """In the program's process: run main.py, send the names of what can be called, then answer until it is killed."""
    module = sys.modules["main"] = types.ModuleType("main")
    exec(prelude, module.__dict__)

    def load() -> list:
        with open("main.py", "rb") as file:
            exec(compile(file.read(), "main.py", "exec"), module.__dict__)
        return [name for name, value in vars(module).items() if callable(value)]

    function, args, kwargs = load, (), {}
    while True:
        try:
            reply = pickle.dumps((function(*args, **kwargs), None, args))
        except BaseException as error:
            base = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            details = [item if isinstance(item, (bytes, int, float, str)) else str(item) for item in error.args]
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            reply = pickle.dumps((None, (base, details, text), ()))
        answers.write(reply)
        answers.flush()
        try:
            name, args, kwargs = pickle.load(calls)
        except EOFError:  # the tests are through
            os._exit(0)
        function = eval(name, module.__dict__)


def verdict(tests: str, func_name: str) -> dict:
    """Runs the tests: "ok", "failed" at which line of theirs, or the program's "error" before any could run."""
    status, at, lines = "error", "", tests.splitlines()
    try:
        names = receive()
        status = "failed"
        code = compile(tests, "tests.py", "exec")
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
        for name in set(names) & set(vars(builtins)) & used - {func_name}:
            raise NameError(f"the tests use {name}, which the program defines anew: say func_name if they test it")
        space = {name: remote(name) for name in names if name not in vars(builtins) or name == func_name}
        exec(code, {**space, "__name__": "tests", "__solution__": solution})
        return {"status": "ok", "failed": "", "error": ""}
    except BaseException as error:
        places = [place.lineno for place in traceback.extract_tb(error.__traceback__) if place.filename == "tests.py"]
        at = lines[places[-1] - 1].strip() if places else ""
        text = getattr(error, "program", None) or "".join(traceback.format_exception_only(type(error), error))
        return {"status": status, "failed": at[:1000], "error": text[:8000]}


if __name__ == "__main__":
    try:  # no process of the same user may look into this one
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        pass
    (program_reads, asked), (tests_read, answered) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        os.close(asked)
        os.close(tests_read)
        serve(sys.argv[1], os.fdopen(program_reads, "rb"), os.fdopen(answered, "wb"))
    os.close(program_reads)
    os.close(answered)
    calls, answers = os.fdopen(asked, "wb"), os.fdopen(tests_read, "rb")
    job = json.load(sys.stdin)
    result = verdict(job["tests"], job["func_name"])
    sys.stdout.write(json.dumps({"nonce": job["nonce"], **result}))
    sys.stdout.flush()
    os._exit(0)
