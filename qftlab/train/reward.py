"""Rewards: models with a scalar head that learn which of two answers is better, and all rewards that have a name.

A reward model is trained on pairs (Bradley and Terry) by `fit_reward` and `reward`. `named_rewards` has what `rloo
--rewards` can name; a new name is added there, to `WANTED` (the columns that it reads) and to `settings.REWARDS`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from qftlab.decoding.engine import known_id
from qftlab.files import resolve
from qftlab.maths.losses import preference_accuracy, sum_by_document
from qftlab.maths.verify import answer_reward, countdown_reward, exact_reward, first_token_reward, reasoned_reward
from qftlab.model.attention import check_rows, register_packed_attention
from qftlab.model.head import context_length, module_mode
from qftlab.model.loading import model_of_files
from qftlab.rows.batches import Example, pack, pad
from qftlab.rows.chat import render_chat, render_prompt
from qftlab.rows.examples import Pair, documents, encode_pairs, place_of
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import AGENT, EDIT, RewardConfig, TrainConfig
from qftlab.train.checkpoint import Checkpoints, training_identity
from qftlab.train.distributed import per_process, wrap
from qftlab.train.dpo import PairSource, count_pairs, held_out_pairs, read_pairs
from qftlab.train.loop import TrainResult, train
from qftlab.train.rollouts import Reward
from qftlab.train.run import RunFolder, Stage, resolve_model, run_stage
from qftlab.train.step import Step, to_device


def reward_model(model, tokenizer) -> nn.Module:
    """A sequence classifier with one label on a copy of a causal model's body; its head is 0, so all answers tie.

    Args:
        model: a causal transformers model (Qwen2, Qwen3, Llama), without adapters.
        tokenizer: gives the classifier its padding id.

    Raises:
        ValueError: for a model with adapters.
    """
    if hasattr(model, "get_base_model"):
        raise ValueError("a reward model must start from a model without adapters: merge them first (export)")
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    return classifier.to(model.device).eval()


ABOUT_PAIRS = ("labels", "reference", "numbers", "mean_chosen_tokens")  # of a batch of pairs, and no input of a model


def scores_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The score of each document, (N,) fp32, read at its last token.

    Args:
        model: a sequence classifier with one label. A decoder's head is applied to the last token by length: its own
            forward looks for padding by id, and would misread a document that ends in that id.
        batch: of `pack` (for a model loaded with packed attention) or `pad`; what `PairSource` adds is left aside.
    """
    inputs = {name: value for name, value in batch.items() if name not in ABOUT_PAIRS}
    if not hasattr(model, "score"):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].float()
    check_rows(model, inputs)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
    if "cu_seq_lens_q" in batch:
        last = hidden[0, batch["cu_seq_lens_q"][1:].long() - 1]
    else:
        ends = batch["attention_mask"].sum(1) - 1
        last = hidden[torch.arange(len(ends), device=ends.device), ends]
    return model.score(last).squeeze(-1).float()


class RewardStep(nn.Module):
    """The Bradley–Terry loss of a batch of pairs: −log σ(score of the chosen − score of the rejected).

    Args:
        model: a sequence classifier with one label.

    Attributes:
        seen: of each forward pass since the last `take`, detached: rows of margin, chosen and rejected score (3, N).

    Source: Bradley and Terry 1952; Ouyang et al. 2022, eq. 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: deque[Tensor] = deque(maxlen=4096)

    def forward(self, num_tokens, **batch) -> Tensor:
        """The sum of the pairs' losses ÷ `num_tokens`, the pairs of the whole optimizer step; a scalar in nats."""
        chosen, rejected = scores_of(self.model, batch).view(-1, 2).unbind(1)
        self.seen.append(torch.stack([chosen - rejected, chosen, rejected]).detach())
        return -F.logsigmoid(chosen - rejected).sum() / num_tokens

    def take(self) -> dict[str, float]:
        """Means over the pairs seen since the last call: margin, accuracy (ties ½), chosen_score and rejected_score."""
        if not self.seen:
            return {}
        margins, chosen, rejected = torch.cat(list(self.seen), 1)
        self.seen.clear()
        means = torch.stack([margins.mean(), preference_accuracy(margins), chosen.mean(), rejected.mean()]).tolist()
        names = ("margin", "accuracy", "chosen_score", "rejected_score")
        return {name: round(value, 6) for name, value in zip(names, means, strict=True)}


def ended(example: Example, markers: Collection[int] = ()) -> Example:
    """A document up to its last trained token: a score is read at `<|im_end|>`, not at the newline behind it.

    Nothing of an empty answer is trained, but it has an end, and a score: that of the last of `markers`.
    """
    flags = example.loss_mask if any(example.loss_mask) else [token in markers for token in example.input_ids]
    end = len(flags) - flags[::-1].index(True)
    return Example(example.input_ids[:end], example.loss_mask[:end])


