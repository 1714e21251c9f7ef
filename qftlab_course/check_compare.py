"""How a check compares and shows values: the first difference in words, and inputs short enough to read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_SHOWN = 400  # characters of a value in a message


def difference(got: Any, wanted: Any, atol: float, rtol: float, where: str = "") -> str | None:
    """The first difference between two values in words, or None if they agree.

    Shapes come first, then values. A tensor may stand for a number or a list of the same shape, a tuple for a list, and
    any dtype for another that holds the same values. Whole numbers agree exactly; NaN agrees with nothing, an infinity
    with itself.

    Args:
        got, wanted: numbers, strings, tensors, lists, dicts, sets, nested at will.
        atol, rtol: tolerances of floating-point values, as in torch.isclose.
        where: path to this value, such as "['labels']", put before the message.
    """
    at = f"at {where}: " if where else ""
    if got is None and wanted is not None:
        return f"{at}got None: is a `return` missing?"
    if isinstance(wanted, Mapping):
        return _mappings(got, wanted, atol, rtol, where)
    if isinstance(wanted, Tensor) or isinstance(got, Tensor):
        return _tensors(got, wanted, atol, rtol, at)
    if isinstance(wanted, Sequence) and not isinstance(wanted, str | bytes):
        return _sequences(got, wanted, atol, rtol, where)
    if isinstance(wanted, float) or (isinstance(wanted, int) and isinstance(got, float)):
        if not _is_number(got):
            return f"{at}{_kind(got)}, wanted a number"
        atol, rtol = (atol, rtol) if isinstance(wanted, float) else (0.0, 0.0)
        return None if _close(float(got), float(wanted), atol, rtol) else f"{at}{show(got)}, wanted {show(wanted)}"
    if isinstance(wanted, str) and isinstance(got, str) and got != wanted:
        first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        short = min(len(got), len(wanted))
        end = f"ends at character {short}" if first is None else f"differs from character {first} on"
        return f"{at}{show(got)}, wanted {show(wanted)}: {end}"
    if type(got) is not type(wanted) and not (_is_number(got) and _is_number(wanted)):
        return f"{at}{_kind(got)}, wanted {_kind(wanted)}"
    return None if got == wanted else f"{at}{show(got)}, wanted {show(wanted)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0


def _close(got: float, wanted: float, atol: float, rtol: float) -> bool:
    if math.isnan(got) or math.isnan(wanted):
        return False
    return got == wanted or (math.isfinite(wanted) and abs(got - wanted) <= atol + rtol * abs(wanted))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _mappings(got: Any, wanted: Mapping, atol: float, rtol: float, where: str) -> str | None:
    at = f"at {where}: " if where else ""
    if not isinstance(got, Mapping):
        return f"{at}{_kind(got)}, wanted a dict with the keys {sorted(map(str, wanted))}"
    for key in wanted:
        if key not in got:
            return f"{at}the key {key!r} is missing"
        if found := difference(got[key], wanted[key], atol, rtol, f"{where}[{key!r}]"):
            return found
    extra = [key for key in got if key not in wanted]
    return f"{at}the key {extra[0]!r} is not wanted" if extra else None


def _sequences(got: Any, wanted: Sequence, atol: float, rtol: float, where: str) -> str | None:
    at = f"at {where}: " if where else ""
    got = got.tolist() if type(got).__module__ == "numpy" and hasattr(got, "tolist") else got
    if isinstance(got, str | bytes) or not isinstance(got, Sequence):
        return f"{at}{_kind(got)}, wanted {_kind(wanted)} of {len(wanted)}"
    if len(got) != len(wanted):
        return f"{at}{len(got)} entries, wanted {len(wanted)}"
    pairs = enumerate(zip(got, wanted, strict=True))
    return next((d for i, (g, w) in pairs if (d := difference(g, w, atol, rtol, f"{where}[{i}]"))), None)


def as_tensor(value: Any) -> Tensor | None:
    """A number, a rectangular list or a tensor as a detached tensor on the CPU; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _tensors(got: Any, wanted: Any, atol: float, rtol: float, at: str) -> str | None:
    a, b = as_tensor(got), as_tensor(wanted)
    if a is None or b is None:
        return f"{at}{_kind(got)}, wanted {_kind(wanted)}" + (f" of shape {_shape(b)}" if b is not None else "")
    if a.shape != b.shape:
        return f"{at}shape {_shape(a)}, wanted {_shape(b)}"
    if a.is_complex() or b.is_complex():
        return None if torch.equal(a, b) else f"{at}complex values differ"
    atol, rtol = (atol, rtol) if b.is_floating_point() else (0.0, 0.0)
    a, b = a.double(), b.double()
    close = torch.isclose(a, b, rtol=rtol, atol=atol)
    if bool(close.all()):
        return None
    first = tuple((~close).nonzero()[0].tolist())
    wrong = f" ({int((~close).sum())} of {close.numel()} entries differ)" if close.numel() > 1 else ""
    spot = f"at {at[3:-2] if at else ''}{list(first)}: " if first else at
    return f"{spot}{_number(a[first].item())}, wanted {_number(b[first].item())}{wrong}"


