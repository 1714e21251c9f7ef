"""Models: loading and saving them, and the presets that scale a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qftlab.core.files import resolve
from qftlab.model.attention import NAME as PACKED
from qftlab.model.attention import register_packed_attention
from qftlab.text.tokenizer import not_loadable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
ATTENTIONS = (PACKED, "sdpa", "eager")


def load_model(
    name_or_path: str | Path, *, dtype: str = "float32", device: str = "cpu", attention: str = PACKED
) -> PreTrainedModel:
    """Loads a causal language model from safetensors, without running any code of its repository.

    Args:
        name_or_path: "tiny", the folder of a saved model, or a name on the hub.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
        device: where the weights go, such as "cpu" or "cuda".
        attention: "packed" (trains packed batches, otherwise as "sdpa"), "sdpa" or "eager".

    Raises:
        ValueError: for an unknown dtype or attention.
        FileNotFoundError: if the folder is not there or lacks config.json or whole safetensors weights, or the hub
            does not give the name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    source = resolve(name_or_path)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: is it the model's folder?")
    implementation = register_packed_attention() if attention == PACKED else attention
    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=DTYPES[dtype],
                attn_implementation=implementation,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, SafetensorError) as error:
        raise not_loadable(source, error) from error
    return model.to(device).eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Writes weights (safetensors), config and tokenizer to `folder`, as transformers and vLLM load them."""
    folder = Path(folder)
    with _without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silences transformers' progress bars, which go to stderr and into notebooks, and gives them back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class Preset:
    """A model and the recipe that suits it.

    Args:
        name: what a notebook's `PRESET` cell says.
        model: for `load_model`.
        data: bundled files SFT trains on, relative to `data/`.
        batch_size: rows in an optimizer step.
        epochs: passes over the rows.
        lr: peak learning rate of SFT.
        dtype: of the weights.
        lora: whether adapters are trained in place of the weights.
        note: the hardware it is meant for.
    """

    name: str
    model: str
    data: tuple[str, ...]
    batch_size: int
    epochs: float
    lr: float
    dtype: str
    lora: bool
    note: str


SFT_DATA = ("instructions/train.jsonl", "countdown/demonstrations.jsonl", "bugfix/train.jsonl")
PRESETS = {
    p.name: p
    for p in (
        Preset("tiny", "tiny", SFT_DATA, 24, 1.0, 5e-4, "float32", False, "two CPU cores"),
        Preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", SFT_DATA, 32, 1.0, 1e-5, "float32", False, "one T4 or better"),
        Preset("qwen3-8b", "Qwen/Qwen3-8B", SFT_DATA, 32, 1.0, 1e-4, "bfloat16", True, "one 80 GB GPU, LoRA"),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
