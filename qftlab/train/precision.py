"""What a step computes in, and what it keeps: the types a device can do, autocast, and gradient checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from qftlab.train.config import TrainConfig

log = logging.getLogger(__name__)


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device computes in bf16 by itself; a T4 only imitates it, slower than fp32."""
    is_cuda = torch.device(device).type == "cuda"
    return not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)


def training_dtype(name: str, device: torch.device | str) -> str:
    """The type that weights are loaded in to be trained on a device.

    Args:
        name: "float32", "bfloat16", "float16" or "auto", as asked.
        device: where they go.

    Returns:
        The same, or "float32" where that would go wrong (the log says why): float16 has too small a range (Qwen2's
        activations can overflow to nan, and small gradients vanish), and a GPU without bf16 only imitates it.
    """
    if name == "float16":
        log.warning("float16 is loaded as float32: Qwen2 can overflow in it, and small gradients vanish")
    elif name in ("bfloat16", "auto") and not has_bf16(device):
        log.warning("%s is loaded as float32: %s has no bf16 of its own", name, torch.cuda.get_device_name(device))
    else:
        return name
    return "float32"


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass: bf16 where the configuration asks for it and the device has it."""
    if config.precision != "autocast":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


@contextmanager
def prepared(step: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing and compilation inside, and the step as it was outside.

    Raises:
        ValueError: if the weights are float16, or the step holds no model that can checkpoint.
    """
    half = [name for name, p in step.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(f'trained weights must be float32 or bfloat16, got float16 ({half[0]}): dtype="float32"')
    device = next(step.parameters()).device
    if config.precision == "autocast" and not has_bf16(device):
        log.warning("autocast is off: %s has no bf16 of its own, fp32 it is", torch.cuda.get_device_name(device))
    model = next((m for m in step.modules() if hasattr(m, "gradient_checkpointing_enable")), None)
    if config.gradient_checkpointing and model is None:
        raise ValueError("gradient_checkpointing must be off, got a step without a transformers model")
    was_on = model is not None and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if config.gradient_checkpointing and not was_on:
        # The reentrant form needs inputs that require gradients, which a frozen embedding does not give.
        _switch(model, "enable", {"use_reentrant": False})
    if config.compile:
        step.compile(dynamic=True)  # rows differ in length from step to step
    try:
        yield
    finally:
        if config.gradient_checkpointing and not was_on:
            _switch(model, "disable")
        if config.compile:
            step._compiled_call_impl = None


def _switch(model: nn.Module, word: str, *arguments) -> None:
    """Checkpointing of a transformers model; newer releases call it activation checkpointing."""
    name = f"activation_checkpointing_{word}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{word}")(*arguments)
