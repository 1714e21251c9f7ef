"""The settings of `generate` and `chat` on the command line; torch is not imported, so `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qftlab.settings import check_at_least, check_choice

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen: the fields of `core.sampling.SamplingParams`, which checks them; greedy by default.

    Args:
        temperature: 0 always takes the likeliest token, 1 samples from the model as it is.
        top_k: sample among so many likeliest tokens only; 0 is off.
        top_p: sample among the likeliest tokens that make up this probability; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest; 0 is off.
        repetition_penalty: above 1, tokens that already stand there become less likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class GenerateConfig:
    """Answers one prompt, or every line of standard input.

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        prompt: what to ask; without it, each line of standard input is a prompt.
        raw: continue the text as it is, without a chat around it: the way to use a base model.
        max_new_tokens: the most tokens an answer may have.
        num_generations: answers to each prompt.
        stop: texts that end an answer, as [first,second].
        format: `text`, or `jsonl` with one object an answer.
        seed: of the sampling.
        batch_size: answers written at once.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        sampling: how tokens are chosen.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    prompt: str = ""
    raw: bool = False
    max_new_tokens: int = 128
    num_generations: int = 1
    stop: tuple[str, ...] | str = ()
    format: Literal["text", "jsonl"] = "text"
    seed: int = 0
    batch_size: int = 64
    dtype: Dtype = "float32"
    device: str = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_at_least(1, max_new_tokens=self.max_new_tokens, num_generations=self.num_generations)
        check_at_least(1, batch_size=self.batch_size)
        check_choice(("text", "jsonl"), format=self.format)


@dataclass(frozen=True)
class ChatConfig:
    """A conversation; the model sees all of it. /new begins another, /quit ends (so does Ctrl-D).

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        system: instructions that stand before the conversation.
        max_new_tokens: the most tokens an answer may have.
        seed: of the sampling.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        sampling: how tokens are chosen.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    system: str = ""
    max_new_tokens: int = 128
    seed: int = 0
    dtype: Dtype = "float32"
    device: str = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_at_least(1, max_new_tokens=self.max_new_tokens)
