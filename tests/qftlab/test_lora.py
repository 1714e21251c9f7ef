"""LoRA: only adapters and the asked-for rows move, tied or not; saving, loading and merging change nothing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qftlab.decoding.engine import generate
from qftlab.files import bundled
from qftlab.model.attention import register_packed_attention
from qftlab.model.export import export_model
from qftlab.model.loading import extend_model, load_model, save_model
from qftlab.model.lora import (
    WEIGHTS,
    add_adapters,
    count_parameters,
    load_adapters,
    merge_adapters,
    row_layers,
    save_adapters,
    trained_token_ids,
)
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.settings import LoRAConfig, TrainConfig
from qftlab.train.sft import fit_rows
from qftlab_course.presets import get_preset

IDS = torch.tensor([[5, 1000, 7, 1001, 300, 12, 4]])
NEW = [1000, 1001]
KINDS = ["tiny, tied", "tiny tokenizer, untied Qwen3", "real Qwen2.5, tied", "real Qwen3-8B, untied"]


def shrunken(config_file: Path, **changes):
    """A random model with a real configuration, real rows included, but narrow and of two layers."""
    real = json.loads(config_file.read_text())
    kind, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[
        real["model_type"]
    ]
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.1, "torch_dtype": "float32"}  # fmt: skip
    torch.manual_seed(0)
    config = kind(**{**real, **small, "max_window_layers": 2, **changes})
    config._attn_implementation = register_packed_attention()
    return model_class(config).eval()


def base_and_tokenizer(kind: str, request):
    """A model before extension, and its tokenizer."""
    if kind == "tiny, tied":
        return load_model("tiny"), load_tokenizer("tiny")
    if kind == "tiny tokenizer, untied Qwen3":
        return random_model("qwen3", tie_word_embeddings=False), load_tokenizer("tiny")
    real = request.getfixturevalue("real_data")
    if "Qwen2.5" in kind:
        return shrunken(real / "qwen2.5-0.5b" / "config.json"), load_tokenizer(real / "qwen2.5-0.5b")
    return shrunken(real / "qwen3-8b" / "config.json", head_dim=16), load_tokenizer(real / "qwen3-0.6b")


def shaken(model, far: float = 0.05):
    """The model with adapters and trained rows pushed away from where they do nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += far * torch.randn(parameter.shape, generator=generator)
    return model


def small(family: str = "qwen2", rank: int = 4, token_ids=NEW, **changes):
    return shaken(add_adapters(random_model(family, **changes), LoRAConfig(rank), token_ids=token_ids))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_the_new_rows_move_and_every_form_writes_the_same(kind, request, tmp_path) -> None:
    model, tokenizer = base_and_tokenizer(kind, request)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    is_tied = kind.endswith(", tied")
    rows_before = model.get_input_embeddings().weight.shape[0]
    report = extend_tokenizer(tokenizer)
    extend_model(model, tokenizer, report)
    new = [token.id for token in report.tokens]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = add_adapters(model, LoRAConfig(4), token_ids=new)
    rows = load_rows(bundled("bugfix", "train.jsonl"))[:8]
    fit_rows(adapted, tokenizer, rows, TrainConfig(lr=2e-2, max_steps=3, batch_size=8))

    changed = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed)
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", "").replace(".token_adapter", ""): p
              for n, p in adapted.named_parameters() if n not in changed}  # fmt: skip
    assert set(frozen) == set(before) and all(torch.equal(p, before[name]) for name, p in frozen.items())

    merged = merge_adapters(adapted)
    assert len(row_layers(merged)) == (1 if is_tied else 2)
    for layer, name in zip(row_layers(merged), ("model.embed_tokens.weight", "lm_head.weight"), strict=False):
        moved = (layer.weight != before[name]).any(1).nonzero().flatten().tolist()
        assert moved == new and layer.weight.shape[0] == rows_before
    moved_blocks = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert {n.split(".")[-2] for n in moved_blocks if "layers" in n} == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )

    # The base on the disk was never extended: the rows come with the adapters.
    save_model(adapted, tokenizer, tmp_path / "adapters")
    export_model(adapted, tokenizer, tmp_path / "exported")
    forms = {
        "adapted": adapted,
        "adapters loaded": load_model(tmp_path / "adapters"),
        "merged": merged,
        "exported": load_model(tmp_path / "exported"),
    }
    prompts = ["47 + 38 =", [{"role": "user", "content": "Mend this: pritn(1)"}], new]
    written = {
        form: [c.token_ids for c in generate(m, tokenizer, prompts, max_new_tokens=12)] for form, m in forms.items()
    }
    assert all(tokens == written["adapted"] for tokens in written.values()), written
    untrained = [c.token_ids for c in generate(load_model(tmp_path / "base"), tokenizer, prompts, max_new_tokens=12)]
    assert written["adapted"] != untrained, "training changed nothing, so nothing was shown"
    exported = forms["exported"]
    assert exported.config.tie_word_embeddings == is_tied
    assert (exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()) == is_tied
    assert load_tokenizer(tmp_path / "exported").convert_tokens_to_ids("<|EDIT|>") == new[1]


