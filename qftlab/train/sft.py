"""Supervised fine-tuning: rows → chats → tokens and masks → the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from qftlab.model.head import context_length
from qftlab.rows.batches import Example, batches, group_by_length, pack, pad, split_step
from qftlab.rows.examples import encode_rows
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, training_identity
from qftlab.train.distributed import per_process, wrap
from qftlab.train.loop import TrainResult, checkpoints_at, train
from qftlab.train.optimizer import MicroBatch
from qftlab.train.run import RunFolder, Stage, read_examples, run_stage
from qftlab.train.step import Step, no_grad_loss


class ExampleSource:
    """Micro-batches of fixed examples: a pure function of (seed, epoch, step).

    Args:
        examples: what is trained on.
        config: batch sizes, packing and seed.
    """

    def __init__(self, examples: Sequence[Example], config: TrainConfig) -> None:
        self.examples, self.config = examples, config
        self.steps_per_epoch = -(-len(examples) // config.batch_size)
        self._order: tuple[int, list[list[int]]] = (-1, [])  # the last epoch asked for, to shuffle once an epoch

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step."""
        if self._order[0] != epoch:
            size, seed = self.config.batch_size, self.config.seed
            self._order = epoch, batches(len(self.examples), batch_size=size, seed=seed, epoch=epoch)
        return self.split(self._order[1][step])

    def split(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """Examples by number, as micro-batches within `micro_batch_size` rows or `tokens_per_micro_batch` tokens."""
        groups = split_step([len(self.examples[i]) for i in numbers], self.config)
        parts = [[numbers[i] for i in group] for group in groups]
        return [MicroBatch(self._collate([self.examples[i] for i in part]), tuple(part)) for part in parts]

    def _collate(self, examples: list[Example]) -> dict[str, Tensor]:
        return pack(examples) if self.config.packing else pad(examples, 0)


def held_out_loss(step: torch.nn.Module, examples: Sequence[Example], config: TrainConfig) -> Callable[[], float]:
    """A function that measures the loss (nats a trained token) on these examples, a step's rows at a time."""
    source = ExampleSource(examples, config)
    size = config.micro_batch_size or config.batch_size
    parts = group_by_length([len(example) for example in examples], rows=size)
    return lambda: no_grad_loss(step, [m.tensors for part in parts for m in source.split(part)])


def fit_examples(
    model,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    held_out: Sequence[Example] = (),
    checkpoints: Checkpoints | str | Path | None = None,
    **options,
) -> TrainResult:
    """Fine-tunes `model` in place on examples. Arguments as in `fit_rows`; raises what `train` raises."""
    checkpoints = checkpoints_at(checkpoints, config, training_identity, model, config, examples, held_out)
    step = wrap(Step(model), config.sharding, config.precision)
    measure = held_out_loss(step, held_out, config) if held_out else None
    source = ExampleSource(examples, per_process(config))
    return train(step, source, config, held_out=measure, checkpoints=checkpoints, **options)


def fit_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    config: TrainConfig,
    *,
    max_length: int | None = None,
    train_on: str = "all",
    thinking: bool | None = None,
    held_out_rows: Sequence[dict] = (),
    **options,
) -> TrainResult:
    """Fine-tunes `model` in place on rows: what a notebook calls.

    Args:
        model: a causal transformers model, or one wrapped by peft; its trainable parameters move.
        tokenizer: its tokenizer, with a chat template.
        rows: alpaca rows, or rows with "messages".
        config: the settings of the loop.
        max_length: the most tokens a row may have, by default the model's context; longer ones are left out.
        train_on: "all" assistant turns or the "last".
        thinking: what prompts will be asked with, as in `render_chat`.
        held_out_rows: rows whose loss is measured.
        options: `on_log`, which gets every step's metrics; `progress`, whether to draw a bar; `checkpoints`, a folder
            for them (see `train`), without which nothing is saved; `resume`, whether to go on from the last of them, if
            there is one: the weights of `model` are then replaced.

    Raises:
        ValueError: if no row can be trained on, or a checkpoint is damaged or of another run.
        NonFiniteLoss: if the loss is no number; rows are then counted from 0 among those kept.
        OSError: if a checkpoint cannot be written.
    """
    how = {"max_length": max_length or context_length(model), "train_on": train_on, "thinking": thinking}
    examples, _ = encode_rows(tokenizer, rows, **how)
    held_out = encode_rows(tokenizer, held_out_rows, **how)[0] if held_out_rows else ()
    return fit_examples(model, examples, config, held_out=held_out, **options)


def sft(config: SFTConfig, *, progress: bool = False) -> Path:
    """Fine-tunes from files to files; the same under torchrun and `accelerate launch`, where one process writes.

    Args:
        config: model, data and settings; `resume` goes on with a run that was killed or interrupted.
        progress: whether to draw a bar.

    Returns:
        The run's folder: model/ (weights as safetensors, tokenizer), config.json, metrics.jsonl, curves.png,
        token_usage.json and, unless `save_every` is 0, checkpoints/: `initial` (the model before the first step), `sft`
        (states to resume from: weights, optimizer and counts) and `final` (a link to model/).

    Raises:
        FileNotFoundError: for a file that is not there, or nothing to resume.
        ValueError: for rows that cannot be read or trained on, and where the run to resume had other settings or data.
        NonFiniteLoss: if the loss is no number; the folder then keeps the metrics up to there, without a model.
        OSError: if a checkpoint cannot be written; those before it are intact.
    """
    return run_stage("sft", config, prepare, progress)


def prepare(config: SFTConfig) -> Stage:
    """Reads rows and model, and makes examples of them."""
    model, tokenizer, examples, held_out, usage = read_examples(config, "sft", encode_rows, train_on=config.train_on)

    def fit(run: RunFolder, **options) -> TrainResult:
        result = fit_examples(model, examples, config.train, held_out=held_out, **options)
        run.write_json("token_usage.json", {**asdict(usage), "tokens_seen": result.tokens,
                                            "trained_tokens_seen": result.trained_tokens})  # fmt: skip
        return result

    return Stage(model, tokenizer, training_identity(model, config.train, examples, held_out), fit)
