"""C6 on the CPU, G6 on one GPU: RLOO from prompts to updated weights, against TRL."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from benchmarks.harness import Benchmark, MismatchError, Options, Side, compare, synchronize
from benchmarks.models import bench_config, half_billion_config, random_prompts, word_tokenizer
from benchmarks.preference import preference_row
from benchmarks.training import restarted
from qftlab.decoding.engine import Completion
from qftlab.model.attention import register_packed_attention
from qftlab.rows.batches import batches
from qftlab.settings import PolicyConfig, TrainConfig
from qftlab.train.rloo import fit_prompts
from qftlab.train.rollouts import ModelSampler, Prompt

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class RolloutWorkload:
    """What every side does: the same prompts in the same order from the same weights, at the same precision.

    Args:
        config: shape of the random model.
        prompts: ids, in the order of the steps.
        batch_size: prompts in an optimizer step.
        generations: answers to each prompt.
        cap: the most tokens of an answer.
        stops: ids that end an answer.
        device, dtype: of the weights; nothing is cast besides.
    """

    config: Qwen2Config
    prompts: list[list[int]]
    batch_size: int
    generations: int
    cap: int
    stops: list[int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return len(self.prompts) // self.batch_size

    def model(self, attention: str) -> Qwen2ForCausalLM:
        """The model at its starting weights."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen2ForCausalLM._from_config(
                copy.deepcopy(self.config), dtype=self.dtype, attn_implementation=attention
            )
        model.generation_config.eos_token_id = self.stops
        model.generation_config.pad_token_id = 0
        return model.eval()


def reward(ids: list[int]) -> float:
    """A number that costs nothing."""
    return sum(ids) % 101 / 101


@dataclass
class Answer:
    """What a run came to: tokens of all answers and the gradient norm of each step."""

    tokens: int
    lengths: list[list[int]]
    grad_norms: list[float]


class Recorder:
    """Our sampler, keeping what it gave; with `given` it samples nothing."""

    def __init__(self, inner: ModelSampler) -> None:
        self.inner, self.rollouts = inner, []

    def sample(self, prompts, **options) -> list[Completion]:
        """As `ModelSampler`."""
        self.rollouts.append(self.inner.sample(prompts, **options))
        return self.rollouts[-1]


def ours(work: RolloutWorkload, logs: list[dict] | None = None, rollouts: list | None = None, **settings):
    """The library's RLOO; returns a function that trains from the start and gives an `Answer`."""
    model, tokenizer = work.model(register_packed_attention()), word_tokenizer(work.config.vocab_size)
    order = [i for group in batches(len(work.prompts), batch_size=work.batch_size, seed=0, epoch=0) for i in group]
    stored = list(work.prompts)
    for place, i in enumerate(order):
        stored[i] = work.prompts[place]
    prompts = [Prompt([{"role": "user", "content": ""}], ids, {}, n) for n, ids in enumerate(stored, 1)]
    config = TrainConfig(lr=LEARNING_RATE, batch_size=work.batch_size, max_steps=work.steps, warmup_ratio=0.0,
                         schedule="constant", weight_decay=0.0, log_every=10**6, **settings)  # fmt: skip
    policy = PolicyConfig(num_generations=work.generations, max_new_tokens=work.cap, beta=0.05)

    def train() -> Answer:
        sampler, found = Recorder(ModelSampler(model, tokenizer, policy)), []
        fit_prompts(model, tokenizer, prompts, {"sum": lambda prompt, ids, text, row: reward(ids)}, config, policy,
                    sampler=sampler, on_log=found.append)  # fmt: skip
        if logs is not None:
            logs[:] = found
        if rollouts is not None:
            rollouts[:] = sampler.rollouts
        lengths = [[len(c.token_ids) for c in part] for part in sampler.rollouts]
        return Answer(sum(map(sum, lengths)), lengths, [record["grad_norm"] for record in found])

    return restarted(model, train)


