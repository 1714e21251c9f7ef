"""LoRA: only adapters and the asked-for rows move, tied or not; saving, loading and merging change nothing."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qftlab import cli
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
from qftlab.settings import DPOConfig, LoRAConfig, PolicyConfig, RewardConfig, RLOOConfig, SFTConfig, TrainConfig
from qftlab.train.dpo import dpo
from qftlab.train.rloo import rloo
from qftlab.train.sft import fit_rows, sft
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


# The base of adapters


def saved(folder: Path, model=None) -> Path:
    return save_model(model or random_model(), load_tokenizer("tiny"), folder)


def test_the_base_is_found_from_anywhere_and_does_not_follow_the_latest_link(tmp_path, monkeypatch) -> None:
    """Named by a relative path through a link, as a user does; then another model takes the link's place."""
    saved(tmp_path / "runs" / "first" / "model")
    saved(tmp_path / "runs" / "second" / "model", shaken(random_model()))
    latest = tmp_path / "runs" / "latest"
    latest.symlink_to("first", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    adapted = shaken(add_adapters(load_model("runs/latest/model"), LoRAConfig(2), token_ids=NEW))
    save_adapters(adapted, "adapters")
    latest.unlink()
    latest.symlink_to("second", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(logits(load_model("../adapters")), logits(adapted))
    base = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((tmp_path / "runs" / "first" / "model").resolve())


def test_a_base_that_is_no_longer_what_it_was_is_refused(tmp_path) -> None:
    """Overwritten by a model of the same shape, which would print noise; --base does not help a wrong one in either."""
    base = saved(tmp_path / "base")
    adapted = small_on(base)
    save_adapters(adapted, tmp_path / "adapters")
    saved(base, shaken(random_model()))
    digests = r"got other weights in .*base \(sha256 \w{8}, \w{8} when they were trained\): load them on the base that"
    with pytest.raises(ValueError, match=digests):
        load_model(tmp_path / "adapters")
    with pytest.raises(ValueError, match=digests.split(":")[0]):
        load_model(base, lora=tmp_path / "adapters")
    assert load_adapters(load_model(base), tmp_path / "adapters"), "who puts them on a model himself may"
    saved(tmp_path / "moved")
    assert torch.equal(logits(load_model(tmp_path / "moved", lora=tmp_path / "adapters")), logits(adapted))


def small_on(base: Path, **options):
    return shaken(add_adapters(load_model(base), LoRAConfig(2), token_ids=NEW, **options))


def test_what_moved_is_named_and_base_gives_it(tmp_path, capsys, monkeypatch) -> None:
    """In generate, chat, evaluate and export; a folder's name is never taken for one of the hub."""
    base = saved(tmp_path / "base")
    save_model(small_on(base), load_tokenizer("tiny"), tmp_path / "adapters")
    asked = ["generate", "--prompt", "47 + 38 =", "--max_new_tokens", "6", "--model", str(tmp_path / "adapters")]
    assert cli.main(asked) == 0
    wanted = capsys.readouterr().out
    base.rename(tmp_path / "moved")
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'adapters'} holds adapters, whose base is not to be had: {base} is no folder" in said
    assert "--base" in said and said.count("\n") == 1
    there = ["--base", str(tmp_path / "moved")]
    assert cli.main([*asked, *there]) == 0 and capsys.readouterr().out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("47 + 38 =\n"))
    assert cli.main(["chat", *asked[3:], *there]) == 0
    rows = ["--limit", "2", "--max_new_tokens", "2"]
    assert cli.main(["evaluate", "--model", str(tmp_path / "adapters"), *rows, *there]) == 0
    assert cli.main(["export", "--model", str(tmp_path / "adapters"), "--output", str(tmp_path / "out"), *there]) == 0
    assert cli.main(["generate", "--model", "tiny", "--prompt", "a", *there]) == 2
    assert "is it the folder of saved adapters?" in capsys.readouterr().err


def test_a_base_that_is_on_no_disk_is_not_named(tmp_path) -> None:
    """Trained in memory, or merged: the folder it once came from is another model now."""
    base, tokenizer = saved(tmp_path / "base"), load_tokenizer("tiny")
    trained = load_model(base)
    fit_rows(trained, tokenizer, load_rows(bundled("bugfix", "train.jsonl"))[:2], TrainConfig(max_steps=1))
    for name, model in (("trained", trained), ("merged", merge_adapters(small_on(base)))):
        save_adapters(add_adapters(copy.deepcopy(model), LoRAConfig(2)), tmp_path / name)
        with pytest.raises(ValueError, match="name its base_model_name_or_path"):
            load_model(tmp_path / name)
        assert load_adapters(model, tmp_path / name)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_that_nothing_trains_are_not_lost_without_a_word(tied: bool, tmp_path) -> None:
    model, tokenizer = random_model(tie_word_embeddings=tied), load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    for ids in ([], NEW[:1]):
        adapted = add_adapters(copy.deepcopy(model), LoRAConfig(2), token_ids=ids)
        lost = ", ".join(str(i) for i in NEW if i not in ids)
        with pytest.raises(ValueError, match=rf"new rows must be trained .*: add_adapters.…, token_ids=\[{lost}\]"):
            save_model(adapted, tokenizer, tmp_path / "adapters")
        assert torch.allclose(logits(merge_adapters(adapted)), logits(adapted), atol=1e-4)
    save_adapters(add_adapters(model, LoRAConfig(2), token_ids=NEW), tmp_path / "adapters")


