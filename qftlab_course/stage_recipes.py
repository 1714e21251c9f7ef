"""What each stage of the lab is made of; `qftlab_course.stages` loads, trains and keeps them.

A chain: base → extended (two new tokens) → sft (three kinds of rows) → warm (more Countdown demonstrations, and some
rows of all kinds) → dpo (polite answers against plain ones) → rloo (Countdown, with a verifier alone).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass

from qftlab.rows.tokenizer import NEW_TOKENS
from qftlab.settings import PolicyConfig, PreferenceLoss, TrainConfig
from qftlab_course.presets import Preset, get_preset

STARTS = {"extended": "base", "sft": "extended", "warm": "sft", "dpo": "warm", "rloo": "dpo"}
STAGES = ("base", *STARTS)
# Peak learning rates of warm, dpo and rloo. Those of `tiny` were found here (benchmarks/LOG.md); the others follow what
# is published for their size, and were not run by us.
RATES = {
    "tiny": (6e-4, 1.2e-4, 2e-4),
    "qwen2.5-0.5b": (1e-5, 1e-6, 1e-6),
    "qwen3-8b": (1e-4, 5e-6, 1e-5),
}


@dataclass(frozen=True)
class Recipe:
    """What a stage is made of, besides code.

    Args:
        preset: model and hardware.
        start: the stage whose model is trained on; empty for the base.
        new_tokens: special tokens that the tokenizer gets.
        train: the loop's settings; None where nothing is trained.
        passes: over the Countdown demonstrations of "warm".
        replay: rows of the other kinds among them, so that older skills are kept.
        pairs: of a polite and a plain answer, for dpo.
        last: so many layers, from the last one, are trained, and all the rest is kept as it is; 0 trains everything. A
            style is decided late, and what is frozen is not forgotten.
        problems: fresh Countdown problems, for rollouts (rloo).
        loss: what preference training minimises.
        policy: how answers are sampled.
    """

    preset: Preset
    start: str = ""
    new_tokens: tuple[str, ...] = NEW_TOKENS
    train: TrainConfig | None = None
    passes: int = 0
    replay: int = 0
    pairs: int = 0
    last: int = 0
    problems: int = 0
    loss: PreferenceLoss | None = None
    policy: PolicyConfig | None = None


def recipe(name: str, preset: str = "tiny", seed: int = 0) -> Recipe:
    """The recipe of a stage; `seed` decides the order of the rows, the pairs, and the answers that are sampled.

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
        train = TrainConfig(lr=p.lr, epochs=p.epochs, batch_size=p.batch_size, micro_batch_size=micro, seed=seed)
        return Recipe(p, start, train=train)
    rates = dict(zip(("warm", "dpo", "rloo"), RATES.get(p.name, RATES["tiny"]), strict=True))
    return _later(name, p, start, rates[name], micro, seed)


def _later(name: str, preset: Preset, start: str, lr: float, micro: int | None, seed: int) -> Recipe:
    """Recipes that all three models share, but for the rate."""
    if name == "warm":
        train = TrainConfig(lr=lr, batch_size=64, micro_batch_size=micro, seed=seed)
        return Recipe(preset, start, train=train, passes=4, replay=3000)
    if name == "dpo":
        train = TrainConfig(lr=lr, batch_size=16, micro_batch_size=micro and micro // 2, warmup_ratio=0.1,
                            schedule="linear", seed=seed)  # fmt: skip
        return Recipe(preset, start, train=train, pairs=320, loss=PreferenceLoss(), last=int(preset.name == "tiny"))
    train = TrainConfig(lr=lr, max_steps=50, batch_size=64, micro_batch_size=micro, schedule="constant",
                        weight_decay=0.0, seed=seed)  # fmt: skip
    policy = PolicyConfig(num_generations=8, max_new_tokens=32)
    return Recipe(preset, start, train=train, problems=50 * 64, policy=policy)


def plain(settings: object) -> object:
    """Settings as JSON holds them, without those that are at their default: what a card compares.

    So a field that a later version adds, at a default that changes nothing, leaves the cards as they are.
    """
    if not is_dataclass(settings):
        return list(settings) if isinstance(settings, tuple) else settings
    kept = {f.name: plain(value) for f in fields(settings) if (value := getattr(settings, f.name)) != _default(f)}
    return {name: value for name, value in kept.items() if value != {}}


def _default(field) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