class EndAt(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    last: torch.Tensor

    def __call__(self, input_ids, scores, **_):
        """(B,) bool, True for a row that has its tokens."""
        return input_ids.shape[1] >= self.last


def trl_trainer(work: RolloutWorkload, **settings):
    """TRL's trainer on the prompts, in their order."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    model, tokenizer = work.model("sdpa"), word_tokenizer(work.config.vocab_size)
    tokenizer.pad_token, tokenizer.eos_token = "0", f"{work.stops[0]}"
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)  # TRL reads its reference from disk
    model.config._name_or_path = folder
    rows = work.batch_size * work.generations
    arguments = RLOOConfig(**{
        "output_dir": folder, "use_cpu": work.device == "cpu", "bf16": False, "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": rows, "num_generations": work.generations, "max_steps": work.steps, "beta": 0.05,
        "max_completion_length": work.cap, "logging_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "adam_beta2": 0.98, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False,
        "temperature": 1.0, "model_init_kwargs": None, **settings,
    })  # fmt: skip
    data = Dataset.from_list([{"prompt": f"{i}"} for i in range(len(work.prompts))])
    it = RLOOTrainer(model, lambda completion_ids, **_: [reward(ids) for ids in completion_ids], args=arguments,
                     train_dataset=data, processing_class=tokenizer)  # fmt: skip
    if it.ref_model is not None:
        it.ref_model.to(work.dtype)
    it._tokenize_prompts = lambda prompts: ([work.prompts[int(p)] for p in prompts], None, {})
    return it


def theirs(it, work: RolloutWorkload, lengths: list[list[int]], rollouts: list | None = None) -> Callable[[], Answer]:
    """A run of TRL's trainer whose answers get the lengths that ours had, or are ours where `rollouts` is given."""
    generate, criterion, seen = it._generate_single_turn, EndAt(), [0]
    plain = it.model.generate
    it.generation_config.eos_token_id = None
    it.eos_token_ids = [-1]
    it.model.generate = lambda *a, **k: plain(*a, **k, stopping_criteria=[criterion])

    def single_turn(prompt_ids, images, fields):
        number = seen[0] % work.steps
        seen[0] += 1
        if rollouts is not None:
            return [list(c.token_ids) for c in rollouts[number]]
        wanted = lengths[number]
        criterion.last = max(map(len, prompt_ids)) + torch.tensor(wanted, device=it.model.device)
        found = generate(prompt_ids, images, fields)
        return [row[:n] for row, n in zip(found, wanted, strict=True)]

    it._generate_single_turn = single_turn

    def train() -> Answer:
        it.optimizer = it.lr_scheduler = None  # a trainer keeps them from one call to the next
        it.state.log_history = []
        with contextlib.redirect_stdout(io.StringIO()):
            it.train()
        norms = [entry["grad_norm"] for entry in it.state.log_history if "grad_norm" in entry]
        return Answer(sum(map(sum, lengths)), lengths, norms)

    return restarted(it.model, train)


def same_updates(work: RolloutWorkload, settings: dict) -> str:
    """Trains both sides on our rollouts and compares the gradient of every step.

    Raises:
        MismatchError: if their norms differ by more than 1e-3 of themselves (bf16: 5 %).
    """
    rollouts: list[list[Completion]] = []
    mine = ours(work, rollouts=rollouts)()
    other = theirs(trl_trainer(work, **settings), work, mine.lengths, rollouts)()
    worst = max(abs(a - b) / b for a, b in zip(mine.grad_norms, other.grad_norms, strict=True))
    if worst > (1e-3 if work.dtype == torch.float32 else 0.05):
        raise MismatchError(f"gradient norms on the same answers differ: {mine.grad_norms} and {other.grad_norms}")
    return f"{len(other.grad_norms)} gradient norms on the same answers within {worst:.0e}"


def same_lengths(mine: Answer, other: Answer) -> str:
    """The answers of both sides have the same lengths; their tokens are drawn from other random numbers.

    Raises:
        MismatchError: if they have not.
    """
    if mine.lengths != other.lengths:
        raise MismatchError(f"{mine.tokens} and {other.tokens} tokens")
    return f"{mine.tokens} tokens in answers of equal lengths"


def trl_phases(work: RolloutWorkload, lengths: list[list[int]], settings: dict) -> dict[str, float]:
    """Seconds of each part of a run of TRL's."""
    it, found = trl_trainer(work, **settings), {"rollout": 0.0, "rollout and scores": 0.0}
    run = theirs(it, work, lengths)

    def timed(name: str, label: str) -> None:
        inner = getattr(it, name)

        def call(*a, **k):
            synchronize(work.device)
            start = clock()
            result = inner(*a, **k)
            synchronize(work.device)
            found[label] += clock() - start
            return result

        setattr(it, name, call)

    clock = time.perf_counter if work.device == "cuda" else time.process_time
    timed("_generate_single_turn", "rollout")
    timed("_generate_and_score_completions", "rollout and scores")
    start = clock()
    run()
    total = clock() - start
    return {"rollout": round(found["rollout"], 3), "scores": round(found["rollout and scores"] - found["rollout"], 3),
            "update": round(total - found["rollout and scores"], 3)}  # fmt: skip


def our_phases(run: Callable, logs: list[dict], device: str) -> dict[str, float]:
    """Seconds of each part of a run of ours."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    run()
    total = clock() - start
    rollout, scores = (sum(record[name] for record in logs) for name in ("rollout_seconds", "score_seconds"))
    scores += sum(record["reward_seconds"] for record in logs)
    return {"rollout": round(rollout, 3), "scores": round(scores, 3), "update": round(total - rollout - scores, 3)}


def compared(work: RolloutWorkload, options: Options, others: list[tuple], ours_settings: dict) -> dict:
    """A row: ours against TRL with several settings, each (name, settings, bar, aim)."""
    logs: list[dict] = []
    mine = ours(work, logs, **ours_settings)
    lengths = mine().lengths
    sides = [Side("qftlab", mine)]
    for name, given, *goals in others:
        sides.append(Side(name, theirs(trl_trainer(work, **given), work, lengths), *goals))
    facts = {"updates": same_updates(work, others[-1][1]),
             "phases": {"qftlab": our_phases(mine, logs, work.device),
                        others[-1][0]: trl_phases(work, lengths, others[-1][1])}}  # fmt: skip
    tokens = sum(map(sum, lengths))
    title = (f"{work.steps} steps of {work.batch_size} prompts x {work.generations}, cap {work.cap}, mean length "
             f"{tokens / sum(map(len, lengths)):.0f}")  # fmt: skip
    return compare(title, sides, options, count=lambda answer: answer.tokens, same=same_lengths, facts=facts)


def workload(options: Options, config: Qwen2Config, prompts: int, generations: int, cap: int, steps: int, **more):
    """Prompts of 32 to 96 tokens; so many ids end an answer that a third of the cap is the mean length."""
    draw = random.Random(1)
    low, high = options.sized((32, 96), (4, 9))
    ids = random_prompts([draw.randint(low, high) for _ in range(prompts * steps)], config.vocab_size)
    stops = draw.sample(range(2, config.vocab_size), 3 * config.vocab_size // cap)
    return RolloutWorkload(config, ids, prompts, generations, cap, stops, **more)


def c6(options: Options) -> Iterator[dict]:
    """8 prompts x 4 answers, cap 128, β 0.05, 4 optimizer steps, fp32: rollouts, rewards, scores and updates."""
    work = workload(options, bench_config(), *options.sized((8, 4, 128, 4), (2, 2, 8, 2)))
    tuned = {"gradient_checkpointing": False}
    yield compared(work, options, [("TRL, default", {}, 3, 4), ("TRL, no gradient checkpointing", tuned, 2.5, 4)], {})


def g6(options: Options) -> Iterator[dict]:
    """A row of DPO; then RLOO, 64 prompts x 8 answers of up to 256 tokens, bf16, two steps; TRL without vLLM."""
    yield preference_row(options)
    config = bench_config() if options.quick else half_billion_config()
    sizes = options.sized((64, 8, 256, 2), (2, 2, 8, 2))
    work = workload(options, config, *sizes, device=options.device, dtype=torch.bfloat16)
    rows = sizes[0] * sizes[1]
    accumulation = options.sized(8, 1)
    tuned = {"gradient_checkpointing": False, "per_device_train_batch_size": rows // accumulation,
             "gradient_accumulation_steps": accumulation}  # fmt: skip
    budget = {"tokens_per_micro_batch": options.sized(32_768, 400)}
    yield compared(work, options, [("TRL, no gradient checkpointing", tuned, 8, 15)], budget)


BENCHMARKS = {
    "C6": Benchmark("RLOO, 8 prompts x 4 answers, cap 128, β 0.05", "TRL RLOOTrainer, default and tuned", c6),
    "G6": Benchmark("DPO and RLOO steps of Qwen2.5-0.5B's shape, 64 x 8 x 256", "TRL without vLLM", g6, "cuda"),
}
