"""The settings of training, as frozen dataclasses; neither torch nor transformers is imported, so `--help` is fast.

A notebook builds the same objects in Python that the command line builds from flags or YAML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qftlab.model.config import LoRAConfig
from qftlab.settings import check_at_least, check_choice

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
        tokens_per_micro_batch: tokens of one forward pass, in place of micro_batch_size: rows are fitted into it
            (first-fit-decreasing when packing, grouped by length when padding); it changes memory, not the result.
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
        patience: held-out losses in a row without a new lowest one after which the run stops; 0 never stops early.
        save_every: optimizer steps between checkpoints, where checkpoints are kept; 0 saves at Ctrl-C only.
        keep: checkpoints kept, the newest ones; the one of the lowest held-out loss is kept besides.
        precision: `weights` computes in the type the weights have; `autocast` in bf16 with fp32 weights, gradients and
            optimizer; `master` in bf16 weights, while the optimizer moves fp32 copies of them.
        gradient_checkpointing: computes activations a second time in the backward pass in place of keeping them.
        compile: compiles the step with torch.compile: a slow start, then faster steps on a GPU.
        sharding: what several processes do (torchrun, accelerate launch): `ddp` keeps the model whole in each, through
            accelerate; `fsdp` splits weights, gradients and optimizer among them. One process ignores it.

    Raises:
        ValueError: for a value out of range.
    """

    lr: float = 1e-3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    tokens_per_micro_batch: int | None = None
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
    patience: int = 0
    save_every: int = 500
    keep: int = 2
    precision: Literal["weights", "autocast", "master"] = "weights"
    gradient_checkpointing: bool = False
    compile: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        check_at_least(1, max_steps=self.max_steps, batch_size=self.batch_size, log_every=self.log_every,
                       micro_batch_size=self.micro_batch_size, keep=self.keep)  # fmt: skip
        check_at_least(0, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm, seed=self.seed,
                       eval_every=self.eval_every, patience=self.patience, save_every=self.save_every)  # fmt: skip
        check_at_least(2, tokens_per_micro_batch=self.tokens_per_micro_batch)
        check_choice(("cosine", "linear", "constant"), schedule=self.schedule)
        check_choice(("weights", "autocast", "master"), precision=self.precision)
        check_choice(("ddp", "fsdp"), sharding=self.sharding)
        if self.tokens_per_micro_batch and self.micro_batch_size:
            raise ValueError(
                f"tokens_per_micro_batch must be alone, got {self.tokens_per_micro_batch} beside micro_batch_size "
                f"{self.micro_batch_size}: leave one of them out"
            )
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
        data: training rows, one file or [several]: alpaca JSON, JSONL or CSV with instruction, input and output;
            conversations; folders in the hub's format and names on the hub.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens a row may have; longer rows are left out and counted; None is the model's context.
        train_on: `all` assistant turns of a conversation, or only the `last`.
        held_out: rows never trained on, whose loss is measured (see train.eval_every).
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        resume: a run folder, or `last` for the newest in `output`, that goes on from its last checkpoint with the
            settings it began with; those given beside it must be the same.
        quant: of the frozen weights, by bitsandbytes; needs adapters and a GPU.
        lora: adapters trained in place of the weights; lora.rank 0 trains the weights themselves.
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
    resume: str | None = None
    quant: Literal["none", "8bit", "4bit"] = "none"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_choice(("all", "last"), train_on=self.train_on)
        check_run(self)
        check_data(self, "rows")


def check_run(config) -> None:
    """What the settings of every kind of run share: max_length, dtype, quant, data, held_out, new_tokens.

    Names given as one text become a tuple, in place.

    Raises:
        ValueError: for a value out of range.
    """
    check_at_least(2, max_length=config.max_length)
    check_choice(("float32", "bfloat16", "float16", "auto"), dtype=config.dtype)
    check_choice(("none", "8bit", "4bit"), quant=config.quant)
    if config.quant != "none" and not config.lora.rank:
        raise ValueError(f"quant must be none without adapters, got {config.quant}: --lora.rank 16")
    for name in ("data", "held_out"):
        value = getattr(config, name)
        object.__setattr__(config, name, (value,) if isinstance(value, str) else tuple(value))
    object.__setattr__(config, "new_tokens", tuple(config.new_tokens))


def check_data(config, kind: str) -> None:
    """Refuses a run without data; `kind` names what its files hold.

    Raises:
        ValueError: if no file is named.
    """
    if not config.data:
        raise ValueError(
            f"data must name at least one file of {kind}, got none: --data {kind}.jsonl (--resume without --config "
            "takes the settings that the run began with)"
        )
