"""C5 on the CPU, and the first row of G6 on one GPU: direct preference optimisation against TRL."""

from __future__ import annotations

import contextlib
import io
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness import Benchmark, Options, Side, compare, synchronize
from benchmarks.models import bench_config, half_billion_config, starting_model, word_tokenizer
from benchmarks.training import CONSTANT, restarted, same_losses, same_means
from qftlab.model.attention import register_packed_attention
from qftlab.rows.batches import Example, batches
from qftlab.rows.examples import Pair
from qftlab.settings import PreferenceLoss, TrainConfig
from qftlab.train.dpo import PairSource, PairStep, Reference, fit_encoded_pairs
from qftlab.train.optimizer import make_optimizer
from qftlab.train.step import to_device


@dataclass(frozen=True)
class PairWorkload:
    """What every side trains: the same pairs in the same order from the same weights, at the same precision.

    Args:
        config: shape of the random model.
        pairs: in the order of the first epoch.
        batch_size: pairs in an optimizer step.
        device, dtype: of the weights; nothing is cast besides.
    """

    config: Qwen2Config
    pairs: list[Pair]
    batch_size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self, attention: str) -> Qwen2ForCausalLM:
        """The model at its starting weights."""
        return starting_model(self.config, attention, device=self.device, dtype=self.dtype)

    @property
    def real_tokens(self) -> int:
        """Tokens of both documents of all pairs, padding left out."""
        return sum(pair.length for pair in self.pairs)

    @property
    def padding(self) -> float:
        """Tokens of the padded batches for each real one."""
        groups = [self.pairs[i : i + self.batch_size] for i in range(0, len(self.pairs), self.batch_size)]
        widths = [max(len(e.input_ids) for p in group for e in (p.chosen, p.rejected)) for group in groups]
        return sum(2 * len(g) * w for g, w in zip(groups, widths, strict=True)) / self.real_tokens

    def stored(self) -> list[Pair]:
        """The pairs in the order that the shuffle of epoch 0 brings back to `pairs`."""
        groups = batches(len(self.pairs), batch_size=self.batch_size, seed=0, epoch=0)
        stored = list(self.pairs)
        for place, i in enumerate(i for group in groups for i in group):
            stored[i] = self.pairs[place]
        return stored


def lognormal_pairs(number: int, *, prompt: float, answer: float, longest: int, vocabulary: int) -> list[Pair]:
    """Random pairs: prompt and both answers of log-normal length (sigma 0.8) with these medians, cut at `longest`."""
    draw = random.Random(0)

    def ids(median: float) -> list[int]:
        size = min(longest, max(2, round(draw.lognormvariate(math.log(median), 0.8))))
        return [draw.randrange(2, vocabulary) for _ in range(size)]

    pairs = []
    for i in range(number):
        start, answers = ids(prompt), (ids(answer), ids(answer))
        made = [Example(start + a, [False] * len(start) + [True] * len(a)) for a in answers]
        pairs.append(Pair(*made, i + 1))
    return pairs


def ours(work: PairWorkload, *, is_known: bool, **settings) -> Callable[[], list[float]]:
    """The library's loop; returns the losses of its steps.

    Args:
        work: what is trained.
        is_known: whether the reference's log-probabilities are in their file before the clock starts.
        settings: further settings of the loop.
    """
    model, stored = work.model(register_packed_attention()), work.stored()
    config = TrainConfig(lr=1e-4, epochs=1, batch_size=work.batch_size, **CONSTANT, **settings)
    cache = Path(tempfile.mkdtemp()) / "reference.safetensors" if is_known else None
    return restarted(model, lambda: fit_encoded_pairs(model, stored, config, cache=cache).losses)


def trainer(work: PairWorkload, *, is_known: bool = False, **settings) -> Callable[[], list[float]]:
    """TRL's `DPOTrainer` on the pairs, in their order; with `is_known` it is given the reference's numbers."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = work.model("sdpa"), word_tokenizer(work.config.vocab_size)
    tokenizer.pad_token, tokenizer.eos_token = "0", "1"
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)  # where TRL looks for the reference
    model.config._name_or_path = folder
    arguments = DPOConfig(**{
        "output_dir": folder, "use_cpu": work.device == "cpu", "bf16": False, "learning_rate": 1e-4,
        "per_device_train_batch_size": work.batch_size, "num_train_epochs": 1, "logging_steps": 1,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.98, "report_to": [], "max_length": None,
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": is_known, **settings,
    })  # fmt: skip
    dummy = Dataset.from_list([{"prompt": "2", "chosen": "3", "rejected": "4"}])
    with contextlib.redirect_stdout(io.StringIO()):
        it = DPOTrainer(model, args=arguments, train_dataset=dummy, processing_class=tokenizer)
    # It tokenises text; these pairs are ids already.
    it.train_dataset = Dataset.from_list(trl_rows(work, is_known))

    def train() -> list[float]:
        it.optimizer = it.lr_scheduler = None  # a trainer keeps them from one call to the next
        with contextlib.redirect_stdout(io.StringIO()):
            it.train()
        return [entry["loss"] for entry in it.state.log_history if "loss" in entry]

    return restarted(model, train)


def trl_rows(work: PairWorkload, is_known: bool) -> list[dict]:
    """The pairs as TRL has them after tokenising, with the reference's log-probabilities if they are known."""
    rows = []
    for pair in work.pairs:
        at = pair.chosen.loss_mask.index(True)
        rows.append({"prompt_ids": pair.chosen.input_ids[:at], "chosen_ids": pair.chosen.input_ids[at:],
                     "rejected_ids": pair.rejected.input_ids[at:]})  # fmt: skip
    if is_known:
        for row, (chosen, rejected) in zip(rows, reference(work).tolist(), strict=True):
            row.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    return rows


