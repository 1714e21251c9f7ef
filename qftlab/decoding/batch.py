"""Rows decoded together, one token a row and step: eagerly, or on CUDA as recorded graphs that replay a whole step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qftlab.decoding.cache import KVCache, Prefix
from qftlab.decoding.decoder import Decoder
from qftlab.maths.sampling import RowParams, SamplingParams, apply_temperature, sample, sample_rows, uniform

# A graph has a fixed number of rows and columns; these are rounded up to, so that few graphs serve all.
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COLUMN_STEP = 128
EVERY_SETTING = SamplingParams(0.5, 1, 0.5, 0.5, 2.0)


@dataclass(frozen=True)
class BatchSettings:
    """What a batch needs to know to choose tokens.

    Args:
        params: one for each row.
        row_ids: what names each row's randomness.
        seed: of the randomness.
        max_new_tokens: steps at most.
        vocab_limit: ids from here on are impossible.
        with_logprobs: whether log-probabilities are kept.
    """

    params: Sequence[SamplingParams]
    row_ids: Sequence[int]
    seed: int
    max_new_tokens: int
    vocab_limit: int
    with_logprobs: bool

    @cached_property
    def is_greedy(self) -> bool:
        """Whether no row is sampled."""
        return all(p.temperature == 0 for p in self.params)

    @cached_property
    def is_penalised(self) -> bool:
        """Whether a row has a repetition penalty."""
        return any(p.repetition_penalty != 1 for p in self.params)


class DecodeBuffers:
    """The tensors of a batch, at fixed places in memory, so that a recorded step finds them again.

    Args:
        decoder: gives shapes, dtype and device.
        rows: B.
        capacity: tokens a row may hold, its prompt and what is new.
        steps: new tokens a row may get.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int, steps: int) -> None:
        device = decoder.weight.device
        self.cache = decoder.new_cache(rows, capacity)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.u = torch.zeros(rows, steps, dtype=torch.float64, device=device)
        self.params = dict(vars(RowParams.of(EVERY_SETTING, rows, device)))
        self.seen: Tensor | None = None  # (B, V), made when a penalty needs it
        self.recorded: dict[tuple, Callable[[], None]] = {}
        self.angles: list[tuple[Tensor, Tensor]] = []  # that recorded steps read: the decoder may make larger tables
        self.is_busy = False

    def changing(self) -> list[Tensor]:
        """The tensors that a step changes, the cache aside (a step done twice writes the same there)."""
        tensors = [self.tokens, self.positions, self.logprobs, self.seen]
        return [t for t in tensors if t is not None]

    def fits(self, rows: int, capacity: int, steps: int) -> bool:
        """Whether a batch of this size has room, and nobody else is in it."""
        enough = self.tokens.shape[0] >= rows and self.cache.capacity >= capacity and self.u.shape[1] >= steps
        return enough and not self.is_busy


