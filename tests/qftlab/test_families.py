"""Families of models: packed = padded = transformers' own loss, or refused by name; and the table of them in the docs.

Losses are means over documents of 6 to 20 trained tokens in fp32: other orders of summation move them by up to 1e-6 a
nat, a document that sees its neighbour, or a window that is not kept to, by 1e-2 and more.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from random_models import random_model
from tiny_families import VOCABULARY, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from qftlab.model import attention
from qftlab.model.attention import PACKABLE, register_packed_attention
from qftlab.model.loading import load_model, save_model
from qftlab.rows.batches import Example, pack, pad
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


def verdict_of(family: str) -> tuple[str, str]:
    """What the library does with a family, and why not more; a difference to transformers' own loss is an error."""
    try:
        model = tiny_model(family, register_packed_attention() if family in PACKABLE else None)
    except Exception as error:
        return "not built tiny", str(error)
    try:
        step = Step(model)
    except ValueError as error:
        return "refused", str(error)
    own = own_losses(model)
    assert (losses(step, lambda examples: pad(examples, 0)) - own).abs().max() < ROUNDING, f"{family}, padded"
    try:
        packed = losses(step, pack)
    except ValueError as error:
        assert family in str(error) or model.config.model_type in str(error)
        return "padded", ""
    assert (packed - own).abs().max() < ROUNDING, f"{family}, packed"
    return "packed", ""


# Some of every kind: windows, soft caps, sinks, states, biases in place of positions, scales, experts, encoders.
FEW = {
    "qwen2": "packed", "qwen3": "packed", "llama": "packed",
}  # fmt: skip


@pytest.mark.parametrize("family", FEW)
def test_a_family_is_what_the_table_says(family: str) -> None:
    assert verdict_of(family)[0] == FEW[family] == read_table()[family]


@pytest.mark.slow
def test_every_family_is_right_or_refused_by_name() -> None:
    """`QFTLAB_WRITE=1` writes the table of the docs in place of comparing with it."""
    found = {family: verdict_of(family) for family in NAMES}
    assert {family for family, (verdict, _) in found.items() if verdict == "packed"} >= set(PACKABLE)
    if os.environ.get("QFTLAB_WRITE"):
        write_table(found)
    assert {family: verdict for family, (verdict, _) in found.items()} == read_table()


HEAD = "| family | rows |\n|---|---|\n"


def write_table(found: dict[str, tuple[str, str]]) -> None:
    rows = "".join(f"| {family} | {verdict} |\n" for family, (verdict, _) in sorted(found.items()))
    text = TABLE.read_text(encoding="utf-8")
    TABLE.write_text(text[: text.index(HEAD)] + HEAD + rows, encoding="utf-8")


def read_table() -> dict[str, str]:
    return dict(re.findall(r"^\| ([\w-]+) \| ([a-z ]+) \|$", TABLE.read_text(encoding="utf-8").partition(HEAD)[2], re.M))