def in_form_of(value: Any, example: Any) -> Any:
    """A value that `difference` finds equal, in the form of an example: a tensor of its dtype, a list, a plain number.

    Args:
        value: what was returned; a NumPy array, a tensor, a list or a tuple may stand for one another.
        example: of the wanted form; the entries of a list are all like its first one.
    """
    if isinstance(example, Tensor):
        return torch.as_tensor(value).to(example.dtype)
    if isinstance(example, list | tuple):
        entries = value.tolist() if hasattr(value, "tolist") else list(value)
        likes = example if isinstance(example, tuple) else example[:1] * len(entries)
        return type(example)(map(in_form_of, entries, likes))
    return type(example)(value)


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.5g}"


def show(value: Any) -> str:
    """A value as a student would write it: rounded, on one line, cut where it grows long, without addresses."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        text = f"{_listed(plain)}  shape {_shape(plain)}" if plain.dim() else _listed(plain)
    else:
        text = _listed(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " …"


def _listed(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, bool) or not isinstance(value, float | list | tuple | dict):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_listed(v)}" for k, v in value.items()) + "}"
    inner = ", ".join(map(_listed, value))
    return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"


def bulk(value: Any) -> int:
    """How much there is to read in a value: scalars and characters, nested ones counted through; smaller is better."""
    if isinstance(value, Tensor):
        return value.numel() + value.dim()
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if isinstance(value, Mapping):
        return 1 + sum(bulk(entry) for pair in value.items() for entry in pair)
    if isinstance(value, Sequence):
        return 1 + sum(map(bulk, value))
    return 1


def general_suspect(got: Any, wanted: Any) -> str | None:
    """A guess that fits any exercise: NaN, a constant factor, a flipped sign, an inverted mask, another order."""
    a, b = as_tensor(got), as_tensor(wanted)
    if a is None or b is None or a.is_complex() or not a.numel():
        return None
    if bool(a.isnan().any()):
        return "a NaN: look for 0 / 0, the log of 0, or infinity minus infinity (an overflowing softmax)"
    if a.shape != b.shape:
        return "the axes are swapped" if a.shape == b.shape[::-1] and a.dim() > 1 else None
    if a.dtype == b.dtype == torch.bool:
        return "it is the exact opposite: True and False are swapped" if torch.equal(a, ~b) else None
    a, b = a.double().flatten(), b.double().flatten()
    if torch.allclose(a, b):
        return None
    if torch.allclose(a, -b):
        return "the sign is flipped"
    factor = _factor(a, b)
    if factor is not None and a.numel() > 1:  # of one number anything is a multiple
        return f"it is {_number(factor)} times the wanted value everywhere: is it divided by the right count?"
    if a.numel() > 1 and torch.allclose(a.sort().values, b.sort().values):
        return "the values are right, their order is not"
    return None


def _factor(a: Tensor, b: Tensor) -> float | None:
    used = b != 0
    if not bool(used.any()) or bool((a[~used] != 0).any()):
        return None
    ratio = (a / b)[used]
    first = ratio[0].item()
    if not math.isfinite(first) or abs(first) < 1e-9 or abs(first - 1) < 1e-3:
        return None
    return first if torch.allclose(ratio, torch.full_like(ratio, first), rtol=1e-4) else None
