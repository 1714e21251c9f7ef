"""New tokens in a model: rows that never shrink, and sensible values for the new ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qftlab.rows.tokenizer import ExtensionReport


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: ExtensionReport,
    *,
    init: str = "mean",
    descriptions: Mapping[str, str] | None = None,
) -> None:
    """Gives each new token a row: the mean of the rows of its old pieces, or of a description's tokens; in place.

    Input and output rows are both set where they are two matrices. Rows are added only if the tokenizer has outgrown
    them; a real Qwen has hundreds to spare (151,936 rows for 151,665 tokens).

    Args:
        model: changed in place; tied or untied.
        tokenizer: already extended.
        report: what `extend_tokenizer` returned; tokens that are not new are left alone.
        init: "mean" of the pieces, or "description".
        descriptions: token → a few words, for `init="description"`.

    Raises:
        ValueError: for another `init`, a new token without a description, the report of another tokenizer, or a model
            that has adapters already.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    if init not in ("mean", "description"):
        raise ValueError(f'init must be "mean" or "description", got {init!r}')
    if hasattr(model, "peft_config"):
        raise ValueError("model must be extended before it gets adapters, got one with adapters")
    lacking = [t.text for t in report.new if init == "description" and not (descriptions or {}).get(t.text)]
    if lacking:
        raise ValueError(f"descriptions must have an entry for each new token, missing {', '.join(lacking)}")
    for token in report.tokens:
        if (found := tokenizer.convert_tokens_to_ids(token.text)) != token.id:
            raise ValueError(
                f"report must be of this tokenizer, but {token.text} is {token.id} in it and {found} here: "
                "pass what extend_tokenizer(tokenizer) returned"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for token in report.new:
            pieces = list(token.pieces_before)
            if init == "description":
                pieces = tokenizer(descriptions[token.text], add_special_tokens=False).input_ids
            for layer in row_layers(model):
                layer.weight[token.id] = layer.weight[pieces].float().mean(0).to(layer.weight.dtype)


def row_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that hold one row a token: the embedding, and the head where it is a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or _matrix(head) is _matrix(embedding) else [embedding, head]


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer is made of; one whose rows peft trains answers `.weight` with a new tensor each time."""
    return (layer.token_adapter.base_layer if hasattr(layer, "token_adapter") else layer).weight
