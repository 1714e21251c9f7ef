"""The settings of RLOO and of reward models, as frozen dataclasses; torch is not imported, so `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qftlab.model.config import LoRAConfig
from qftlab.settings import check_at_least, check_choice
from qftlab.train.config import TrainConfig, check_data, check_run


@dataclass(frozen=True)
class PolicyConfig:
    """How answers are sampled and what RLOO makes of their rewards.

    Filters (top-k, top-p, min-p, repetition penalty) are off: the log-probabilities would not be those of the sampler.

    Args:
        num_generations: answers to each prompt, at least 2: each is measured against the mean of the others.
        max_new_tokens: of an answer.
        temperature: of the sampling and of all log-probabilities.
        beta: of the KL penalty in the reward, β·(log π − log π_ref); 0 needs no reference.
        reference: `start` is the model before its first step, `base` the model without its adapters.
        epsilon: how far an answer's probability ratio may move before it earns nothing more.
        updates_per_rollout: optimizer steps on the same answers.
        truncated: an answer cut off at max_new_tokens is scored as it is (`keep`), is scored but not trained (`mask`),
            or earns 0 (`zero`).
        skip_equal: leave out prompts whose answers all earn the same; their KL penalty is then lost. With beta 0 they
            move nothing and are always left out.
        weights: of the reward functions, by name; those not named count 1.
        rollout_batch_size: answers decoded together.
        sample_every: optimizer steps between two tables of samples; 0 is never.

    Raises:
        ValueError: for a value out of range.
    """

    num_generations: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    beta: float = 0.0
    reference: Literal["start", "base"] = "start"
    epsilon: float = 0.2
    updates_per_rollout: int = 1
    truncated: Literal["keep", "mask", "zero"] = "keep"
    skip_equal: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    rollout_batch_size: int = 512
    sample_every: int = 0

    def __post_init__(self) -> None:
        check_at_least(2, num_generations=self.num_generations)
        check_at_least(1, max_new_tokens=self.max_new_tokens, updates_per_rollout=self.updates_per_rollout,
                       rollout_batch_size=self.rollout_batch_size)  # fmt: skip
        check_at_least(0, sample_every=self.sample_every, beta=self.beta)
        check_choice(("start", "base"), reference=self.reference)
        check_choice(("keep", "mask", "zero"), truncated=self.truncated)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"weights must be finite, got {weight} for {name!r}")


@dataclass(frozen=True)
class ServerConfig:
    """Where answers come from, if not from the model itself: a server that speaks the OpenAI protocol.

    Args:
        url: such as http://localhost:8000/v1; without one the model itself samples.
        model: the name the server knows the model by.
        key: the name of the environment variable that holds the server's key.
        threads: requests at a time.
        retries: further attempts after a request that failed.
        timeout: seconds a request may take.
        adapters: a folder that the server reads as well: each rollout's adapters are written there and loaded by
            vLLM's /v1/load_lora_adapter. Without it the server keeps the weights it was started with.

    Raises:
        ValueError: for a value out of range.
    """

    url: str = ""
    model: str = "policy"
    key: str = "OPENAI_API_KEY"
    threads: int = 32
    retries: int = 2
    timeout: float = 600.0
    adapters: str = ""

    def __post_init__(self) -> None:
        check_at_least(1, threads=self.threads)
        check_at_least(0, retries=self.retries, timeout=self.timeout)
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"server.url must begin with http:// or https://, got {self.url!r}")


@dataclass(frozen=True)
class RLOOConfig:
    """RLOO on files of prompts.

    Args:
        model: `tiny`, a folder (such as runs/sft/latest), or a name on the Hugging Face hub.
        data: rows whose prompts are answered, one source or [several]; what answers they have is not trained on.
        problems: so many fresh Countdown problems, in place of data.
        rewards: what scores an answer, one or [several]: countdown, reasoned (countdown, of what follows the last
            </think>: countdown itself reads no text of more than 512 characters), answer (an <answer> is there), exact
            (the row's output word for word), mode (the row's mode token comes first), or model.
        reward_model: for `model`: a folder or hub name of a sequence classifier with one label.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens a prompt may have; longer ones are left out and counted; None is what the model's
            context leaves for it.
        held_out: rows never trained on, whose mean reward under greedy decoding is measured (see train.eval_every).
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        resume: a run folder, or `last` for the newest in `output`, that goes on from its last checkpoint with the
            settings it began with; those given beside it must be the same.
        quant: of the frozen weights, by bitsandbytes; needs adapters and a GPU.
        lora: adapters trained in place of the weights; lora.rank 0 trains the weights themselves.
        policy: how answers are sampled and what is minimised.
        server: a server that samples in place of the model.
        train: the settings of the loop; its batch counts prompts. Half a billion weights want rates near 1e-6.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    data: tuple[str, ...] | str = ()
    problems: int = 0
    rewards: tuple[str, ...] | str = ("countdown",)
    reward_model: str = ""
    output: str = "runs/rloo"
    new_tokens: tuple[str, ...] = ()
    max_length: int | None = None
    held_out: tuple[str, ...] | str = ()
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"
    resume: str | None = None
    quant: Literal["none", "8bit", "4bit"] = "none"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, schedule="constant"))

    def __post_init__(self) -> None:
        _check_run(self)
        check_at_least(0, problems=self.problems)
        object.__setattr__(self, "rewards", (self.rewards,) if isinstance(self.rewards, str) else tuple(self.rewards))
        for name in self.rewards:
            check_choice(("countdown", "reasoned", "answer", "exact", "mode", "model"), rewards=name)
        if not self.rewards:
            raise ValueError("rewards must name a reward, got none: --rewards [countdown]")
        if self.reward_model and "model" not in self.rewards:
            raise ValueError(
                f"rewards must hold model where a reward_model is given, got {list(self.rewards)}: add it, as in "
                f"--rewards [{','.join((*self.rewards, 'model'))}], or --rewards model for it alone"
            )
        if "model" in self.rewards and not self.reward_model:
            raise ValueError(
                "reward_model must be given for the reward model, got none: --reward_model runs/reward/latest"
            )
        if bool(self.data) == bool(self.problems):
            raise ValueError(
                f"data or problems must be given, and not both, got {len(self.data)} sources and {self.problems}: "
                "--data prompts.jsonl, or --problems 4800"
            )


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model on files of pairs.

    Args:
        model: whose body it starts from: `tiny`, a folder, or a name on the Hugging Face hub.
        data: pairs, one source or [several], as for `dpo`.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens prompt and answer may have; longer pairs are left out and counted; None is the
            model's context.
        held_out: pairs never trained on, whose loss and accuracy are measured (see train.eval_every).
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        resume: a run folder, or `last` for the newest in `output`, that goes on from its last checkpoint with the
            settings it began with; those given beside it must be the same.
        train: the settings of the loop; its batch counts pairs.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    data: tuple[str, ...] | str = ()
    output: str = "runs/reward"
    new_tokens: tuple[str, ...] = ()
    max_length: int | None = None
    held_out: tuple[str, ...] | str = ()
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"
    resume: str | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, batch_size=32))

    def __post_init__(self) -> None:
        _check_run(self)
        check_data(self, "pairs")

    @property
    def quant(self) -> str:
        """Never quantised: the head is trained with its body."""
        return "none"

    @property
    def lora(self) -> LoRAConfig:
        """Without adapters."""
        return LoRAConfig()


def _check_run(config: RLOOConfig | RewardConfig) -> None:
    """What all runs share; an empty text names no source here."""
    for name in ("data", "held_out"):
        if getattr(config, name) == "":
            object.__setattr__(config, name, ())
    check_run(config)
