"""What every room asks of a model: the causal model inside a peft wrapper, and a mode that is given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with a head inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def module_mode(module: nn.Module, is_training: bool) -> Iterator[None]:
    """Training or evaluation mode inside; outside, every submodule's own mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(is_training)
    try:
        yield
    finally:
        for m, was_training in modes:
            m.training = was_training