def test_adapters_on_adapters_on_a_base(tmp_path) -> None:
    """The first are merged, as they were when the second were trained on them; a changed link of the chain is found."""
    base = saved(tmp_path / "base")
    save_adapters(small_on(base), tmp_path / "first")
    merged = load_model(tmp_path / "first", adapters="merge")
    assert type(merged).__name__ == "Qwen2ForCausalLM"
    assert torch.allclose(logits(merged), logits(load_model(tmp_path / "first")), atol=1e-4)
    second = shaken(add_adapters(merged, LoRAConfig(3, targets="mlp"), token_ids=NEW), 0.1)
    save_adapters(second, tmp_path / "second")
    loaded = load_model(tmp_path / "second", adapters="continue")
    assert torch.equal(logits(loaded), logits(second)) and loaded.peft_config["default"].r == 3
    assert count_parameters(loaded).trained == count_parameters(second).trained > 0
    save_adapters(small_on(base, seed=3), tmp_path / "first")
    with pytest.raises(ValueError, match="got other weights in .*first "):
        load_model(tmp_path / "second")


# Stages one after the other


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with an untied Qwen3 as `start`, rows and pairs, and the run of an SFT with adapters under `sft`."""
    folder = tmp_path_factory.mktemp("stages")
    saved(folder / "start", random_model("qwen3", tie_word_embeddings=False))
    pairs = [{"prompt": f"Say {w}.", "chosen": f"{w}!", "rejected": f"no {w}"} for w in "one two three four".split()]
    rows = [{"instruction": p["prompt"], "input": "", "output": p["chosen"]} for p in pairs]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    sft(settings(SFTConfig, folder, "sft", "start", lora=LoRAConfig(4)))
    return folder


def settings(kind, folder: Path, output: str, model: str, **changes):
    """A stage of two steps; `model` and `output` are folders in `folder`."""
    data = {} if kind is RLOOConfig else {"data": str(folder / ("rows.jsonl" if kind is SFTConfig else "pairs.jsonl"))}
    train = TrainConfig(lr=1e-2, max_steps=2, batch_size=2, warmup_ratio=0, schedule="constant")
    return kind(model=str(folder / model), output=str(folder / output), device="cpu", train=train, **data, **changes)


def rloo_of(folder: Path, output: str, model: str, **changes):
    policy = PolicyConfig(num_generations=2, max_new_tokens=6, beta=0.1)
    rewarding = {"problems": 4, "rewards": ("answer", "countdown"), "policy": policy}
    return settings(RLOOConfig, folder, output, model, **rewarding, **changes)


def apart(a, b) -> float:
    """The largest difference of a logit of the tokens that both know."""
    return (logits(a) - logits(b))[..., :1002].abs().max().item()


def test_sft_dpo_and_rloo_train_one_pair_of_adapters_on(stages) -> None:
    """Each stage begins with the very model the one before it has left, and moves it."""
    first = load_model(stages / "sft" / "latest" / "model")
    second = dpo(settings(DPOConfig, stages, "dpo", "sft/latest", lora=LoRAConfig(4)))  # the same rank
    third = rloo(rloo_of(stages, "rloo", "dpo/latest"))
    for run, before in ((second, first), (third, load_model(second / "model"))):
        begun, ended = load_model(run / "checkpoints" / "initial"), load_model(run / "model")
        assert torch.equal(logits(begun), logits(before)) and apart(ended, begun) > 1e-3
        assert ended.peft_config["default"].r == 4 and trained_token_ids(ended) == NEW
        named = json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str((stages / "start").resolve())
    assert cli.main(["export", "--model", str(third), "--output", str(stages / "out")]) == 0
    assert apart(load_model(stages / "out"), load_model(third / "model")) < 1e-4


def test_fresh_adapters_on_merged_ones(stages) -> None:
    """The first stay where they are: the second name them as their base, and a new token finds its rows."""
    tokens = {"new_tokens": ("<|NEW|>",), "lora": LoRAConfig(2, targets="mlp", from_="merge")}
    run = sft(settings(SFTConfig, stages, "merged", "sft/latest", **tokens))
    model, first = load_model(run / "model"), stages / "sft" / "latest" / "model"
    begun = load_model(run / "checkpoints" / "initial")
    assert apart(begun, load_model(first)) < 1e-4 < 1e-3 < apart(model, begun)  # the order of a sum, logits of order 10
    assert model.peft_config["default"].r == 2 and trained_token_ids(model) == [1002]
    assert json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        first.resolve()
    )
    whole = sft(settings(SFTConfig, stages, "whole", "merged/latest", new_tokens=(), lora=LoRAConfig(from_="merge")))
    assert (whole / "model" / "model.safetensors").is_file()
    assert apart(load_model(whole / "checkpoints" / "initial"), model) < 1e-4
    again = rloo(rloo_of(stages, "again", "merged/latest", lora=LoRAConfig(2, from_="merge")))
    assert apart(load_model(again / "checkpoints" / "initial"), model) < 1e-4


def test_a_reward_model_starts_from_merged_adapters(stages) -> None:
    from qftlab.train.reward import ModelReward, reward

    run = reward(settings(RewardConfig, stages, "reward", "sft/latest"))
    scorer = ModelReward.load(str(run / "checkpoints" / "initial")).model
    adapted = load_model(stages / "sft" / "latest" / "model")
    with torch.no_grad():
        hidden, wanted = (m.base_model(IDS).last_hidden_state for m in (scorer, adapted.get_base_model()))
    assert torch.allclose(hidden, wanted, atol=1e-4)


def test_a_killed_continuation_is_resumed(stages) -> None:
    whole = dpo(settings(DPOConfig, stages, "uncut", "sft/latest"))
    run = dpo(settings(DPOConfig, stages, "cut", "sft/latest"))
    shutil.rmtree(run / "model")
    train = dataclasses.replace(settings(DPOConfig, stages, "cut", "sft/latest").train, max_steps=2)
    for path in (run / "checkpoints" / "dpo").glob("step-*"):
        shutil.rmtree(path)
    config = dataclasses.replace(settings(DPOConfig, stages, "cut", "sft/latest"), train=train, resume="last")
    assert dpo(config) == run
    assert torch.equal(logits(load_model(run / "model")), logits(load_model(whole / "model")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": LoRAConfig(8)}, "keep theirs, got lora.rank 8 for 4: leave it out, or --lora.from merge"),
        ({"lora": LoRAConfig(alpha=64)}, "got lora.alpha 64 for 32.0"),
        ({"lora": LoRAConfig(dropout=0.1)}, "got lora.dropout 0.1 for 0.0"),
        ({"lora": LoRAConfig(targets="mlp")}, "got lora.targets mlp for all"),
        ({"lora": LoRAConfig(tokens="<|im_end|>")}, r"got a row for <\|im_end\|>, which they do not train"),
        ({"new_tokens": ("<|NEW|>", "<|AGENT|>")}, r"got a row for <\|NEW\|>, which they do not train"),
        ({"base": "nowhere/at/all"}, "nowhere/at/all is no folder"),
    ],
)
def test_what_adapters_that_train_on_do_not_have_is_refused_before_there_is_a_run(stages, changes, words) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        sft(settings(SFTConfig, stages, "refused", "sft/latest", **changes))
    assert not (stages / "refused").exists()


def test_stages_take_the_base_from_where_it_is_now(stages, tmp_path) -> None:
    """And go on from there: the adapters that come out name the new place."""
    shutil.copytree(stages / "sft" / "latest" / "model", tmp_path / "adapters")
    shutil.copytree(stages / "start", tmp_path / "start")
    text = (tmp_path / "adapters" / "adapter_config.json").read_text()
    (tmp_path / "adapters" / "adapter_config.json").write_text(text.replace(str(stages.resolve()), "/gone"))
    config = dataclasses.replace(settings(DPOConfig, stages, "there", "x"), model=str(tmp_path / "adapters"))
    with pytest.raises(FileNotFoundError, match="whose base is not to be had: /gone/start is no folder"):
        dpo(config)
    run = dpo(dataclasses.replace(config, base=str(tmp_path / "start")))
    named = json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "start").resolve()) and load_model(run / "model").peft_config


def test_the_flag_is_lora_from(stages, capsys) -> None:
    """Python keeps the word, so the field is `from_`; flags, YAML and what --print_config prints take each other."""
    common = ["dpo", "--data", "x"]
    for given in (["--lora.from", "merge"], ["--lora.from=merge"], ["--lora", "{from: merge}"],
                  ["--config", "{lora: {from: merge}}"], ["--config", "{lora: {from_: merge}}"]):  # fmt: skip
        assert cli.parse("dpo", [*common[1:], *given]).lora == LoRAConfig(from_="merge"), given
    assert cli.main([*common, "--lora.from", "merge", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert cli.parse("dpo", ["--config", printed]).lora.from_ == "merge"
    assert cli.main(["dpo", "--help"]) == 0 and "--lora.from {continue,merge}" in capsys.readouterr().out
    assert cli.main([*common, "--lora.from", "scratch"]) == 2 and "scratch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lora and quant must be left out of a reward model, .*from_='continue'"):
        RewardConfig(data="x", lora=LoRAConfig())


def test_quantised_weights_where_they_cannot_run(monkeypatch) -> None:
    with pytest.raises(ValueError, match="quant must be one of none, 8bit, 4bit, got '2bit'"):
        load_model("tiny", quant="2bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quant '4bit' needs bitsandbytes, .* pip install bitsandbytes"):
        load_model("tiny", quant="4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="quant '4bit' needs a CUDA GPU, got device 'cpu'"):
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
