"""A server of the OpenAI protocol: rows join a running batch, and a chat page shows what the model thought likely."""

from __future__ import annotations

from dataclasses import dataclass

from qftlab.settings import Dtype, Thinking, check_at_least, check_fields


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
