"""What the local Tinker service trains and samples: LoRA on this machine, by the library's step, optimizer and engine.

No HTTP here; `qftlab_course.tinker_local` speaks it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qftlab.decoding.engine import Completion, default_stop_ids, generate, head_rows
from qftlab.files import aside, read_json, remove
from qftlab.maths.sampling import SamplingParams
from qftlab.model.head import bump_weights_version_, context_length, module_mode
from qftlab.model.loading import load_model
from qftlab.model.lora import ATTENTION, MLP
from qftlab.rows.batches import group_by_length
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import TrainConfig
from qftlab.train.optimizer import make_optimizer
from qftlab.train.step import IGNORED, Step

log = logging.getLogger(__name__)
ALPHA = 32  # the service scales every adapter by 32 / rank
BUDGET = 8192  # tokens of one forward pass, padding counted
KINDS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
DEFAULT_TOKENS = 256  # of a sample that names no limit
Weights = dict[str, Tensor]


class UserError(ValueError):
    """A request that cannot be carried out as it is, as the service tells its user."""


def _cross_entropy(logprobs: Tensor, given: Weights, _) -> Tensor:
    return -logprobs * given["weights"]


def _importance_sampling(logprobs: Tensor, given: Weights, _) -> Tensor:
    return -(logprobs - given["logprobs"]).exp() * given["advantages"]


def _ppo(logprobs: Tensor, given: Weights, config: Mapping[str, float]) -> Tensor:
    ratio = (logprobs - given["logprobs"]).exp()
    kept = ratio.clamp(config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))
    return -torch.minimum(ratio * given["advantages"], kept * given["advantages"])


# Each gives the loss of every target, to be summed; with what it reads besides the targets.
LOSSES: dict[str, tuple[Callable[[Tensor, Weights, Mapping], Tensor], tuple[str, ...]]] = {
    "cross_entropy": (_cross_entropy, ("weights",)),
    "importance_sampling": (_importance_sampling, ("logprobs", "advantages")),
    "ppo": (_ppo, ("logprobs", "advantages")),
}


@dataclass(frozen=True)
class Adapters:
    """What a run trains of its base, in the service's words."""

    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def targets(self) -> list[str]:
        """The modules that get an adapter."""
        asked = [(self.train_attn, ATTENTION), (self.train_mlp, MLP), (self.train_unembed, ("lm_head",))]
        return [name for is_asked, names in asked if is_asked for name in names]


@dataclass(frozen=True)
class Datum:
    """Tokens that are read, and what each of their positions is trained to say: `inputs` has one number a token."""

    tokens: list[int]
    targets: list[int]
    inputs: dict[str, list[float]]


