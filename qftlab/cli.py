"""The command line, `python -m qftlab COMMAND`: options and YAML build the dataclasses that notebooks build."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from qftlab import __version__
from qftlab.commands import COMMANDS, PROGRAM, Command
from qftlab.settings import parse_config

log = logging.getLogger(__name__)


@functools.cache
def all_commands() -> dict[str, Command]:
    """The library's own, and those that installed packages add (entry-point group `qftlab.commands`)."""
    added = [point.load() for point in entry_points(group="qftlab.commands")]
    return COMMANDS | {name: command for commands in added for name, command in commands.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: what stands after the program's name, by default on the command line.

    Returns:
        The exit code: 0, 2 for a mistake of the user's (one message, no traceback), 130 after Ctrl-C.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview(all_commands()))
        return 0
    if name == "--version":
        print(f"qftlab {__version__}")
        return 0
    commands = all_commands()
    if name not in commands:
        return complain(f"{name!r} is no command; there are {', '.join(commands)}: {PROGRAM} --help")
    is_verbose = "--verbose" in rest
    level = logging.DEBUG if is_verbose else logging.WARNING if commands[name].speaks else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in () if is_verbose else ("httpx", "matplotlib", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        commands[name].run(parse(name, [a for a in rest if a != "--verbose"]))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What reads our output has had enough; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        log.debug("traceback:", exc_info=True)
        return complain(f"{name}: {error}")
    return 0


def complain(message: str, code: int = 2) -> int:
    """One message to standard error; returns the exit code."""
    print(f"qftlab {message}" if ": " in message else message, file=sys.stderr)
    return code


def overview(commands: dict[str, Command]) -> str:
    """The help of the whole program."""
    lines = [f"usage: {PROGRAM} COMMAND [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    for name, command in commands.items():
        lines += [f"  {name:9} {command.summary}", f"            {PROGRAM} {command.example}", ""]
    lines += [
        f"Options of a command:        {PROGRAM} sft --help",
        f"Its settings as YAML:        {PROGRAM} sft --data rows.jsonl --print_config > sft.yaml",
        f"Run them, with one changed:  {PROGRAM} sft --config sft.yaml --train.lr 5e-4",
        "A trained model stays in its run folder; runs/sft/latest is the last one.",
        "--verbose logs more, and shows where an error came from.",
    ]
    return "\n".join(lines)


def parse(name: str, arguments: Sequence[str]) -> object:
    """The configuration of a command, from flags and YAML.

    Raises:
        ValueError: for an unknown option or an unfit value.
        SystemExit: after `--help` and `--print_config`.
    """
    command = all_commands()[name]
    module, _, kind = command.config.partition(":")
    about = f"{command.summary[0].upper()}{command.summary[1:]}. Example: {PROGRAM} {command.example}"
    config_class = getattr(importlib.import_module(module), kind)
    return parse_config(config_class, with_own_settings(config_class, arguments), f"{PROGRAM} {name}", about)


def with_own_settings(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a run to resume, behind the settings it began with: what is given besides must equal them."""
    resume, arguments = option(arguments, "resume"), list(arguments)
    if not resume or resume == "null" or option(arguments, "config") or not hasattr(config_class, "resume"):
        return arguments
    from qftlab.train.run import find_run, own_settings

    run = find_run(resume, Path(option(arguments, "output") or config_class.output))
    return ["--config", json.dumps(own_settings(run)), *arguments]


def option(arguments: Sequence[str], name: str) -> str:
    """The value of `--name value` or `--name=value`, the last one; empty if there is none."""
    found = [after for one, after in zip(arguments, arguments[1:], strict=False) if one == f"--{name}"]
    found += [one.partition("=")[2] for one in arguments if one.startswith(f"--{name}=")]
    return found[-1] if found else ""