def reference(work: PairWorkload) -> Tensor:
    """The reference's log-probabilities of the pairs, (N, 2)."""
    config = TrainConfig(batch_size=work.batch_size)
    return Reference(work.model(register_packed_attention()), "start", config).logprobs(work.pairs)


def summed_size(work: PairWorkload) -> float:
    """What is rounded in a loss of DPO, for `rounding`: β times the log-probabilities of a pair, as sums of tokens."""
    counts = torch.tensor([[sum(e.loss_mask) for e in (pair.chosen, pair.rejected)] for pair in work.pairs])
    return PreferenceLoss().beta * (reference(work) / counts.sqrt()).norm(dim=1).mean().item()


def phases(work: PairWorkload) -> dict[str, float]:
    """Seconds of each part of one epoch of ours: what the ratios are made of; one warm epoch, by the bench's clock."""
    model = work.model(register_packed_attention())
    config = TrainConfig(lr=1e-4, batch_size=work.batch_size, **CONSTANT)
    step, clock = PairStep(model, PreferenceLoss()), time.perf_counter if work.device == "cuda" else time.process_time
    optimizer, found, last = make_optimizer(step, config), {}, [0.0]

    def lap(name: str | None = None) -> None:
        synchronize(work.device)
        now = clock()
        if name:
            found[name] = round(found.get(name, 0.0) + now - last[0], 4)
        last[0] = now

    for is_counted in (False, True):
        if is_counted:
            found.clear()
        lap()
        known = Reference(model, "start", config).logprobs(work.pairs)
        lap("reference")
        source = PairSource(work.pairs, known, config)
        for i in range(source.steps_per_epoch):
            [part] = source(0, i)
            batch = to_device(part.tensors, torch.device(work.device))
            lap("batches")
            loss = step(**batch, num_tokens=work.batch_size)
            lap("forward")
            loss.backward()
            lap("backward")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            lap("clip and optimizer")
    return found


def c5(options: Options) -> Iterator[dict]:
    """24 pairs, 6 optimizer steps of 4, fp32 on both sides: once with the reference to compute, once with it known."""
    sizes = {"prompt": options.sized(50, 6), "answer": options.sized(100, 8), "longest": options.sized(512, 20)}
    work = PairWorkload(bench_config(), lognormal_pairs(options.sized(24, 8), vocabulary=2048, **sizes), 4)
    title = f"{len(work.pairs)} pairs, {work.real_tokens} tokens, {work.padding:.2f} x that when padded"
    fast, same = {"gradient_checkpointing": False}, partial(same_losses, size=summed_size(work))
    plans = {
        "reference in the run": (False, [("TRL, default", {}, 2.9), ("TRL, no gradient checkpointing", fast, 2.5)]),
        "reference known": (True, [("TRL, reference precomputed", {}, 2.5),
                                   ("TRL, precomputed, no gradient checkpointing", fast, None)]),
    }  # fmt: skip
    for name, (is_known, others) in plans.items():
        sides = [Side("qftlab", ours(work, is_known=is_known))]
        sides += [Side(label, trainer(work, is_known=is_known, **given), bar, bar and 3.5)
                  for label, given, bar in others]  # fmt: skip
        yield compare(f"{title}; {name}", sides, options, count=lambda _: work.real_tokens, same=same,
                      facts={"phases": phases(work)})  # fmt: skip


def preference_row(options: Options) -> dict:
    """G6's row of DPO: three optimizer steps of 32 pairs of Qwen2.5-0.5B's shape, bf16 weights on both sides.

    TRL has micro-batches of 8 pairs and no gradient checkpointing; the reference is computed in the run by both.
    """
    config = bench_config() if options.quick else half_billion_config()
    sizes = {"prompt": options.sized(150, 6), "answer": options.sized(200, 8), "longest": options.sized(768, 20)}
    pairs = lognormal_pairs(options.sized(96, 8), vocabulary=config.vocab_size, **sizes)
    work = PairWorkload(config, pairs, options.sized(32, 4), options.device, torch.bfloat16)
    part = options.sized(8, 4)
    fast = {"gradient_checkpointing": False, "per_device_train_batch_size": part,
            "gradient_accumulation_steps": work.batch_size // part}  # fmt: skip
    sides = [Side("qftlab", ours(work, is_known=False, tokens_per_micro_batch=options.sized(32_768, 400))),
             Side("TRL, no gradient checkpointing", trainer(work, **fast), 3, 5)]  # fmt: skip
    title = f"DPO: {len(pairs)} pairs, {work.real_tokens} tokens, {work.padding:.2f} x that when padded"
    return compare(title, sides, options, count=lambda _: work.real_tokens, same=same_means)


BENCHMARKS = {"C5": Benchmark("DPO, 24 pairs, batch 4", "TRL DPOTrainer, default and reference precomputed", c5)}
