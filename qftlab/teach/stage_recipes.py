"""What each stage of the lab is made of; `qftlab.teach.stages` builds and keeps them.

A chain: base → extended (two new tokens) → sft (three kinds of rows) → warm (more Countdown demonstrations, and some
rows of all kinds) → dpo (its own right answers against its own wrong ones) → rloo (a verifier alone).
"""

from __future__ import annotations

from dataclasses import dataclass

from qftlab.model.loading import Preset, get_preset
from qftlab.text.tokenizer import NEW_TOKENS
from qftlab.train.config import TrainConfig
from qftlab.train.policy_config import PolicyConfig
from qftlab.train.preference_config import PreferenceLoss

# What decides the weights of a stage, besides its recipe and the stage it starts from.
CODE = ("core/chunks.py", "core/logprobs.py", "core/losses.py", "data/batching.py", "data/sources.py",
        "model/attention.py", "model/blocked.py", "model/head.py", "model/loading.py", "model/lora.py",
        "model/modules.py", "model/vocabulary.py", "text/chat.py", "text/tokenizer.py", "train/config.py",
        "train/loop.py", "train/optim.py", "train/precision.py", "train/rows.py", "train/sft.py", "train/step.py",
        "train/update.py")  # fmt: skip
SAMPLING = ("core/draws.py", "core/filters.py", "core/rewards.py", "core/sampling.py", "data/countdown.py",
            "generate/attend.py", "generate/batch.py", "generate/cache.py", "generate/decoder.py",
            "generate/engine.py")  # fmt: skip
PAIRS = ("train/dpo.py", "train/pair_rows.py", "train/pairs.py", "train/reference.py")
POLICY = ("train/policy_source.py", "train/policy_step.py", "train/rloo.py", "train/rollouts.py",
          "train/shared_prefix.py")  # fmt: skip
MORE_CODE = {"dpo": (*SAMPLING, *PAIRS), "rloo": (*SAMPLING, *POLICY)}

STARTS = {"extended": "base", "sft": "extended", "warm": "sft", "dpo": "warm", "rloo": "dpo"}
# Peak learning rates of warm, dpo and rloo. Those of `tiny` were found here (benchmarks/LOG.md); the others follow what
# is published for their size, and were not run by us.
RATES = {
    "tiny": (6e-4, 1.5e-4, 2e-4),
    "qwen2.5-0.5b": (1e-5, 1e-6, 1e-6),
    "qwen3-8b": (1e-4, 5e-6, 1e-5),
}


@dataclass(frozen=True)
class Recipe:
    """What a stage is made of, besides code: all of it goes into the hash.

    Args:
        preset: model and hardware.
        start: the stage whose model is trained on; empty for the base.
        new_tokens: special tokens that the tokenizer gets.
        train: the loop's settings; None where nothing is trained.
        passes: over the Countdown demonstrations of "warm".
        replay: rows of the other kinds among them, so that older skills are kept.
        problems: fresh Countdown problems, for pairs (dpo) or rollouts (rloo).
        loss: what preference training minimises.
        policy: how answers are sampled.
        version: for changes that no file shows.
    """

    preset: Preset
    start: str = ""
    new_tokens: tuple[str, ...] = NEW_TOKENS
    train: TrainConfig | None = None
    passes: int = 0
    replay: int = 0
    problems: int = 0
    loss: PreferenceLoss | None = None
    policy: PolicyConfig | None = None
    version: int = 1


def recipe(name: str, preset: str = "tiny") -> Recipe:
    """The recipe of a stage.

    Raises:
        ValueError: for a stage or preset that does not exist.
    """
    if name not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {name!r}")
    p = get_preset(preset)
    start = STARTS.get(name, "")
    if name in ("base", "extended"):
        return Recipe(p, start)
    # 16 rows of a real model fill a small GPU; `tiny` takes its whole step at once.
    micro = 16 if p.name in RATES and p.name != "tiny" else None
    if name == "sft":
        train = TrainConfig(lr=p.lr, epochs=p.epochs, batch_size=p.batch_size, micro_batch_size=micro)
        return Recipe(p, start, train=train)
    rates = dict(zip(("warm", "dpo", "rloo"), RATES.get(p.name, RATES["tiny"]), strict=True))
    return _later(name, p, start, rates[name], micro)


def _later(name: str, preset: Preset, start: str, lr: float, micro: int | None) -> Recipe:
    """Recipes that all three models share, but for the rate."""
    if name == "warm":
        train = TrainConfig(lr=lr, batch_size=64, micro_batch_size=micro)
        return Recipe(preset, start, train=train, passes=4, replay=3000)
    sampled = {"num_generations": 8, "max_new_tokens": 32}
    if name == "dpo":
        train = TrainConfig(lr=lr, batch_size=16, micro_batch_size=micro and micro // 2, warmup_ratio=0.1,
                            schedule="linear")  # fmt: skip
        loss = PreferenceLoss(beta=0.5, nll_weight=1.0)
        return Recipe(preset, start, train=train, problems=1600, loss=loss, policy=PolicyConfig(**sampled))
    train = TrainConfig(lr=lr, max_steps=50, batch_size=64, micro_batch_size=micro, schedule="constant",
                        weight_decay=0.0)  # fmt: skip
    return Recipe(preset, start, train=train, problems=50 * 64, policy=PolicyConfig(**sampled))


STAGES = ("base", *STARTS)