class Shell:
    """A base model with adapters of one shape, whose weights come with each call: many runs share it.

    Args:
        source: what `load_model` takes.
        adapters: their shape; None for the base as it is.
    """

    def __init__(self, source: str, adapters: Adapters | None) -> None:
        self.model, self.tokenizer = load_model(source), load_tokenizer(source)
        if adapters is not None:
            settings = PeftConfig(task_type="CAUSAL_LM", r=adapters.rank, lora_alpha=ALPHA,
                                  target_modules=adapters.targets())  # fmt: skip
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                # The head's adapter is never merged here, and `to_peft` refuses one on a tied head.
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)
                self.model = get_peft_model(self.model.requires_grad_(False), settings).eval()
        self.step, self.rows = Step(self.model), head_rows(self.model)
        self.context = context_length(self.model) or math.inf

    def names(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the shell itself, by the step's names."""
        return {name: p for name, p in self.step.named_parameters() if "lora_" in name}

    def fresh(self, seed: int) -> Weights:
        """Weights that change nothing yet: A drawn from the seed as peft draws it, B zero."""
        generator = torch.Generator().manual_seed(seed)
        made = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.names().items()}
        for name, tensor in made.items():
            if "lora_A" in name:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        return made

    def check(self, tokens: Sequence[int], most: int = 0) -> None:
        """Refuses tokens that the model cannot read, alone or with `most` new ones.

        Raises:
            UserError: naming the rule and the value.
        """
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.rows:
            raise UserError(f"tokens must be at least one, each from 0 to {self.rows - 1}, got {list(tokens)[:5]}…")
        if len(tokens) + most > self.context:
            raise UserError(f"tokens must be at most {self.context}, got {len(tokens)} and {most} new ones")

    def logprobs(self, weights: Weights, data: Sequence[Datum]) -> Tensor:
        """Of each target, (B, T) fp32 nats, 0 where a row is shorter than the longest."""
        width, pad = max(len(d.tokens) for d in data) + 1, nn.functional.pad
        ids = [torch.tensor([*d.tokens, d.targets[-1]]) for d in data]
        labels = [torch.tensor([IGNORED, *d.targets]) for d in data]
        mask = torch.stack([pad(torch.ones_like(one), (0, width - len(one))) for one in ids])
        batch = {"input_ids": torch.stack([pad(one, (0, width - len(one))) for one in ids]), "attention_mask": mask,
                 "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
                 "labels": torch.stack([pad(one, (0, width - len(one)), value=IGNORED) for one in labels])}  # fmt: skip
        return torch.func.functional_call(self.step, weights, (), {**batch, "want": "logprobs"})

    def forward(
        self, weights: Weights, data: Sequence[Datum], loss: str, config: Mapping[str, float], is_training: bool
    ) -> tuple[float, list[list[float]]]:
        """The sum of the losses of all targets and their log-probabilities; gradients add up in the weights.

        Raises:
            UserError: for an unknown loss, or data that it cannot read.
        """
        if loss not in LOSSES:
            raise UserError(f"loss_fn must be one of {', '.join(LOSSES)}, got {loss!r}")
        function, wanted = LOSSES[loss]
        for datum in data:
            self.check(datum.tokens)
            self.check(datum.targets)
            sizes = {"target_tokens": len(datum.targets), **{n: len(datum.inputs.get(n, ())) for n in wanted}}
            if wrong := [f"{name} {size}" for name, size in sizes.items() if size != len(datum.tokens)]:
                raise UserError(f"{loss} must have a number for each of {len(datum.tokens)} tokens, got {wrong[0]}")
        total, found, lengths = 0.0, [[]] * len(data), [len(datum.tokens) for datum in data]
        with module_mode(self.step, False), torch.set_grad_enabled(is_training):
            for group in group_by_length(lengths, budget=max(BUDGET, *lengths)):
                rows = [data[i] for i in group]
                logprobs = self.logprobs(weights, rows)
                given = {name: torch.nn.utils.rnn.pad_sequence([torch.tensor(d.inputs[name]) for d in rows], True)
                         for name in wanted}  # fmt: skip
                value = function(logprobs, given, config).double().sum()
                if is_training:
                    value.backward()
                total += value.item()
                for i, row in zip(group, logprobs.detach(), strict=True):
                    found[i] = row[: lengths[i]].tolist()
        return total, found

    def sample(self, weights: Weights, tokens: list[int], count: int, asked: Mapping, seed: int) -> list[Completion]:
        """Completions of a prompt; `stop` None ends at the model's own end of sequence, [] never does.

        Raises:
            UserError: for a setting out of range.
        """
        stop, most = asked.get("stop"), asked.get("max_tokens")
        most, room = DEFAULT_TOKENS if most is None else most, self.context - len(tokens)
        if most > room:
            log.info("max_tokens %d is more than the model's context has room for: %d", most, room)
        self.check(tokens, most := max(1, min(most, room)))
        stop = [stop] if isinstance(stop, str) else stop
        texts = [one for one in stop or [] if isinstance(one, str)]
        ends = default_stop_ids(self.model, self.tokenizer) if stop is None or texts else stop
        with torch.no_grad():
            for name, parameter in self.names().items():
                parameter.copy_(weights[name])
        bump_weights_version_(self.model)
        try:
            params = SamplingParams(
                asked.get("temperature", 1.0), max(0, asked.get("top_k", -1)), asked.get("top_p", 1.0)
            )
            return generate(
                self.model, self.tokenizer, [tokens], max_new_tokens=most, params=params, stop=texts,
                stop_token_ids=list(ends), seed=seed, num_generations=count, return_logprobs=True,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from None


class Run:
    """One training run: its weights, their gradients, and the optimizer.

    Args:
        name: its id.
        base: the base model's name.
        adapters: their shape.
        shell: of that base and shape.
        weights: to begin with.
    """

    def __init__(self, name: str, base: str, adapters: Adapters, shell: Shell, weights: Weights) -> None:
        self.name, self.base, self.adapters, self.shell = name, base, adapters, shell
        self.weights = {key: nn.Parameter(tensor.clone()) for key, tensor in weights.items()}
        self.optimizer = make_optimizer(shell.step, TrainConfig(), self.weights)

    def forward(self, data: Sequence[Datum], loss: str, config: Mapping[str, float], is_training: bool):
        """As `Shell.forward`, on this run's weights."""
        return self.shell.forward(self.weights, data, loss, config, is_training)

    def update(self, asked: Mapping[str, float]) -> dict[str, float]:
        """One step of AdamW over the gradients that have added up, which are gone afterwards; their norm."""
        most = asked.get("grad_clip_norm") or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), most)
        for group in self.optimizer.param_groups:
            group |= {"lr": asked["learning_rate"], "betas": (asked["beta1"], asked["beta2"]), "eps": asked["eps"],
                      "weight_decay": asked.get("weight_decay", 0.0)}  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm:mean": float(norm)}

    def snapshot(self) -> Weights:
        """A copy of the weights as they are."""
        return {name: p.detach().clone() for name, p in self.weights.items()}


