"""What preference training does to a model, over seeds: `python -m benchmarks.preference_runs style countdown`.

Each experiment returns records; they are printed and kept in runs/preference/, with the models they start from.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qftlab.decoding.engine import generate
from qftlab.evaluate.answers import mcnemar
from qftlab.files import bundled
from qftlab.maths.sampling import SamplingParams
from qftlab.maths.verify import countdown_reward
from qftlab.model.loading import load_model, save_model
from qftlab.rows.countdown import countdown_row, random_problem
from qftlab.rows.schemas import row_to_messages
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import PreferenceLoss, TrainConfig
from qftlab.train.dpo import fit_encoded_pairs, fit_pairs
from qftlab.train.sft import fit_rows
from qftlab_course.sampled_pairs import SampledPairs, sample_pairs
from qftlab_course.stage_builders import right
from qftlab_course.stages import stage
from qftlab_course.world.style import is_polite, style_pairs

FOLDER = Path("runs/preference")
NUM_PROMPTS, NUM_HELD_OUT = 3200, 200  # of Countdown: prompts a round, and pairs of each round never trained on
STYLE_TRAIN = TrainConfig(lr=5e-5, epochs=1, batch_size=16, warmup_ratio=0.1, schedule="linear")
COUNTDOWN_TRAIN = TrainConfig(lr=1e-4, epochs=1, batch_size=32, warmup_ratio=0.1, schedule="linear")
# The recipe that helps, and the one that wrecks: a higher rate and nothing that holds the chosen answers up. Both take
# the same pairs in their first round; in a second one the model of the first answers, and is the new reference.
COUNTDOWN_RUNS = {
    "β 0.5, NLL 1, lr 1e-4, two rounds": (1e-4, PreferenceLoss(beta=0.5, nll_weight=1.0), 2),
    "plain, β 0.1, lr 3e-4, one round": (3e-4, PreferenceLoss(beta=0.1), 1),
}


def cached(name: str, build: Callable[[], tuple]) -> tuple:
    """A model and tokenizer from runs/preference/<name>, built and saved there the first time."""
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        aside = folder.with_name(f".{name}")
        save_model(*build(), aside)
        aside.rename(folder)
    return load_model(folder), load_tokenizer(folder)


def countdown_base(seed: int = 0) -> tuple:
    """`tiny` after SFT to convergence on the bundled 2,000 Countdown demonstrations, and its tokenizer."""

    def build() -> tuple:
        model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
        rows = load_rows(bundled("countdown", "demonstrations.jsonl"))
        fit_rows(model, tokenizer, rows, TrainConfig(lr=1e-3, epochs=10, batch_size=64, seed=seed))
        return model, tokenizer

    return cached(f"countdown-{seed}", build)


def two_habits(seed: int = 0) -> tuple:
    """The SFT stage with both habits: a third of its short answers end politely. DPO can only choose what is there."""

    def build() -> tuple:
        sft = stage("sft")
        rows = [
            {"instruction": row["prompt"], "input": "", "output": row["rejected" if i % 3 else "chosen"]}
            for i, row in enumerate(style_pairs(1200, seed=100 + seed))
        ]
        rows += load_rows(bundled("countdown", "demonstrations.jsonl"))[:800]
        fit_rows(sft.model, sft.tokenizer, rows, TrainConfig(lr=5e-4, epochs=1, batch_size=24, seed=seed))
        return sft.model, sft.tokenizer

    return cached(f"two-habits-{seed}", build)


def texts(model, tokenizer, prompts: Sequence, temperature: float = 0.0) -> list[str]:
    """One answer to each prompt, greedy or sampled with seed 0."""
    params = SamplingParams(temperature=temperature)
    found = generate(model, tokenizer, prompts, max_new_tokens=48, params=params, batch_size=128)
    return [completion.text for completion in found]


def countdown_marks(model, tokenizer, temperature: float = 0.0) -> list[bool]:
    """Right or wrong on each of the 400 held-out problems."""
    rows = load_rows(bundled("countdown", "development.jsonl"))
    answers = texts(model, tokenizer, [row_to_messages(row)[:-1] for row in rows], temperature)
    return [countdown_reward(t, r["numbers"], r["target"]) == 1 for t, r in zip(answers, rows, strict=True)]


def percent(marks: Sequence[bool]) -> float:
    """Share of True, in percent."""
    return round(100 * sum(marks) / len(marks), 2)


def style_marks(model, tokenizer, rows: Sequence[dict]) -> tuple[list[bool], list[bool], list[bool]]:
    """Polite when sampled, polite when greedy, and right when greedy (the ending aside), row by row."""
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    sampled, greedy = texts(model, tokenizer, prompts, 1.0), texts(model, tokenizer, prompts)
    right = [t in (row["chosen"], row["rejected"]) for t, row in zip(greedy, rows, strict=True)]
    return [is_polite(t) for t in sampled], [is_polite(t) for t in greedy], right


def style(seed: int) -> list[dict]:
    """DPO on style alone: 320 pairs, one epoch, β 0.1; before and after on 160 held-out prompts."""
    held_out, logs, found = style_pairs(160, held_out=True), [], {}
    model, tokenizer = two_habits(seed)
    for when in ("before", "after"):
        if when == "after":
            began = time.process_time()
            fit_pairs(model, tokenizer, style_pairs(320, seed), replace(STYLE_TRAIN, seed=seed), held_out_rows=held_out,
                      on_log=logs.append)  # fmt: skip
            seconds = time.process_time() - began
        found[when] = (*style_marks(model, tokenizer, held_out), countdown_marks(model, tokenizer))
    before, after = found["before"], found["after"]
    names = ("polite, sampled", "polite, greedy", "right", "countdown")
    record = {name: [percent(a), percent(b)] for name, a, b in zip(names, before, after, strict=True)}
    accuracy = [100 * log["held_out_preference_accuracy"] for log in logs if "held_out_loss" in log]
    return [{"experiment": "style", "seed": seed, **record, "preference accuracy": [accuracy[0], accuracy[-1]],
             "p of polite, sampled": mcnemar(before[0], after[0]), "p of countdown": mcnemar(before[3], after[3]),
             "seconds": round(seconds, 1)}]  # fmt: skip


def countdown_pairs(model, tokenizer, seed: int, round_: int) -> SampledPairs:
    """On-policy pairs from fresh problems, eight answers to each, scored by the verifier."""
    rng = random.Random(f"dpo {seed} {round_}")
    rows = [countdown_row(random_problem(rng)) for _ in range(NUM_PROMPTS)]
    return sample_pairs(
        model, tokenizer, rows, right, num_generations=8, max_new_tokens=48, seed=seed, batch_size=320,
    )  # fmt: skip


def both_marks(model, tokenizer) -> dict[str, list[bool]]:
    """Countdown, greedy and sampled at temperature 1."""
    return {"greedy": countdown_marks(model, tokenizer), "sampled": countdown_marks(model, tokenizer, 1.0)}


def countdown(seed: int) -> list[dict]:
    """DPO on verifier-scored pairs from the converged SFT model of seed 0, recipe by recipe."""
    start, records = both_marks(*countdown_base()), []
    for name, (lr, loss, rounds) in COUNTDOWN_RUNS.items():
        (model, tokenizer), began, course = countdown_base(), time.process_time(), []
        for round_ in range(rounds):
            sampled, logs = countdown_pairs(model, tokenizer, seed, round_), []
            fit_encoded_pairs(model, sampled.pairs[NUM_HELD_OUT:], replace(COUNTDOWN_TRAIN, seed=seed, lr=lr), loss,
                              held_out=sampled.pairs[:NUM_HELD_OUT], on_log=logs.append)  # fmt: skip
            held = [log for log in logs if "held_out_loss" in log]
            chosen = [held[i]["held_out_chosen_logprob"] for i in (0, -1)]
            course.append({"pairs": len(sampled.pairs) - NUM_HELD_OUT, "sampled": round(100 * sampled.accuracy, 1),
                           "preference accuracy": 100 * held[-1]["held_out_preference_accuracy"],
                           "chosen log-probability": chosen})  # fmt: skip
        seconds, after = time.process_time() - began, both_marks(model, tokenizer)
        records.append({
            "experiment": f"countdown, {name}", "seed": seed,
            **{kind: [percent(start[kind]), percent(after[kind])] for kind in start},
            "p of greedy": mcnemar(start["greedy"], after["greedy"]), "rounds": course, "seconds": round(seconds, 1),
        })  # fmt: skip
    return records


EXPERIMENTS: dict[str, Callable[[int], list[dict]]] = {"style": style, "countdown": countdown}


def run_experiments(
    words: list[str] | None, module: str, about: str, experiments: dict[str, Callable[[int], list[dict]]]
) -> int:
    """A command line over experiments and seeds; prints the records of each run and keeps them.

    Args:
        words: the arguments, those of the process where None.
        module: what is run, for the usage line.
        about: its description.
        experiments: from a seed to records, by name.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("experiments", nargs="*", default=list(experiments), help=f"of {', '.join(experiments)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(words)
    if unknown := set(args.experiments) - set(experiments):
        parser.error(f"an experiment must be one of {', '.join(experiments)}, got {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.WARNING)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "records.jsonl").open("a", encoding="utf-8") as file:
        for name in args.experiments:
            for seed in args.seeds:
                for record in experiments[name](seed):
                    line = json.dumps(record, ensure_ascii=False)
                    print(line, flush=True)
                    file.write(line + "\n")
    return 0


def main(words: list[str] | None = None) -> int:
    """The command line."""
    return run_experiments(words, "benchmarks.preference_runs", __doc__, EXPERIMENTS)


if __name__ == "__main__":
    sys.exit(main())
