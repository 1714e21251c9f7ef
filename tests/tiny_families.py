"""A tiny random model of every causal family that this transformers has, by one way of shrinking its configuration."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, WINDOW, VOCABULARY, LARGEST, MISSING = 4, 5, 64, 5_000_000, object()
# By the names that configurations use; whatever a configuration does not have is left alone.
SIZES = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "dim_model", "emb_dim",
                     "word_embed_proj_dim", "decoder_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff", "dff",
                     "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "dim_ff",
                     "feed_forward_size", "shared_intermediate_size", "dense_intermediate_size",
                     "moe_shared_expert_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "multi_query_group_num"], 2),
    **dict.fromkeys(["head_dim", "attention_head_size", "dim_head", "kv_channels"], 8),
    **dict.fromkeys(["sliding_window", "attention_window", "window_size"], WINDOW),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"], 64),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk"], 2),
    "vocab_size": VOCABULARY, "initializer_range": 0.2, "init_std": 0.2, "attention_dropout": 0.0, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "attention_chunk_size": WINDOW, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What that does not know of a family.
SPECIAL: dict[str, dict] = {
    **dict.fromkeys(["qwen2", "qwen3"], {"use_sliding_window": True, "max_window_layers": 2}),
    **dict.fromkeys(["axk1", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite", "deepseek_v32", "axk2",
                     "glm_moe_dsa"], {"head_dim": MISSING, "num_key_value_heads": 4}),
    "deepseek_v2": {"head_dim": MISSING, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    "hy_v4": {"head_dim": MISSING},
    **dict.fromkeys(["codegen", "gptj"], {"rotary_dim": 8}),
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    **dict.fromkeys(["ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"], {"head_dim": 8}),
    "nemotron": {"num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
                         "mamba_chunk_size": 8, "layer_types": ["mamba", "attention"] * 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
              "attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1,
                  "mamba_chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip


def shrunk(kind: type[PreTrainedConfig], special: dict) -> PreTrainedConfig:
    """A small configuration, and small ones within it."""
    known = kind().to_dict()
    sizes = {name: size for name, size in SIZES.items() if known.get(name) is not None} | special
    sizes = {name: size for name, size in sizes.items() if size is not MISSING}
    inner = {name: shrunk(CONFIG_MAPPING[known[name]["model_type"]], {}) for name in kind.sub_configs or ()
             if isinstance(known.get(name), dict) and known[name].get("model_type") in CONFIG_MAPPING}  # fmt: skip
    return kind(**inner, **sizes)


def tiny_model(family: str, attention: str | None = None, **changes):
    """A model of some four layers, fp32, in eval mode, each weight a little off its start, as zeros hide mistakes."""
    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[family], {**SPECIAL.get(family, {}), **changes})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"a tiny {family} must have at most {LARGEST} numbers, got {size}")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()
