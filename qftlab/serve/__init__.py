"""Handing a model over: one folder with its card, other formats, and a server of the OpenAI protocol."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qftlab.settings import Dtype, Names, Thinking, check_at_least, check_fields


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


@dataclass(frozen=True)
class ServeConfig:
    """Answers clients of the OpenAI protocol, and a browser. QFTLAB_API_KEY in the environment is the key to ask for.

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        name: what clients call it; by default the last part of `model`.
        host: the address to listen on; 127.0.0.1 is heard on this machine only.
        port: 0 takes a free one.
        max_batch: answers written at once.
        max_queue: answers that may wait; more are refused with 429.
        max_new_tokens: of a chat's answer whose request does not say.
        cache_tokens: tokens that the batch may hold, prompts included; what does not fit waits.
        thinking: `on` or `off`, where the chat template can be asked for it (Qwen3); `auto` leaves it to the template.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        base: of a model that is a folder of adapters: where their base is now, if it has moved.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 32
    max_queue: int = 256
    max_new_tokens: int = 1024
    cache_tokens: int = 262_144
    thinking: Thinking = "auto"
    dtype: Dtype = "float32"
    device: str = "auto"
    base: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(0, port=self.port)
        counts = ("max_batch", "max_queue", "max_new_tokens", "cache_tokens")
        check_at_least(1, **{name: getattr(self, name) for name in counts})
