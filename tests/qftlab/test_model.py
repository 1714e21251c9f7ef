"""Models: packed attention, loading and saving, and vocabularies that grow without losing anything."""

from __future__ import annotations

import pytest
import torch
from random_models import random_model

from qftlab.model.loading import extend_model, load_model, save_model
from qftlab.rows.batches import Example, pack, pad
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab_course.presets import PRESETS, Preset, get_preset

FAMILIES = ("qwen2", "qwen3", "llama")


def examples(lengths=(5, 1, 17, 9, 9, 30), vocab: int = 1000) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [Example(torch.randint(0, vocab, (n,), generator=generator).tolist(), [True] * n) for n in lengths]


def hidden(model, batch: dict) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_one_by_one(family):
    model, docs = random_model(family), examples()
    packed, padded = hidden(model, pack(docs))[0], hidden(model, pad(docs, 0))
    left = hidden(model, pad(docs, 0, side="left"))
    start = 0
    for row, doc in enumerate(docs):
        n = len(doc.input_ids)
        alone = hidden(model, {"input_ids": torch.tensor([doc.input_ids])})[0]
        # Different summation orders of fp32: 1e-5 on values of order 1.
        for other in (packed[start : start + n], padded[row, :n], left[row, -n:]):
            assert torch.allclose(alone, other, atol=1e-5)
        start += n


def test_packed_gradients_equal_one_by_one():
    model, docs = random_model(), examples()
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
    (hidden(model, pack(docs)) @ weights).sum().backward()
    together = [p.grad.clone() for p in model.base_model.parameters()]
    model.zero_grad()
    for doc in docs:
        (hidden(model, {"input_ids": torch.tensor([doc.input_ids])}) @ weights).sum().backward()
    for a, p in zip(together, model.base_model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-5, atol=1e-5 * p.grad.abs().max())


def test_packed_positions_without_lengths_still_keep_documents_apart():
    model, batch = random_model(), pack(examples())
    bare = {k: batch[k] for k in ("input_ids", "position_ids")}
    assert torch.allclose(hidden(model, batch), hidden(model, bare), atol=1e-5)


def test_packed_attention_refuses_a_rectangle():
    batch = pack(examples())
    batch["input_ids"] = batch["input_ids"].repeat(2, 1)
    with pytest.raises(ValueError, match="packed attention takes one row"):
        hidden(random_model(), batch)


