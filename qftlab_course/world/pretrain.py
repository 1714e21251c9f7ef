"""How `tiny` is made: its tokenizer, its corpus and its weights, from nothing, by one resumable command.

`python -m qftlab pretrain --output data/tiny` rebuilds what the repository ships (about an hour of one core).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from qftlab.files import remove
from qftlab.model.attention import register_packed_attention
from qftlab.rows.batches import Example, pack
from qftlab.settings import TrainConfig, check_at_least
from qftlab.train.checkpoint import Checkpoints
from qftlab.train.loop import TrainResult, train
from qftlab.train.optimizer import MicroBatch
from qftlab.train.step import Step
from qftlab_course.world.corpus import END, Document, documents, tokenizer_text

# Qwen2's pre-tokenisation: contractions, words, single digits, punctuation, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (END, "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of `tiny`.

    Args:
        output: folder that receives tokenizer, weights, `pretraining.json` and, while running, `checkpoints/`.
        steps: optimizer steps.
        documents_per_step: documents in a step, about 35 tokens each.
        lr: peak learning rate, reached after `warmup` steps and left `decay` of the run before its end.
        polish_steps: steps of the last, short phase of the corpus; its rate falls from `polish_lr` to zero.
        weight_decay: on matrices, not on the embedding (on which it also was when the shipped weights were made).
        vocab_size: tokenizer entries, special tokens included; `rows` embedding rows stand above them.
        save_every: steps between checkpoints.
        seed: of weights, corpus and order.
    """

    output: str = "data/tiny"
    steps: int = 4_400
    documents_per_step: int = 128
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.3
    polish_steps: int = 400
    polish_lr: float = 8e-4
    weight_decay: float = 0.05
    vocab_size: int = 1_000
    rows: int = 1_024
    hidden_size: int = 160
    intermediate_size: int = 448
    layers: int = 4
    save_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, documents_per_step=self.documents_per_step, save_every=self.save_every)
        if self.rows < self.vocab_size:
            raise ValueError(f"rows must be at least vocab_size, got {self.rows} < {self.vocab_size}")


def build_tokenizer(vocab_size: int, seed: int = 0) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on the corpus, with Qwen's pre-tokenisation, special-token names and chat template."""
    bpe = Tokenizer(models.BPE(byte_fallback=False))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_text(seed), trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) for m in state["merges"]],
        unk_token=None,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS[1:]],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained Qwen2 of the recipe, in fp32."""
    torch.manual_seed(config.seed)
    end = tokenizer.convert_tokens_to_ids(END)
    shape = Qwen2Config(
        vocab_size=config.rows,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.04,
    )
    shape._attn_implementation = register_packed_attention()
    model = Qwen2ForCausalLM(shape)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def encode_documents(tokenizer: PreTrainedTokenizerBase, docs: list[Document]) -> list[Example]:
    """Documents → examples; a token is trained if it lies in a trained span."""
    encoded = tokenizer.backend_tokenizer.encode_batch([d.text for d in docs])
    return [
        Example(e.ids, [any(a <= s and t <= b for a, b in doc.trained) for s, t in e.offsets])
        for doc, e in zip(docs, encoded, strict=True)
    ]


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, a plateau, a linear fall to zero over the last `decay` share; then once more from `polish_lr`."""
    if step >= config.steps:
        return config.polish_lr * (config.steps + config.polish_steps - step) / config.polish_steps
    falling = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, falling)


class Corpus:
    """The corpus as a source of `train`: step after step new documents, all in one epoch."""

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.steps_per_epoch = config.steps + config.polish_steps

    def __call__(self, epoch: int, step: int) -> list[MicroBatch]:
        """The documents of one optimizer step."""
        docs = documents(self.config.seed, step, self.config.documents_per_step)
        return [MicroBatch(pack(encode_documents(self.tokenizer, docs)))]


def pretrain(config: PretrainConfig) -> Path:
    """Builds tokenizer and model, or resumes from the last checkpoint; returns the folder, ready for `load_model`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with the steps so far saved; the same command goes on.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config.vocab_size, config.seed)
    model, source = new_model(config, tokenizer), Corpus(config, tokenizer)
    recipe = {name: value for name, value in asdict(config).items() if name != "output"}
    checkpoints = Checkpoints(folder / "checkpoints", {**recipe, "save_every": None}, keep=1)
    settings = TrainConfig(
        lr=config.lr, max_steps=source.steps_per_epoch, weight_decay=config.weight_decay, beta2=0.98, max_grad_norm=1.0,
        save_every=config.save_every, log_every=50, seed=config.seed,
    )  # fmt: skip
    result = train(Step(model), source, settings, checkpoints=checkpoints, resume=True,
                   rate=lambda settings, step, total: learning_rate(config, step))  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt(f"stopped after {result.steps} steps; the same command goes on")
    _finish(folder, recipe, model, tokenizer, result)
    remove(checkpoints.folder)
    return folder


def _finish(folder: Path, recipe: dict, model, tokenizer, result: TrainResult) -> None:
    """Stores bf16 weights, the tokenizer and the record of the run: its recipe, tokens, and losses by 50 steps."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = {start + 50: result.losses[start : start + 50] for start in range(0, result.steps, 50)}
    curve = [[min(end, result.steps), round(math.fsum(part) / len(part), 4)] for end, part in parts.items()]
    (folder / "pretraining.json").write_text(json.dumps({"config": recipe, "tokens": result.tokens, "curve": curve}))
