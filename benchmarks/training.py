"""C4 on the CPU, G1 and G2 on one GPU: supervised fine-tuning against TRL, transformers and a plain loop."""

from __future__ import annotations

import contextlib
import io
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness import Benchmark, MismatchError, Options, Side, compare, judge
from benchmarks.models import bench_config, ceilings, half_billion_config, starting_model, word_tokenizer
from qftlab.maths.logprobs import HeadTerm, chunk_tokens, linear_cross_entropy
from qftlab.model.attention import register_packed_attention
from qftlab.rows.batches import Example, batches, pad
from qftlab.settings import TrainConfig
from qftlab.train.sft import fit_examples

CONSTANT = {"warmup_ratio": 0.0, "schedule": "constant", "weight_decay": 0.0, "log_every": 10**6}


@dataclass(frozen=True)
class Workload:
    """What every side trains: the same rows in the same order from the same weights, at the same precision.

    Args:
        config: shape of the random model.
        rows: in the order of the first epoch.
        batch_size: rows in an optimizer step.
        device, dtype: of the weights; nothing is cast besides.
    """

    config: Qwen2Config
    rows: list[Example]
    batch_size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self, attention: str) -> Qwen2ForCausalLM:
        """The model at its starting weights."""
        return starting_model(self.config, attention, device=self.device, dtype=self.dtype)

    @property
    def real_tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return sum(len(row.input_ids) for row in self.rows)


def lognormal_rows(number: int, *, median: float, sigma: float, longest: int, vocabulary: int, trained: float = 0.5):
    """Random rows whose lengths are log-normal, cut at `longest`; the last share `trained` of each is trained.

    The 1,000 rows of the Alpaca sample in characters have sigma 0.79; 0.8 is taken for tokens.
    """
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        n = min(longest, max(8, round(draw.lognormvariate(math.log(median), sigma))))
        ids = [draw.randrange(2, vocabulary) for _ in range(n)]
        rows.append(Example(ids, [i >= n * (1 - trained) for i in range(n)]))
    return rows


def restarted(model: torch.nn.Module, train: Callable[[], list[float]]) -> Callable[[], list[float]]:
    """`train` from the starting weights each time."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run() -> list[float]:
        model.load_state_dict(start)
        return train()

    return run


def ours(work: Workload, **settings) -> Callable[[], list[float]]:
    """The library's loop; returns the losses of its steps."""
    model = work.model(register_packed_attention())
    # An order given beforehand: rows are stored so that the shuffle of epoch 0 brings them back to `work.rows`.
    order = [i for group in batches(len(work.rows), batch_size=work.batch_size, seed=0, epoch=0) for i in group]
    stored = list(work.rows)
    for place, i in enumerate(order):
        stored[i] = work.rows[place]
    config = TrainConfig(lr=1e-4, epochs=1, batch_size=work.batch_size, **{**CONSTANT, **settings})
    return restarted(model, lambda: fit_examples(model, stored, config).losses)


