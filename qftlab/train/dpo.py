"""Direct preference optimisation: pairs → both answers in one pass → the loss against a reference that is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qftlab.files import aside
from qftlab.maths.losses import dpo_loss, preference_accuracy, sum_by_document
from qftlab.model.head import context_length, module_mode
from qftlab.rows.batches import batches, group_by_length, pack, pad, split_step
from qftlab.rows.examples import Pair, documents, encode_pairs
from qftlab.settings import DPOConfig, PreferenceLoss, TrainConfig
from qftlab.train.checkpoint import Checkpoints, fingerprint, training_identity, weights_digest
from qftlab.train.distributed import Ranks, autocast, per_process, wrap
from qftlab.train.loop import TrainResult, checkpoints_at, train
from qftlab.train.optimizer import MicroBatch, NonFiniteLoss
from qftlab.train.run import RunFolder, Stage, read_examples, run_stage
from qftlab.train.step import IGNORED, Frozen, Step, to_device

REFERENCE = "reference.safetensors"


class Reference:
    """The model that the policy is held to, as it is when it is asked: before the policy's first step.

    Args:
        model: the policy before its first step, or another model with its tokenizer.
        which: "start" (the model as it is), "base" (its adapters off), or "none".
        config: batch sizes, packing and precision.

    Raises:
        ValueError: for "base" without adapters.
    """

    def __init__(self, model: nn.Module, which: str, config: TrainConfig) -> None:
        self.model, self.which, self.config = model, which, config
        self.frozen = Frozen(Step(model), which, moves=False)

    @cached_property
    def digest(self) -> str:
        """The start of a sha256 of its weights (with adapters, where it has some) and of what it computes in."""
        weights = {} if self.which == "none" else self.model.state_dict()
        return weights_digest(weights.items(), f"{self.which} {self.config.precision == 'autocast'}")

    def logprobs(self, pairs: Sequence[Pair], cache: Path | None = None) -> Tensor:
        """Of the chosen and rejected answers, (N, 2) fp32 in nats on the CPU; zeros for "none".

        Args:
            pairs: each process computes its share of them.
            cache: a file to read them from if it belongs to these pairs and this reference, else to write them to.
        """
        if self.which == "none":
            return torch.zeros(len(pairs), 2)
        world = Ranks.current()
        key = f"{self.digest} {fingerprint(documents(pairs))}" if cache else ""
        found = world.gather(_read(cache, key) if world.is_main else None)[0]
        if found is None:
            found = torch.zeros(len(pairs), 2)
            for share in world.gather(self._share(pairs, world)):
                for numbers, values in share:
                    found[numbers] = values
            if cache and world.is_main:
                _write(cache, key, found)
        return found

    def _share(self, pairs: Sequence[Pair], world: Ranks) -> list[tuple[list[int], Tensor]]:
        """This process's part: every `size`-th group of pairs of like length."""
        device = next(self.model.parameters()).device
        size = self.config.micro_batch_size or self.config.batch_size
        groups, share = group_by_length([pair.length for pair in pairs], rows=size)[world.rank :: world.size], []
        with autocast(self.config, device):
            for group in groups:
                examples = documents([pairs[i] for i in group])
                batch = to_device(pack(examples) if self.config.packing else pad(examples, 0), device)
                logprobs = self.frozen(batch)
                share.append((group, sum_by_document(logprobs, batch.get("cu_seq_lens_q")).view(-1, 2).float().cpu()))
        return share


def _read(path: Path | None, key: str) -> Tensor | None:
    """What the file holds, if it is whole and belongs to this key."""
    try:
        with safe_open(path or "", "pt") as file:
            return file.get_tensor("logprobs") if file.metadata() == {"key": key} else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, key: str, values: Tensor) -> None:
    with aside(path) as place:
        save_file({"logprobs": values}, place, metadata={"key": key})