def fit_reward(
    model,
    tokenizer,
    rows: Sequence[dict],
    config: TrainConfig,
    *,
    max_length: int | None = None,
    held_out_rows: Sequence[dict] = (),
    **options,
) -> TrainResult:
    """Trains a reward model in place on preference rows.

    Args:
        model: of `reward_model`, or another decoder with one label.
        tokenizer: its tokenizer, with a chat template.
        rows: as for `encode_pairs`.
        config: the settings of the loop; its batch counts pairs.
        max_length: the most tokens a prompt with its answer may have, by default the model's context.
        held_out_rows: rows whose loss and accuracy are measured.
        options: `on_log`, `progress`, `checkpoints` and `resume` as in `fit_rows`. `on_log` also gets what
            `RewardStep.take` returns, `pairs` so far in place of trained_tokens, and the same as held_out_….

    Raises:
        ValueError, NonFiniteLoss, OSError: as `fit_pairs`.
    """
    limit = max_length or context_length(model)
    pairs = encode_pairs(tokenizer, rows, max_length=limit)[0]
    held_out = encode_pairs(tokenizer, held_out_rows, max_length=limit)[0] if held_out_rows else ()
    return fit_reward_pairs(model, pairs, config, held_out=held_out, **options)


def fit_reward_pairs(
    model, pairs: Sequence[Pair], config: TrainConfig, *, held_out: Sequence[Pair] = (), **options
) -> TrainResult:
    """Trains a reward model in place on pairs that are tokens already. Arguments as in `fit_reward`."""
    pairs, held_out = ([replace(p, chosen=ended(p.chosen), rejected=ended(p.rejected)) for p in part]
                       for part in (pairs, held_out))  # fmt: skip
    if isinstance(folder := options.get("checkpoints"), str | Path):
        identity = training_identity(model, config, documents(pairs), documents(held_out))
        options["checkpoints"] = Checkpoints(folder, identity, config.keep)
    bare = RewardStep(model)
    step = wrap(bare, config.sharding, config.precision)
    sources = [PairSource(part, torch.zeros(len(part), 2), per_process(config)) for part in (pairs, held_out)]
    measure = partial(held_out_pairs, step, bare, sources[1]) if held_out else None
    return train(step, sources[0], config, count=count_pairs, unit="pairs", take=bare.take, held_out=measure, **options)


