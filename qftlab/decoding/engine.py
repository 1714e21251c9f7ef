"""Batched generation from a transformers model: greedy or sampled, with stop tokens, stop strings and streaming.

A row's tokens depend on the row alone: positions start at its first token, nothing is padded, and its randomness is a
hash of (seed, row id, step). So a batch gives what each of its rows would give alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from qftlab.decoding.batch import Batch, BatchSettings
from qftlab.decoding.decoder import Decoder, decoder_for
from qftlab.maths.sampling import SamplingParams
from qftlab.model.head import language_head, module_mode
from qftlab.rows.chat import render_prompt

END_OF_TURN = "<|im_end|>"
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


def encode_prompts(tokenizer, prompts: Sequence[Prompt], thinking: bool | None = None) -> list[list[int]]:
    """Token ids of each prompt: text as the tokenizer reads it, messages as a chat prompt, ids as they are.

    Args:
        tokenizer: with a chat template, if there are messages.
        prompts: a list of them.
        thinking: of messages, as in `render_prompt`.

    Raises:
        TypeError: for a prompt of another kind, or prompts that are not a list of them.
        ValueError: for an empty prompt.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}: write [prompt]")
    if prompts and isinstance(prompts[0], Mapping | int):
        raise TypeError("prompts must be a list of prompts, got one list of messages or ids: write [prompt]")
    return [_encode(tokenizer, prompt, i, thinking) for i, prompt in enumerate(prompts)]


def _encode(tokenizer, prompt: Prompt, index: int, thinking: bool | None) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
        ids = render_prompt(tokenizer, list(prompt), thinking=thinking)
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
    context = getattr(model.config, "max_position_embeddings", None)
    rows = min(head_rows(model), model.get_input_embeddings().weight.shape[0])
    for i, (ids, limit) in enumerate(zip(encoded, limits, strict=True)):
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit} for prompts[{i}]")
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
    return language_head(model).weight.shape[0]


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


UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how half a UTF-8 sequence decodes


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


