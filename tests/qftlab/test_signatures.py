"""What holds for every function and dataclass of the library: quiet defaults, and values that cannot be changed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import qftlab
from qftlab.decoding import engine

# What is counted up while it is used.
COUNTED = {"TrainResult", "Usage", "LengthStats", "LoadReport", "Totals"}
# Nothing of this happens unless it is asked for.
ASKED_FOR = ("progress", "resume", "return_logprobs", "with_entropy", "is_streaming", "in_place", "reference_free",
             "is_broken")  # fmt: skip
NUMBERS = {
    "generate": {"max_new_tokens": 128, "seed": 0, "batch_size": 64, "num_generations": 1},
    "beam_search": {"num_beams": 4, "max_new_tokens": 128, "num_return_sequences": 1, "batch_size": 64},
    "split_rows": {"test": 0.2, "seed": 0},
    "contamination": {"n": 8},
    "dpo_loss": {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0},
    "Checkpoints": {"keep": 2},
    "samples_of": {"count": 4},
    "optimizer_step": {"number": 1},
}


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(qftlab.__path__, "qftlab."):
        if found.name not in ("qftlab.__main__", "qftlab.maths.kernels"):  # it runs, and needs Triton
            yield importlib.import_module(found.name)


def ours() -> dict[str, object]:
    """Every function and class of the library by its name."""
    return {name: value for module in modules() for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and callable(value)}  # fmt: skip


def test_dataclasses_are_frozen_but_those_that_count() -> None:
    found = {name: kind for name, kind in ours().items() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}
    assert len(found) > 30
    assert {name for name, kind in found.items() if not kind.__dataclass_params__.frozen} == COUNTED


def test_defaults_of_functions() -> None:
    known = {name: dict(inspect.signature(f).parameters) for name, f in ours().items()
             if inspect.isfunction(f) or name in NUMBERS}  # fmt: skip
    for name, parameters in known.items():
        for flag in ASKED_FOR:
            assert flag not in parameters or parameters[flag].default in (False, inspect.Parameter.empty), (name, flag)
    found = {name: {key: known[name][key].default for key in numbers} for name, numbers in NUMBERS.items()}
    assert found == NUMBERS


def test_a_stream_begins_with_the_defaults_of_generate() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (engine.plan_rows, engine.generate))
    shared = [name for name, p in ours.items() if name in theirs and p.default is not inspect.Parameter.empty]
    assert len(shared) > 6 and ours["batch_size"].default == 1  # a stream has one row
    assert all(ours[name].default == theirs[name].default for name in shared if name != "batch_size")
    assert inspect.signature(engine.stream).parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
