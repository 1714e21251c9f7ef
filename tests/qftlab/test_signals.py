"""Runs of every stage stopped by signals at random moments end as if nothing had happened: the same bytes.

Ctrl-C once and twice, SIGTERM, and SIGKILL, also inside the writes of checkpoints; then the run goes on to its end.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from random_models import random_model
from random_signals import disturbed

from qftlab.files import bundled, sha256
from qftlab.model.loading import save_model
from qftlab.rows.countdown import fresh_problems
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import DPOConfig, PolicyConfig, RewardConfig, RLOOConfig, RunConfig, SFTConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, read_state
from qftlab.train.dpo import dpo
from qftlab.train.reward import reward
from qftlab.train.rloo import rloo
from qftlab.train.sft import sft

STAGES = {"sft": sft, "dpo": dpo, "rloo": rloo, "reward": reward}


def config_of(stage: str, folder: Path, output: str, resume: str | None = None) -> RunConfig:
    train = {"lr": 3e-3, "max_steps": 8, "batch_size": 3, "eval_every": 4, "save_every": 1}
    shared = {"model": str(folder / "start"), "output": str(folder / output), "device": "cpu", "resume": resume}
    if stage == "rloo":
        policy = PolicyConfig(num_generations=2, max_new_tokens=6, beta=0.1)
        return RLOOConfig(problems=12, held_out=str(folder / "problems.jsonl"), policy=policy,
                          rewards=("countdown", "answer"), train=TrainConfig(**train), **shared)  # fmt: skip
    kind = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}[stage]
    rows = "rows" if stage == "sft" else "pairs"
    return kind(data=str(folder / f"{rows}.jsonl"), held_out=str(folder / f"{rows}-held.jsonl"),
                train=TrainConfig(**train), **shared)  # fmt: skip


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A folder with a random model that has dropout, and rows, pairs and problems."""
    folder = tmp_path_factory.mktemp("signals")
    save_model(random_model(attention_dropout=0.1), load_tokenizer("tiny"), folder / "start")
    rows = load_rows(bundled("instructions", "train.jsonl"))[:30]
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"not {row['output']}"} for row in rows
    ]
    files = {"rows": rows[:24], "rows-held": rows[24:], "pairs": pairs[:24], "pairs-held": pairs[24:],
             "problems": fresh_problems(3, 9)}  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(little) -> dict[str, Path]:
    """The runs that nobody disturbs."""
    torch.set_num_threads(1)
    return {stage: run(config_of(stage, little, f"whole-{stage}")) for stage, run in STAGES.items()}


def begin_or_go_on(stage: str, folder: Path, output: str) -> Path:
    """Begins a run, or goes on with it if one has begun."""
    begun = any((folder / output).glob("*/metrics.jsonl"))
    return STAGES[stage](config_of(stage, folder, output, "last" if begun else None))


def signals(little: Path, whole: dict[str, Path], count: int, seed: int) -> None:
    chance, clock = random.Random(seed), time.perf_counter()
    sft(config_of("sft", little, f"timed-{seed}"))
    seconds = time.perf_counter() - clock
    for number in range(count):
        stage = list(STAGES)[number % 4]
        output = f"{stage}-{seed}-{number}"
        disturbed(begin_or_go_on, (stage, little, output), little / output, chance, seconds)
        found = [Checkpoints(path).last() for path in (little / output).glob(f"*/checkpoints/{stage}")]
        last = found[0] if found else None
        step = read_state(last)["result"]["steps"] if last else 0
        run = begin_or_go_on(stage, little, output)
        assert step <= 8 and (step == 0 or Checkpoints(run / "checkpoints" / stage).last().name == "step-000008")
        ours, theirs = (sha256(path / "model" / "model.safetensors") for path in (run, whole[stage]))
        assert ours == theirs, output
        assert records(run) == records(whole[stage]), output


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = ("seconds", "per_second", "peak_gb")
    return [{k: v for k, v in line.items() if not k.endswith(timing)} for line in lines]


@pytest.mark.long
def test_ten_signals_change_nothing(little, whole) -> None:
    signals(little, whole, 10, seed=1)


@pytest.mark.slow
def test_a_hundred_signals_change_nothing(little, whole) -> None:
    signals(little, whole, 100, seed=2)
