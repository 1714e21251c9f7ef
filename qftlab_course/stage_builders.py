"""How the stages of the lab are trained: what each reads, as tokens in the order of its steps, and the fit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qftlab.files import bundled
from qftlab.maths.verify import countdown_reward
from qftlab.model.head import context_length
from qftlab.model.loading import extend_model
from qftlab.model.lora import add_adapters
from qftlab.rows.batches import Example, batches
from qftlab.rows.countdown import fresh_problems
from qftlab.rows.examples import documents, encode_pairs, encode_rows
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import extend_tokenizer
from qftlab.settings import TrainConfig
from qftlab.train.dpo import fit_encoded_pairs
from qftlab.train.loop import TrainResult
from qftlab.train.optimizer import total_steps
from qftlab.train.rloo import fit_prompts, prompts_for
from qftlab.train.sft import fit_examples
from qftlab_course.sampled_pairs import sample_pairs
from qftlab_course.stage_recipes import Recipe
from qftlab_course.world.style import style_pairs

log = logging.getLogger(__name__)
Say = Callable[[str], None]
HELD_OUT_PAIRS = 80  # whose preference accuracy the dpo stage measures


@dataclass(frozen=True)
class Work:
    """A stage before it is trained.

    Args:
        documents: the ids and masks that training reads, in the order of its steps; RLOO's are prompts.
        what: the same in words.
        headline: the record's figure that is told, and what it is called.
        fit: trains; it is given what gets the records.
    """

    documents: Iterable[Example]
    what: str
    headline: tuple[str, str]
    fit: Callable[[Callable[[dict], None]], TrainResult]


def right(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    """The verifier of Countdown: the reward for models that answer at once, as `tiny` does."""
    return countdown_reward(text, row["numbers"], row["target"])


def prepared(name: str, wanted: Recipe, model, tokenizer) -> tuple:
    """The model that a stage trains: with its new tokens, its adapters, its frozen layers."""
    if name == "extended":
        extend_model(model, tokenizer, extend_tokenizer(tokenizer, wanted.new_tokens))
    if name == "sft" and wanted.preset.lora.rank:
        new = tokenizer.convert_tokens_to_ids(list(wanted.new_tokens))
        model = add_adapters(model, wanted.preset.lora, token_ids=new)
    if wanted.last:
        model.requires_grad_(False)
        model.model.layers[-wanted.last :].requires_grad_(True)
    return model, tokenizer


def sft_work(wanted: Recipe, model, tokenizer) -> Work:
    """Supervised fine-tuning on all three kinds of rows."""
    return _on_rows(wanted, model, tokenizer, sft_rows(wanted))


def warm_work(wanted: Recipe, model, tokenizer) -> Work:
    """More of the 2,000 Countdown demonstrations, as a start for practice, with some rows of all kinds in between."""
    rows = sft_rows(wanted)
    demonstrations = [row for row in rows if row["skill"] == "countdown"]
    others = [row for row in rows if row["skill"] != "countdown"]
    replay = random.Random(f"replay {wanted.train.seed}").sample(others, min(wanted.replay, len(others)))
    return _on_rows(wanted, model, tokenizer, demonstrations * wanted.passes + replay)


def dpo_work(wanted: Recipe, model, tokenizer) -> Work:
    """Preference training on style alone: the same right answer, politely ended (chosen) and bare (rejected)."""
    rows, asked = style_pairs(wanted.pairs, wanted.train.seed), style_pairs(HELD_OUT_PAIRS, held_out=True)
    pairs, held_out = (encode_pairs(tokenizer, r, max_length=context_length(model))[0] for r in (rows, asked))
    return Work(
        documents([pairs[i] for i in order(len(pairs), wanted.train)]), f"{len(pairs)} pairs",
        ("held_out_preference_accuracy", "preference accuracy"),
        lambda note: fit_encoded_pairs(model, pairs, wanted.train, wanted.loss, held_out=held_out, on_log=note),
    )  # fmt: skip


def rloo_work(wanted: Recipe, model, tokenizer) -> Work:
    """Practice: fresh problems, eight answers to each, and a verifier."""
    problems = fresh_problems(wanted.problems, wanted.train.seed + 1)  # not those the bundled pairs were made of
    [prompts] = prompts_for(model, tokenizer, wanted.policy, None, problems)
    asked = (prompts[i].ids for i in order(len(prompts), wanted.train))
    return Work(
        [Example(ids, [False] * len(ids)) for ids in asked], f"{len(prompts):,} fresh Countdown problems",
        ("reward", "mean reward"),
        lambda note: fit_prompts(model, tokenizer, prompts, {"countdown": right}, wanted.train, wanted.policy,
                                 on_log=note),
    )  # fmt: skip


WORKS: dict[str, Callable[..., Work]] = {"sft": sft_work, "warm": warm_work, "dpo": dpo_work, "rloo": rloo_work}


def countdown_pairs(model, tokenizer, problems: int = 1600, seed: int = 0) -> list[dict]:
    """Rows for notebook 07: a model's own right answer against its own wrong one, to fresh Countdown problems.

    Returns:
        Dicts with prompt, chosen, rejected, both scores, numbers and target; one for each problem with both kinds.
    """
    asked = fresh_problems(problems, seed)
    found = sample_pairs(model, tokenizer, asked, right, num_generations=8, seed=seed, max_new_tokens=32)
    return [row | {k: asked[pair.number - 1][k] for k in ("numbers", "target")}
            for row, pair in zip(found.rows, found.pairs, strict=True)]  # fmt: skip


def sft_rows(wanted: Recipe) -> list[dict]:
    """The bundled rows of the preset."""
    return load_rows([bundled(*part.split("/")) for part in wanted.preset.data])


def order(count: int, config: TrainConfig) -> list[int]:
    """Which of `count` things the steps read, in order: epoch after epoch, the last one as far as it is needed."""
    found, epoch = [], 0
    steps = total_steps(config, -(-count // config.batch_size))
    while len(found) < steps:
        found += batches(count, batch_size=config.batch_size, seed=config.seed, epoch=epoch)
        epoch += 1
    return [i for part in found[:steps] for i in part]


def _on_rows(wanted: Recipe, model, tokenizer, rows: list[dict]) -> Work:
    examples, _ = encode_rows(tokenizer, rows, max_length=context_length(model))
    return Work(
        [examples[i] for i in order(len(examples), wanted.train)], f"{len(rows):,} rows", ("loss", "loss"),
        lambda note: fit_examples(model, examples, wanted.train, on_log=note),
    )  # fmt: skip


def noting(say: Say, headline: tuple[str, str], every: int) -> tuple[list[dict], Callable]:
    """A list that gets every record, and what fills it and says a line now and then."""
    metrics: list[dict] = []
    name, words = headline

    def note(record: dict) -> None:
        metrics.append(record)
        if name in record and (record["step"] == 1 or record["step"] % every == 0):
            tell(say, f"step {record['step']}: {words} {record[name]:.2f}")

    return metrics, note


def tell(say: Say, line: str) -> None:
    """To the log and to whoever watches."""
    log.info("%s", line)
    say(line)
