"""The settings of all that runs, as frozen dataclasses; torch is not imported, so `--help` is fast.

A notebook builds the same objects in Python that the command line builds from flags or YAML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

AGENT, EDIT = "<|AGENT|>", "<|EDIT|>"
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
REWARDS = ("countdown", "reasoned", "answer", "exact", "mode", "model")  # see qftlab.train.reward.named_rewards
Names = tuple[str, ...] | str  # of files, rewards, tokens; one text is one name, an empty one none
Thinking = Literal["auto", "on", "off"]
ENABLE_THINKING = {"auto": None, "on": True, "off": False}  # what chat templates take as enable_thinking


def check_at_least(low: float, **values: float | None) -> None:
    """Refuses a number below `low`, and nan; None passes.

    Raises:
        ValueError: naming the first such value.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low:g}, got {value}")


def check_choice(allowed: tuple[str, ...], **values: str) -> None:
    """Refuses a word that is not among those allowed.

    Raises:
        ValueError: naming the value and the allowed words.
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_fields(config: object) -> None:
    """Refuses a word that the type of its field does not name; sources given as one text become a tuple, in place.

    Raises:
        ValueError: naming the field and the allowed words.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            check_choice(get_args(kind), **{name: value})
        elif kind == Names:
            object.__setattr__(config, name, ((value,) if value else ()) if isinstance(value, str) else tuple(value))


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of the weights: W + (alpha / rank) · B A, with A (rank, D_in) and B (D_out, rank).

    Args:
        rank: of the update of each matrix; 0 is without adapters, the weights themselves are trained.
        alpha: the update is scaled by alpha / rank, so that a good learning rate depends little on the rank.
        dropout: share of an adapter's inputs set to 0 in training.
        targets: the matrices of each block that get one: `all`, or those of `attention` or `mlp` only.
        tokens: besides new ones, the tokens whose rows are trained, such as [<|im_start|>,<|im_end|>] where the base
            has never seen a chat, as `tiny` has not: without them a low rank hardly learns to end a turn.
        from_: what becomes of the adapters that a model has: `continue` trains them on, as they are (rank, alpha,
            dropout and targets are theirs), `merge` makes them part of the weights first; then rank says what trains.

    Raises:
        ValueError: for a value out of range.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all", "attention", "mlp"] = "all"
    tokens: Names = ()
    from_: Literal["continue", "merge"] = "continue"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(0, rank=self.rank)
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


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
        check_fields(self)
        check_at_least(1, max_steps=self.max_steps, batch_size=self.batch_size, log_every=self.log_every,
                       micro_batch_size=self.micro_batch_size, keep=self.keep)  # fmt: skip
        check_at_least(0, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm, seed=self.seed,
                       eval_every=self.eval_every, patience=self.patience, save_every=self.save_every)  # fmt: skip
        check_at_least(2, tokens_per_micro_batch=self.tokens_per_micro_batch)
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
class RunConfig:
    """What the settings of every stage share; a stage adds its own, and says what its `data` holds.

    Args:
        model: `tiny`, a folder (such as runs/sft/latest), or a name on the Hugging Face hub.
        data: what is trained on, one source or [several]: files, folders in the hub's format and names on the hub.
        columns: the rows' own names of fields, as in '{prompt: q, output: a}'.
        output: folder of runs; each run gets a folder of its own in it, and `latest` points at the last.
        new_tokens: special tokens the tokenizer gets if it lacks them.
        max_length: the most tokens an example may have; longer ones are left out and counted; None is the model's
            context.
        held_out: what is never trained on and measured (see train.eval_every).
        thinking: what prompts are asked with, where the chat template can be asked for it (Qwen3): `on`, `off`, or
            `auto`: every answer as it is, one without thinking as if thinking had been off. If no answer thinks, or
            with `on` and `off`, the template that is saved asks so by itself.
        num_proc: processes that make examples of the rows.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        resume: a run folder, or `last` for the newest in `output`, that goes on from its last checkpoint with the
            settings it began with; those given beside it must be the same.
        quant: of the frozen weights, by bitsandbytes; needs adapters and a GPU.
        lora: adapters trained in place of the weights; lora.rank 0 trains the weights themselves.
        base: of a model that is a folder of adapters: where their base is now, if it has moved.
        train: the settings of the loop.

    Raises:
        ValueError: for a value out of range.
    """

    kind: ClassVar[str] = "rows"  # what files of `data` hold

    model: str = "tiny"
    data: Names = ()
    columns: dict[str, str] = field(default_factory=dict)
    output: str = "runs"
    new_tokens: Names = ()
    max_length: int | None = None
    held_out: Names = ()
    thinking: Thinking = "auto"
    num_proc: int = 1
    dtype: Dtype = "float32"
    device: str = "auto"
    resume: str | None = None
    quant: Literal["none", "8bit", "4bit"] = "none"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    base: str = ""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(2, max_length=self.max_length)
        check_at_least(1, num_proc=self.num_proc)
        if self.quant != "none" and not self.lora.rank:
            raise ValueError(f"quant must be none without adapters, got {self.quant}: --lora.rank 16")
        self.check_data()

    def check_data(self) -> None:
        """Refuses a run without data.

        Raises:
            ValueError: if no file is named.
        """
        if not self.data:
            raise ValueError(
                f"data must name at least one file of {self.kind}, got none: --data {self.kind}.jsonl (--resume "
                "without --config takes the settings that the run began with)"
            )


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning of a model on files of rows.

    Args:
        data: training rows, one file or [several]: alpaca JSON, JSONL or CSV with instruction, input and output;
            conversations; folders in the hub's format and names on the hub.
        max_length: the most tokens a row may have; longer rows are left out and counted; None is the model's context.
        held_out: rows never trained on, whose loss is measured (see train.eval_every).
        train_on: `all` assistant turns of a conversation, or only the `last`.

    Raises:
        ValueError: for a value out of range.
    """

    output: str = "runs/sft"
    new_tokens: Names = (AGENT, EDIT)
    train_on: Literal["all", "last"] = "all"


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
        check_fields(self)
        check_at_least(0, nll_weight=self.nll_weight)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss_type == "ipo"):
            raise ValueError(
                f"label_smoothing must be in [0, 0.5), and 0 with ipo, got {self.label_smoothing} ({self.loss_type})"
            )


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """Direct preference optimisation of a model on files of pairs.

    Args:
        data: pairs, one source or [several]: JSON, JSONL, CSV or parquet with prompt, chosen and rejected, as texts or
            messages; UltraFeedback and other hub names.
        max_length: the most tokens prompt and answer may have; longer pairs are left out and counted; None is the
            model's context.
        held_out: pairs never trained on, whose loss and preference accuracy are measured (see train.eval_every).
        loss: what is minimised.
        train: the settings of the loop; its batch counts pairs, its losses are per pair. Half a billion weights and
            more want rates from 5e-7 to 5e-6.

    Raises:
        ValueError: for a value out of range.
    """

    kind: ClassVar[str] = "pairs"

    output: str = "runs/dpo"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=3e-5, batch_size=32))
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)


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
        check_fields(self)
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
        if set("@?#") & set(self.url):  # it stands in logs and in config.json
            raise ValueError("server.url must be without user, password, query and fragment, got one (not shown)")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"server.url must begin with http:// or https://, got {self.url!r}")


@dataclass(frozen=True)
class RLOOConfig(RunConfig):
    """RLOO on files of prompts.

    Args:
        data: rows whose prompts are answered, one source or [several]; what answers they have is not trained on.
        max_length: the most tokens a prompt may have; longer ones are left out and counted; None is what the model's
            context leaves for it.
        held_out: rows never trained on, whose mean reward under greedy decoding is measured (see train.eval_every).
        train: the settings of the loop; its batch counts prompts. Half a billion weights want rates near 1e-6.
        problems: so many fresh Countdown problems, in place of data.
        rewards: what scores an answer, one or [several]: countdown (for models that answer at once: a text of more than
            512 characters earns 0), reasoned (the same of what follows the last </think>: for models that think
            first), answer (an <answer> is there), exact (the row's output word for word), mode (the row's mode token
            comes first), or model.
        reward_model: for `model`: a folder or hub name of a sequence classifier with one label.
        policy: how answers are sampled and what is minimised.
        server: a server that samples in place of the model.

    Raises:
        ValueError: for a value out of range.
    """

    output: str = "runs/rloo"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, schedule="constant"))
    problems: int = 0
    rewards: Names = ("countdown",)
    reward_model: str = ""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        check_at_least(0, problems=self.problems)
        check_fields(self)
        for name in self.rewards:
            check_choice(REWARDS, rewards=name)
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
        super().__post_init__()

    def check_data(self) -> None:
        """Refuses a run without prompts, and one with both kinds.

        Raises:
            ValueError: unless either files or a number of problems is given.
        """
        if bool(self.data) == bool(self.problems):
            raise ValueError(
                f"data or problems must be given, and not both, got {len(self.data)} sources and {self.problems}: "
                "--data prompts.jsonl, or --problems 4800"
            )


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Training of a reward model on files of pairs: all of its weights, because the head is new.

    Args:
        model: whose body it starts from: `tiny`, a folder, or a name on the Hugging Face hub.
        data: pairs, one source or [several], as for `dpo`.
        max_length: the most tokens prompt and answer may have; longer pairs are left out and counted; None is the
            model's context.
        held_out: pairs never trained on, whose loss and accuracy are measured (see train.eval_every).
        quant: none; a quantised body cannot be trained with its head.
        lora: none; the head is trained with its body, into which the adapters of a model that has some are merged.
        train: the settings of the loop; its batch counts pairs.

    Raises:
        ValueError: for a value out of range.
    """

    kind: ClassVar[str] = "pairs"

    output: str = "runs/reward"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-4, batch_size=32))
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(from_="merge"))

    def __post_init__(self) -> None:
        if self.lora.rank or self.quant != "none" or self.lora.from_ != "merge":
            raise ValueError(f"lora and quant must be left out of a reward model, got {self.lora}, quant {self.quant}")
        super().__post_init__()


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen: as `qftlab.maths.sampling.SamplingParams`, which checks the values; greedy by default.

    Args:
        temperature: 0 always takes the likeliest token, 1 samples from the model as it is.
        top_k: sample among so many likeliest tokens only; 0 is off.
        top_p: sample among the likeliest tokens that make up this probability; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest; 0 is off.
        repetition_penalty: above 1, tokens that already stand there become less likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class AnswerConfig:
    """What everything that lets a model write shares.

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        max_new_tokens: the most tokens an answer may have.
        thinking: `on` or `off`, where the chat template can be asked for it (Qwen3); `auto` leaves it to the template.
        seed: of the sampling.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.
        base: of a model that is a folder of adapters: where their base is now, if it has moved.
        sampling: how tokens are chosen.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    max_new_tokens: int = 128
    thinking: Thinking = "auto"
    seed: int = 0
    dtype: Dtype = "float32"
    device: str = "auto"
    base: str = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(1, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class GenerateConfig(AnswerConfig):
    """Answers one prompt, or every line of standard input.

    Args:
        prompt: what to ask; without it, each line of standard input is a prompt.
        raw: continue the text as it is, without a chat around it: the way to use a base model.
        num_generations: answers to each prompt.
        stop: texts that end an answer, as [first,second].
        format: `text`, or `jsonl` with one object an answer.
        batch_size: answers written at once.
    """

    prompt: str = ""
    raw: bool = False
    num_generations: int = 1
    stop: Names = ()
    format: Literal["text", "jsonl"] = "text"
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_generations=self.num_generations, batch_size=self.batch_size)


@dataclass(frozen=True)
class ChatConfig(AnswerConfig):
    """A conversation; the model sees all of it. /new begins another, /quit ends (so does Ctrl-D).

    Args:
        system: instructions that stand before the conversation.
    """

    system: str = ""
