"""Two processes train as one: DDP through accelerate and FSDP2, on gloo, in one launch of torchrun.

Tolerance 1e-5, on losses of about 7 and weights of about 1: sums in another order, and Adam's division by roots of
nearly nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, HALF, STEPS, config, examples, fit
from random_models import random_model
from test_rloo import shared_run

from qftlab.files import bundled
from qftlab.model.loading import load_model, save_model
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import SFTConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints
from qftlab.train.distributed import Ranks, rank_share
from qftlab.train.sft import ExampleSource, sft

pytestmark = pytest.mark.distributed
HERE = Path(__file__).resolve().parent


def launch(folder: Path) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), str(HERE / "distributed_cases.py"), str(folder)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with what two processes made of every case."""
    folder = tmp_path_factory.mktemp("two")
    save_model(random_model(), load_tokenizer("tiny"), folder / "start")
    rows = load_rows(bundled("instructions", "train.jsonl"))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:32])), encoding="utf-8")
    files = {"model": str(folder / "start"), "data": str(folder / "train.jsonl")}
    (folder / "files.json").write_text(json.dumps(files))
    for sharding in ("ddp", "fsdp"):  # what is begun by one process and resumed by two
        part = folder / f"from-one-{sharding}"
        fit(config(), folder=part)
        for path in Checkpoints(part).all()[1:]:
            shutil.rmtree(path)
    launch(folder)
    return folder


@pytest.fixture(scope="module")
def one() -> dict:
    """The same run in one process."""
    return fit(config())


def assert_agree(ours: dict, theirs: dict) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5) and len(ours["losses"]) == STEPS
    for (step, loss), (other, expected) in zip(ours["held_out"], theirs["held_out"], strict=True):
        assert step == other and loss == pytest.approx(expected, abs=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("sharding", "is_on"), CASES)
def test_two_processes_are_one(two, one, sharding: str, is_on: bool) -> None:
    """The parameters were DTensors under FSDP2: distributed_cases.fit asserts it."""
    found = torch.load(two / f"{sharding}-{is_on}.pt")
    assert_agree(found, one)
    assert found["norms"] == pytest.approx(one["norms"], rel=1e-4)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_small_micro_batches_and_adapters_agree_as_well(two, one, sharding: str) -> None:
    assert_agree(torch.load(two / f"{sharding}-small.pt"), one)
    assert_agree(torch.load(two / f"{sharding}-lora.pt"), fit(config(), "lora"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_one_to_two_and_two_to_one_processes(two, one, sharding: str, tmp_path) -> None:
    assert_agree(torch.load(two / f"{sharding}-resumed.pt"), {**one})
    folder = two / f"{sharding}-False"
    paths = Checkpoints(folder).all()
    assert [int(p.name[-6:]) for p in paths] == [HALF, STEPS]
    (tmp_path / "c").mkdir()
    paths[0].rename(tmp_path / "c" / paths[0].name)
    assert_agree(fit(config(), folder=tmp_path / "c", resume=True), one)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_sft_in_two_processes_writes_one_run(two, sharding: str, tmp_path) -> None:
    runs = [p for p in (two / f"runs-{sharding}").iterdir() if not p.is_symlink()]
    assert len(runs) == 1
    run = runs[0]
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "curves.png", "metrics.jsonl",
                                                     "model", "token_usage.json"]  # fmt: skip
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    files = json.loads((two / "files.json").read_text())
    train = TrainConfig(lr=1e-2, max_steps=6, batch_size=8, save_every=3)
    alone = sft(SFTConfig(**files, output=str(tmp_path), device="cpu", train=train))
    ours, theirs = (dict(load_model(folder / "model").named_parameters()) for folder in (run, alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("updates", [1, 2])
def test_rloo_in_two_processes_trains_as_in_one(two, updates: int) -> None:
    """Each samples its share of the prompts; the second has none in an epoch's last step."""
    losses, weights = torch.load(two / f"rloo-{updates}.pt")
    ours, expected = shared_run(updates)
    assert losses == pytest.approx(ours, abs=1e-5)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


def test_every_process_names_the_rows_of_a_loss_that_is_no_number(two) -> None:
    messages = torch.load(two / "messages.pt")["messages"]
    assert messages[0] == messages[1]
    assert "loss must be finite, got nan at step" in messages[0] and " 7" in messages[0]


def test_shares_are_the_whole_and_equally_many() -> None:
    source = ExampleSource(examples(7), config(batch_size=7, micro_batch_size=1))
    shares = [rank_share(source(0, 0), Ranks(rank, 3)) for rank in range(3)]
    assert {len(share) for share in shares} == {3}
    real = [m.rows for share in shares for m in share if m.weight]
    assert sorted(real) == sorted(m.rows for m in source(0, 0))
    lonely = ExampleSource(examples(1), config())
    shares = [rank_share(lonely(0, 0), Ranks(rank, 2)) for rank in range(2)]
    assert [[m.weight for m in share] for share in shares] == [[1.0], [0.0]]
