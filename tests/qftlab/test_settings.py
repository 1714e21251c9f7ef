"""Settings: documented defaults, ranges that end where their messages say, and what does not go together."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qftlab import settings
from qftlab.serve import ExportConfig
from qftlab.settings import (
    ChatConfig,
    DPOConfig,
    GenerateConfig,
    LoRAConfig,
    PolicyConfig,
    PreferenceLoss,
    RewardConfig,
    RLOOConfig,
    SamplingConfig,
    ServerConfig,
    SFTConfig,
    TrainConfig,
)

TRAIN = {
    "lr": 1e-3, "epochs": 1.0, "max_steps": None, "batch_size": 64, "micro_batch_size": None,
    "tokens_per_micro_batch": None, "packing": True, "warmup_ratio": 0.05, "schedule": "cosine", "weight_decay": 0.01,
    "beta1": 0.9, "beta2": 0.98, "max_grad_norm": 1.0, "seed": 0, "log_every": 10, "eval_every": 0, "patience": 0,
    "save_every": 500, "keep": 2, "precision": "weights", "gradient_checkpointing": False, "compile": False,
    "sharding": "ddp",
}  # fmt: skip
LORA = {"rank": 0, "alpha": 32.0, "dropout": 0.0, "targets": "all", "tokens": (), "from_": "continue"}
RUN = {
    "columns": {}, "thinking": "auto", "num_proc": 1, "model": "tiny", "data": ("x",),
    "new_tokens": (), "max_length": None, "held_out": (), "dtype": "float32",
    "device": "auto", "resume": None, "quant": "none", "lora": LORA, "base": "",
}  # fmt: skip
SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
LOSS = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "nll_weight": 0.0, "reference": "start"}
POLICY = {
    "num_generations": 8, "max_new_tokens": 64, "temperature": 1.0, "beta": 0.0, "reference": "start", "epsilon": 0.2,
    "updates_per_rollout": 1, "truncated": "keep", "skip_equal": False, "weights": {}, "rollout_batch_size": 512,
    "sample_every": 0,
}  # fmt: skip
SERVER = {"url": "", "model": "policy", "key": "OPENAI_API_KEY", "threads": 32, "retries": 2, "timeout": 600.0,
          "adapters": ""}  # fmt: skip
MADE = {"thinking": "auto", "seed": 0, "dtype": "float32", "device": "auto", "max_new_tokens": 128, "model": "tiny",
        "base": "", "sampling": SAMPLING}  # fmt: skip


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (SFTConfig("tiny", "x"), {**RUN, "output": "runs/sft", "new_tokens": ("<|AGENT|>", "<|EDIT|>"),
                                  "train_on": "all", "train": TRAIN}),
        (DPOConfig("tiny", "x"), {**RUN, "output": "runs/dpo", "loss": LOSS,
                                  "train": {**TRAIN, "lr": 3e-5, "batch_size": 32}}),
        (RewardConfig("tiny", "x"), {**RUN, "output": "runs/reward", "train": {**TRAIN, "lr": 1e-4, "batch_size": 32},
                                     "lora": {**LORA, "from_": "merge"}}),
        (RLOOConfig("tiny", "x"), {**RUN, "output": "runs/rloo", "problems": 0, "rewards": ("countdown",),
                                   "reward_model": "", "policy": POLICY, "server": SERVER,
                                   "train": {**TRAIN, "lr": 1e-4, "schedule": "constant"}}),
        (GenerateConfig(), {**MADE, "prompt": "", "raw": False, "num_generations": 1, "stop": (), "format": "text",
                            "batch_size": 64}),
        (ChatConfig(), {**MADE, "system": ""}),
        (ExportConfig(), {"model": "runs/sft/latest", "output": "exported", "base": "", "data": (), "dtype": "auto",
                          "device": "auto", "check": "quick", "gguf": "none", "evaluation": "", "push_to": "",
                          "private": False}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_defaults(made, want: dict) -> None:
    """A default that moves changes what every recorded command did: it is to be moved here as well, and on purpose."""
    assert dataclasses.asdict(made) == want


def ok(kind, name: str, *values) -> list[tuple]:
    return [(kind, name, value, True) for value in values]


def bad(kind, name: str, *values) -> list[tuple]:
    return [(kind, name, value, False) for value in values]


EDGES = [
    *(edge for name in ("batch_size", "log_every", "keep", "max_steps", "micro_batch_size")
      for edge in ok(TrainConfig, name, 1) + bad(TrainConfig, name, 0)),
    *(edge for name in ("weight_decay", "max_grad_norm", "seed", "eval_every", "patience", "save_every")
      for edge in ok(TrainConfig, name, 0) + bad(TrainConfig, name, -1)),
    *(edge for name in ("lr", "epochs") for edge in
      ok(TrainConfig, name, 1e-9, 1e9) + bad(TrainConfig, name, 0, math.inf, math.nan)),
    *(edge for name in ("warmup_ratio", "beta1", "beta2") for edge in
      ok(TrainConfig, name, 0, 0.999) + bad(TrainConfig, name, 1, -0.001, math.nan)),
    *ok(TrainConfig, "tokens_per_micro_batch", 2), *bad(TrainConfig, "tokens_per_micro_batch", 1),
    *ok(LoRAConfig, "rank", 0), *bad(LoRAConfig, "rank", -1), *ok(LoRAConfig, "alpha", 0.5),
    *bad(LoRAConfig, "alpha", 0, math.inf), *ok(LoRAConfig, "dropout", 0, 0.9), *bad(LoRAConfig, "dropout", 1, -0.1),
    *ok(PreferenceLoss, "beta", 0.5, 9), *bad(PreferenceLoss, "beta", 0, math.inf),
    *ok(PreferenceLoss, "label_smoothing", 0, 0.49), *bad(PreferenceLoss, "label_smoothing", 0.5, -0.1),
    *ok(PreferenceLoss, "nll_weight", 0), *bad(PreferenceLoss, "nll_weight", -0.1),
    *ok(PolicyConfig, "num_generations", 2), *bad(PolicyConfig, "num_generations", 1),
    *(edge for name in ("max_new_tokens", "updates_per_rollout", "rollout_batch_size") for edge in
      ok(PolicyConfig, name, 1) + bad(PolicyConfig, name, 0)),
    *(edge for name in ("sample_every", "beta") for edge in ok(PolicyConfig, name, 0) + bad(PolicyConfig, name, -1)),
    *ok(PolicyConfig, "temperature", 0.1, 2), *bad(PolicyConfig, "temperature", 0, math.inf),
    *ok(PolicyConfig, "epsilon", 0.1, 0.9), *bad(PolicyConfig, "epsilon", 0, 1),
    *ok(PolicyConfig, "weights", {"a": -1.0}), *bad(PolicyConfig, "weights", {"a": math.nan}, {"a": 1, "b": math.inf}),
    *ok(ServerConfig, "threads", 1), *bad(ServerConfig, "threads", 0), *ok(ServerConfig, "retries", 0),
    *bad(ServerConfig, "retries", -1), *ok(ServerConfig, "timeout", 0), *bad(ServerConfig, "timeout", -1),
    *ok(ServerConfig, "url", "", "http://a", "https://a"), *bad(ServerConfig, "url", "a:8000"),
    *(edge for name in ("max_new_tokens", "num_generations", "batch_size") for edge in
      ok(GenerateConfig, name, 1) + bad(GenerateConfig, name, 0)),
    *ok(ChatConfig, "max_new_tokens", 1), *bad(ChatConfig, "max_new_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value", "passes"), EDGES)
def test_ranges_end_where_they_say(kind, name: str, value, passes: bool) -> None:
    if passes:
        assert getattr(kind(**{name: value}), name) == value
    else:
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TrainConfig, {"tokens_per_micro_batch": 9, "micro_batch_size": 2}, "tokens_per_micro_batch must be alone"),
        (SFTConfig, {"data": "x", "max_length": 1}, "max_length must be at least 2"),
        (SFTConfig, {"data": "x", "quant": "4bit"}, "quant must be none without adapters"),
        (SFTConfig, {"data": ""}, "data must name at least one file"),
        (PreferenceLoss, {"label_smoothing": 0.1, "loss_type": "ipo"}, "0 with ipo"),
        (RLOOConfig, {"data": "x", "problems": 5}, "data or problems must be given, and not both"),
        (RLOOConfig, {}, "data or problems must be given"),
        (RLOOConfig, {"problems": -1}, "problems must be at least 0"),
        (RLOOConfig, {"problems": 5, "rewards": ()}, "rewards must name a reward"),
        (RLOOConfig, {"problems": 5, "rewards": ("answer", "x")}, "rewards must be one of"),
        (RLOOConfig, {"problems": 5, "reward_model": "r"}, "rewards must hold model where a reward_model is given"),
        (RLOOConfig, {"problems": 5, "rewards": "model"}, "reward_model must be given for the reward model"),
        (RewardConfig, {"data": "x", "lora": LoRAConfig(rank=4)}, "lora and quant must be left out"),
        (RewardConfig, {"data": "x", "quant": "8bit", "lora": LoRAConfig(rank=4)}, "lora and quant must be left out"),
        (RewardConfig, {"data": "x", "quant": "8bit"}, "lora and quant must be left out"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(kind, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_settings_that_go_together() -> None:
    assert SFTConfig(data="x", max_length=2, quant="4bit", lora=LoRAConfig(rank=1)).quant == "4bit"
    assert TrainConfig(tokens_per_micro_batch=9).micro_batch_size is None
    assert RLOOConfig(problems=5, rewards="model", reward_model="r").rewards == ("model",)
    assert RLOOConfig(problems=5, rewards=("answer", "exact")).data == ()
    assert PreferenceLoss(loss_type="ipo").label_smoothing == 0
    assert SFTConfig(data=["a", "b"], held_out="c", new_tokens="").held_out == ("c",)
    assert SamplingConfig() == SamplingConfig(0.0, 0, 1.0, 0.0, 1.0)
    settings.check_at_least(1, a=None, b=1)
    with pytest.raises(ValueError, match="b must be at least 1, got 0.5"):
        settings.check_at_least(1, a=None, b=0.5)
