"""The guard of a self-checking exercise: a time limit on a student's call, and a spy on what it calls.

Delegation is seen while it runs: a profile hook knows forbidden Python functions by their code object, under whatever
name, and a torch function mode sees every torch call. Neither patches anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import io
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_AGAIN = 0.05  # seconds between two rings, for code that swallows the first
_PATIENCE = 3  # rings after which a bare `except:` is no longer let off
_GRACE = 1.0  # seconds a worker thread gets to die before it is left behind


class TimeLimitReached(BaseException):
    """Raised inside a student's call when its time is up; not an `Exception`, so that `except Exception` lets it by."""


@dataclass(frozen=True)
class Outcome:
    """What one guarded call did: exactly one of `value`, `error` and `timed_out` is meaningful.

    `calls` names the forbidden callables that ran, `printed` is what the call wrote to standard output.
    """

    value: Any = None
    error: BaseException | None = None
    timed_out: bool = False
    calls: tuple[str, ...] = ()
    printed: str = ""


def resolve(name: str) -> Any:
    """The object that a dotted name such as "torch.nn.functional.cross_entropy" stands for.

    Raises:
        ValueError: if no module or attribute of that name exists.
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        with contextlib.suppress(AttributeError):
            return functools.reduce(getattr, parts[cut:], found)
    raise ValueError(f"{name} must name something that can be imported; check its spelling and the installed versions")


def unwrap(thing: Any) -> Any:
    """What a callable stands for once partials, bound methods and `functools.wraps` layers are taken off."""
    for _ in range(100):
        inner = getattr(thing, "func", None) if isinstance(thing, functools.partial) else None
        inner = inner or (thing.__func__ if isinstance(thing, types.MethodType) else None)
        if inner is None and not isinstance(thing, type | types.ModuleType):
            inner = inspect.getattr_static(thing, "__wrapped__", None)
        if inner is None:
            return thing
        thing = inner
    return thing


class Forbidden:
    """The callables an answer may not use: their names by identity, and by code object where they are Python's."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.by_id = {id(unwrap(thing)): name for name, thing in named.items()}
        self.kept = [unwrap(thing) for thing in named.values()]  # keeps the ids above alive
        self.codes = {code: name for name, thing in named.items() for code in _codes(unwrap(thing))}


def _codes(thing: Any) -> Iterator[types.CodeType]:
    if isinstance(thing, types.FunctionType):
        yield thing.__code__
    elif isinstance(thing, type):
        own = (vars(thing).get(name) for name in ("__init__", "__call__", "forward"))
        yield from (method.__code__ for method in own if isinstance(method, types.FunctionType))


class _TorchSpy(TorchFunctionMode):
    def __init__(self, forbidden: Forbidden, calls: list[str]) -> None:
        super().__init__()
        self.forbidden, self.calls = forbidden, calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if name := self.forbidden.by_id.get(id(func)):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def spying(forbidden: Forbidden) -> Iterator[list[str]]:
    """Records the forbidden callables that run in this thread; gives the profile hook back as it was found."""
    calls: list[str] = []

    def hook(frame: types.FrameType, event: str, arg: Any) -> None:
        name = forbidden.codes.get(frame.f_code) if event == "call" else None
        name = name or (forbidden.by_id.get(id(arg)) if event == "c_call" else None)
        if name:
            calls.append(name)

    before = sys.getprofile()
    try:
        with _TorchSpy(forbidden, calls):
            sys.setprofile(hook)
            try:
                yield calls
            finally:
                sys.setprofile(before)
    finally:
        sys.setprofile(before)


def guarded(answer: Callable, args: Sequence[Any], seconds: float, forbidden: Forbidden) -> Outcome:
    """Calls `answer(*args)` for at most `seconds` of wall time, spied upon, its prints kept out of the notebook.

    In the main thread of a system with interval timers a signal ends a call that is late; elsewhere the call runs in a
    worker thread that gets an asynchronous exception, and is left behind if it ignores that too.

    Raises:
        KeyboardInterrupt: if the reader interrupts.
    """
    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    runner = _run_under_alarm if alarm else _run_in_thread
    with contextlib.redirect_stdout(io.StringIO()) as out:
        outcome = runner(lambda: answer(*args), seconds, forbidden)
    if isinstance(outcome.error, KeyboardInterrupt):
        raise outcome.error
    return Outcome(outcome.value, outcome.error, outcome.timed_out, outcome.calls, out.getvalue())


def _attempt(call: Callable) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # SystemExit and the time limit included: the notebook must run on
        return None, error


def _run_under_alarm(call: Callable, seconds: float, forbidden: Forbidden) -> Outcome:
    rings, armed, tracer = [], True, sys.gettrace()

    def ring(signum: int, frame: types.FrameType | None) -> None:
        if armed:
            rings.append(signum)
            if frame is None or frame.f_code is not _run_under_alarm.__code__:
                if len(rings) >= _PATIENCE:
                    _raise_in_handlers(frame)
                raise TimeLimitReached

    with spying(forbidden) as calls:
        before = signal.signal(signal.SIGALRM, ring)
        started = time.monotonic()
        left, every = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), _AGAIN)
        value = error = None
        try:
            value, error = _attempt(call)
        except TimeLimitReached as late:
            error = late
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            sys.settrace(tracer)
            if left:  # somebody else's timer, such as a test runner's: give it what is left
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.001), every)
    return Outcome(value, error, bool(rings), tuple(dict.fromkeys(calls)))


def _raise_in_handlers(frame: types.FrameType | None) -> None:
    """Makes the handler that swallows the next exception raise in its own first line, outside of its `try`."""
    raised = []

    def tracer(frame: types.FrameType, event: str, arg: Any) -> Callable:
        if event == "line" and raised:
            raise TimeLimitReached
        raised.extend([event] if event == "exception" else [])
        return tracer

    while frame is not None and frame.f_code is not _run_under_alarm.__code__:
        frame.f_trace = tracer
        frame = frame.f_back
    sys.settrace(tracer)


def _run_in_thread(call: Callable, seconds: float, forbidden: Forbidden) -> Outcome:
    found: dict[str, Any] = {}
    is_grad = torch.is_grad_enabled()

    def work() -> None:
        with contextlib.suppress(TimeLimitReached), torch.set_grad_enabled(is_grad), spying(forbidden) as calls:
            found["calls"] = calls
            found["outcome"] = _attempt(call)

    worker = threading.Thread(target=work, name="qftlab-check", daemon=True)
    worker.start()
    worker.join(seconds)
    is_late = worker.is_alive()
    give_up = time.monotonic() + _GRACE
    while worker.is_alive() and time.monotonic() < give_up:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(TimeLimitReached))
        worker.join(_AGAIN)
    value, error = found.get("outcome", (None, TimeLimitReached()))
    return Outcome(value, error, is_late, tuple(dict.fromkeys(found.get("calls", ()))))
