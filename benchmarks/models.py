"""The models of the benchmarks, random and built in memory, their tokenizers, and what the machine could do at best."""

from __future__ import annotations

import copy
import random
import time

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.harness import Options, synchronize

END = 1  # the id that may end a text, where a workload has one


def bench_config() -> Qwen2Config:
    """The `bench` model of DESIGN.md: 4 layers, hidden 256, 4 heads on 2 key heads, vocabulary 2,048; 4.46 M.

    Weights are drawn wider (0.05) than transformers' 0.02: the tied head of a narrow random model would otherwise
    repeat its input token for ever, and equal greedy tokens would prove little.
    """
    return Qwen2Config(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def half_billion_config() -> Qwen2Config:
    """The shape of Qwen2.5-0.5B: 357.9 M in its body, 136.1 M in its tied head."""
    return Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def starting_model(
    config: Qwen2Config, attention: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen2ForCausalLM:
    """A model to train, with weights drawn from seed 0."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)


def random_model(config: Qwen2Config, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Qwen2ForCausalLM:
    """A model with weights drawn from seed 0, in evaluation mode, that no token ends."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words, " 0", " 1" and so on, each the token of that id."""
    words = models.WordLevel({f"{i}": i for i in range(size)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


def random_prompts(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids of these lengths, uniform over the vocabulary without its first two ids (padding, `END`)."""
    draw = random.Random(seed)
    return [[draw.randrange(2, vocabulary) for _ in range(n)] for n in lengths]


def ceilings(options: Options) -> dict[str, float]:
    """What this machine reaches in a large copy and a large bf16 matrix product, on random data.

    Returns:
        copy_gb_per_s, bytes read plus bytes written over time, in 1e9; matmul_tflop_per_s, 2n³ over time, in 1e12.
    """
    dtype, device = torch.bfloat16, options.device
    size, side = options.sized((1 << 30, 8192), (1 << 20, 256))
    source = torch.randn(size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), options)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: a @ b, options)
    return {"copy_gb_per_s": 2 * 2 * size / copy / 1e9, "matmul_tflop_per_s": 2 * side**3 / product / 1e12}


def _best(work, options: Options, inner: int = 20) -> float:
    """Median seconds of one call, timed in groups of `inner` so that launching is not what is measured."""
    found = []
    for _ in range(6):
        synchronize(options.device)
        began = time.perf_counter()
        for _ in range(inner):
            work()
        synchronize(options.device)
        found.append((time.perf_counter() - began) / inner)
    return sorted(found[1:])[2]
