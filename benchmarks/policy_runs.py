"""What RLOO does to a model, over seeds: `python -m benchmarks.policy_runs rloo tour --seeds 0 1 2`.

Each experiment returns a record; it is printed and kept in runs/preference/, with the models they start from. The hack
of notebook 08 and its repair are in benchmarks/records.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.preference_runs import both_marks, countdown_base, percent, run_experiments
from qftlab.evaluate.answers import mcnemar
from qftlab.rows.countdown import fresh_problems
from qftlab.settings import PolicyConfig, TrainConfig
from qftlab.train.rloo import fit_policy
from qftlab_course.stage_builders import right
from qftlab_course.stages import recipe

# Above 1 fewer groups of answers are all alike; accuracy is measured at 1, and greedy.
POLICY = PolicyConfig(num_generations=8, max_new_tokens=32, temperature=1.3)
COMMON = {"batch_size": 64, "warmup_ratio": 0.05, "weight_decay": 0.0}
TOUR = recipe("rloo")
RLOO_TRAIN = TrainConfig(lr=3e-4, max_steps=125, schedule="linear", **COMMON)


def accuracy(seed: int, name: str, config: TrainConfig, policy: PolicyConfig = POLICY) -> dict:
    """RLOO from the converged SFT model of seed 0: held-out accuracy before and after, in percent."""
    before = both_marks(*countdown_base())
    (model, tokenizer), logs = countdown_base(), []
    problems, began = fresh_problems(config.batch_size * config.max_steps, seed), time.process_time()
    fit_policy(model, tokenizer, problems, right, replace(config, seed=seed), policy, on_log=logs.append)
    seconds, after = round(time.process_time() - began, 1), both_marks(model, tokenizer)
    return {"experiment": name, "seed": seed, "steps": config.max_steps,
            **{kind: [percent(before[kind]), percent(after[kind])] for kind in before},
            **{f"p of {kind}": mcnemar(before[kind], after[kind]) for kind in before},
            "equal groups": [logs[i]["equal_groups"] for i in (0, -1)],
            "entropy": [round(logs[i]["entropy"], 3) for i in (0, -1)], "seconds": seconds}  # fmt: skip


EXPERIMENTS: dict[str, Callable[[int], list[dict]]] = {
    "rloo": lambda seed: [accuracy(seed, "rloo", RLOO_TRAIN)],
    "tour": lambda seed: [accuracy(seed, "rloo, the tour's", TOUR.train, TOUR.policy)],
}


def main(words: list[str] | None = None) -> int:
    """The command line."""
    return run_experiments(words, "benchmarks.policy_runs", __doc__, EXPERIMENTS)


if __name__ == "__main__":
    sys.exit(main())
