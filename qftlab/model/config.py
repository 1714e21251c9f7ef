"""The settings of adapters; torch is not imported, so `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qftlab.settings import check_at_least, check_choice


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of the weights: W + (alpha / rank) · B A, with A (rank, D_in) and B (D_out, rank).

    Args:
        rank: of the update of each matrix; 0 is without adapters, the weights themselves are trained.
        alpha: the update is scaled by alpha / rank, so that a good learning rate depends little on the rank.
        dropout: share of an adapter's inputs set to 0 in training.
        targets: the matrices of each block that get one: `all`, or those of `attention` or `mlp` only.
        tokens: besides new ones, the tokens whose rows are trained, such as [<|im_start|>,<|im_end|>] where the base
            has never seen a chat, as `tiny` has not: without them a low rank hardly learns to end a turn.

    Raises:
        ValueError: for a value out of range.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all", "attention", "mlp"] = "all"
    tokens: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", (self.tokens,) if isinstance(self.tokens, str) else tuple(self.tokens))
        check_at_least(0, rank=self.rank)
        check_choice(("all", "attention", "mlp"), targets=self.targets)
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class ExportConfig:
    """A trained model, adapters merged, as one folder that transformers and vLLM load.

    Args:
        model: a run folder such as `runs/sft/latest`, a folder, or a name on the Hugging Face hub.
        output: the folder to write; it must not exist, or be empty.
        base: the model it was made from, for its card.
        data: what it was trained on, for its card.
        dtype: of the weights; `auto` is what the run trained in, or else their own.
        device: `auto` is the GPU where there is one.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "runs/sft/latest"
    output: str = "exported"
    base: str = ""
    data: tuple[str, ...] | str = ()
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice(("float32", "bfloat16", "float16", "auto"), dtype=self.dtype)
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(self.data))
