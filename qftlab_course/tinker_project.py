"""The project of instruction, input and output on Tinker: its configuration, the price, the whole way, weights back."""

from __future__ import annotations

import ast
import json
import logging
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from qftlab.files import read_json, resolve
from qftlab.remote.budget import ServerError
from qftlab.remote.tinker import TinkerConfig, connect, read_examples, result_of, train
from qftlab.rows.examples import encode_pairs, load_wanted
from qftlab.settings import ENABLE_THINKING, Names, PolicyConfig, check_at_least, check_choice

log = logging.getLogger(__name__)
# The names of the project's own guide, whose config.py is read as it is; the others are ours in capitals.
GUIDE = {"DATA_FILES": "data", "NUM_EPOCHS": "epochs", "LEARNING_RATE": "lr", "MAX_SEQUENCE_LENGTH": "max_length",
         "TRUNCATE_LONG_SEQUENCES": "truncate", "MODEL_NAME_PREFIX": "name"}  # fmt: skip
# USD per million tokens. Provider's page as transcribed on 2026-10-07; prices move: give your own by `prices`.
PRICES = {"Qwen/Qwen3-8B": {"prefill": 0.195, "sample": 0.60, "train": 0.44, "date": "2026-10-07"}}


@dataclass(frozen=True)
class ProjectConfig(TinkerConfig):
    """Fine-tunes on Tinker from files: rows, masks and loss are those of `sft`.

    TINKER_API_KEY is read from the environment alone. TINKER_BASE_URL names another service, such as the one of `qftlab
    tinker-local`. The SDK sends telemetry unless TINKER_TELEMETRY=0.

    Args:
        stage: `sft`, `dpo` on pairs, or `rloo` on prompts.
        guide: a config.py with the guide's names (BASE_MODEL, LORA_RANK, …), read and never run, or the same as YAML;
            options given besides win.
        name: under which weights are kept, with the time behind it.
        sampling_max_tokens: of the samples at the end.
        sampling_temperature: theirs.
        sampling_num_samples: how many; 0 takes none.
        beta: of DPO.
        rewards: of RLOO, as there: countdown, reasoned, answer or exact, one or [several].
        num_generations: answers of RLOO to each prompt, each of at most sampling_max_tokens tokens.
        prices: a YAML file of USD per million tokens, as {Qwen/Qwen3-8B: {train: 0.44, date: 2026-10-07}}, in place of
            the lab's table.
        output: a folder for the adapters in peft's form and the tokenizer, which `export`, `chat` and `evaluate` take;
            without it they stay there.

    Raises:
        ValueError: for a value out of range.
    """

    stage: Literal["sft", "dpo", "rloo"] = "sft"
    guide: str = ""
    name: str = "qftlab"
    sampling_max_tokens: int = 128
    sampling_temperature: float = 0.7
    sampling_num_samples: int = 1
    beta: float = 0.1
    rewards: Names = ("countdown",)
    num_generations: int = 8
    prices: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        given = read_guide(self.guide) if self.guide else {}
        for field in fields(self):
            if field.name in given and getattr(self, field.name) == field.default:
                object.__setattr__(self, field.name, given[field.name])
        super().__post_init__()
        check_at_least(0, sampling_num_samples=self.sampling_num_samples)
        check_at_least(1, sampling_max_tokens=self.sampling_max_tokens)
        check_at_least(2, num_generations=self.num_generations)
        for name in self.rewards:
            check_choice(("countdown", "reasoned", "answer", "exact"), rewards=name)


@dataclass(frozen=True)
class TinkerResult:
    """Losses of the epochs (nats a trained token, or a pair; of RLOO mean rewards), the kept weights, samples."""

    losses: list[float]
    sampler: str
    state: str
    samples: list[str]


