"""What test_distributed.py runs in two processes: `torchrun distributed_cases.py FOLDER`; not a test itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from random_models import random_model
from test_rloo import shared_run
from torch.distributed.tensor import DTensor

from qftlab.rows.batches import Example
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, training_identity
from qftlab.train.distributed import Ranks, processes, unsharded
from qftlab.train.sft import fit_examples, sft

STEPS, HALF = 20, 10
CASES = [(sharding, is_on) for sharding in ("ddp", "fsdp") for is_on in (False, True)]


def model_of(kind: str = "full"):
    """The model that every case starts from; untied, so that embedding and head are sharded each."""
    model = random_model("qwen3", tie_word_embeddings=False)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    return model


def examples(count: int = 26, seed: int = 0) -> list[Example]:
    """Documents of very different length and number of trained tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=g).tolist()
    return [Example(torch.randint(0, 1024, (n,), generator=g).tolist(), [i % 3 > 0 for i in range(n)]) for n in lengths]


def config(**changes) -> TrainConfig:
    """Steps of 5 rows and, at the end of an epoch, of one: shares are unequal, and one process has none."""
    settings = {"lr": 1e-3, "batch_size": 5, "max_steps": STEPS, "save_every": HALF, "eval_every": HALF, "keep": 9}
    return TrainConfig(**{**settings, **changes})


def fit(settings: TrainConfig, kind: str = "full", folder: Path | None = None, resume: bool = False) -> dict:
    """Trains from the start, or resumes; returns losses, norms, held-out losses and the whole weights."""
    model, records = model_of(kind), []
    rows, held = examples(), examples(6, seed=1)
    saved = Checkpoints(folder, training_identity(model, settings, rows, held), settings.keep) if folder else None
    result = fit_examples(model, rows, settings, held_out=held, on_log=records.append, checkpoints=saved, resume=resume)
    is_sharded = [isinstance(p, DTensor) for p in model.parameters()]
    assert all(is_sharded) if Ranks.current().size > 1 and settings.sharding == "fsdp" else not any(is_sharded)
    whole = unsharded(model, lambda: model_of(kind))
    norms = [r["grad_norm"] for r in records if "loss" in r]
    weights = {n: p.detach().clone() for n, p in whole.named_parameters()} if Ranks.current().is_main else {}
    return {"losses": result.losses, "norms": norms, "held_out": [list(pair) for pair in result.held_out],
            "tokens": result.tokens, "weights": weights}  # fmt: skip


def main(folder: Path) -> None:
    """Every case, one after the other; the first process writes what came out."""
    assert Ranks.current().size == 2
    for sharding, is_on in CASES:
        name, settings = f"{sharding}-{is_on}", config(sharding=sharding, gradient_checkpointing=is_on)
        keep(folder / f"{name}.pt", fit(settings, folder=folder / name))
    for sharding in ("ddp", "fsdp"):
        keep(folder / f"{sharding}-small.pt", fit(config(sharding=sharding, micro_batch_size=1)))
        keep(folder / f"{sharding}-lora.pt", fit(config(sharding=sharding), "lora"))
        # From one process to two.
        keep(folder / f"{sharding}-resumed.pt", fit(config(sharding=sharding), folder=folder / f"from-one-{sharding}",
                                                    resume=True))  # fmt: skip
    files = json.loads((folder / "files.json").read_text())
    for sharding in ("ddp", "fsdp"):
        train = TrainConfig(lr=1e-2, max_steps=6, batch_size=8, save_every=3, sharding=sharding)
        sft(SFTConfig(**files, output=str(folder / f"runs-{sharding}"), device="cpu", train=train))
    for updates in (1, 2):
        keep(folder / f"rloo-{updates}.pt", shared_run(updates))
    broken = examples()
    broken[7] = Example([5] * 4, [False, True, True, True])
    model = model_of()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    message = ""
    try:
        fit_examples(model, broken, config())
    except ArithmeticError as error:
        message = str(error)
    messages = Ranks.current().gather(message)
    keep(folder / "messages.pt", {"messages": messages})


def keep(path: Path, content) -> None:
    """Written by the first process."""
    if Ranks.current().is_main:
        torch.save(content, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes("cpu"):
        main(Path(sys.argv[1]))
