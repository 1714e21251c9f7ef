"""The settings of preference training, as frozen dataclasses; torch is not imported, so `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qftlab.model.config import LoRAConfig
from qftlab.settings import check_at_least, check_choice
from qftlab.train.config import TrainConfig, check_data, check_run


@dataclass(frozen=True)
class PreferenceLoss:
    """What DPO minimises; see `qftlab.maths.losses.dpo_loss`.

    Args:
        beta: how strongly the policy is held to the reference; smaller lets it go further.
        loss_type: `sigmoid` (DPO, on sums of token log-probabilities) or `ipo` (on their means).
        label_smoothing: the share of pairs taken to be labelled the wrong way round; sigmoid only.
        nll_weight: of the chosen answers' mean surprise, added to the loss: it keeps them likely.
        reference: `start` is the model before its first step, `base` the model without its adapters, `none` no
            reference at all.

    Raises:
        ValueError: for a value out of range.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    reference: Literal["start", "base", "none"] = "start"

    def __post_init__(self) -> None:
        check_choice(("sigmoid", "ipo"), loss_type=self.loss_type)
        check_choice(("start", "base", "none"), reference=self.reference)
        check_at_least(0, nll_weight=self.nll_weight)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss_type == "ipo"):
            raise ValueError(
                f"label_smoothing must be in [0, 0.5), and 0 with ipo, got {self.label_smoothing} ({self.loss_type})"
            )


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation of a model on files of pairs.

    Args:
        model: `tiny`, a folder (such as runs/sft/latest), or a name on the Hugging Face hub.
        data: pairs, one source or [several]: JSON, JSONL, CSV or parquet with prompt, chosen and rejected, as texts or
            messages; UltraFeedback and other hub names.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens prompt and answer may have; longer pairs are left out and counted; None is the
            model's context.
        held_out: pairs never trained on, whose loss and preference accuracy are measured (see train.eval_every).
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        resume: a run folder, or `last` for the newest in `output`, that goes on from its last checkpoint with the
            settings it began with; those given beside it must be the same.
        quant: of the frozen weights, by bitsandbytes; needs adapters and a GPU.
        lora: adapters trained in place of the weights; lora.rank 0 trains the weights themselves.
        loss: what is minimised.
        train: the settings of the loop; its batch counts pairs, its losses are per pair. Half a billion weights and
            more want rates from 5e-7 to 5e-6.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    data: tuple[str, ...] | str = ()
    output: str = "runs/dpo"
    new_tokens: tuple[str, ...] = ()
    max_length: int | None = None
    held_out: tuple[str, ...] | str = ()
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"
    resume: str | None = None
    quant: Literal["none", "8bit", "4bit"] = "none"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=3e-5, batch_size=32))

    def __post_init__(self) -> None:
        check_run(self)
        check_data(self, "pairs")
