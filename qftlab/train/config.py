"""The settings of training, as frozen dataclasses; neither torch nor transformers is imported, so `--help` is fast.

A notebook builds the same objects in Python that the command line builds from flags or YAML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qftlab.core.checks import check_at_least, check_choice

AGENT, EDIT = "<|AGENT|>", "<|EDIT|>"


@dataclass(frozen=True)
class TrainConfig:
    """How the one loop trains, whatever the stage.

    Args:
        lr: peak learning rate, reached when the warm-up ends.
        epochs: times every row is seen; may be a fraction.
        max_steps: optimizer steps; where given, `epochs` is ignored.
        batch_size: rows in one optimizer step.
        micro_batch_size: rows in one forward pass, all of the step's where None; it changes memory, not the result.
        packing: rows one after the other without padding; false pads them to the longest.
        warmup_ratio: share of the steps in which the rate rises from near 0.
        schedule: what the rate does after the warm-up (cosine and linear fall to 0).
        weight_decay: AdamW's, on matrices only: not on norms, biases or embeddings.
        beta1: AdamW's memory of the gradient.
        beta2: AdamW's memory of its square.
        max_grad_norm: gradients longer than this are shortened to it; 0 leaves them.
        seed: of the order of the rows and of dropout.
        log_every: optimizer steps between two lines of the log; metrics.jsonl has every step.
        eval_every: optimizer steps between two held-out losses; 0 takes them at start and end only.

    Raises:
        ValueError: for a value out of range.
    """

    lr: float = 1e-3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    packing: bool = True
    warmup_ratio: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, max_steps=self.max_steps, batch_size=self.batch_size, log_every=self.log_every,
                       micro_batch_size=self.micro_batch_size)  # fmt: skip
        check_at_least(0, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm, seed=self.seed,
                       eval_every=self.eval_every)  # fmt: skip
        check_choice(("cosine", "linear", "constant"), schedule=self.schedule)
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a model on files of rows.

    Args:
        model: `tiny`, a folder, or a name on the Hugging Face hub.
        data: training rows, one file or [several]: alpaca JSON, JSONL or CSV with instruction, input and output.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens a row may have; longer rows are left out and counted; None is the model's context.
        train_on: `all` assistant turns of a conversation, or only the `last`.
        held_out: rows never trained on, whose loss is measured (see train.eval_every).
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        train: the settings of the loop.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    data: tuple[str, ...] | str = ()
    output: str = "runs/sft"
    new_tokens: tuple[str, ...] = (AGENT, EDIT)
    max_length: int | None = None
    train_on: Literal["all", "last"] = "all"
    held_out: tuple[str, ...] | str = ()
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_at_least(2, max_length=self.max_length)
        check_choice(("all", "last"), train_on=self.train_on)
        check_choice(("float32", "bfloat16", "float16", "auto"), dtype=self.dtype)
        for name in ("data", "held_out"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "new_tokens", tuple(self.new_tokens))
        if not self.data:
            raise ValueError("data must name at least one file of rows, got none: --data rows.jsonl")