class PairStep(nn.Module):
    """The preference loss of a batch of pairs, both answers in one forward pass.

    Args:
        model: as `Step` takes it.
        loss: what is minimised.

    Attributes:
        seen: of each forward pass since the last `take`, detached: pair numbers (N,) and rows of loss, margin, chosen
            and rejected log-probability (4, N).
    """

    def __init__(self, model: nn.Module, loss: PreferenceLoss) -> None:
        super().__init__()
        self.step, self.loss = Step(model), loss
        self.seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=4096)  # nobody takes them where nothing is logged

    def answers(self, labels: Tensor, **inputs) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats) and lengths (tokens) of all answers, (N, 2) each: chosen, rejected."""
        logprobs = self.step(labels=labels, want="logprobs", **inputs)
        both = logprobs, (labels[:, 1:] != IGNORED).to(logprobs)
        first, second = (sum_by_document(values, inputs.get("cu_seq_lens_q")).view(-1, 2) for values in both)
        return first, second

    def forward(
        self, labels: Tensor, reference: Tensor, numbers: Tensor, mean_chosen_tokens: Tensor, num_tokens, **inputs
    ) -> Tensor:
        """The sum of the pairs' losses ÷ `num_tokens`, the pairs of the whole optimizer step; a scalar in nats.

        Args:
            labels: of chosen and rejected documents in turns, as a batch of `PairSource` has them.
            reference: (N, 2) log-probabilities of the reference.
            numbers: (N,) of the pairs.
            mean_chosen_tokens: tokens of a chosen answer on average over the whole step.
            num_tokens: pairs of the whole step (the loop's name for what is counted).
            inputs: what the backbone takes.
        """
        logprobs, tokens = self.answers(labels, **inputs)
        is_free, settings = self.loss.reference == "none", self.loss
        references = (None, None) if is_free else reference.unbind(1)
        losses = dpo_loss(
            *logprobs.unbind(1), *references, beta=settings.beta, loss_type=settings.loss_type,
            label_smoothing=settings.label_smoothing, reference_free=is_free, tokens=tokens.unbind(1),
            nll_weight=settings.nll_weight, mean_chosen_tokens=mean_chosen_tokens,
        )  # fmt: skip
        with torch.no_grad():
            gain = logprobs - reference
            margins = settings.beta * (gain[:, 0] - gain[:, 1])
            self.seen.append((numbers, torch.stack([losses.detach(), margins, *logprobs.unbind(1)])))
        return losses.sum() / num_tokens

    def take(self) -> dict[str, float]:
        """Means over the pairs seen since the last call, in this process; empty without any.

        Returns:
            margin (β times the gain of chosen over rejected against the reference, nats), preference_accuracy (ties
            ½), chosen_logprob and rejected_logprob (nats an answer).
        """
        return take_means_(self.seen, ("margin", "preference_accuracy", "chosen_logprob", "rejected_logprob"))

    def suspects(self) -> str:
        """The pairs seen since the last `take` whose loss is no number, with their log-probabilities; for messages."""
        lines = []
        for numbers, values in self.seen:
            for i in (~values[0].isfinite()).nonzero().flatten().tolist():
                _, _, chosen, rejected = values[:, i].tolist()
                lines.append(f"pair of row {numbers[i]}: log-probability {chosen:.1f} chosen, {rejected:.1f} rejected")
        return "; ".join(lines[:5]) or "no pair by itself"


def take_means_(seen: deque[tuple[Tensor, Tensor]], names: Sequence[str]) -> dict[str, float]:
    """Empties what a step has seen of its pairs: means of margin, accuracy (ties ½), chosen and rejected as `names`."""
    if not seen:
        return {}
    margins, chosen, rejected = torch.cat([values for _, values in seen], 1)[-3:]
    seen.clear()
    means = torch.stack([margins.mean(), preference_accuracy(margins), chosen.mean(), rejected.mean()]).tolist()
    return {name: round(value, 6) for name, value in zip(names, means, strict=True)}


class PairSource:
    """Micro-batches of fixed pairs: a pure function of (seed, epoch, step).

    Args:
        pairs: what is trained on.
        reference: (N, 2) the reference's log-probabilities of chosen and rejected.
        config: batch sizes (in pairs), packing and seed.
    """

    def __init__(self, pairs: Sequence[Pair], reference: Tensor, config: TrainConfig) -> None:
        self.pairs, self.reference, self.config = pairs, reference, config
        self.steps_per_epoch = -(-len(pairs) // config.batch_size)

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step."""
        size, seed = self.config.batch_size, self.config.seed
        return self.split(batches(len(self.pairs), batch_size=size, seed=seed, epoch=epoch)[step])

    def split(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """Pairs by index, as micro-batches within `micro_batch_size` pairs or `tokens_per_micro_batch` tokens."""
        pairs, joined = [self.pairs[i] for i in numbers], sum if self.config.packing else max
        groups = split_step([joined((len(p.chosen), len(p.rejected))) for p in pairs], self.config, 2)
        mean = torch.tensor(sum(sum(p.chosen.loss_mask[1:]) for p in pairs) / len(pairs))
        return [self._micro_batch([numbers[i] for i in group], mean) for group in groups]

    def _micro_batch(self, indices: list[int], mean_chosen_tokens: Tensor) -> MicroBatch:
        pairs = [self.pairs[i] for i in indices]
        examples, numbers = documents(pairs), [p.number for p in pairs]
        tensors = pack(examples) if self.config.packing else pad(examples, 0)
        extra = {"reference": self.reference[indices], "numbers": torch.tensor(numbers),
                 "mean_chosen_tokens": mean_chosen_tokens}  # fmt: skip
        return MicroBatch(tensors | extra, tuple(numbers))


def count_pairs(batch: dict[str, Tensor]) -> int:
    """Pairs of a batch."""
    return len(batch["numbers"])


def fit_encoded_pairs(
    model,
    pairs: Sequence[Pair],
    config: TrainConfig,
    loss: PreferenceLoss | None = None,
    *,
    held_out: Sequence[Pair] = (),
    reference: Reference | None = None,
    reference_model=None,
    cache: str | Path | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    **options,
) -> TrainResult:
    """Trains `model` in place on pairs that are tokens already. Arguments as in `fit_pairs`; raises what it raises.

    `reference` is one that was asked for its digest before, in place of `reference_model`: weights are hashed once.
    """
    loss = loss or PreferenceLoss()
    if reference is None:
        reference = Reference(model if reference_model is None else reference_model, loss.reference, config)
    facts = model, config, loss, pairs, held_out, reference
    checkpoints = checkpoints_at(checkpoints, config, pair_identity, *facts)
    bare = PairStep(model, loss)
    known = reference.logprobs(pairs, Path(cache) if cache else None)
    # In groups of their own, as they are measured: the same sums, so that before the first step all are exact ties.
    held_cache = Path(cache).with_name(f"held_out_{Path(cache).name}") if cache else None
    known_held_out = reference.logprobs(held_out, held_cache) if held_out else known[:0]
    step = wrap(bare, config.sharding, config.precision)
    measure = partial(held_out_pairs, step, bare, PairSource(held_out, known_held_out, config)) if held_out else None
    try:
        return train(step, PairSource(pairs, known, per_process(config)), config, count=count_pairs, unit="pairs",
                     take=bare.take, held_out=measure, checkpoints=checkpoints, **options)  # fmt: skip
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}; not finite: {bare.suspects()}") from error


def held_out_pairs(step: nn.Module, bare: PairStep, source: PairSource) -> tuple[float, dict[str, float]]:
    """Loss (nats a pair) and the figures of `PairStep.take` on all pairs of a source, without gradients or dropout."""
    size, device = source.config.micro_batch_size or source.config.batch_size, next(step.parameters()).device
    groups = group_by_length([pair.length for pair in source.pairs], rows=size)
    parts = [m for group in groups for m in source.split(group)]
    bare.take()
    with module_mode(step, False), torch.no_grad():
        total = sum(step(**to_device(m.tensors, device), num_tokens=1) for m in parts)
    return (total / len(source.pairs)).item(), {f"held_out_{name}": value for name, value in bare.take().items()}


def pair_identity(
    model, config: TrainConfig, loss: PreferenceLoss, pairs: Sequence[Pair], held_out: Sequence[Pair], reference
) -> dict:
    """What decides the result of preference training; `reference` is the `Reference` of the run."""
    found = training_identity(model, config, documents(pairs), documents(held_out))
    return found | {"loss": asdict(loss), "reference": reference.digest}


def fit_pairs(
    model,
    tokenizer,
    rows: Sequence[dict],
    config: TrainConfig,
    loss: PreferenceLoss | None = None,
    *,
    max_length: int | None = None,
    thinking: bool | None = None,
    held_out_rows: Sequence[dict] = (),
    **options,
) -> TrainResult:
    """Trains `model` in place on preference rows: what a notebook calls.

    Args:
        model, tokenizer: as in `fit_rows`.
        rows: "prompt", "chosen" and "rejected"; see `encode_pairs`.
        config: the settings of the loop; its batch sizes count pairs.
        loss: what is minimised, DPO with β 0.1 by default.
        max_length: the most tokens a prompt with its answer may have, by default the model's context.
        thinking: what prompts will be asked with, as in `render_chat`.
        held_out_rows: rows whose loss and preference accuracy are measured.
        options: `reference_model` (another model that the policy is held to, in place of `loss.reference`), `cache` (a
            file that keeps the reference's log-probabilities), and `on_log`, `progress`, `checkpoints` and `resume`
            as in `fit_rows`; with `resume` the model given must be the one the run started from. `on_log` also gets
            what `PairStep.take` returns, `pairs` so far in place of trained_tokens, and with held_out_loss the same
            figures as held_out_….

    Returns:
        Losses in nats a pair.

    Raises:
        ValueError: if no pair can be trained on, the reference asked for is not there, or a checkpoint is damaged or of
            another run.
        NonFiniteLoss: if the loss is no number, naming the pair by its row.
        OSError: if a checkpoint cannot be written.
    """
    limits = {"max_length": max_length or context_length(model), "thinking": thinking}
    pairs, _ = encode_pairs(tokenizer, rows, **limits)
    held_out = encode_pairs(tokenizer, held_out_rows, **limits)[0] if held_out_rows else ()
    return fit_encoded_pairs(model, pairs, config, loss, held_out=held_out, **options)


def dpo(config: DPOConfig, *, progress: bool = False) -> Path:
    """Trains on pairs from files to files; the same under torchrun and `accelerate launch`, where one process writes.

    Args:
        config: model, data and settings; `resume` goes on with a run that was killed or interrupted.
        progress: whether to draw a bar.

    Returns:
        The run's folder, as `sft` leaves it (checkpoints under checkpoints/dpo), with pair_usage.json, and
        reference.safetensors: the reference's log-probabilities.

    Raises:
        FileNotFoundError, ValueError, NonFiniteLoss, OSError: as `sft` and `fit_pairs`.
    """
    return run_stage("dpo", config, prepare, progress)


def prepare(config: DPOConfig) -> Stage:
    """Reads pairs and model, and has the reference look at the model as it is."""
    model, tokenizer, pairs, held_out, usage = read_examples(config, "preference", encode_pairs)
    reference = Reference(model, config.loss.reference, config.train)

    def fit(run: RunFolder, **options) -> TrainResult:
        run.write_json("pair_usage.json", asdict(usage))
        return fit_encoded_pairs(model, pairs, config.train, config.loss, held_out=held_out, reference=reference,
                                 cache=run.path / REFERENCE, **options)  # fmt: skip

    return Stage(model, tokenizer, pair_identity(model, config.train, config.loss, pairs, held_out, reference), fit)
