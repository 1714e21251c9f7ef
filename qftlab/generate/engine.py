"""Batched generation from a transformers model: greedy or sampled, with a cache, stop tokens and stop strings.

A row's tokens depend on the row alone: padding is masked, positions start at its first token, and its randomness is a
hash of (seed, row id, step). So a batch gives what each of its rows would give alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from qftlab.core.sampling import SamplingParams, sample, uniform
from qftlab.text.chat import render_prompt

logger = logging.getLogger(__name__)
GREEDY = SamplingParams(temperature=0.0)
END_OF_TURN = "<|im_end|>"
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    `token_ids` holds every sampled token, the stop token included; `text` ends before the stop token or stop string and
    shows other special tokens (`<|AGENT|>`). `finish_reason` is "stop" or "length". `logprobs` (nats, one a token) are
    fp32, at the sampling temperature (1 where decoding is greedy), over all rows of the head, before any filter.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class _Request:
    row: int  # prompt index * num_generations + generation: names the row's randomness
    prompt_ids: list[int]


@dataclass(frozen=True)
class _Plan:
    tokenizer: object
    max_new_tokens: int
    params: SamplingParams
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    seed: int
    vocab_limit: int
    with_logprobs: bool


class _Row:
    """One request while it is decoded."""

    def __init__(self, request: _Request) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason = ""

    def take(self, token: int, logprob: float | None, plan: _Plan) -> None:
        """Appends a token and notes whether the row is finished by it."""
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        cut = None
        if token in plan.stop_ids:
            self.finish_reason = "stop"
        else:
            cut = find_stop(plan.tokenizer, self.request.prompt_ids, self.token_ids, plan.stop)
            if cut is not None:
                self.finish_reason = "stop"
            elif len(self.token_ids) == plan.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            ids = self.token_ids[:-1] if token in plan.stop_ids else self.token_ids
            self.text = continuation_text(plan.tokenizer, self.request.prompt_ids, ids)[:cut]

    def completion(self, plan: _Plan) -> Completion:
        """The finished row as callers see it."""
        logprobs = self.logprobs if plan.with_logprobs else None
        return Completion(self.request.prompt_ids, self.token_ids, self.text, self.finish_reason, logprobs)


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    params: SamplingParams = GREEDY,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_generations: int = 1,
    return_logprobs: bool = False,
) -> list[Completion]:
    """Completes every prompt `num_generations` times.

    Args:
        model: a causal transformers model (or one wrapped by peft); its `training` flags are given back as found.
        tokenizer: its tokenizer; ids past `len(tokenizer)` are never produced.
        prompts: each a str (raw text, no template), a list of messages (rendered as a chat prompt) or a list of ids.
        max_new_tokens: the most tokens a completion may have.
        params: temperature and filters; temperature 0 is greedy.
        stop: strings that end a completion, found across token borders.
        stop_token_ids: tokens that end one; by default `default_stop_ids(model, tokenizer)`.
        seed: with the row id (prompt index * num_generations + generation), the whole of the randomness.
        batch_size: rows decoded together; halved, with one log line, when memory runs out.
        num_generations: completions of each prompt.
        return_logprobs: whether completions carry log-probabilities.

    Returns:
        `len(prompts) * num_generations` completions, those of one prompt side by side, in the order of `prompts`.

    Raises:
        TypeError: for a prompt of another kind, or prompts that are not a list.
        ValueError: for an empty prompt, ids or numbers out of range, or a prompt that with its new tokens is longer
            than the model's context.
    """
    _check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, num_generations=num_generations)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise ValueError("stop strings must not be empty, got '': leave it out")
    num_rows = model.get_output_embeddings().weight.shape[0]
    encoded = encode_prompts(tokenizer, prompts)
    _check_prompts(encoded, min(num_rows, model.get_input_embeddings().weight.shape[0]), max_new_tokens, model.config)
    stop_ids = default_stop_ids(model, tokenizer) if stop_token_ids is None else stop_token_ids
    plan = _Plan(tokenizer, max_new_tokens, params, stop, frozenset(stop_ids), seed,
                 min(len(tokenizer), num_rows), return_logprobs)  # fmt: skip
    requests = [_Request(i * num_generations + g, ids) for i, ids in enumerate(encoded) for g in range(num_generations)]
    requests.sort(key=lambda request: len(request.prompt_ids))
    completions: list[Completion | None] = [None] * len(requests)
    with _evaluating(model), torch.no_grad():
        for row in _in_batches(requests, batch_size, lambda batch: _decode(model, batch, plan)):
            completions[row.request.row] = row.completion(plan)
    return completions


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


def continuation_text(tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Text of `token_ids` as it follows the prompt, special tokens shown.

    The prompt's last token is decoded with them and cut off again: some tokenizers (Llama's) drop the blank before the
    first word of what they decode.
    """
    head = tokenizer.decode(list(prompt_ids[-1:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    joined = [*prompt_ids[-1:], *token_ids]
    text = tokenizer.decode(joined, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text.startswith(head):
        return text[len(head) :]
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def find_stop(tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in the text of `token_ids`, looked for in its end; None if there is none.

    Called after each token, it reads only as many tokens as a stop string may span (a token is at least one byte); the
    whole text is decoded only for a hit.
    """
    if not stop:
        return None
    span = max(len(s.encode()) for s in stop) + 8
    before = [*prompt_ids, *token_ids[:-span]]
    tail = continuation_text(tokenizer, before, token_ids[-span:])
    if not any(s in tail for s in stop):
        return None
    text = continuation_text(tokenizer, prompt_ids, token_ids)
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_prompts(encoded: list[list[int]], num_rows: int, max_new_tokens: int, config) -> None:
    context = getattr(config, "max_position_embeddings", None)
    for i, ids in enumerate(encoded):
        if min(ids) < 0 or max(ids) >= num_rows:
            worst = max(ids) if max(ids) >= num_rows else min(ids)
            raise ValueError(
                f"prompts[{i}] must hold ids from 0 to {num_rows - 1}, the rows of the model's embedding, got {worst}: "
                "use the model's own tokenizer, or extend the model after extending the tokenizer"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt and new tokens must fit the context of {context} tokens, got {len(ids)} in prompts[{i}] + "
                f"{max_new_tokens} new: shorten the prompt or lower max_new_tokens"
            )


@contextmanager
def _evaluating(model) -> Iterator[None]:
    found = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in found:
            module.training = was_training


def _in_batches(
    requests: list[_Request], batch_size: int, decode: Callable[[list[_Request]], list[_Row]]
) -> Iterator[_Row]:
    """Rows of all requests, a batch at a time; a batch that does not fit in memory is halved, and so are later ones."""
    done = 0
    while done < len(requests):
        batch = requests[done : done + batch_size]
        try:
            rows = decode(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            rows = None
        if rows is None:  # outside `except`, whose traceback would keep the failed batch alive
            batch_size = len(batch) // 2
            logger.warning("out of memory with %d rows a batch: going on with %d", len(batch), batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        done += len(batch)
        yield from rows


def _decode(model, batch: list[_Request], plan: _Plan) -> list[_Row]:
    """Decodes a batch to its end; rows leave it as they finish."""
    device = model.get_input_embeddings().weight.device
    rows = [_Row(request) for request in batch]
    running = rows
    input_ids, mask = _left_pad([r.prompt_ids for r in batch], device)  # (B, T)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    seen = [torch.tensor(r.prompt_ids, device=device) for r in batch] if plan.params.repetition_penalty != 1 else None
    cache = DynamicCache(config=model.config)
    for step in range(plan.max_new_tokens):
        logits = model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # (B, V)  # fmt: skip
        tokens = _next_tokens(logits, running, seen, step, plan)  # (B,)
        logprobs = _logprobs(logits, tokens, plan) if plan.with_logprobs else [None] * len(running)
        for row, token, logprob in zip(running, tokens.tolist(), logprobs, strict=True):
            row.take(token, logprob, plan)
        kept = [i for i, row in enumerate(running) if not row.finish_reason]
        if not kept:
            break
        if seen is not None:
            seen = [torch.cat([seen[i], tokens[i : i + 1]]) for i in kept]
        if len(kept) < len(running):
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            running = [running[i] for i in kept]
            tokens, mask, position_ids = tokens[index], mask[index], position_ids[index]
        input_ids, position_ids = tokens.unsqueeze(1), position_ids[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
    return rows


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T) int64: padding on the left, so that every row's last column is its last token."""
    width = max(map(len, prompts))
    # What stands in the padding does not matter, the mask hides it; id 0 always exists.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _next_tokens(logits: Tensor, running: list[_Row], seen: list[Tensor] | None, step: int, plan: _Plan) -> Tensor:
    row_ids = torch.tensor([row.request.row for row in running], device=logits.device)
    u = uniform(plan.seed, row_ids, step)
    return sample(logits, plan.params, u, seen_ids=seen, vocab_limit=plan.vocab_limit)


def _logprobs(logits: Tensor, tokens: Tensor, plan: _Plan) -> list[float]:
    scaled = logits.float() / (plan.params.temperature or 1.0)
    return scaled.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