def test_tiny_is_what_the_card_says():
    model = load_model("tiny")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32 and not model.training
    assert 800_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    assert model.get_input_embeddings().weight.shape[0] == 1024 > len(load_tokenizer("tiny"))
    assert load_model("tiny", dtype="auto").dtype == torch.bfloat16
    assert get_preset("tiny") == PRESETS["tiny"] and isinstance(PRESETS["qwen3-8b"], Preset)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_nothing_else_moves(tied):
    tokenizer, model = load_tokenizer("tiny"), random_model(tie_word_embeddings=tied)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [layer.weight.clone() for layer in layers]
    report = extend_tokenizer(tokenizer)
    extend_model(model, tokenizer, report)
    for layer, old in zip(layers, before, strict=True):
        assert layer.weight.shape == old.shape
        for token in report.tokens:
            assert torch.allclose(layer.weight[token.id], old[list(token.pieces_before)].mean(0), atol=1e-6)
        assert torch.equal(layer.weight[:1000], old[:1000]) and torch.equal(layer.weight[1002:], old[1002:])
    assert (layers[0].weight is layers[1].weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_added_only_when_the_tokenizer_outgrows_them(tied):
    tokenizer, model = load_tokenizer("tiny"), random_model(vocab_size=1001, tie_word_embeddings=tied)
    head = model.get_output_embeddings().weight.clone()
    report = extend_tokenizer(tokenizer)
    extend_model(model, tokenizer, report, init="description", descriptions={"<|AGENT|>": "find", "<|EDIT|>": "line"})
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == 1002 and model.config.vocab_size == 1002
    assert torch.allclose(rows[1000], rows[tokenizer("find").input_ids].mean(0), atol=1e-6)
    new_head = model.get_output_embeddings().weight
    assert new_head.shape[0] == 1002 and torch.equal(new_head[:1000], head[:1000]) and (new_head is rows) == tied
    assert torch.allclose(new_head[1000], head[tokenizer("find").input_ids].mean(0), atol=1e-6)
    again = rows.clone()
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    assert torch.equal(rows, again)


def test_real_qwen_is_not_resized(real_data):
    tokenizer = load_tokenizer(real_data / "qwen2.5-0.5b")
    model = random_model(vocab_size=151_936, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    assert model.get_input_embeddings().weight.shape[0] == 151_936


def test_bad_requests_name_the_way_out(tmp_path):
    tokenizer, model = load_tokenizer("tiny"), random_model()
    report = extend_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="init must be one of mean, description"):
        extend_model(model, tokenizer, report, init="zeros")
    with pytest.raises(ValueError, match=r"missing <\|AGENT\|>, <\|EDIT\|>"):
        extend_model(model, tokenizer, report, init="description")
    other = load_tokenizer("tiny")
    with pytest.raises(ValueError, match=r"report must be of this tokenizer, but <\|x\|> is 1000 in it and None here"):
        extend_model(model, load_tokenizer("tiny"), extend_tokenizer(other, ["<|x|>"]))
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_model("./no/such/folder")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model("tiny", dtype="fp8")
    with pytest.raises(ValueError, match="preset must be one of"):
        get_preset("huge")


def test_folders_without_sound_safetensors_are_refused(tmp_path):
    random_model().config.save_pretrained(tmp_path)
    torch.save({"lm_head.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="cannot be loaded: .* read from .safetensors only"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(FileNotFoundError, match="cannot be loaded: "):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_name_that_the_hub_does_not_give_is_reported_in_one_line(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="^Qwen/Qwen9 is no .* did not give it: We couldn.t connect [^;]*; give"
    ):
        load("Qwen/Qwen9")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_mistyped_run_is_not_looked_for_on_the_hub(load):
    """Where there is no network, looking takes 46 seconds of retries and ends in an error about the connection."""
    with pytest.raises(FileNotFoundError, match="runs/sfd is no folder: give"):
        load("runs/sfd")


def test_saved_models_load_in_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tokenizer("tiny"), load_model("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    save_model(model, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([tokenizer("47 + 38 =").input_ids])
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    assert plain.config._attn_implementation == "sdpa"


def test_the_real_llama_loads_and_scores_english(real_data):
    """A 260k-parameter Llama trained on children's stories: its own text is likelier than the same words shuffled."""
    from qftlab.maths.logprobs import token_logprobs

    model, tokenizer = load_model(real_data / "tinylm" / "hf"), load_tokenizer(real_data / "tinylm" / "hf")

    def score(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            return token_logprobs(model(ids).logits, ids).mean().item()

    assert score("Once upon a time, there was a little girl.") > score("girl little a was there, time a upon Once.") + 1


def test_an_untied_head_grows_as_the_embedding_does_and_in_silence(caplog):
    """A tokenizer that puts a token before every text, as Llama's does: it is no part of a description.

    transformers can draw new rows around the mean of the old ones, which takes a covariance of the vocabulary and a
    notice to the reader; all rows are set here, so it shall not.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers.utils import logging as transformers_logging

    tokenizer, model = load_tokenizer("tiny"), random_model(vocab_size=1001, tie_word_embeddings=False)
    begin = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    assert tokenizer("find").input_ids[0] == begin[1]
    old = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    report, said = extend_tokenizer(tokenizer), {"<|AGENT|>": "find", "<|EDIT|>": "line"}
    transformers_logging.enable_propagation()
    try:
        extend_model(model, tokenizer, report, init="description", descriptions=said)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    assert layers[0].weight is not layers[1].weight and model.config.tie_word_embeddings is False
    for layer, before in zip(layers, old, strict=True):
        assert layer.weight.shape == (1002, 32) and torch.equal(layer.weight[:1000], before[:1000])
        for token in report.tokens:
            pieces = tokenizer(said[token.text], add_special_tokens=False).input_ids
            assert torch.allclose(layer.weight[token.id], before[pieces].mean(0), atol=1e-6)
    kept = [layer.weight.clone() for layer in layers]
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    assert all(torch.equal(layer.weight, before) for layer, before in zip(layers, kept, strict=True))