class Batch:
    """Prompts read once each and continued by one or several rows; rows that are done leave.

    Args:
        decoder: the model.
        prompts: ids of each row's prompt; neighbours with the same prompt share its prefill.
        settings: how tokens are chosen.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], settings: BatchSettings) -> None:
        self.decoder, self.settings, self.recorder = decoder, settings, decoder.recorder
        self.params, self.count, self.at = _joined(settings.params), len(prompts), 0
        self.firsts = [i for i, p in enumerate(prompts) if i == 0 or p is not prompts[i - 1]]
        # A recorded step finds its keys at fixed places: there prompts are copied to their rows.
        self.is_sharing = self.recorder is None and len(self.firsts) < len(prompts)
        longest = 0 if self.is_sharing else max(map(len, prompts))
        size = len(prompts), longest + settings.max_new_tokens, settings.max_new_tokens
        if decoder.spare is None or not decoder.spare.fits(*size):
            decoder.spare = DecodeBuffers(decoder, *size)
        self.buffers = decoder.spare
        self.buffers.is_busy = True
        self._fill(prompts)
        self._read(prompts)

    def _fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Writes what choosing needs into the buffers' first rows."""
        buffers, settings, n = self.buffers, self.settings, self.count
        device = buffers.tokens.device
        buffers.step.zero_()
        buffers.positions[:n] = torch.tensor([len(p) for p in prompts], device=device)
        if not settings.is_greedy:
            row_ids, steps = torch.tensor(settings.row_ids, device=device), torch.arange(settings.max_new_tokens)
            buffers.u[:n, : settings.max_new_tokens] = uniform(settings.seed, row_ids, steps.to(device))
        values = {k: v for k, v in vars(RowParams.of(self.params, n, device)).items() if v is not None}
        self.used = tuple(values)
        for name, value in values.items():
            buffers.params[name][:n] = value
        if settings.is_penalised:
            vocabulary = self.decoder.vocabulary
            if buffers.seen is None:
                buffers.seen = torch.zeros(len(buffers.tokens), vocabulary, dtype=torch.bool, device=device)
            buffers.seen.zero_()
            for row, prompt in enumerate(prompts):
                buffers.seen[row, torch.tensor(prompt, device=device)] = True

    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefills every prompt once for all its rows and chooses their first tokens."""
        unique = [prompts[i] for i in self.firsts]
        cache = KVCache(self.buffers.cache.store[:, :, : self.count], [0] * self.count)
        if len(unique) == self.count:
            logits = self.decoder.prefill(unique, cache)
        else:
            owners = [bisect_right(self.firsts, i) - 1 for i in range(self.count)]
            read = self.decoder.new_cache(len(unique), max(map(len, unique)))
            logits = self.decoder.prefill(unique, read)[torch.tensor(owners, device=cache.store.device)]
            if self.is_sharing:
                cache.prefix = Prefix(read.store, read.lengths, owners)
            else:
                cache.copy_(read, owners)
        self.cache = cache
        self._choose_eagerly(logits)

    @property
    def tokens(self) -> list[int]:
        """The token each row has just got; waits for the device.

        Raises:
            ValueError: if a row's logits were no numbers.
        """
        tokens = self.buffers.tokens[: self.count].tolist()
        bad = [i for i, token in enumerate(tokens) if token < 0]
        if bad:
            raise ValueError(f"logits must be finite or -inf, with something finite in each row; rows {bad} are not")
        return tokens

    @property
    def logprobs(self) -> list[float] | list[None]:
        """Their log-probabilities (nats), None each if they are not kept."""
        kept = self.settings.with_logprobs
        return self.buffers.logprobs[: self.count].tolist() if kept else [None] * self.count

    def advance(self) -> None:
        """One more token for every row."""
        self.at += 1
        if self.recorder is None:
            self._choose_eagerly(self.decoder.step(self.buffers.tokens[: self.count], self.cache))
            return
        buffers, width = self.buffers, max(self.cache.lengths) + 1
        rows = min(next((b for b in ROW_BUCKETS if b >= self.count), self.count), len(buffers.tokens))
        width = min(-(-width // COLUMN_STEP) * COLUMN_STEP, buffers.cache.capacity)
        buffers.step.fill_(self.at)
        self.decoder.check_version()
        self._recorded(rows, width)()
        self.cache.lengths = [n + 1 for n in self.cache.lengths]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Lets all other rows go; returns the order in which those kept stand from now on."""
        self.cache, order = self.cache.keep(rows)
        self.count = len(order)
        if not isinstance(self.params, SamplingParams):
            self.params = [self.params[i] for i in order]
        moved = [i for i, source in enumerate(order) if i != source]
        if moved:
            buffers = self.buffers
            target = torch.tensor(moved, device=buffers.tokens.device)
            source = torch.tensor([order[i] for i in moved], device=buffers.tokens.device)
            tensors = [buffers.tokens, buffers.positions, buffers.u, buffers.seen, *buffers.params.values()]
            for tensor in tensors:
                if tensor is not None:
                    tensor[target] = tensor[source]
        return order

    def close(self, is_broken: bool = False) -> None:
        """Gives the buffers back, or drops broken ones: even under a mask, a NaN in the cache would spoil others."""
        self.buffers.is_busy = False
        if is_broken and self.decoder.spare is self.buffers:
            self.decoder.spare = None

    def _choose_eagerly(self, logits: Tensor) -> None:
        buffers, n = self.buffers, self.count
        seen = buffers.seen[:n] if self.settings.is_penalised else None
        limit = self.settings.vocab_limit
        tokens = sample(logits, self.params, buffers.u[:n, self.at], seen_ids=seen, vocab_limit=limit)
        self._note(buffers, logits, tokens, n)

    def _choose_recorded(self, logits: Tensor, n: int) -> None:
        buffers, settings = self.buffers, self.settings
        seen = buffers.seen[:n] if settings.is_penalised else None
        u = buffers.u[:n].index_select(1, buffers.step).squeeze(1)
        rows = RowParams(**{name: buffers.params[name][:n] for name in self.used})
        if settings.is_greedy and not settings.is_penalised:  # spares the weights of what is not drawn
            tokens = logits[:, : settings.vocab_limit].argmax(-1)
            peak = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
            tokens = tokens.masked_fill(~peak.isfinite(), -1)
        else:
            tokens = sample_rows(logits, rows, u, seen=seen, vocab_limit=settings.vocab_limit)
        self._note(buffers, logits, tokens, n)

    def _note(self, buffers: DecodeBuffers, logits: Tensor, tokens: Tensor, n: int) -> None:
        """Keeps the chosen tokens, in place."""
        buffers.tokens[:n] = tokens
        if self.settings.with_logprobs:
            scores = apply_temperature(logits.float(), RowParams(buffers.params["temperature"][:n]))  # (B, V)
            picked = scores.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
            buffers.logprobs[:n] = picked - scores.logsumexp(-1)
        if self.settings.is_penalised:
            buffers.seen[:n].scatter_(1, tokens.clamp(min=0).unsqueeze(1), True)

    def _recorded(self, rows: int, width: int) -> Callable[[], None]:
        """The step of this many rows and columns, recorded when it is first needed."""
        settings, buffers = self.settings, self.buffers
        key = (rows, width, self.used, settings.is_greedy, settings.with_logprobs, settings.vocab_limit)
        if key not in buffers.recorded:
            cache = KVCache(buffers.cache.store[:, :, :rows], [0] * rows)

            def step() -> None:
                positions = buffers.positions[:rows]
                logits = self.decoder.step_at(buffers.tokens[:rows].clamp(min=0), positions, cache, width)
                self._choose_recorded(logits, rows)
                # Rows that have left still count on: they must stay inside the cache.
                positions.add_(1).clamp_(max=buffers.cache.capacity - 1)

            before = [t.clone() for t in buffers.changing()]
            step()  # once eagerly: what is loaded on first use cannot be recorded
            for tensor, value in zip(buffers.changing(), before, strict=True):
                tensor.copy_(value)
            buffers.recorded[key] = self.recorder(step)
            buffers.angles.append(self.decoder.rope(buffers.cache.capacity))
        return buffers.recorded[key]


def _joined(params: Sequence[SamplingParams]) -> SamplingParams | list[SamplingParams]:
    """One setting where all rows have the same, seen once and not at every token."""
    return params[0] if all(p == params[0] for p in params) else list(params)