class TextStream:
    """The text of a growing completion, piece by piece; the pieces joined are the finished text.

    Half a character waits for its other bytes, and an end that could begin a stop string waits until it is clear.

    Args:
        tokenizer: decodes.
        prompt_ids: of the prompt, (T,).
        stop: strings that end the completion and are not part of its text.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._prompt_ids, self._stop = tokenizer, list(prompt_ids), tuple(stop)
        self._read, self._shown, self._held = 0, 0, ""

    def take(self, token_ids: Sequence[int]) -> str:
        """What may be shown now, given all tokens so far, the last of them no stop token."""
        if len(token_ids) <= self._read:  # a row that began again after memory ran out
            return ""
        before = [*self._prompt_ids[-1:], *token_ids[: self._read]]
        fresh = continuation_text(self._tokenizer, before, token_ids[self._read :])
        if fresh.endswith(UNFINISHED):
            return ""
        self._read = len(token_ids)
        text = self._held + fresh
        waiting = _possible_stop(text, self._stop)
        self._held = text[len(text) - waiting :]
        return self._show(text[: len(text) - waiting])

    def finish(self, text: str) -> str:
        """What was still held back of the finished text."""
        return self._show(text[self._shown :])

    def _show(self, piece: str) -> str:
        self._shown += len(piece)
        return piece


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(lengths, default=0)


logger = logging.getLogger(__name__)
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    `token_ids` holds every sampled token, the stop token included; `text` ends before the stop token or stop string and
    shows other special tokens (`<|AGENT|>`). `finish_reason` is "stop", "length" or "cancelled". `logprobs` (nats, one
    a token) are fp32, at the sampling temperature (1 where decoding is greedy), over all rows of the head, before any
    filter.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class _Request:
    tokenizer: object
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    seed: int
    vocab_limit: int
    with_logprobs: bool
    is_streaming: bool


class Row:
    """One completion, from its prompt to its end."""

    def __init__(self, number: int, prompt_ids: list[int], params: SamplingParams, limit: int, plan: _Request) -> None:
        self.number, self.prompt_ids, self.params, self.limit, self.plan = number, prompt_ids, params, limit, plan
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text, self.finish_reason, self.piece = "", "", ""
        self._stream = TextStream(plan.tokenizer, prompt_ids, plan.stop)

    def take(self, token: int, logprob: float | None) -> None:
        """Appends a token and notes whether the row is finished by it; `piece` is the text it lets one see."""
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.plan.stop_ids:
            self.finish("stop", len(self.token_ids) - 1)
            return
        cut = find_stop(self.plan.tokenizer, self.prompt_ids, self.token_ids, self.plan.stop)
        if cut is not None:
            self.finish("stop", cut=cut)
        elif len(self.token_ids) == self.limit:
            self.finish("length")
        elif self.plan.is_streaming:
            self.piece = self._stream.take(self.token_ids)

    def finish(self, reason: str, tokens: int | None = None, cut: int | None = None) -> None:
        """Ends the row: its text is that of its first `tokens` tokens, up to character `cut`."""
        self.finish_reason = reason
        self.text = continuation_text(self.plan.tokenizer, self.prompt_ids, self.token_ids[:tokens])[:cut]
        self.piece = self._stream.finish(self.text) if self.plan.is_streaming else ""

    def tell(self, on_text: Callable[[int, str], None] | None) -> None:
        """Hands on the piece of text that has just been written, if there is one and somebody to hear it."""
        if self.piece and on_text is not None:
            on_text(self.number, self.piece)

    def completion(self) -> Completion:
        """The finished row as callers see it."""
        logprobs = self.logprobs if self.plan.with_logprobs else None
        return Completion(self.prompt_ids, self.token_ids, self.text, self.finish_reason, logprobs)


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_generations: int = 1,
    thinking: bool | None = None,
    return_logprobs: bool = False,
    decoder: Decoder | None = None,
    on_text: Callable[[int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Completes every prompt `num_generations` times.

    Args:
        model: a causal transformers model (Qwen2, Qwen3 or Llama; also one wrapped by peft); its `training` flags are
            given back as found.
        tokenizer: its tokenizer; ids past `len(tokenizer)` are never produced.
        prompts: each a str (raw text, no template), a list of messages (rendered as a chat prompt) or a list of ids.
        max_new_tokens: the most tokens a completion may have, the same for all prompts or one for each.
        params: temperature and filters, the same for all prompts or one for each; temperature 0 is greedy.
        stop: strings that end a completion, found across token borders.
        stop_token_ids: tokens that end one; by default `default_stop_ids(model, tokenizer)`.
        seed: with the row id (prompt index * num_generations + generation), the whole of the randomness.
        batch_size: rows decoded together; halved, with one log line, when memory runs out.
        num_generations: completions of each prompt; they share its prefill.
        thinking: Qwen3's `enable_thinking`, of messages; None leaves the chat template its default.
        return_logprobs: whether completions carry log-probabilities.
        decoder: a `Decoder` of the same model, to keep its snapshot and CUDA graphs from call to call; by default one
            made anew, in the layout that pays on this machine (`decoder_for`).
        on_text: gets (completion's number, piece of text) as the text grows; the pieces joined are the text.
        should_stop: asked after every token; once true, what is not finished ends as "cancelled".
        progress: whether to draw a `tqdm.auto` bar of completions.

    Returns:
        `len(prompts) * num_generations` completions, those of one prompt side by side, in the order of `prompts`.

    Raises:
        TypeError: for a prompt of another kind, or prompts that are not a list.
        ValueError: for an empty prompt, ids or numbers out of range, a prompt that with its new tokens is longer than
            the model's context, logits that are no numbers, or a model or decoder that `Decoder` refuses.
    """
    rows = plan_rows(model, tokenizer, prompts, max_new_tokens, params, stop, stop_token_ids, seed, batch_size,
                      num_generations, thinking, return_logprobs, on_text is not None)  # fmt: skip
    with tqdm(total=len(rows), unit="completion", disable=not progress) as bar:
        for row in _run(model, decoder, rows, batch_size):
            row.tell(on_text)
            if row.finish_reason:
                bar.update()
            if should_stop is not None and should_stop():
                break
    for row in (row for row in rows if not row.finish_reason):
        row.finish("cancelled")
        row.tell(on_text)
    return [row.completion() for row in rows]