class Checkpoints:
    """Saved weights as folders, RUN/KIND/NAME, with adapter_model.safetensors, info.json and maybe optimizer.pt.

    Args:
        folder: where; what is there already can be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def place(self, path: str) -> Path:
        """The folder of a `tinker://` path.

        Raises:
            UserError: if there is none.
        """
        run, *rest = path.removeprefix("tinker://").split("/")
        place = self.folder.joinpath(_safe(run), *map(_safe, rest))
        if not path.startswith("tinker://") or len(rest) != 2 or not (place / "info.json").is_file():
            raise UserError(f"path must name a checkpoint, tinker://RUN/KIND/NAME, got {path!r}: there is none")
        return place

    def save(self, run: Run, kind: str, name: str, overwrite: bool = False, ttl: float | None = None) -> str:
        """Writes a checkpoint and returns its path.

        Raises:
            UserError: if the name is taken, or no name.
        """
        if not name or name != _safe(name):
            raise UserError(f"path must be a name of letters, digits, '.', '-' and '_', got {name!r}")
        place = self.folder / _safe(run.name) / KINDS[kind] / name
        if place.exists() and not overwrite:
            raise UserError(f"checkpoint {name!r} is there already: give another name, or overwrite=True")
        path, now = f"tinker://{run.name}/{KINDS[kind]}/{name}", datetime.now(timezone.utc)
        info = {"tinker_path": path, "checkpoint_id": f"{KINDS[kind]}/{name}", "checkpoint_type": kind,
                "time": now.isoformat(), "expires_at": ttl and (now + timedelta(seconds=ttl)).isoformat(),
                "run": run.name, "base_model": run.base, "adapters": asdict(run.adapters)}  # fmt: skip
        with aside(place) as fresh:
            fresh.mkdir()
            if kind == "external":
                _write_external(fresh, run)
            else:
                save_file(run.snapshot(), fresh / "adapter_model.safetensors")
            if kind == "training":
                torch.save(run.optimizer.state_dict(), fresh / "optimizer.pt")
            (fresh / "info.json").write_text(json.dumps(info), encoding="utf-8")
        return path

    def load(self, path: str) -> tuple[dict, Weights]:
        """What a checkpoint says of itself, and its weights."""
        place = self.place(path)
        return read_json(place / "info.json"), load_file(place / "adapter_model.safetensors")

    def optimizer(self, path: str) -> dict:
        """The state of the optimizer of a training checkpoint."""
        return torch.load(self.place(path) / "optimizer.pt", weights_only=True)

    def delete(self, path: str) -> None:
        """Removes a checkpoint."""
        remove(self.place(path))

    def expire(self, path: str, seconds: float | None) -> None:
        """Sets when a checkpoint expires; the local service only says so, and removes nothing by itself."""
        place = self.place(path) / "info.json"
        end = datetime.now(timezone.utc) + timedelta(seconds=seconds or 0)
        place.write_text(json.dumps(read_json(place) | {"expires_at": seconds and end.isoformat()}), encoding="utf-8")

    def infos(self) -> list[dict]:
        """All checkpoints, the newest first."""
        found = [read_json(p) | {"size_bytes": sum(f.stat().st_size for f in p.parent.iterdir())}
                 for p in self.folder.glob("[!.]*/[!.]*/[!.]*/info.json")]  # fmt: skip
        return sorted(found, key=lambda info: info["time"], reverse=True)


def _write_external(folder: Path, run: Run) -> None:
    """The files in the form in which the service gives weights away: its own name for the head, alpha and rank."""
    tensors = {name.removeprefix("model.").replace(".default.", ".").replace("base_model.model.lm_head",
               "base_model.model.model.unembed_tokens"): tensor for name, tensor in run.snapshot().items()}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": run.adapters.rank, "lora_alpha": ALPHA, "target_modules": "all-linear",
              "base_model_name_or_path": run.base}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _safe(name: str) -> str:
    """A name as a folder's, on any system."""
    return re.sub("[^A-Za-z0-9._-]", "_", name).lstrip(".")
