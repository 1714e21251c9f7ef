"""How `tiny` is made: its tokenizer, its corpus and its weights, from nothing, by one resumable command.

`python -m qftlab pretrain --output data/tiny` rebuilds what the repository ships (about an hour of one core).
"""

from __future__ import annotations

import json
import logging
import os
import time
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

from qftlab.model.attention import register_packed_attention
from qftlab.rows.batches import Example, pack
from qftlab.settings import check_at_least
from qftlab.train.loop import MicroBatch, optimizer_step
from qftlab.train.step import Step
from qftlab_course.world.corpus import END, Document, documents, tokenizer_text

log = logging.getLogger(__name__)

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
        output: folder that receives tokenizer, weights, `pretraining.json` and, while running, `checkpoint.pt`.
        steps: optimizer steps.
        documents_per_step: documents in a step, about 35 tokens each.
        lr: peak learning rate, reached after `warmup` steps and left `decay` of the run before its end.
        polish_steps: steps of the last, short phase of the corpus; its rate falls from `polish_lr` to zero.
        weight_decay: on matrices only.
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


def make_optimizer(model: PreTrainedModel, config: PretrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def pretrain(config: PretrainConfig) -> Path:
    """Builds tokenizer and model, or resumes from `checkpoint.pt`; returns the folder, ready for `load_model`."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config.vocab_size, config.seed)
    model = new_model(config, tokenizer)
    optimizer = make_optimizer(model, config)
    checkpoint = folder / "checkpoint.pt"
    start, tokens, curve = 0, 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, tokens, curve = state["step"], state["tokens"], state["curve"]
        log.info("resumed at step %d", start)
    step, clock, recent = Step(model), time.process_time(), []
    last = config.steps + config.polish_steps
    for number in range(start, last):
        examples = encode_documents(tokenizer, documents(config.seed, number, config.documents_per_step))
        lr = learning_rate(config, number)
        report = optimizer_step(step, optimizer, [MicroBatch(pack(examples))], lr, 1.0, number=number + 1)
        recent.append(report.loss)
        tokens += report.tokens
        if (number + 1) % 50 == 0:
            curve.append([number + 1, tokens, round(sum(recent) / len(recent), 4)])
            log.info("step %d: loss %.4f, %d tokens, %.0f s", *curve[-1][::2], tokens, time.process_time() - clock)
            recent = []
        if (number + 1) % config.save_every == 0 or number + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
            torch.save({**state, "tokens": tokens, "curve": curve}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    _finish(folder, config, model, tokenizer, tokens, curve)
    checkpoint.unlink(missing_ok=True)
    return folder


def _finish(folder: Path, config: PretrainConfig, model, tokenizer, tokens: int, curve: list) -> None:
    """Stores bf16 weights, the tokenizer and the record of the run."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = {name: value for name, value in asdict(config).items() if name != "output"}
    record = {"config": recipe, "tokens": tokens, "curve": curve}
    (folder / "pretraining.json").write_text(json.dumps(record))