def stream(model, tokenizer, prompt: Prompt, **options) -> Iterator[str]:
    """The text of one completion, piece by piece as it is written; closing the iterator stops the model.

    Args:
        model, tokenizer: as in `generate`.
        prompt: one prompt of any kind.
        options: max_new_tokens, params, stop, stop_token_ids, seed, thinking and decoder of `generate`.

    Yields:
        Pieces of text that joined are `generate`'s text: whole characters, and nothing of a stop string.

    Raises:
        What `generate` raises, before the first piece.
    """
    decoder = options.pop("decoder", None)
    [row] = plan_rows(model, tokenizer, [prompt], is_streaming=True, **options)
    return (r.piece for r in _run(model, decoder, [row], 1) if r.piece)


def plan_rows(
    model, tokenizer, prompts, max_new_tokens=128, params=GREEDY, stop=(), stop_token_ids=None, seed=0, batch_size=1,
    num_generations=1, thinking=None, return_logprobs=False, is_streaming=False,
) -> list[Row]:  # fmt: skip
    """A row for every completion, in the order of the results, once everything has been checked."""
    for name, value in {"batch_size": batch_size, "num_generations": num_generations}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) for s in stop):
        raise TypeError(f"stop must be texts, got {stop!r:.60}: ids go to stop_token_ids")
    if "" in stop:
        raise ValueError("stop strings must not be empty, got '': leave it out")
    encoded = encode_prompts(tokenizer, prompts, thinking)
    limits = check_prompts(encoded, model, max_new_tokens)
    each = [params] * len(encoded) if isinstance(params, SamplingParams) else list(params)
    if not all(isinstance(p, SamplingParams) for p in each):
        raise TypeError(f"params must be SamplingParams, one or one a prompt, got {params!r:.60}")
    if len(each) != len(encoded):
        raise ValueError(f"params must be one, or one for each of the {len(encoded)} prompts, got {len(each)}")
    stop_ids = default_stop_ids(model, tokenizer) if stop_token_ids is None else stop_token_ids
    limit = min(len(tokenizer), head_rows(model))
    if unfit := [i for i in stop_ids if not isinstance(i, int) or not 0 <= i < head_rows(model)]:
        raise ValueError(f"stop_token_ids must be ids from 0 to {head_rows(model) - 1}, got {unfit[0]!r}")
    plan = _Request(tokenizer, stop, frozenset(stop_ids), seed, limit, return_logprobs, is_streaming)
    numbers = [(i, g) for i in range(len(encoded)) for g in range(num_generations)]
    return [Row(i * num_generations + g, encoded[i], each[i], limits[i], plan) for i, g in numbers]


def _run(model, decoder: Decoder | None, rows: list[Row], batch_size: int) -> Iterator[Row]:
    """Decodes all rows, those with short prompts first; yields a row whenever it has got a token."""
    waiting = sorted(rows, key=lambda row: len(row.prompt_ids))
    with module_mode(model, False):
        steps = max((row.limit for row in rows), default=0) * -(-len(rows) // batch_size)
        decoder = decoder_for(model, steps, decoder)
        while waiting:
            batch = waiting[:batch_size]
            try:
                yield from _decode(decoder, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # Outside `except`, whose traceback would keep the failed batch alive. Rows it did not finish begin again.
            unfinished = [row for row in batch if not row.finish_reason]
            if unfinished:
                batch_size = len(batch) // 2
                logger.warning("out of memory with %d rows a batch: going on with %d", len(batch), batch_size)
                decoder.spare = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            waiting = unfinished + waiting[len(batch) :]


def _decode(decoder: Decoder, rows: list[Row]) -> Iterator[Row]:
    """Decodes a batch to its end; rows leave it as they finish."""
    for row in rows:
        row.token_ids, row.logprobs = [], []
    plan = rows[0].plan
    settings = BatchSettings([r.params for r in rows], [r.number for r in rows], plan.seed, max(r.limit for r in rows),
                        plan.vocab_limit, plan.with_logprobs)  # fmt: skip
    batch = Batch(decoder, [row.prompt_ids for row in rows], settings)
    try:
        while True:
            for row, token, logprob in zip(rows, batch.tokens, batch.logprobs, strict=True):
                row.take(token, logprob)
                yield row
            kept = [i for i, row in enumerate(rows) if not row.finish_reason]
            if not kept:
                return
            if len(kept) < len(rows):
                rows = [rows[i] for i in batch.keep(kept)]
            batch.advance()
    except ValueError:
        batch.close(is_broken=True)
        raise
    finally:
        batch.close()
