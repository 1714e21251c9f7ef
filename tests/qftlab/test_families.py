"""Families of models: packed = padded = transformers' own loss, or refused by name; and the table of them in the docs.

Losses are means over documents of 6 to 20 trained tokens in fp32: other orders of summation move them by up to 1e-6 a
nat, a document that sees its neighbour, or a window that is not kept to, by 1e-2 and more.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from tiny_families import VOCABULARY, tiny_model
from transformers import AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from qftlab.decoding.decoder import Decoder
from qftlab.model.attention import PACKABLE, UNHEEDED, register_packed_attention
from qftlab.model.cpu import pack_answers
from qftlab.model.loading import load_model, save_model
from qftlab.rows.batches import Example, pack, pad
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.reward import scores_of
from qftlab.train.step import Step

TABLE = Path(__file__).resolve().parents[2] / "docs/models.md"
LENGTHS = (21, 7, 13)
ROUNDING = 2e-5


def documents() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in LENGTHS]


def own_losses(model) -> torch.Tensor:
    """transformers' loss of each document by itself."""
    with torch.no_grad():
        ids = [torch.tensor([document]) for document in documents()]
        return torch.stack([model(input_ids=x, labels=x).loss for x in ids])


@torch.no_grad()
def losses(step: Step, collate) -> torch.Tensor:
    """The step's loss of each document, all in one batch."""
    batch = collate([Example(ids, [True] * len(ids)) for ids in documents()])
    found = step(**batch, want="logprobs")
    rows = found[0].split([*LENGTHS[:-1], LENGTHS[-1] - 1]) if len(found) == 1 else found
    return torch.stack([-row[: n - 1].sum() / (n - 1) for row, n in zip(rows, LENGTHS, strict=True)])


def verdict_of(family: str, attentions: tuple[str | None, ...] = (None,), **changes) -> tuple[str, str]:
    """What the library does with a family, and why not more; a difference to transformers' own loss is an error."""
    try:
        models = [tiny_model(family, name, **changes) for name in attentions]
        own = own_losses(models[-1])
    except Exception as error:
        return "not built tiny", f"{type(error).__name__}: {error}"
    kinds = set()
    for model in models:
        try:
            step = Step(model)
        except ValueError as error:
            assert model.config.model_type in str(error)
            return "refused", str(error)
        assert (losses(step, lambda examples: pad(examples, 0)) - own).abs().max() < ROUNDING, f"{family}, padded"
        try:
            assert (losses(step, pack) - own).abs().max() < ROUNDING, f"{family}, packed"
            kinds.add("packed")
        except ValueError as error:
            assert f"packing must be false for {model.config.model_type}" in str(error)
            kinds.add("padded")
    [kind] = kinds
    return kind, ""


def every_attention(family: str) -> tuple[str | None, ...]:
    """What `load_model` would take first, for families that may be packed the others too, transformers' choice last."""
    return (register_packed_attention(), "eager", None) if family in PACKABLE else (None,)


# Some of every kind: windows, soft caps, sinks, states, biases in place of positions, scales, experts, encoders.
FEW = {
    "bert": "refused", "bloom": "padded", "cohere": "refused", "falcon": "padded", "gemma2": "refused",
    "gpt2": "packed", "gpt_oss": "padded", "granite": "packed", "lfm2": "padded", "llama": "packed", "mamba": "padded",
    "mistral": "packed", "mixtral": "packed", "phi3": "packed", "qwen2": "packed", "qwen3": "packed",
    "qwen3_next": "padded",
}  # fmt: skip


@pytest.mark.parametrize("family", FEW)
def test_a_family_is_what_the_table_says(family: str) -> None:
    assert verdict_of(family, every_attention(family))[0] == FEW[family] == read_table()[family]


@pytest.mark.slow
def test_every_family_is_right_or_refused_by_name() -> None:
    """`QFTLAB_WRITE=1` writes the table of the docs in place of comparing with it."""
    found = {family: verdict_of(family, every_attention(family)) for family in NAMES}
    for family, (verdict, why) in found.items():
        print(f"{family:28} {verdict:15} {why:.200}")
    assert {family for family, (verdict, _) in found.items() if verdict == "packed"} >= set(PACKABLE)
    if os.environ.get("QFTLAB_WRITE"):
        write_table({family: verdict for family, (verdict, _) in found.items()})
    assert {family: verdict for family, (verdict, _) in found.items()} == read_table()


HEAD = "| family | rows |\n|---|---|\n"


def write_table(found: dict[str, str]) -> None:
    rows = "".join(f"| {family} | {verdict} |\n" for family, verdict in sorted(found.items()))
    TABLE.write_text(TABLE.read_text(encoding="utf-8").partition(HEAD)[0] + HEAD + rows, encoding="utf-8")