class ModelReward:
    """A reward model as a reward function, for `fit_policy` and for scoring; many answers at a time.

    Args:
        model: a sequence classifier with one label, such as `fit_reward` leaves or one of the hub.
        tokenizer: its own tokenizer, with a chat template: conversations are rendered as it knows them.
        batch_size: answers in one forward pass.
    """

    __name__ = "model"

    def __init__(self, model: nn.Module, tokenizer, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def load(cls, name: str, *, device: str = "cpu", dtype: str = "auto") -> ModelReward:
        """From a folder (a run's as well) or the hub; no code of the repository is run.

        Raises:
            FileNotFoundError, ValueError: as `load_model`, for a model without a head of rewards, and for a classifier
                with more or fewer labels than one.
        """
        source = resolve(resolve_model(name))
        register_packed_attention()  # what a saved configuration may name
        model = model_of_files(AutoModelForSequenceClassification, source, dtype=dtype)
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model must have one label, got {model.config.num_labels} in {name}")
        return cls(model.to(device).eval(), load_tokenizer(source))

    def __call__(self, prompt: list[dict], completion_ids: list[int], text: str, row: dict) -> float:
        """The score of one answer."""
        return self.many([(prompt, completion_ids, text, row)])[0]

    @torch.no_grad()
    def many(self, answers: Sequence[tuple]) -> list[float]:
        """The scores of answers, each (prompt, completion_ids, text, row)."""
        examples = [self._example(prompt, text) for prompt, _, text, _ in answers]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        device, found = next(self.model.parameters()).device, [0.0] * len(examples)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = pad([examples[i] for i in part], self.tokenizer.pad_token_id or 0)
            for i, value in zip(part, scores_of(self.model, to_device(batch, device)).tolist(), strict=True):
                found[i] = value
        return found

    def _example(self, prompt: list[dict], text: str) -> Example:
        said = {"role": "assistant", "content": text}
        [document] = render_chat(self.tokenizer, [*prompt, said], train_on="last")
        return ended(document, {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()})


class ImplicitReward:
    """The reward that a model trained by DPO holds: β·(log π(answer) − log π_ref(answer)), in nats.

    Args:
        model: the model after DPO.
        reference: the one it was held to, of the same tokenizer.
        tokenizer: renders the prompts.
        beta: that of its training.
        batch_size: answers in one forward pass.

    Source: Rafailov et al. 2023, eq. 5, without the term that depends on the prompt alone (a group shares it).
    """

    __name__ = "implicit"

    def __init__(self, model, reference, tokenizer, beta: float = 0.1, batch_size: int = 64) -> None:
        self.steps, self.tokenizer = (Step(model), Step(reference)), tokenizer
        self.beta, self.batch_size = beta, batch_size

    def __call__(self, prompt: list[dict], completion_ids: list[int], text: str, row: dict) -> float:
        """The reward of one answer."""
        return self.many([(prompt, completion_ids, text, row)])[0]

    @torch.no_grad()
    def many(self, answers: Sequence[tuple]) -> list[float]:
        """The rewards of answers, each (prompt, completion_ids, text, row)."""
        found: list[float] = []
        device = next(self.steps[0].parameters()).device
        for start in range(0, len(answers), self.batch_size):
            part = answers[start : start + self.batch_size]
            batch = to_device(pack([self._example(prompt, ids) for prompt, ids, *_ in part]), device)
            both = []
            for step in self.steps:
                with module_mode(step, False):
                    both.append(sum_by_document(step(**batch, want="logprobs"), batch["cu_seq_lens_q"]))
            found += (self.beta * (both[0] - both[1])).tolist()
        return found

    def _example(self, prompt: list[dict], completion_ids: list[int]) -> Example:
        ids = render_prompt(self.tokenizer, prompt)
        return Example([*ids, *completion_ids], [False] * len(ids) + [True] * len(completion_ids))


# Columns of a row that a named reward reads.
WANTED = {
    "countdown": ("numbers", "target"), "reasoned": ("numbers", "target"), "exact": ("output",), "mode": ("mode",),
}  # fmt: skip


def check_columns(names: Sequence[str], rows: Sequence[Mapping], sources: Mapping[str, int]) -> None:
    """Refuses rows that lack what a named reward reads.

    Raises:
        ValueError: naming the reward, what is missing and the row's place.
    """
    for name in names:
        for number, row in enumerate(rows, 1):
            if missing := [column for column in WANTED.get(name, ()) if column not in row]:
                raise ValueError(f"rewards {name} wants {' and '.join(missing)} in each row, got {', '.join(row)} in "
                                 f"{place_of(number, sources)}: add it, or name another of --rewards")  # fmt: skip


def named_rewards(names: Sequence[str], tokenizer, reward_model: str = "", device: str = "cpu") -> dict[str, Reward]:
    """The reward functions that a configuration can name.

    Args:
        names: countdown (for models that answer at once), reasoned (the same, for models that think first: it reads
            what follows the last </think>), answer, exact, mode, model.
        tokenizer: of the policy, for the ids of `<|AGENT|>` and `<|EDIT|>`.
        reward_model: for model: a folder or hub name.
        device: of the reward model.

    Raises:
        ValueError: for mode with a tokenizer that lacks these tokens.
    """
    modes = {"AGENT": known_id(tokenizer, AGENT), "EDIT": known_id(tokenizer, EDIT)}
    if "mode" in names and None in modes.values():
        raise ValueError(f"reward mode must have {AGENT} and {EDIT} as tokens: --new_tokens [{AGENT},{EDIT}]")
    known: dict[str, Reward] = {
        "countdown": lambda prompt, ids, text, row: countdown_reward(text, row["numbers"], row["target"]),
        "reasoned": lambda prompt, ids, text, row: reasoned_reward(text, row["numbers"], row["target"]),
        "answer": lambda prompt, ids, text, row: answer_reward(text),
        "exact": lambda prompt, ids, text, row: exact_reward(text, row["output"]),
        "mode": lambda prompt, ids, text, row: first_token_reward(ids, modes[row["mode"]], list(modes.values())),
    }
    if "model" in names:
        known["model"] = ModelReward.load(reward_model, device=device)
    return {name: known[name] for name in names}


def reward(config: RewardConfig, *, progress: bool = False) -> Path:
    """Trains a reward model from files to files.

    Args:
        config: model, data and settings; `resume` goes on with a run that was killed or interrupted.
        progress: whether to draw a bar.

    Returns:
        The run's folder, as `sft` leaves it (checkpoints under checkpoints/reward); model/ loads as
        `AutoModelForSequenceClassification`.

    Raises:
        FileNotFoundError, ValueError, NonFiniteLoss, OSError: as `sft` and `fit_reward`.
    """
    return run_stage("reward", config, prepare, progress)


def prepare(config: RewardConfig) -> Stage:
    """Reads pairs and model, and gives the model its head."""
    model, tokenizer, pairs, held_out, usage = read_pairs(config, reward_model)

    def fit(run: RunFolder, **options) -> TrainResult:
        run.write_json("pair_usage.json", asdict(usage))
        return fit_reward_pairs(model, pairs, config.train, held_out=held_out, **options)

    identity = training_identity(model, config.train, documents(pairs), documents(held_out))
    return Stage(model, tokenizer, identity, fit, wrap=reward_model)
