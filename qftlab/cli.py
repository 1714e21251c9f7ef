"""The command line, `python -m qftlab COMMAND`: options and YAML build the dataclasses that notebooks build."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from qftlab import __version__
from qftlab.commands import COMMANDS, PROGRAM, Command

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
    except KeyboardInterrupt as interrupt:
        print(interrupt or "", file=sys.stderr)
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
        lines += [f"  {name:10} {command.summary}", f"             {PROGRAM} {command.example}", ""]
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
    about = f"{command.summary[0].upper()}{command.summary[1:]}. Example: {PROGRAM} {command.example}"
    config_class = pkgutil.resolve_name(command.config)
    return parse_config(config_class, with_own_settings(config_class, arguments), f"{PROGRAM} {name}", about)


def with_own_settings(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a run to resume, behind the settings it began with: what is given besides must equal them."""
    resume, arguments = option(arguments, "resume"), gathered(arguments)
    if not resume or resume == "null" or option(arguments, "config") or not hasattr(config_class, "resume"):
        return arguments
    from qftlab.train.run import find_run, own_settings

    run = find_run(resume, Path(option(arguments, "output") or config_class.output))
    return ["--config", json.dumps(own_settings(run)), *arguments]


def gathered(arguments: Sequence[str]) -> list[str]:
    """The arguments, with sources that are given one by one (--data A --data B) as one list."""
    flags = ("--data", "--held_out", "--against")
    found = [part for one in arguments for part in (one.split("=", 1) if one.partition("=")[0] in flags else [one])]
    for flag in flags:
        while found[:-1].count(flag) > 1:
            first = found.index(flag)
            last = found.index(flag, first + 1) + 1
            inner = [one[1:-1] if one[:1] == "[" else json.dumps(one) for one in (found[first + 1], found[last])]
            found[last] = f"[{', '.join(inner)}]"
            del found[first : first + 2]
    return found


def option(arguments: Sequence[str], name: str) -> str:
    """The value of `--name value` or `--name=value`, the last one; empty if there is none."""
    found = [after for one, after in zip(arguments, arguments[1:], strict=False) if one == f"--{name}"]
    found += [one.partition("=")[2] for one in arguments if one.startswith(f"--{name}=")]
    return found[-1] if found else ""


def parse_config(config_class: type, arguments: Sequence[str], program: str, about: str) -> object:
    """An instance of a dataclass from flags (`--train.lr 1e-3`) and YAML (`--config FILE`).

    Args:
        config_class: a dataclass whose docstring describes its fields under "Args:"; fields may be dataclasses.
        arguments: what stands after the program's name.
        program: that name, for usage and messages.
        about: what `--help` says first.

    Raises:
        ValueError: for an unknown option or an unfit value.
        SystemExit: after `--help` and `--print_config`.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_depth(arguments)
    usage = f"{program} [--config FILE.yaml] [--OPTION VALUE ...]"
    parser = ArgumentParser(prog=program, usage=usage, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these options; flags after it change them")
    parser.add_class_arguments(config_class)
    describe(parser, config_class)
    try:
        return build(config_class, parser.parse_args(list(arguments)))
    except (ArgumentError, AttributeError) as error:  # the second: a file with other settings than these
        message = " ".join(str(error).split())
        raise ValueError(f"{message} ({program} --help lists the options)") from None


def check_depth(arguments: Sequence[str]) -> None:
    """Refuses lists in lists without end, in files of settings and in options: they would crash the reader of YAML.

    Raises:
        ValueError: naming the file or option.
    """
    import yaml

    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    files = [name.partition("=")[2] or after for name, after in pairs if name.partition("=")[0] == "--config"]
    for name, text in [(one, one) for one in arguments] + [(file, None) for file in files]:
        depth = 0
        try:
            for event in yaml.parse(Path(name).read_bytes() if text is None else text, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > 100:
                    raise ValueError(f"{name:.60} must hold settings, got lists or objects nested more than 100 deep")
        except (yaml.YAMLError, UnicodeError, OSError):
            continue  # whoever needs it says so


def build(kind: type, values: object) -> object:
    """A dataclass, with the dataclasses inside it, from parsed values."""
    types = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        value = getattr(values, field.name)
        given[field.name] = build(types[field.name], value) if dataclasses.is_dataclass(types[field.name]) else value
    return kind(**given)


def describe(parser, kind: type) -> None:
    """Gives every option the text that the dataclass's docstring has for it, and groups their plain titles."""
    helps = option_helps(kind)
    for action in parser._actions:
        if action.dest.endswith("_"):  # `lora.from_` is `lora.from` here and in YAML: Python keeps that word
            action.option_strings.insert(0, f"--{action.dest[:-1]}")
            parser._option_string_actions[f"--{action.dest[:-1]}"] = action
        if action.dest in helps:
            action.help = helps[action.dest].replace("%", "%%")
    for group in parser._action_groups:
        if "class '" in str(group.title):
            group.title = "settings"
            group.description = None


def option_helps(kind: type, prefix: str = "") -> dict[str, str]:
    """Option name ("train.lr") to its line in the "Args:" section of the dataclass it belongs to, or of its parents."""
    helps: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        text = (owner.__doc__ or "").partition("Args:\n")[2].partition("Raises:")[0]
        found = re.findall(r"^        (\w+): (.+(?:\n {10,}.+)*)", text, re.M)
        helps |= {prefix + name: " ".join(value.split()) for name, value in found}
    for field in dataclasses.fields(kind):
        inner = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(inner):
            what = helps.get(prefix + field.name, "settings").rstrip(".")
            helps |= {prefix + field.name: f"{what}; a YAML file with the settings below"}
            helps |= option_helps(inner, f"{prefix}{field.name}.")
    return helps
