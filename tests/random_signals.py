"""Runs that get a random signal at a random moment, half of them inside a write of a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = (0, -signal.SIGKILL, 143, 130, -signal.SIGTERM)  # the last where it comes before the run listens


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is half written somewhere below."""
    try:
        return any(folder.rglob(".step-*"))
    except FileNotFoundError:  # a folder was renamed while it was looked into
        return False


def killed(run: Callable, arguments: tuple, folder: Path, pattern: str) -> None:
    """Runs `run(*arguments)` in a process of its own and kills it as soon as `pattern` is found in `folder`."""
    process, deadline = started(run, arguments), time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()


def started(run: Callable, arguments: tuple) -> BaseProcess:
    """A process that has just begun `run(*arguments)`, and ends with the code of the command line."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, arguments, theirs))
    process.start()
    assert ours.recv()
    return process


def disturbed(run: Callable, arguments: tuple, folder: Path, chance: random.Random, seconds: float) -> int:
    """Runs `run(*arguments)` in a process of its own, which writes below `folder`, and disturbs it.

    Args:
        run: what is run.
        arguments: of it.
        folder: where checkpoints appear.
        chance: decides which signal and when.
        seconds: that an undisturbed run takes.

    Returns:
        The code it ended with: as the command line's.
    """
    process = started(run, arguments)
    number = chance.choice(SIGNALS)
    if chance.random() < 0.5:  # inside the write of a checkpoint
        deadline = time.monotonic() + 60
        while process.is_alive() and not is_writing(folder):
            assert time.monotonic() < deadline
            time.sleep(1e-4)
    else:
        time.sleep(chance.uniform(0, seconds))
    if process.is_alive():
        os.kill(process.pid, number)
        if number == signal.SIGINT and chance.random() < 0.5:
            time.sleep(chance.uniform(0, 0.01))
            os.kill(process.pid, number) if process.is_alive() else None
    process.join(120)
    assert process.exitcode in CODES
    return process.exitcode


def _child(run: Callable, arguments: tuple, pipe) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe.send(True)
    try:
        run(*arguments)
    except KeyboardInterrupt:
        os._exit(130)
