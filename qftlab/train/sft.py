"""Supervised fine-tuning: rows → chats → tokens and masks → the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from qftlab.decoding.engine import known_id
from qftlab.model.head import causal_model
from qftlab.model.loading import extend_model, load_model, save_model
from qftlab.rows.batches import (
    Example,
    batches,
    first_fit_decreasing,
    group_by_length,
    pack,
    pad,
)
from qftlab.rows.examples import encode_rows
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, step_of, training_identity
from qftlab.train.distributed import World, processes, training_dtype, unsharded, wrap
from qftlab.train.loop import MicroBatch, TrainResult, train
from qftlab.train.run import RunFolder, resolve_model
from qftlab.train.step import Step, no_grad_loss


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
        """Examples by number, as micro-batches within `micro_batch_size` rows or `tokens_per_micro_batch` tokens."""
        rows, budget = self.config.micro_batch_size, self.config.tokens_per_micro_batch
        lengths = [len(self.examples[i].input_ids) for i in numbers]
        if not self.config.packing:
            groups = group_by_length(lengths, budget=budget, rows=rows)
        elif budget is not None:
            groups = first_fit_decreasing(lengths, budget)
        else:
            size = rows or len(numbers)
            groups = [list(range(i, min(i + size, len(numbers)))) for i in range(0, len(numbers), size)]
        parts = [[numbers[i] for i in group] for group in groups]
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
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
) -> TrainResult:
    """Fine-tunes `model` in place on examples. Arguments as in `fit_rows`; raises what `train` raises."""
    if isinstance(checkpoints, str | Path):
        identity = training_identity(model, config, examples, held_out)
        checkpoints = Checkpoints(checkpoints, identity, config.keep)
    step, world = wrap(Step(model), config.sharding, config.precision), World.current()
    measure = held_out_loss(step, held_out, config) if held_out else None
    split = config
    if world.size > 1 and not (config.micro_batch_size or config.tokens_per_micro_batch):
        split = replace(config, micro_batch_size=-(-config.batch_size // world.size))
    return train(step, ExampleSource(examples, split), config, held_out=measure, on_log=on_log, progress=progress,
                 checkpoints=checkpoints, resume=resume)  # fmt: skip


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
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
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
        checkpoints: a folder for checkpoints (see `train`); without one nothing is saved.
        resume: whether to go on from the last of them, if there is one; the weights of `model` are then replaced.

    Raises:
        ValueError: if no row can be trained on, or a checkpoint is damaged or of another run.
        NonFiniteLoss: if the loss is no number; rows are then counted from 0 among those kept.
        OSError: if a checkpoint cannot be written.
    """
    limit = max_length or context_length(model)
    examples, _ = encode_rows(tokenizer, rows, max_length=limit, train_on=train_on)
    held_out = encode_rows(tokenizer, held_out_rows, max_length=limit, train_on=train_on)[0] if held_out_rows else ()
    return fit_examples(model, examples, config, held_out=held_out, on_log=on_log, progress=progress,
                        checkpoints=checkpoints, resume=resume)  # fmt: skip


def context_length(model) -> int | None:
    """Tokens the model can attend to at once, if its configuration says so."""
    return getattr(causal_model(model).config, "max_position_embeddings", None)


def sft(config: SFTConfig, *, progress: bool = False) -> Path:
    """Fine-tunes from files to files; the same under torchrun and `accelerate launch`, where one process writes.

    Args:
        config: model, data and settings; `resume` goes on with a run that was killed or interrupted.
        progress: whether to draw a bar.

    Returns:
        The run's folder: model/ (weights as safetensors, tokenizer), config.json, metrics.jsonl, curves.png,
        token_usage.json and, unless `save_every` is 0, checkpoints/: `initial` (the model before the first step), `sft`
        (states to resume from: weights, optimizer and counts) and `final` (a link to model/). After Ctrl-C as well,
        with the weights so far.

    Raises:
        FileNotFoundError: for a file that is not there, or nothing to resume.
        ValueError: for rows that cannot be read or trained on, and where the run to resume had other settings or data.
        NonFiniteLoss: if the loss is no number; the folder then keeps the metrics up to there, without a model.
        OSError: if a checkpoint cannot be written; those before it are intact.
    """
    with processes(best_device(config.device)) as device:
        return _sft(replace(config, device=device), progress)


