"""Random models of real families, small enough for a test."""

from __future__ import annotations


def random_model(family: str = "qwen2", **changes):
    """A random two-layer model of a real family, small enough for a test; fp32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from qftlab.model.attention import register_packed_attention

    kinds = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    shape = {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    if family == "qwen3":
        shape["head_dim"] = 8
    config_class, model_class = kinds[family]
    torch.manual_seed(0)
    config = config_class(**{**shape, **changes})
    config._attn_implementation = register_packed_attention()
    return model_class(config).eval()
