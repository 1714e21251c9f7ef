"""Continuous batching: one thread owns the model; rows join its batch between two steps, and leave it as they finish.

A row is the engine's own: its tokens hang on its prompt, settings, seed and number alone, so a served answer is that of
`generate`, whoever else is in the batch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from qftlab.decoding.cache import KVCache
from qftlab.decoding.decoder import LONG_ENOUGH, decoder_for
from qftlab.decoding.engine import Row, head_rows
from qftlab.maths.sampling import sample, uniform
from qftlab.model.head import module_mode
from qftlab.serve import ServeConfig

log = logging.getLogger(__name__)
PREFILL_TOKENS = 2048  # of newcomers that are read between two steps: while they are, all others wait
COLUMNS = 128  # by which the cache grows
Token = tuple[int, float | None, list[tuple[int, float]]]  # id, logprob, the likeliest ids with theirs
# The row's index, text that may be shown now, the tokens since the last event, why the row has ended ("": it goes on).
Event = tuple[int, str, list[Token], str]


class Failed(RuntimeError):
    """A row that ended early, or was not taken, through no fault of its own; `status` is HTTP's number for it."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class Seat:
    """A row's place in queue and batch; `is_over` set to true takes it out before the next step.

    Args:
        index: of the row in its request.
        row: of `plan_rows`.
        hear: gets each `Event`, or the exception that ends the row; called in the model's thread.
        top: likeliest tokens to tell at each place.
    """

    def __init__(self, index: int, row: Row, hear: Callable[[Event | Exception], None], top: int) -> None:
        self.index, self.row, self.hear, self.top = index, row, hear, top
        self.fresh: list[Token] = []
        self.is_over, self.size = False, len(row.prompt_ids) + row.limit
        numbers, steps = torch.tensor([row.number]), torch.arange(row.limit if row.params.temperature else 0)
        self.u = uniform(row.plan.seed, numbers, steps)[0].tolist()

    def take(self, token: Token) -> None:
        """The row's next token; whoever asked hears of it where there is something to show."""
        row, streams = self.row, self.row.plan.is_streaming
        try:
            row.take(*token[:2])
            self.fresh.append(token)
            if row.finish_reason or (streams and (row.piece or row.plan.with_logprobs)):
                self.hear((self.index, row.piece if streams else row.text, self.fresh, row.finish_reason))
                self.fresh = []
            self.is_over = self.is_over or bool(row.finish_reason)
        except Exception as error:  # of one row, which must not end the others
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the row; whoever asked hears why."""
        self.is_over = True
        with suppress(RuntimeError):  # its event loop is closed
            self.hear(error)


class Batcher:
    """Rows of many requests, decoded together by a thread of its own.

    Args:
        model, tokenizer: as in `generate`.
        config: how many rows and tokens the batch holds, and how many rows may wait.

    Raises:
        ValueError: for a model that `Decoder` refuses.
    """

    def __init__(self, model, tokenizer, config: ServeConfig) -> None:
        self.model, self.config, self.vocab_limit = model, config, min(len(tokenizer), head_rows(model))
        with module_mode(model, False):
            self.decoder = decoder_for(model, LONG_ENOUGH)
        self.device = self.decoder.weight.device
        self.waiting: deque[Seat] = deque()
        self.seats: list[Seat] = []
        self.lengths: list[int] = []
        self.store: Tensor | None = None  # keys and values; its first rows are those of the seats
        self.changed, self.is_closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, rows: Sequence[Row], hear: Callable[[Event | Exception], None], top: int = 0) -> list[Seat]:
        """Puts rows into the queue.

        Args:
            rows, hear, top: as in `Seat`.

        Raises:
            Failed: with status 429, if the queue has no room for all of them.
        """
        seats, most = [Seat(index, row, hear, top) for index, row in enumerate(rows)], self.config.max_queue
        with self.changed:
            self.waiting = deque(seat for seat in self.waiting if not seat.is_over)
            if self.is_closed or len(self.waiting) + len(seats) > most:
                raise Failed(f"{len(self.waiting)} answers wait, and {most} may: ask for {len(seats)} later", 429)
            self.waiting += seats
            self.changed.notify()
        return seats

    def close(self) -> None:
        """Ends the thread; what is unfinished fails."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()
        for seat in (*self.seats, *self.waiting):
            seat.fail(Failed("the server was stopped: ask again when it is back"))

    def _run(self) -> None:
        with module_mode(self.model, False), torch.no_grad():
            while not self.is_closed:
                if failure := _attempt(self._round):
                    for seat in self.seats:
                        seat.fail(failure)

    def _round(self) -> None:
        """Newcomers join, all rows take a step, and those that are over leave."""
        self._settle()
        self._admit(self._newcomers())
        self._settle()
        if self.seats and (failure := _attempt(self._step)):
            self.seats[-1].fail(failure)  # the others try again without it

    def _newcomers(self) -> list[Seat]:
        """Those in the queue that the batch has room for, in their order; waits while there is nothing to do."""
        new: list[Seat] = []
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.seats or self.is_closed)
            while self.waiting and (self.waiting[0].is_over or self._fits([*new, self.waiting[0]])):
                new.append(self.waiting.popleft())
        return [seat for seat in new if not seat.is_over]

    def _fits(self, new: list[Seat]) -> bool:
        seats, read = [*self.seats, *new], len(new) * max(len(seat.row.prompt_ids) for seat in new)
        tokens = len(seats) * max(seat.size for seat in seats)
        has_room = len(seats) <= self.config.max_batch and (len(seats) == 1 or tokens <= self.config.cache_tokens)
        return has_room and (len(new) == 1 or read <= PREFILL_TOKENS)

    def _admit(self, new: list[Seat]) -> None:
        """Newcomers join; where that fails, each by itself, so that only those fail that must."""
        count = len(self.seats)
        if new and (failure := _attempt(self._join, new)):
            del self.seats[count:], self.lengths[count:]
            for seat in new if len(new) > 1 else ():
                self._admit([seat])
            if len(new) == 1:
                new[0].fail(failure)

    def _join(self, new: list[Seat]) -> None:
        """Reads the newcomers' prompts into free rows, each prompt once, and chooses their first tokens."""
        count, prompts = len(self.seats), [seat.row.prompt_ids for seat in new]
        self._make_room([*self.seats, *new], max([*self.lengths, *map(len, prompts)]) + 1)
        unique = list({id(prompt): prompt for prompt in prompts}.values())
        cache = KVCache(self.store[:, :, count : count + len(new)], [0] * len(new))
        logits = self.decoder.prefill(unique, cache)
        if len(unique) < len(new):
            owners = [next(i for i, one in enumerate(unique) if one is prompt) for prompt in prompts]
            cache.copy_(cache, owners)
            logits = logits[torch.tensor(owners, device=self.device)]
        self.seats, self.lengths = [*self.seats, *new], [*self.lengths, *cache.lengths]
        self._choose(logits, count)

    def _step(self) -> None:
        """One more token for every row."""
        count = len(self.seats)
        self._make_room(self.seats, max(self.lengths) + 1)
        tokens = torch.tensor([seat.row.token_ids[-1] for seat in self.seats], device=self.device)
        cache = KVCache(self.store[:, :, :count], self.lengths)
        self._choose(self.decoder.step(tokens, cache), 0)
        self.lengths = cache.lengths

    def _make_room(self, seats: list[Seat], columns: int) -> None:
        """A store of at least so many rows and columns, rounded up within what `_fits` allows."""
        old, rows = self.store, len(seats)
        if old is not None and old.shape[2] >= rows and old.shape[4] >= columns:
            return
        columns = min(-(-columns // COLUMNS) * COLUMNS, max(seat.size for seat in seats))
        most = max(rows, min(self.config.max_batch, self.config.cache_tokens // columns))
        self.store = self.decoder.new_cache(min(1 << (rows - 1).bit_length(), most), columns).store
        if self.lengths:
            count, width = len(self.lengths), max(self.lengths)
            self.store[:, :, :count, :, :width] = old[:, :, :count, :, :width]

    def _choose(self, logits: Tensor, first: int) -> None:
        """Gives the rows from `first` on their next tokens; one whose logits are no numbers ends."""
        is_good = logits[:, : self.vocab_limit].amax(-1).isfinite()
        for index in (~is_good).nonzero().flatten().tolist():
            self.store[:, :, first + index] = 0  # what is no number there would spoil the row's next owner
            self.seats[first + index].fail(Failed("the logits are no numbers: are the model's weights damaged?"))
        seats = [self.seats[first + index] for index in is_good.nonzero().flatten().tolist()]
        if not seats:
            return
        logits, rows = logits if len(seats) == len(logits) else logits[is_good], [seat.row for seat in seats]
        seen = None
        if any(row.params.repetition_penalty != 1 for row in rows):
            seen = [torch.tensor([*row.prompt_ids, *row.token_ids]) for row in rows]
        u = torch.tensor([seat.u[len(seat.row.token_ids)] if seat.u else 0 for seat in seats], dtype=torch.float64)
        params = [row.params for row in rows]
        chosen = sample(logits, params, u.to(self.device), seen_ids=seen, vocab_limit=self.vocab_limit)
        for seat, token in zip(seats, _tokens(logits, chosen, seats), strict=True):
            seat.take(token)

    def _settle(self) -> None:
        """Rows that are over leave, and those behind them move up; an empty batch gives its memory back."""
        kept = [index for index, seat in enumerate(self.seats) if not seat.is_over]
        if not kept:
            self.seats, self.lengths, self.store = [], [], None
        elif len(kept) < len(self.seats):
            cache, order = KVCache(self.store[:, :, : len(self.seats)], self.lengths).keep(kept)
            self.seats, self.lengths = [self.seats[index] for index in order], cache.lengths


def _attempt(act: Callable[..., None], *given) -> Failed | None:
    """What went wrong, without its traceback, which would keep tensors alive."""
    try:
        act(*given)
        return None
    except Exception as error:
        log.warning("a step failed", exc_info=True)
        what = "memory ran out, ask for less" if isinstance(error, torch.OutOfMemoryError) else "the model failed"
        return Failed(f"{what} ({type(error).__name__}: {error})")


def _tokens(logits: Tensor, chosen: Tensor, seats: Sequence[Seat]) -> list[Token]:
    """The chosen tokens, with what `generate` calls their log-probabilities where a row is to tell them."""
    tokens: list[Token] = [(token, None, []) for token in chosen.tolist()]
    rows = [row for row, seat in enumerate(seats) if seat.row.plan.with_logprobs]
    if rows:
        scale = torch.tensor([seats[row].row.params.temperature or 1.0 for row in rows], device=logits.device)
        scores = (logits[rows].float() / scale.unsqueeze(1)).log_softmax(-1)
        values, ids = scores.topk(max(seats[row].top for row in rows))
        for i, row in enumerate(rows):
            best = list(zip(ids[i].tolist(), values[i].tolist(), strict=True))[: seats[row].top]
            tokens[row] = tokens[row][0], scores[i, tokens[row][0]].item(), best
    return tokens