def read_table() -> dict[str, str]:
    rows = TABLE.read_text(encoding="utf-8").partition(HEAD)[2]
    return dict(re.findall(r"^\| ([\w-]+) \| ([a-z ]+) \|$", rows, re.MULTILINE))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
        ("gemma4", {"final_logit_softcapping": 30.0}),  # its configuration is inside another
        ("mixtral", {"output_router_logits": True}),  # logits are the head's, and the loss has the router's as well
        ("olmoe", {"output_router_logits": True}),
    ],
)
def test_what_a_configuration_adds_to_logits_or_loss_is_refused(family: str, changes: dict) -> None:
    for attention in every_attention(family):
        model = tiny_model(family, attention)
        Step(model)
        for name, value in changes.items():
            setattr(model.config.get_text_config(), name, value)
        with pytest.raises(ValueError, match=f"logits must be the head's and loss theirs alone, got {family} .scale"):
            Step(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_lets_rounding_be_and_sees_a_small_scale(dtype: torch.dtype) -> None:
    """A sixteenth, where bf16 rounds by a 256th; the loss of bf16 logits is their own."""
    model = tiny_model("granite", logits_scaling=1.0).to(dtype)
    Step(model)
    model.config.logits_scaling = 1.0625
    with pytest.raises(ValueError, match="got granite .scale, cap"):
        Step(model)


# --- windows, masks and what else attention is asked for --------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_a_window_counts_where_it_is_shorter_than_a_document(family: str) -> None:
    """And then is kept to in packed rows, also of documents that share a prompt: in loss and in gradients."""
    docs = [Example(ids, [i >= 3 for i in range(len(ids))]) for ids in documents()]
    docs.append(Example([*docs[0].input_ids[:3], 9, 8, 7, 6, 5, 4, 3], [i >= 3 for i in range(10)]))
    docs.insert(1, docs.pop())
    rows = [pack_answers(docs, [0, 0, 1, 2], [3] * 4), pack(docs), pad(docs, 0)]
    found = {}
    for window in (5, 64):
        model = tiny_model(family, register_packed_attention(), sliding_window=window)
        assert model.config.sliding_window == window
        for number, batch in enumerate(rows):
            model.zero_grad()
            loss = Step(model)(**batch, num_tokens=10)
            loss.backward()
            found[window, number] = loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for window in (5, 64):
        for number in (0, 1):
            assert found[window, number][0] == pytest.approx(found[window, 2][0], rel=1e-5)
            for ours, theirs in zip(found[window, number][1], found[window, 2][1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    assert abs(found[5, 1][0] - found[64, 1][0]) > 0.05, "the window does something"


@pytest.mark.parametrize("name", UNHEEDED)
def test_packed_attention_refuses_what_it_would_leave_out(name: str) -> None:
    model = tiny_model("qwen3", register_packed_attention())
    batch = {name: value for name, value in pack([Example([1, 2, 3], [True] * 3)]).items() if name != "labels"}
    for rows in (batch, {"input_ids": batch["input_ids"]}):
        model(**rows)
        with pytest.raises(ValueError, match=f"packed attention knows no {name}, got Qwen3Attention with it"):
            model(**rows, **{name: torch.ones(4)})


def test_packed_rows_refuse_masks_that_they_would_not_keep_to() -> None:
    """A family that sees what comes after, and a mask that comes with the row."""
    model = tiny_model("qwen3", register_packed_attention())
    batch = pack([Example(ids, [True] * len(ids)) for ids in documents()])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="packed attention knows no a mask of its own"):
        model(**inputs, attention_mask=torch.ones(1, 1, 41, 41, dtype=torch.bool))
    model.config.is_causal = False
    with pytest.raises(ValueError, match="packing must be false for qwen3"):
        Step(model)(**batch, num_tokens=3)
    with pytest.raises(ValueError, match="packed attention knows no a mask of its own"):
        model(**inputs)
    model.config.use_sliding_window = False
    with pytest.raises(ValueError, match="is_causal must be true, got false"):
        Decoder(model)


def test_a_reward_model_refuses_packed_rows_that_it_would_mix_up() -> None:
    config = tiny_model("gpt_oss").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    rows = [Example(ids, [True] * len(ids)) for ids in documents()]
    assert scores_of(model, pad(rows, 0)).shape == (3,)
    with pytest.raises(ValueError, match="packing must be false for gpt_oss, got a packed row"):
        scores_of(model, pack(rows))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_families_load_with_an_attention_that_they_know(tmp_path: Path, caplog) -> None:
    """`falcon` once answered with KeyError: 'packed'. The name stands in no file that is written."""
    caplog.set_level("INFO", "qftlab.model.loading")
    tokenizer = load_tokenizer("tiny")
    for family, attention in (("falcon", "sdpa"), ("gpt_oss", "eager"), ("mistral", "packed"), ("qwen3", "packed")):
        folder = save_model(tiny_model(family, register_packed_attention() if family in PACKABLE else None), tokenizer,
                            tmp_path / family)  # fmt: skip
        caplog.clear()
        assert load_model(folder).config._attn_implementation == attention
        assert ("takes no packed rows" in caplog.text) == (attention != "packed")
        again = save_model(load_model(folder), tokenizer, tmp_path / "again")
        assert '"packed"' not in (again / "config.json").read_text(encoding="utf-8")


def test_what_is_no_causal_language_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_kv=2, num_layers=1, vocab_size=64, d_ff=8, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="got t5 .*encoder"):
        Step(T5ForConditionalGeneration(config))
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"of which nothing is read")
    with pytest.raises(ValueError, match="must be a causal language model, such as Qwen3, got a t5"):
        load_model(tmp_path)