def _sft(config: SFTConfig, progress: bool) -> Path:
    rows = load_rows(list(config.data))
    held_out_rows = load_rows(list(config.held_out)) if config.held_out else []
    model, tokenizer = load_extended(config)
    limit = config.max_length or context_length(model)
    examples, usage = encode_rows(tokenizer, rows, max_length=limit, train_on=config.train_on)
    held_out = (
        encode_rows(tokenizer, held_out_rows, max_length=limit, train_on=config.train_on)[0] if held_out_rows else ()
    )
    run = open_run(config)
    identity = sft_identity(config) | training_identity(model, config.train, examples, held_out)
    checkpoints = Checkpoints(run.checkpoints / "sft", identity, config.train.keep)
    begin(run, checkpoints, config, model, tokenizer)
    result = fit_examples(model, examples, config.train, held_out=held_out, on_log=run.log, progress=progress,
                          checkpoints=checkpoints, resume=bool(config.resume))  # fmt: skip
    model = unsharded(model, lambda: load_extended(replace(config, device="cpu"))[0])
    run.write_json("token_usage.json", {**asdict(usage), "tokens_seen": result.tokens,
                                        "trained_tokens_seen": result.trained_tokens})  # fmt: skip
    run.put_model(run.model_path, lambda folder: save_model(model, tokenizer, folder))
    run.finish(result.losses, result.held_out)
    return run.path


def open_run(config: SFTConfig) -> RunFolder:
    """The folder of a new run, or of the one to resume; all processes get the same, and the first writes."""
    world, run = World.current(), None
    if world.is_main:
        run = RunFolder(config.output, config, [*config.data, *config.held_out], resume=config.resume)
    path = world.gather(run.path if run else None)[0]
    return run or RunFolder.reader(path)


def begin(run: RunFolder, checkpoints: Checkpoints, config: SFTConfig, model, tokenizer) -> None:
    """Saves the model before its first step, as `initial` beside the checkpoints, or goes back to the last of them.

    Args:
        run: its metrics are taken back to the last checkpoint where the run is resumed.
        checkpoints: of the stage.
        config: of any stage.
        model: as it is before the first step.
        tokenizer: saved with it.

    Raises:
        ValueError: if the last checkpoint is damaged or of another run.
    """
    last = checkpoints.last()
    if last:
        checkpoints.check(last)
    if config.resume:
        run.rewind(step_of(last) if last else -1)
    if config.train.save_every and not last:
        run.put_model(run.checkpoints / "initial", lambda folder: save_model(model, tokenizer, folder))


def sft_identity(config: SFTConfig) -> dict:
    """The settings of a run that a resumed one must share, those of the loop aside; data count by their documents."""
    free = ("data", "held_out", "output", "device", "resume", "train")
    return {name: value for name, value in asdict(config).items() if name not in free}


def load_extended(config: SFTConfig) -> tuple:
    """Model and tokenizer of a configuration, with its new tokens added to both, and adapters if it asks for them."""
    name = resolve_model(config.model)
    device = best_device(config.device)
    dtype = training_dtype(config.dtype, device)
    model, tokenizer = load_model(name, dtype=dtype, device=device, quant=config.quant), load_tokenizer(name)
    tokens = []
    if config.new_tokens:
        report = extend_tokenizer(tokenizer, config.new_tokens)
        extend_model(model, tokenizer, report)
        tokens = [token.id for token in report.tokens]
    for text in config.lora.tokens:
        if (number := known_id(tokenizer, text)) is None:
            raise ValueError(f"lora.tokens must be tokens of the tokenizer, got {text!r}: --new_tokens adds one")
        tokens = sorted({*tokens, number})
    if config.lora.rank:
        from qftlab.model.lora import add_adapters

        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)  # the same in every process
            model = add_adapters(model, config.lora, token_ids=tokens)
    return model, tokenizer


def best_device(name: str = "auto") -> str:
    """The device that `auto` means here: the GPU where there is one; any other name as it is.

    Raises:
        ValueError: for a device that torch does not know or does not find.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch finds here, got {name!r}: {reason}") from None
    return name