def test_fresh_adapters_change_nothing_and_the_count_is_the_formula() -> None:
    model = random_model()
    plain = logits(model)
    sizes = [m.weight.shape for n, m in model.named_modules() if n.endswith("_proj")]
    total = count_parameters(model).total
    adapted = add_adapters(model, LoRAConfig(4), token_ids=NEW)
    assert torch.equal(logits(adapted), plain) and not adapted.training
    count = count_parameters(adapted)
    assert count.trained == 4 * sum(a + b for a, b in sizes) + 2 * 32 and count.total == total + count.trained
    # By hand: 2 layers, D = 32, kv 16, MLP 64: q, o 64 each; k, v 48; gate, up, down 96.
    assert count.trained == 4 * 2 * (2 * 64 + 2 * 48 + 3 * 96) + 64
    assert trained_token_ids(adapted) == NEW and trained_token_ids(model) == []


def test_the_update_is_alpha_over_rank_times_b_a() -> None:
    adapted = small(rank=4)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = merge_adapters(adapted).model.layers[0].mlp.up_proj.weight
    assert torch.allclose(merged, layer.base_layer.weight + 32 / 4 * b @ a, atol=1e-6)


def test_adapters_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (add_adapters(load_model("tiny"), LoRAConfig(2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b, c = (next(p for n, p in m.named_parameters() if "lora_A" in n) for m in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("targets, names", [("attention", "qkvo"), ("mlp", "gud")])
def test_targets_choose_the_matrices(targets: str, names: str) -> None:
    adapted = add_adapters(random_model(), LoRAConfig(2, targets=targets))
    found = {n.split(".")[-4][0] for n, p in adapted.named_parameters() if p.requires_grad}
    assert found == set(names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_saved_and_loaded_are_bit_identical_and_peft_reads_them(family, tied, tmp_path) -> None:
    from peft import PeftModel

    adapted = small(family, tie_word_embeddings=tied)
    save_adapters(adapted, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]
    rows = [name for name in load_file(tmp_path / WEIGHTS) if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2)
    loaded = load_adapters(random_model(family, tie_word_embeddings=tied), tmp_path, is_trainable=True)
    theirs = PeftModel.from_pretrained(random_model(family, tie_word_embeddings=tied), str(tmp_path))
    assert torch.equal(logits(loaded), logits(adapted)) and torch.equal(logits(theirs), logits(adapted))
    assert count_parameters(loaded) == count_parameters(adapted) and not loaded.training
    assert count_parameters(load_adapters(random_model(family, tie_word_embeddings=tied), tmp_path)).trained == 0


def test_everything_trained_is_fp32_on_a_bf16_base(tmp_path) -> None:
    """A bf16 row at 1.0 would not move by 1e-4 steps: its neighbours are 0.008 away."""
    base = random_model().to(torch.bfloat16)
    adapted = add_adapters(base, LoRAConfig(4), token_ids=NEW)
    save_adapters(adapted, tmp_path)
    loaded = load_adapters(random_model().to(torch.bfloat16), tmp_path, is_trainable=True)
    for model in (adapted, loaded):
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16


def test_merging_leaves_the_adapted_model_alone_unless_in_place() -> None:
    adapted = small()
    wanted = logits(adapted)
    merged = merge_adapters(adapted)
    # The order of a sum changes: 1e-5 on logits of order 10.
    assert torch.allclose(logits(merged), wanted, atol=1e-4) and torch.equal(logits(adapted), wanted)
    assert all(p.requires_grad for p in merged.parameters()) and type(merged).__name__ == "Qwen2ForCausalLM"
    weight = adapted.get_base_model().model.embed_tokens.token_adapter.base_layer.weight
    assert merge_adapters(adapted, in_place=True).model.embed_tokens.weight is weight


def test_a_folder_of_adapters_loads_its_base_by_name(tmp_path) -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    adapted = shaken(add_adapters(model, LoRAConfig(2), token_ids=NEW))
    save_model(adapted, tokenizer, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert torch.equal(logits(load_model(tmp_path)), logits(adapted))
    assert torch.equal(logits(load_model("tiny", lora=tmp_path)), logits(adapted))
    assert len(load_tokenizer(tmp_path)) == 1002


def test_rows_are_added_where_the_saved_tokens_outgrew_the_base(tmp_path) -> None:
    tokenizer, model = load_tokenizer("tiny"), random_model(vocab_size=1000)
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    adapted = shaken(add_adapters(model, LoRAConfig(2), token_ids=NEW))
    save_adapters(adapted, tmp_path)
    loaded = load_adapters(random_model(vocab_size=1000), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted)) and logits(loaded).shape[-1] == 1002


def test_no_warning_reaches_a_notebook(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapters(add_adapters(load_model("tiny"), LoRAConfig(2), token_ids=NEW), tmp_path)
        merge_adapters(load_adapters(load_model("tiny"), tmp_path))


def test_requests_that_cannot_be_met(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"rank must be at least 1, got 0: LoRAConfig\(rank=16\)"):
        add_adapters(random_model(), LoRAConfig())
    with pytest.raises(ValueError, match=r"token_ids must be from 0 to 1023.* got \[1024\]: call extend_model first"):
        add_adapters(random_model(), LoRAConfig(2), token_ids=[1024])
    adapted = add_adapters(random_model(), LoRAConfig(2), token_ids=NEW)
    with pytest.raises(ValueError, match=r"model must be without adapters.* merge_adapters\(model\) first"):
        add_adapters(adapted, LoRAConfig(2))
    with pytest.raises(ValueError, match="must be extended before it gets adapters"):
        extend_model(adapted, tokenizer := load_tokenizer("tiny"), extend_tokenizer(tokenizer))
    with pytest.raises(ValueError, match="model must have one of q_proj, .* got a Linear"):
        layer = torch.nn.Linear(2, 2)
        layer.get_input_embeddings = lambda: layer
        add_adapters(layer, LoRAConfig(2))
    for action in (merge_adapters, lambda model: save_adapters(model, tmp_path)):
        with pytest.raises(ValueError, match="model must have adapters"):
            action(random_model())
    for changes, words in (
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": "head"}, "targets must be one of all, attention, mlp, got 'head'"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRAConfig(**changes)


def test_damaged_or_unfit_adapters_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds no adapter_config.json and no {WEIGHTS}"):
        load_adapters(random_model(), tmp_path)
    save_adapters(small(), tmp_path)
    with pytest.raises(ValueError, match="must fit the model, got size mismatch"):
        load_adapters(random_model(hidden_size=64), tmp_path)
    with pytest.raises(ValueError, match="must fit the model, got .* has no counterpart"):
        load_adapters(random_model(num_hidden_layers=3), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({name: t for name, t in state.items() if "trainable_tokens" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="must fit the model, got .*trainable_tokens_delta"):
        load_adapters(random_model(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="adapters of .* must fit the model"):
        load_adapters(random_model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="must name its base_model_name_or_path"):
        load_model(tmp_path)


def test_quantised_weights_where_they_cannot_run(monkeypatch) -> None:
    with pytest.raises(ValueError, match="quant must be one of none, 8bit, 4bit, got '2bit'"):
        load_model("tiny", quant="2bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quant '4bit' needs bitsandbytes, .* pip install bitsandbytes"):
        load_model("tiny", quant="4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="quant '4bit' needs a CUDA GPU, got device 'cpu'"):
        load_model("tiny", quant="4bit")


@pytest.mark.gpu
def test_qlora_trains_on_a_gpu() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, tokenizer = load_model("tiny", quant="4bit", device="cuda", dtype="bfloat16"), load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    adapted = add_adapters(model, LoRAConfig(4), token_ids=NEW)
    rows = load_rows(bundled("bugfix", "train.jsonl"))[:32]
    losses = fit_rows(adapted, tokenizer, rows, TrainConfig(lr=1e-3, max_steps=20, batch_size=32)).losses
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="weights must be whole to merge, got quantised ones"):
        merge_adapters(adapted)


def test_presets_say_which_models_get_adapters() -> None:
    assert get_preset("tiny").lora.rank == 0 and get_preset("qwen3-8b").lora == LoRAConfig(16)
