"""The models a notebook can be run with: what its cell `PRESET` says, and the recipe that suits each."""

from __future__ import annotations

from dataclasses import dataclass

from qftlab.settings import LoRAConfig


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
        lora: adapters trained in place of the weights; rank 0 where the weights themselves are.
        note: the hardware it is meant for.
    """

    name: str
    model: str
    data: tuple[str, ...]
    batch_size: int
    epochs: float
    lr: float
    dtype: str
    lora: LoRAConfig
    note: str


SFT_DATA = ("instructions/train.jsonl", "countdown/demonstrations.jsonl", "bugfix/train.jsonl")
PRESETS = {
    p.name: p
    for p in (
        Preset("tiny", "tiny", SFT_DATA, 24, 1.0, 5e-4, "float32", LoRAConfig(), "two CPU cores"),
        Preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", SFT_DATA, 32, 1.0, 1e-5, "float32", LoRAConfig(), "a T4 or better"),
        Preset("qwen3-8b", "Qwen/Qwen3-8B", SFT_DATA, 32, 1.0, 1e-4, "bfloat16", LoRAConfig(16), "one 80 GB GPU"),
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