def read_guide(path: str | Path) -> dict[str, Any]:
    """Settings of a file that has the guide's names or ours; names that are neither are said, a key is not read.

    Args:
        path: config.py, of whose assignments only plain values are taken, or YAML.

    Raises:
        ValueError: for a file that is no such thing.
    """
    text, found = Path(path).read_text(encoding="utf-8"), {}
    try:
        if Path(path).suffix == ".py":
            pairs = [(target.id, node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)
                     for target in node.targets if isinstance(target, ast.Name)]  # fmt: skip
        else:
            pairs = list((yaml.safe_load(text) or {}).items())
    except (SyntaxError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} must hold NAME = value lines, or YAML: {error}") from None
    for key, value in pairs:
        name = GUIDE.get(key, key.lower())
        if name not in ProjectConfig.__dataclass_fields__ or name == "guide":
            log.warning("%s: %s is not known here, and left out", path, key)
            continue
        try:
            found[name] = ast.literal_eval(value) if isinstance(value, ast.AST) else value
        except ValueError:
            log.warning("%s: %s is no plain value, and left out: nothing of the file is run", path, key)
    return found


def is_tied(base: str) -> bool:
    """Whether a base has one matrix for embedding and head; where its config is not to be had it counts as untied."""
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(resolve(base)).tie_word_embeddings)
    except (OSError, ValueError) as error:
        log.warning("whether %s ties its head cannot be told: %s", base, error)
        return False


def estimate(config: ProjectConfig, tokens: int) -> str:
    """What the training costs, in words; the table's date is said.

    Raises:
        OSError, ValueError: for a file of prices that cannot be read.
    """
    table = yaml.safe_load(Path(config.prices).read_text(encoding="utf-8")) if config.prices else PRICES
    price, seen = table.get(config.base_model), tokens * config.epochs
    if price is None:
        return f"{seen:,} tokens to train; no price of {config.base_model} is known: --prices FILE"
    cost = seen * price["train"] / 1e6
    return (
        f"{seen:,} tokens to train, about ${cost:.2f} at ${price['train']} a million ({price.get('date', 'undated')})"
    )


def fine_tune(config: ProjectConfig) -> TinkerResult:
    """Reads, trains, keeps the weights under time-stamped names, and samples.

    Raises:
        ServerError, ValueError, ImportError: as the functions that it calls.
    """
    if not config.data:
        raise ValueError("data must name a file of rows, got none: --data rows.json")
    service, client, max_length = connect(config)
    tokenizer = client.get_tokenizer()
    losses, rows = STAGES[config.stage](config, client, tokenizer, max_length)
    name = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    sampler, state = (result_of(keep(name)).path for keep in (client.save_weights_for_sampler, client.save_state))
    log.info("kept: %s for sampling, %s to go on from (--state)", sampler, state)
    if config.output:
        bring_back(result_of(client.save_weights_external(name)).path, config.base_model, config.output)
        tokenizer.save_pretrained(config.output)  # what answers with these adapters looks for it here
    return TinkerResult(losses, sampler, state, sample(service, sampler, tokenizer, rows[0], config))


def _sft(config: ProjectConfig, client, tokenizer, max_length: int | None) -> tuple[list[float], list[dict]]:
    examples, rows = read_examples(config, tokenizer, max_length)
    log.info("%s", estimate(config, sum(map(len, examples))))
    return train(client, examples, config), rows


def _dpo(config: ProjectConfig, client, tokenizer, max_length: int | None) -> tuple[list[float], list[dict]]:
    from qftlab_course.tinker_policies import train_pairs

    rows, files = load_wanted(config.data, "preference", missing="warning")
    options = {"max_length": max_length, "thinking": ENABLE_THINKING[config.thinking]}
    pairs, usage = encode_pairs(tokenizer, rows, sources=files, **options)
    log.info("%s (DPO reads every token once more than this)", estimate(config, usage.tokens))
    return train_pairs(client, pairs, config, config.beta), rows


