"""The settings of all that runs, as frozen dataclasses, and how flags and YAML become them; torch is not imported."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence


def check_at_least(low: float, **values: float | None) -> None:
    """Refuses a number below `low`, and nan; None passes.

    Raises:
        ValueError: naming the first such value.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low:g}, got {value}")


def check_choice(allowed: tuple[str, ...], **values: str) -> None:
    """Refuses a word that is not among those allowed.

    Raises:
        ValueError: naming the value and the allowed words.
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


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
        if action.dest in helps:
            action.help = helps[action.dest].replace("%", "%%")
    for group in parser._action_groups:
        if "class '" in str(group.title):
            group.title = "settings"
            group.description = None


def option_helps(kind: type, prefix: str = "") -> dict[str, str]:
    """Option name ("train.lr") to its line in the "Args:" section of the dataclass it belongs to."""
    text = (kind.__doc__ or "").partition("Args:\n")[2].partition("Raises:")[0]
    helps = {prefix + k: " ".join(v.split()) for k, v in re.findall(r"^        (\w+): (.+(?:\n {10,}.+)*)", text, re.M)}
    for name, inner in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(inner):
            helps |= {prefix + name: "a YAML file with the settings below"} | option_helps(inner, f"{prefix}{name}.")
    return helps
