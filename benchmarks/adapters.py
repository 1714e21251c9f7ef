"""G7: a LoRA step on a model of Qwen3-8B's shape on one GPU, in bf16 and, where bitsandbytes is there, in 4 bits."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import Benchmark, Options, Side, compare
from benchmarks.training import CONSTANT, Peak, lognormal_rows
from qftlab.model.attention import register_packed_attention
from qftlab.model.loading import load_model
from qftlab.model.lora import add_adapters
from qftlab.rows.batches import Example
from qftlab.settings import LoRAConfig, TrainConfig
from qftlab.train.sft import fit_examples

NEW_IDS = [151_669, 151_670]  # two of the padded rows, as <|AGENT|> and <|EDIT|> take them


def eight_billion_config(is_small: bool) -> Qwen3Config:
    """The shape of Qwen3-8B (8.19 B weights, untied head), or a narrow one of the same kind."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512} if is_small else {
             "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}  # fmt: skip
    return Qwen3Config(
        **sizes, max_position_embeddings=40_960, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def g7(options: Options) -> Iterator[dict]:
    """Two steps of 16 documents, rank 16 on every matrix, two token rows, gradient checkpointing."""
    config = eight_billion_config(options.quick)
    dtype = options.sized(torch.bfloat16, torch.float32)
    torch.manual_seed(0)
    with torch.device(options.device):
        base = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation=register_packed_attention())
    rows = lognormal_rows(32, median=options.sized(512, 20), sigma=0.5, longest=options.sized(1024, 40),
                          vocabulary=config.vocab_size)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        is_quantised = options.device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
        if is_quantised:
            base.save_pretrained(folder)
        yield step_row("bf16", base, rows, options)
        del base
        if is_quantised:
            torch.cuda.empty_cache()
            yield step_row("4 bits", load_model(folder, dtype="bfloat16", device="cuda", quant="4bit"), rows, options)


def step_row(name: str, base, rows: list[Example], options: Options) -> dict:
    """Times the steps on one base and notes the memory they take and what the weights take."""
    ids = NEW_IDS if not options.quick else [500, 501]
    model = add_adapters(base, LoRAConfig(16), token_ids=ids, seed=0)
    config = TrainConfig(lr=1e-4, epochs=1, batch_size=16, gradient_checkpointing=True,
                         tokens_per_micro_batch=options.sized(8192, 200), **CONSTANT)  # fmt: skip
    run: Callable[[], object] = Peak(lambda: fit_examples(model, rows, config).losses, options.device)
    before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
    tokens = sum(len(row.input_ids) for row in rows)
    row = compare(f"2 steps, {tokens} tokens, rank 16, {name}", [Side("qftlab", run)], options,
                  count=lambda _: tokens, same=lambda a, b: "")  # fmt: skip
    row["peak_gb"] = {"weights": before / 1e9, "step above them": run.bytes / 1e9}
    return row


BENCHMARKS = {"G7": Benchmark("LoRA step in the shape of Qwen3-8B", "nothing: it fits and runs", g7, "cuda")}
