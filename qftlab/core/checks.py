"""Checks that configurations share; each error names the setting, the rule and the value."""

from __future__ import annotations


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
