"""Supervised fine-tuning: rows → chats → tokens and masks → the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qftlab.data.batching import Example, batches, count_trained, pack, pad
from qftlab.data.sources import load_rows
from qftlab.model.loading import load_model, save_model
from qftlab.model.vocabulary import extend_model
from qftlab.text.chat import render_chat, row_to_messages
from qftlab.text.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.train.config import SFTConfig, TrainConfig
from qftlab.train.loop import MicroBatch, TrainResult, train
from qftlab.train.runs import RunFolder, resolve_model
from qftlab.train.step import Step, causal_model, no_grad_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenUsage:
    """What became of the rows. Row numbers are 1-based; lengths are in tokens, of the documents that are kept."""

    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    longest: int
    mean_length: float
    median_length: int
    p95_length: int
    without_trained_token: tuple[int, ...]
    too_long: tuple[int, ...]
    max_length: int | None

    def summary(self) -> str:
        """One line for a log."""
        left_out = "".join(
            f"; {len(numbers)} left out: {why} (row {', '.join(map(str, numbers[:5]))}{', …' if numbers[5:] else ''})"
            for numbers, why in (
                (self.without_trained_token, "the assistant says nothing in them (an empty output?)"),
                (self.too_long, f"longer than {self.max_length} tokens"),
            )
            if numbers
        )
        return (
            f"{self.rows} rows read, {self.documents} documents kept, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained, {self.median_length} tokens in the median row{left_out}"
        )


def encode_rows(
    tokenizer, rows: Sequence[dict], *, max_length: int | None = None, train_on: str = "all"
) -> tuple[list[Example], TokenUsage]:
    """Rows as examples by the loss-mask contract; rows that cannot be trained on are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: alpaca rows, or rows with "messages".
        max_length: the most tokens an example may have; longer ones are left out, never cut.
        train_on: "all" assistant turns or the "last".

    Raises:
        ValueError: if a row cannot be rendered (its number is named), or no row is left.
    """
    examples: list[Example] = []
    empty, too_long = [], []
    for number, row in enumerate(rows, 1):
        messages = row_to_messages(row)
        if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
            empty.append(number)
            continue
        try:
            rendered = render_chat(tokenizer, messages, train_on=train_on)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        for document in rendered:
            example = Example(document.input_ids, document.loss_mask)
            if max_length is not None and len(example.input_ids) > max_length:
                too_long.append(number)
            elif not count_trained([example]):
                empty.append(number)
            else:
                examples.append(example)
    usage = _usage(examples, len(rows), empty, too_long, max_length)
    if not examples:
        raise ValueError(f"rows must hold something to train on, got {usage.summary()}")
    (log.warning if empty or too_long else log.info)("%s", usage.summary())
    return examples, usage


def _usage(examples: list[Example], rows: int, empty: list[int], too_long: list[int], limit: int | None) -> TokenUsage:
    lengths = sorted(len(e.input_ids) for e in examples) or [0]
    return TokenUsage(
        rows=rows,
        documents=len(examples),
        tokens=sum(lengths),
        trained_tokens=count_trained(examples),
        longest=lengths[-1],
        mean_length=sum(lengths) / len(lengths),
        median_length=lengths[len(lengths) // 2],
        p95_length=lengths[int(0.95 * (len(lengths) - 1))],
        without_trained_token=tuple(dict.fromkeys(empty)),
        too_long=tuple(dict.fromkeys(too_long)),
        max_length=limit,
    )


class ExampleSource:
    """Micro-batches of fixed examples: a pure function of (seed, epoch, step).

    Args:
        examples: what is trained on.
        config: batch sizes, packing and seed.
        pad_id: fills padded batches; masked by length, so any id will do.
    """

    def __init__(self, examples: Sequence[Example], config: TrainConfig, pad_id: int = 0) -> None:
        self.examples, self.config, self.pad_id = examples, config, pad_id
        self.steps_per_epoch = -(-len(examples) // config.batch_size)
        self._order: tuple[int, list[list[int]]] = (-1, [])  # the last epoch asked for, to shuffle once an epoch

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step."""
        if self._order[0] != epoch:
            size, seed = self.config.batch_size, self.config.seed
            self._order = epoch, batches(len(self.examples), batch_size=size, seed=seed, epoch=epoch)
        return self.split(self._order[1][step])

    def split(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """Examples by number, as micro-batches of at most `micro_batch_size` rows."""
        size = self.config.micro_batch_size or len(numbers)
        parts = [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
        return [MicroBatch(self._collate([self.examples[i] for i in part]), tuple(part)) for part in parts]

    def _collate(self, examples: list[Example]) -> dict[str, Tensor]:
        return pack(examples) if self.config.packing else pad(examples, self.pad_id)


def held_out_loss(step: torch.nn.Module, examples: Sequence[Example], config: TrainConfig) -> Callable[[], float]:
    """A function that measures the loss (nats a trained token) on these examples, a step's rows at a time."""
    source = ExampleSource(examples, config)
    size = config.micro_batch_size or config.batch_size
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return lambda: no_grad_loss(step, [m.tensors for part in parts for m in source.split(part)])


def fit_examples(
    model,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    held_out: Sequence[Example] = (),
    on_log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> TrainResult:
    """Fine-tunes `model` in place on examples. Arguments as in `fit_rows`; raises what `train` raises."""
    step = Step(model)
    measure = held_out_loss(step, held_out, config) if held_out else None
    source = ExampleSource(examples, config)
    return train(step, source, config, held_out=measure, on_log=on_log, progress=progress)


def fit_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    config: TrainConfig,
    *,
    max_length: int | None = None,
    train_on: str = "all",
    held_out_rows: Sequence[dict] = (),
    on_log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> TrainResult:
    """Fine-tunes `model` in place on rows: what a notebook calls.

    Args:
        model: a causal transformers model, or one wrapped by peft; its trainable parameters move.
        tokenizer: its tokenizer, with a chat template.
        rows: alpaca rows, or rows with "messages".
        config: the settings of the loop.
        max_length: the most tokens a row may have, by default the model's context; longer ones are left out.
        train_on: "all" assistant turns or the "last".
        held_out_rows: rows whose loss is measured.
        on_log: gets every step's metrics.
        progress: whether to draw a bar.

    Raises:
        ValueError: if no row can be trained on.
        NonFiniteLoss: if the loss is no number; rows are then counted from 0 among those kept.
    """
    limit = max_length or context_length(model)
    examples, _ = encode_rows(tokenizer, rows, max_length=limit, train_on=train_on)
    held_out = encode_rows(tokenizer, held_out_rows, max_length=limit, train_on=train_on)[0] if held_out_rows else ()
    return fit_examples(model, examples, config, held_out=held_out, on_log=on_log, progress=progress)


def context_length(model) -> int | None:
    """Tokens the model can attend to at once, if its configuration says so."""
    return getattr(causal_model(model).config, "max_position_embeddings", None)


def sft(config: SFTConfig, *, progress: bool = False) -> Path:
    """Fine-tunes from files to files.

    Args:
        config: model, data and settings.
        progress: whether to draw a bar.

    Returns:
        The run's folder: model/ (weights as safetensors, tokenizer), config.json, metrics.jsonl, curves.png and
        token_usage.json. After Ctrl-C as well, with the weights so far.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for rows that cannot be read or trained on.
        NonFiniteLoss: if the loss is no number; the folder then keeps the metrics up to there, without a model.
    """
    rows = load_rows(list(config.data))
    held_out_rows = load_rows(list(config.held_out)) if config.held_out else []
    model, tokenizer = load_extended(config)
    limit = config.max_length or context_length(model)
    examples, usage = encode_rows(tokenizer, rows, max_length=limit, train_on=config.train_on)
    held_out = encode_rows(tokenizer, held_out_rows, max_length=limit)[0] if held_out_rows else ()
    run = RunFolder(config.output, config, [*config.data, *config.held_out])
    log.info("run folder %s", run.path)
    result = fit_examples(model, examples, config.train, held_out=held_out, on_log=run.log, progress=progress)
    run.write_json("token_usage.json", {**asdict(usage), "tokens_seen": result.tokens,
                                        "trained_tokens_seen": result.trained_tokens})  # fmt: skip
    save_model(model, tokenizer, run.model_path)
    run.finish(result.losses, result.held_out)
    return run.path


def load_extended(config: SFTConfig) -> tuple:
    """Model and tokenizer of a configuration, with its new tokens added to both."""
    name = resolve_model(config.model)
    device = best_device(config.device)
    model, tokenizer = load_model(name, dtype=config.dtype, device=device), load_tokenizer(name)
    if config.new_tokens:
        extend_model(model, tokenizer, extend_tokenizer(tokenizer, config.new_tokens))
    return model, tokenizer


def best_device(name: str = "auto") -> str:
    """The device that `auto` means here: the GPU where there is one; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