def padded_loop(work: Workload) -> Callable[[], list[float]]:
    """The loop of a tutorial: padded batches, whole logits, fused AdamW."""
    model = work.model("sdpa")

    def train() -> list[float]:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        losses = []
        for i in range(0, len(work.rows), work.batch_size):
            batch = pad(work.rows[i : i + work.batch_size], pad_id=0)
            loss = model(**{k: v.to(work.device) for k, v in batch.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    return restarted(model, train)


def trainer(kind: str, work: Workload, **settings) -> Callable[[], list[float]]:
    """TRL's `SFTTrainer` or transformers' `Trainer` ("trl", "transformers") on the rows, in their order."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = work.model("sdpa"), word_tokenizer(work.config.vocab_size)
    tokenizer.pad_token, tokenizer.eos_token = "0", "1"
    common = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": work.device == "cpu", "bf16": False, "learning_rate": 1e-4,
        "per_device_train_batch_size": work.batch_size, "num_train_epochs": 1, "logging_steps": 1,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.98, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels()} for row in work.rows])
    if kind == "trl":
        arguments = SFTConfig(**{**common, "max_length": None, **settings})
        it = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    else:
        arguments = TrainingArguments(**{**common, **settings})
        data = data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
        it = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), data)

    def train() -> list[float]:
        it.optimizer = it.lr_scheduler = None  # a trainer keeps them from one call to the next
        with contextlib.redirect_stdout(io.StringIO()):
            it.train()
        return [entry["loss"] for entry in it.state.log_history if "loss" in entry]

    return restarted(model, train)


def rounding(size: float, steps: int) -> float:
    """How far the fp32 losses of two right sides may lie apart after so many optimizer steps, in nats.

    About twenty products and sums stand between weights and a loss. Each rounds by eps, and independent errors add as
    the root of their squares: 4 eps a side, 8 for both. An update hands the difference on to the next step, which adds
    its own, so the bound grows with the steps.

    Args:
        size: of what is rounded, in nats: a mean itself; a · √n for a sum of n tokens of a nats each.
        steps: 1 for the first.
    """
    return 8 * steps * torch.finfo(torch.float32).eps * size


def same_losses(ours: list[float], theirs: list[float], size: float | None = None) -> str:
    """Every step's loss within `rounding`; where a side packs its own batches, see `same_means`.

    Args:
        ours, theirs: losses of the steps (nats).
        size: for `rounding`; by default the first loss, a mean of tokens' nats.

    Raises:
        MismatchError: if they are not.
    """
    if len(ours) != len(theirs):
        return same_means(ours, theirs)
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    shares = [gap / rounding(size or ours[0], step) for step, gap in enumerate(gaps, 1)]
    found = f"{max(gaps):.2g}, {max(shares):.2g} x their rounding"
    if not all(share <= 1 for share in shares):
        raise MismatchError(f"losses of {len(ours)} steps differ by {found}")
    return f"losses of {len(ours)} steps within {found}"


def same_means(ours: list[float], theirs: list[float]) -> str:
    """For a side that packs its own batches: mean losses of the run within 1 %.

    Raises:
        MismatchError: if they are not.
    """
    a, b = (sum(losses) / len(losses) for losses in (ours, theirs))
    if abs(a - b) > 0.01 * a:
        raise MismatchError(f"mean losses differ: {a:.4f} and {b:.4f}")
    return f"its own batches, {len(theirs)} steps: mean losses {a:.3f} and {b:.3f}"


def c4(options: Options) -> Iterator[dict]:
    """96 rows of log-normal length, 12 optimizer steps of 8 rows, half of each row trained, fp32 on both sides.

    TRL packs by its own plan, so its packed side has other steps: rows of 1,024 tokens, one a step, about as many
    tokens as 8 of our rows; `padding_free` keeps the batches.
    """
    sizes = {"median": options.sized(100, 12), "sigma": 0.8, "longest": options.sized(1024, 40)}
    work = Workload(bench_config(), lognormal_rows(options.sized(96, 16), vocabulary=2048, **sizes), 8)
    fast = {"gradient_checkpointing": False}
    packed = {"packing": True, "max_length": sizes["longest"], "per_device_train_batch_size": 1}
    sides = [
        Side("qftlab", ours(work)),
        Side("TRL, default", trainer("trl", work), 3.9, 4.5),
        Side("TRL, no gradient checkpointing", trainer("trl", work, **fast), 3.5, 4.5),
        Side("TRL, padding_free", trainer("trl", work, padding_free=True, **fast), 3.5, 4.5),
        Side("TRL, packing", trainer("trl", work, **fast, **packed), 3.5, 4.5),
        Side("plain padded loop", padded_loop(work), 2.5, 4.5),
        Side("transformers Trainer", trainer("transformers", work)),
    ]
    padded = pad_waste(work)
    name = f"{len(work.rows)} rows, {work.real_tokens} tokens, {padded:.2f} x that when padded"
    yield compare(name, sides, options, count=lambda _: work.real_tokens, same=same_losses)


def pad_waste(work: Workload) -> float:
    """Tokens of the padded batches for each real one."""
    lengths = [len(row.input_ids) for row in work.rows]
    groups = (lengths[i : i + work.batch_size] for i in range(0, len(lengths), work.batch_size))
    return sum(len(group) * max(group) for group in groups) / work.real_tokens


class Peak:
    """The memory a run takes on the GPU above what was there, in bytes: gradients, optimizer, activations."""

    def __init__(self, run: Callable[[], object], device: str) -> None:
        self.run, self.device, self.bytes = run, device, 0

    def __call__(self) -> object:
        """Runs once and keeps the largest peak."""
        if self.device != "cuda":
            return self.run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer = self.run()
        self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() - before)
        return answer


def training_flops(config: Qwen2Config, rows: Sequence[Example]) -> float:
    """Floating-point operations of forward and backward: 6 a weight and token, the head at trained positions only, and
    causal attention (6 x hidden x layers for each token before). Norms and activations are left out, as usual.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    narrow = d * config.num_key_value_heads // config.num_attention_heads
    body = layers * (2 * d * d + 2 * d * narrow + 3 * d * config.intermediate_size)
    tokens, trained = sum(len(r.input_ids) for r in rows), sum(sum(r.loss_mask[1:]) for r in rows)
    pairs = sum(len(r.input_ids) ** 2 for r in rows)
    return 6 * (body * tokens + config.vocab_size * d * trained) + 6 * d * layers * pairs


def g1(options: Options) -> Iterator[dict]:
    """Steps of 64k tokens, documents of at most 1,024, every token trained, all in bf16; eager, then compiled.

    TRL has the same tokens in its own packing, rows of 1,024, as many at a time as our rows of 16k hold.
    """
    limits, longest, steps = ceilings(options), options.sized(1024, 40), options.sized(4, 2)
    config = half_billion_config() if not options.quick else bench_config()
    per_step, per_pass = options.sized((65_536, 16_384), (400, 200))
    made = lognormal_rows(
        options.sized(4096, 400), median=longest * 0.45, sigma=0.6, longest=longest,
        vocabulary=config.vocab_size, trained=1.0,
    )  # fmt: skip
    size = max(1, round(per_step * len(made) / sum(len(r.input_ids) for r in made)))  # rows of a step
    work = Workload(config, made[: size * steps], size, options.device, torch.bfloat16)
    flops = training_flops(config, work.rows)
    packed = {
        "gradient_checkpointing": False, "packing": True, "max_length": longest,
        "per_device_train_batch_size": per_pass // longest, "gradient_accumulation_steps": per_step // per_pass,
    }  # fmt: skip
    plans = {"eager": {}} if options.quick else {"eager": {}, "compiled": {"compile": True}}
    for name, settings in plans.items():
        mine = Peak(ours(work, tokens_per_micro_batch=per_pass, **settings), options.device)
        theirs = Peak(trainer("trl", work, **packed), options.device)
        sides = [Side(f"qftlab, {name}", mine), Side("TRL, packing", theirs)]
        facts = {"ceilings": limits, "flops": flops}
        title = f"{steps} steps of {work.real_tokens // steps} tokens, {name}"
        row = compare(title, sides, options, count=lambda _: work.real_tokens, same=same_means, facts=facts)
        rates = [100 * flops / s / (1e12 * limits["matmul_tflop_per_s"]) for s in row["sides"][0]["rounds"]]
        row["judged"].append(judge("% of the measured bf16 matrix rate", rates, 45, 55, is_judged=not options.quick))
        if mine.bytes and theirs.bytes:
            share = mine.bytes / theirs.bytes
            row["judged"].append(judge("of TRL's peak memory", [share], 0.5, None, at_most=True))
        row["peak_gb"] = {"qftlab": mine.bytes / 1e9, "TRL, packing": theirs.bytes / 1e9}
        yield row


def g2(options: Options) -> Iterator[dict]:
    """Head and cross-entropy of 16k hidden states in bf16, loss and both gradients; peaks above inputs and weights."""
    limits = ceilings(options)
    n, vocab, width = options.sized((16_384, 151_936, 896), (96, 500, 32))
    torch.manual_seed(0)
    make = {"device": options.device, "dtype": torch.bfloat16}
    x, w = torch.randn(n, width, **make).requires_grad_(), (0.05 * torch.randn(vocab, width, **make)).requires_grad_()
    y = torch.randint(0, vocab, (n,), device=options.device)
    peaks = {name: Peak(backward(loss, x, w, y), options.device) for name, loss in head_losses().items()}
    sides = [Side("qftlab", peaks["qftlab"])]
    goals = {"TRL's kernel": (1.3, 1.3), "Liger's kernel": (1.0, 1.0)}
    sides += [Side(name, peak, *goals.get(name, ())) for name, peak in peaks.items() if name != "qftlab"]
    row = compare(f"{n} tokens x {vocab}, hidden {width}", sides, options, count=lambda _: n, same=same_gradients,
                  facts={"ceilings": limits})  # fmt: skip
    products = 3 * 2 * n * vocab * width
    shares = [100 * products / s / (1e12 * limits["matmul_tflop_per_s"]) for s in row["sides"][0]["rounds"]]
    row["judged"].append(judge("% of its three products", shares, 0, 80, is_judged=not options.quick))
    if options.device == "cuda":
        row["judged"].append(judge("GB of peak memory", [peaks["qftlab"].bytes / 1e9], 1.5, None, at_most=True))
    row["peak_gb"] = {name: peak.bytes / 1e9 for name, peak in peaks.items()}
    yield row


def head_losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Σ −log p(y) of hidden states x and a head's weight w, each competitor's way; those that are installed."""
    found = {
        # A chunk named by hand keeps to our own path where Liger is installed.
        "qftlab": lambda x, w, y: linear_cross_entropy([HeadTerm(x, w)], y, chunk=chunk_tokens(len(w), x.device)),
        "whole logits": lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y, reduction="sum"),
    }
    with contextlib.suppress(ImportError):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

        found["TRL's kernel"] = lambda x, w, y: -ChunkedLogProbFunction.apply(
            x, w, None, y, 1.0, WIDTH, None, 1.0, ()
        )[0].sum()  # fmt: skip
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        found["Liger's kernel"] = lambda x, w, y: liger(w, x, y)
    return found


def backward(loss: Callable, x: Tensor, w: Tensor, y: Tensor) -> Callable[[], tuple[float, float, float]]:
    """One loss (nats a token) with the norms of both gradients."""

    def run() -> tuple[float, float, float]:
        value = loss(x, w, y) / len(y)
        gradients = torch.autograd.grad(value, (x, w))
        return value.item(), *(g.norm(dtype=torch.float32).item() for g in gradients)

    return run


def same_gradients(ours: tuple, theirs: tuple) -> str:
    """Loss and gradient norms within 1 %: bf16 on both sides, rounded at different places.

    Raises:
        MismatchError: if they are not.
    """
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    if worst > 0.01:
        raise MismatchError(f"loss and gradient norms {ours} and {theirs}")
    return f"loss and gradient norms within {100 * worst:.2g} %"


BENCHMARKS = {
    "C4": Benchmark(
        "SFT, 96 rows of log-normal length, batch 8", "TRL SFTTrainer, transformers Trainer, a plain loop", c4
    ),
    "G1": Benchmark("SFT of Qwen2.5-0.5B's shape, 64k tokens a step", "the bf16 matrix rate; TRL", g1, "cuda"),
    "G2": Benchmark("head and cross-entropy, 16k tokens", "TRL's and Liger's kernels", g2, "cuda"),
}
