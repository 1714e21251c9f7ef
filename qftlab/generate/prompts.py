"""Prompts as callers write them → token ids, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qftlab.rows.chat import render_prompt
from qftlab.settings import check_at_least

END_OF_TURN = "<|im_end|>"
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


def encode_prompts(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text as the tokenizer reads it, messages as a chat prompt, ids as they are.

    Raises:
        TypeError: for a prompt of another kind, or prompts that are not a list of them.
        ValueError: for an empty prompt.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}: write [prompt]")
    if prompts and isinstance(prompts[0], Mapping | int):
        raise TypeError("prompts must be a list of prompts, got one list of messages or ids: write [prompt]")
    return [_encode(tokenizer, prompt, i) for i, prompt in enumerate(prompts)]


def _encode(tokenizer, prompt: Prompt, index: int) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
        ids = render_prompt(tokenizer, list(prompt))
    elif isinstance(prompt, Sequence) and all(isinstance(item, int) for item in prompt):
        ids = list(prompt)
    else:
        raise TypeError(f"prompts[{index}] must be a str, a list of messages or a list of ids, got {prompt!r:.60}")
    if not ids:
        raise ValueError(f"prompts[{index}] must have at least one token, got none: begin it with a token or some text")
    return ids


def check_prompts(encoded: Sequence[Sequence[int]], model, max_new_tokens: int | Sequence[int]) -> list[int]:
    """Refuses ids that the model has no row for, and prompts that do not fit its context with their new tokens.

    Returns:
        The most new tokens of each prompt.

    Raises:
        ValueError: naming the prompt and both numbers.
    """
    if isinstance(max_new_tokens, float | str):
        raise TypeError(f"max_new_tokens must be a whole number, or one for each prompt, got {max_new_tokens!r}")
    limits = [max_new_tokens] * len(encoded) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(encoded):
        raise ValueError(f"max_new_tokens must be one, or one for each of {len(encoded)} prompts, got {len(limits)}")
    check_at_least(1, max_new_tokens=min(limits, default=1))
    context = getattr(model.config, "max_position_embeddings", None)
    rows = min(head_rows(model), model.get_input_embeddings().weight.shape[0])
    for i, (ids, limit) in enumerate(zip(encoded, limits, strict=True)):
        if min(ids) < 0 or max(ids) >= rows:
            worst = max(ids) if max(ids) >= rows else min(ids)
            raise ValueError(
                f"prompts[{i}] must hold ids from 0 to {rows - 1}, the rows of the model's embedding, got {worst}: "
                "use the model's own tokenizer, or extend the model after extending the tokenizer"
            )
        if context is not None and len(ids) + limit > context:
            raise ValueError(
                f"prompt and new tokens must fit the context of {context} tokens, got {len(ids)} in prompts[{i}] + "
                f"{limit} new: shorten the prompt or lower max_new_tokens"
            )
    return limits


def head_rows(model) -> int:
    """Rows of the model's head: one logit each, padding rows included."""
    return model.get_output_embeddings().weight.shape[0]


def default_stop_ids(model, tokenizer) -> list[int]:
    """Ids that end a completion: the generation config's and tokenizer's end of sequence, and `<|im_end|>` if known."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(configured if isinstance(configured, list | tuple) else [configured])
    ids |= {tokenizer.eos_token_id, known_id(tokenizer, END_OF_TURN)}
    return sorted(ids - {None})


def known_id(tokenizer, token: str) -> int | None:
    """The id of one token's text, or None if the tokenizer has no such token (some answer with their unknown token)."""
    index = tokenizer.convert_tokens_to_ids(token)
    return index if index is not None and tokenizer.convert_ids_to_tokens(index) == token else None
