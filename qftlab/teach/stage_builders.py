"""How the stages of the lab are trained: each takes the stage it starts from and gives back what is to be kept."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from qftlab.core.files import bundled, resolve
from qftlab.core.rewards import countdown_reward
from qftlab.data.sources import load_rows
from qftlab.model.loading import load_model
from qftlab.model.lora import adapter_base, add_adapters, load_adapters
from qftlab.model.vocabulary import extend_model
from qftlab.teach.stage_recipes import Recipe
from qftlab.text.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.train.dpo import fit_encoded_pairs
from qftlab.train.pairs import sample_pairs
from qftlab.train.rloo import fit_policy, fresh_problems
from qftlab.train.sft import best_device, fit_rows

log = logging.getLogger(__name__)
Say = Callable[[str], None]
PAIR_ROWS = "pairs.jsonl"
HELD_OUT_PAIRS = 100  # of a dpo stage's pairs, never trained on


@dataclass
class Built:
    """What a builder leaves: a model, its tokenizer, the records of its training, and further text files by name."""

    model: object
    tokenizer: object
    metrics: list[dict] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def right(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    """The verifier of the last two stages: the contract's Countdown reward."""
    return countdown_reward(text, row["numbers"], row["target"])


def start_of(folder: str, dtype: str) -> tuple:
    """Model and tokenizer of a stage's folder, ready to be trained on; adapters stay adapters."""
    base = adapter_base(folder)
    model = load_model(resolve(base) if base else folder, dtype=dtype, device=best_device())
    return load_adapters(model, folder, is_trainable=True) if base else model, load_tokenizer(folder)


def build_extended(wanted: Recipe, start: tuple, say: Say) -> Built:
    """The base with the new tokens and their rows."""
    model, tokenizer = start
    extend_model(model, tokenizer, extend_tokenizer(tokenizer, wanted.new_tokens))
    return Built(model, tokenizer)


def build_sft(wanted: Recipe, start: tuple, say: Say) -> Built:
    """Supervised fine-tuning on all three kinds of rows."""
    model, tokenizer = start
    if wanted.preset.lora.rank:
        new = tokenizer.convert_tokens_to_ids(list(wanted.new_tokens))
        model = add_adapters(model, wanted.preset.lora, token_ids=new)
    return _on_rows("sft", wanted, model, tokenizer, sft_rows(wanted), say)


def build_warm(wanted: Recipe, start: tuple, say: Say) -> Built:
    """More of the 2,000 Countdown demonstrations, as a start for practice, with some rows of all kinds in between."""
    rows = sft_rows(wanted)
    demonstrations = [row for row in rows if row["skill"] == "countdown"]
    others = [row for row in rows if row["skill"] != "countdown"]
    replay = random.Random(f"replay {wanted.train.seed}").sample(others, min(wanted.replay, len(others)))
    return _on_rows("warm", wanted, *start, demonstrations * wanted.passes + replay, say)


def build_dpo(wanted: Recipe, start: tuple, say: Say) -> Built:
    """Preference training on the model's own answers: one that the verifier takes against one that it does not."""
    model, tokenizer = start
    tell(say, f"sampling answers to {wanted.problems:,} fresh Countdown problems")
    problems, seed = fresh_problems(wanted.problems, wanted.train.seed), wanted.train.seed
    found = sample_pairs(
        model, tokenizer, problems, right, num_generations=wanted.policy.num_generations, seed=seed,
        max_new_tokens=wanted.policy.max_new_tokens, batch_size=wanted.policy.rollout_batch_size,
    )  # fmt: skip
    tell(say, f"training stage dpo of {wanted.preset.name} on {found.summary()}")
    held_out = min(HELD_OUT_PAIRS, len(found.pairs) // 2)
    metrics, note = _noting(say, "held_out_preference_accuracy", "preference accuracy")
    result = fit_encoded_pairs(model, found.pairs[held_out:], wanted.train, wanted.loss,
                               held_out=found.pairs[:held_out], on_log=note)  # fmt: skip
    _whole(result)
    rows = [row | {k: problems[pair.number - 1][k] for k in ("numbers", "target")}
            for row, pair in zip(found.rows, found.pairs, strict=True)]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return Built(model, tokenizer, metrics, {PAIR_ROWS: lines})


def build_rloo(wanted: Recipe, start: tuple, say: Say) -> Built:
    """Practice: fresh problems, eight answers to each, and a verifier."""
    model, tokenizer = start
    tell(say, f"training stage rloo of {wanted.preset.name} on {wanted.problems:,} fresh Countdown problems")
    problems = fresh_problems(wanted.problems, wanted.train.seed + 1)  # not those the pairs were made of
    metrics, note = _noting(say, "reward", "mean reward", every=max(1, wanted.train.max_steps // 6))
    _whole(fit_policy(model, tokenizer, problems, {"countdown": right}, wanted.train, wanted.policy, on_log=note))
    return Built(model, tokenizer, metrics)


def sft_rows(wanted: Recipe) -> list[dict]:
    """The bundled rows of the preset."""
    return load_rows([bundled(*part.split("/")) for part in wanted.preset.data])


def _on_rows(name: str, wanted: Recipe, model, tokenizer, rows: list[dict], say: Say) -> Built:
    tell(say, f"training stage {name} of {wanted.preset.name} on {len(rows):,} rows")
    steps = wanted.train.max_steps or -(-len(rows) // wanted.train.batch_size) * wanted.train.epochs
    metrics, note = _noting(say, "loss", "loss", every=max(1, round(steps / 6)), steps=round(steps))
    _whole(fit_rows(model, tokenizer, rows, wanted.train, on_log=note))
    return Built(model, tokenizer, metrics)


def _noting(say: Say, name: str, words: str, every: int = 1, steps: int = 0) -> tuple[list[dict], Callable]:
    """A list that gets every record, and what fills it and says a line now and then."""
    metrics: list[dict] = []

    def note(record: dict) -> None:
        metrics.append(record)
        if name in record and (record["step"] == 1 or record["step"] % every == 0):
            of = f" of about {steps}" if steps else ""
            tell(say, f"step {record['step']}{of}: {words} {record[name]:.2f}")

    return metrics, note


def _whole(result) -> None:
    if result.interrupted:
        raise KeyboardInterrupt("interrupted: an unfinished stage is not kept")


def tell(say: Say, line: str) -> None:
    """To the log and to whoever watches."""
    log.info("%s", line)
    say(line)


BUILDERS: dict[str, Callable[[Recipe, tuple, Say], Built]] = {
    "extended": build_extended, "sft": build_sft, "warm": build_warm, "dpo": build_dpo, "rloo": build_rloo,
}  # fmt: skip
