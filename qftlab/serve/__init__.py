"""Handing a model over: one folder with its card, other formats, and a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qftlab.settings import Dtype, Names, check_fields


@dataclass(frozen=True)
class ExportConfig:
    """A trained model, adapters merged, as one folder that transformers and vLLM load, with a card.

    Args:
        model: a run folder such as `runs/sft/latest`, a folder, or a name on the Hugging Face hub.
        output: the folder to write; it must not exist, or be empty.
        base: the model it was made from, for its card, and where adapters find it, if it has moved.
        data: what else it was trained on, for its card, which names what its runs recorded.
        dtype: of the weights; `auto` is what the run trained in, or else their own.
        device: `auto` is the GPU where there is one.
        check: what is compared with the model in memory, greedy tokens and logits: `quick` on one or two texts, `full`
            on three and more, `none` nothing.
        gguf: a model.gguf beside them, for llama.cpp and Ollama: `f32`, `f16`, `bf16` or `q8_0`.
        evaluation: a folder that `evaluate --output` wrote of this model, whose scores go on the card.
        push_to: owner/name on the hub to upload the folder to, with the token in HF_TOKEN.
        private: whether that shall be private.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "runs/sft/latest"
    output: str = "exported"
    base: str = ""
    data: Names = ()
    dtype: Dtype = "auto"
    device: str = "auto"
    check: Literal["none", "quick", "full"] = "quick"
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0"] = "none"
    evaluation: str = ""
    push_to: str = ""
    private: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.push_to and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            raise ValueError(f"push_to must be owner/name, got {self.push_to!r}")