def _rloo(config: ProjectConfig, client, tokenizer, max_length: int | None) -> tuple[list[float], list[dict]]:
    from qftlab.train.reward import check_columns, named_rewards
    from qftlab.train.rollouts import encode_prompts
    from qftlab_course.tinker_policies import train_policy

    rows, files = load_wanted(config.data, missing="warning")
    check_columns(config.rewards, rows, files)
    room = max_length and max_length - config.sampling_max_tokens
    options = {"max_length": room, "thinking": ENABLE_THINKING[config.thinking], "sources": files}
    policy = PolicyConfig(num_generations=config.num_generations, max_new_tokens=config.sampling_max_tokens,
                          temperature=1.0)  # fmt: skip
    rewards = named_rewards(config.rewards, tokenizer)
    prompts = encode_prompts(tokenizer, rows, **options)
    return train_policy(client, tokenizer, prompts, rewards, config, policy), rows


STAGES = {"sft": _sft, "dpo": _dpo, "rloo": _rloo}


def sample(service, path: str, tokenizer, row: Mapping, config: ProjectConfig) -> list[str]:
    """What kept weights answer to the question of a row."""
    from qftlab.decoding.engine import encode_prompts
    from qftlab.rows.schemas import row_to_prompt
    from qftlab_course.tinker_asking import sampled

    if not config.sampling_num_samples:
        return []
    ids = encode_prompts(tokenizer, [row_to_prompt(row)], ENABLE_THINKING[config.thinking])
    client = result_of(service.create_sampling_client(model_path=path))
    found = sampled(client, tokenizer, ids, [config.seed], config.sampling_num_samples,
                    max_tokens=config.sampling_max_tokens, temperature=config.sampling_temperature)  # fmt: skip
    return [text for _, _, text in found]


def bring_back(path: str, base: str, folder: str | Path) -> Path:
    """Downloads weights of `save_weights_external` as adapters in peft's form, for `load_model` and `export`.

    Args:
        path: tinker://RUN/external_weights/NAME.
        base: what `load_model` takes for the base.
        folder: for adapter_model.safetensors and adapter_config.json.

    Raises:
        ServerError: if they cannot be fetched.
        ValueError: as `to_peft`.
    """
    import tinker

    from qftlab.model.lora import CONFIG, WEIGHTS

    folder, links = Path(folder), result_of(tinker.RestClient().get_external_weights_urls(path)).urls
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        try:
            with urllib.request.urlopen(links[name], timeout=60) as answer, open(folder / name, "wb") as file:
                while piece := answer.read(1 << 20):
                    file.write(piece)
        except (OSError, LookupError) as error:
            raise ServerError(f"{name} of {path} cannot be fetched: {error}; ask again") from error
    return to_peft(folder, base)


def to_peft(folder: str | Path, base: str) -> Path:
    """Renames what the service wrote so that peft reads it: its head, and the modules that have adapters; in place.

    Args:
        folder: of adapter_model.safetensors and adapter_config.json, as the SDK's command line downloads them.
        base: as in `bring_back`.

    Raises:
        ValueError: for an adapter on a tied head, which cannot be merged, or on modules that no dense model has.
    """
    from safetensors.torch import load_file, save_file

    from qftlab.model.lora import ATTENTION, CONFIG, MLP, WEIGHTS

    folder = Path(folder)
    tensors = {name.replace("base_model.model.model.unembed_tokens", "base_model.model.lm_head"): tensor
               for name, tensor in load_file(folder / WEIGHTS).items()}  # fmt: skip
    targets = sorted({name.split(".")[-3] for name in tensors})
    if unknown := set(targets) - {*ATTENTION, *MLP, "lm_head"}:
        raise ValueError(f"adapters must be on the modules of a dense model, got {sorted(unknown)[0]}")
    if "lm_head" in targets and is_tied(base):
        raise ValueError(f"{base} ties its head, so an adapter there cannot be merged: train with train_unembed=False")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    own = {name: read_json(folder / CONFIG)[name] for name in ("r", "lora_alpha")}
    settings = own | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets,
                      "base_model_name_or_path": base, "inference_mode": True, "bias": "none"}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder
