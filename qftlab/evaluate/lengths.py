"""How long rows are in tokens, and what to do with those that are too long.

Counting is batched and streams: rows come as an iterator, memory holds one batch and one number for each *distinct*
length. Documents are those that training makes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Literal

from qftlab.evaluate.data import ReadConfig
from qftlab.rows.batches import Example, count_trained
from qftlab.rows.sources import LoadReport
from qftlab.settings import ENABLE_THINKING, Thinking, check_at_least

FIRST = 10  # affected rows that are named


@dataclass
class LengthStats:
    """Running statistics of lengths; exact, in memory that grows with the distinct lengths only.

    Args:
        counts: length in tokens → how many documents have it.
    """

    counts: Counter = field(default_factory=Counter)

    def add(self, lengths: Iterable[int]) -> None:
        """Takes in more lengths."""
        self.counts.update(lengths)

    @property
    def count(self) -> int:
        """Documents counted."""
        return self.counts.total()

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return sum(length * count for length, count in self.counts.items())

    def quantile(self, q: float) -> int:
        """The smallest length that at least a share q in [0, 1] of the documents does not exceed.

        Raises:
            ValueError: if nothing was counted, or for another q.
        """
        if not self.count or not 0 <= q <= 1:
            raise ValueError(f"quantiles must be of at least one document, q in [0, 1], got {self.count} and q={q}")
        lengths = sorted(self.counts)
        reached = list(accumulate(self.counts[length] for length in lengths))
        return lengths[bisect_left(reached, max(1, math.ceil(q * self.count - 1e-9)))]

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """(from, to, documents) of equally wide bins over all lengths, both ends included."""
        check_at_least(1, bins=bins)
        low, high = min(self.counts), max(self.counts)
        width = max(1, math.ceil((high - low + 1) / bins))
        filled = Counter()
        for length, count in self.counts.items():
            filled[(length - low) // width] += count
        return [(low + i * width, low + (i + 1) * width - 1, filled[i]) for i in range((high - low) // width + 1)]

    def summary(self) -> str:
        """The statistics and the histogram as text."""
        if not self.count:
            return "no documents"
        lines = [
            f"documents {self.count:,}, tokens {self.total:,}",
            f"min {self.quantile(0):,}, mean {self.total / self.count:,.1f}, median {self.quantile(0.5):,}, "
            f"p95 {self.quantile(0.95):,}, max {self.quantile(1):,}",
        ]
        bars = self.histogram()
        most = max(count for _, _, count in bars)
        lines += [f"{a:>7,}-{b:<7,} {n:>8,} {'#' * math.ceil(40 * n / most)}" for a, b, n in bars]
        return "\n".join(lines)


def row_documents(
    tokenizer, rows: Iterable[dict], *, thinking: bool | None = None, batch_size: int = 1000
) -> Iterator[list[Example]]:
    """Documents of rows by the loss-mask contract, tokenised a batch at a time.

    Args:
        tokenizer: a fast one with a chat template.
        rows: of any layout; may be a generator, read one batch ahead at most.
        thinking: as in `render_chat`.
        batch_size: rows tokenised at once; changes speed, not results.

    Yields:
        For each row its documents: mostly one; a pair's two; a problem's prompt; none where there is
        nothing to train on; several where the template rewrites earlier turns.

    Raises:
        ValueError: for a row that cannot be rendered (its number, from 1, is named), or batch_size below 1.
    """
    from qftlab.rows.encoding import Chunks
    from qftlab.rows.examples import Usage

    check_at_least(1, batch_size=batch_size)
    chunks, rows, done = Chunks(tokenizer, (), "", None, "all", thinking), iter(rows), 0
    while batch := list(islice(rows, batch_size)):
        kept = dict(chunks.encoded(list(Usage().fit(batch, "", done))))
        yield from (kept.get(number, []) for number in range(done + 1, done + len(batch) + 1))
        done += len(batch)


def limited(example: Example, max_length: int | None, policy: str = "skip") -> tuple[Example | None, str]:
    """An example within a length, if it may stay, and what was done to it ("" for nothing).

    Truncation cuts the end, so the prompt stays whole; where no trained token would be left the example is skipped
    instead. An example that has no trained token to begin with is skipped whatever its length.

    Args:
        example: a document with its loss mask.
        max_length: in tokens; None: any length will do.
        policy: "truncate", or "skip" for what is too long.
    """
    if not count_trained([example]):
        return None, "nothing to train in it"
    if max_length is None or len(example) <= max_length:
        return example, ""
    if policy != "truncate":
        return None, "too long"
    short = Example(example.input_ids[:max_length], example.loss_mask[:max_length])
    return (short, "truncated") if count_trained([short]) else (None, "its prompt alone fills max_length")


@dataclass(frozen=True)
class LengthsConfig(ReadConfig):
    """Counts the tokens of rows as training renders them, in memory that does not grow with the files.

    Args:
        data: files, patterns, folders or hub names of rows, pairs or prompts, one or [several].
        model: whose tokenizer: `tiny`, a folder, or a name on the hub.
        max_length: also say which rows are longer than so many tokens.
        policy: what to do with those: `truncate` keeps the prompt, `skip` leaves them out, `error` fails.
        thinking: `on`, `off`, or `auto`, as in `sft`.
        batch_size: rows tokenised at once.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    max_length: int | None = None
    policy: Literal["truncate", "skip", "error"] = "skip"
    thinking: Thinking = "auto"
    batch_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, max_length=self.max_length)
        check_at_least(1, batch_size=self.batch_size)


def measure(config: LengthsConfig) -> str:
    """Counts tokens and returns the statistics, and what `max_length` would do.

    Raises:
        ValueError: for rows that cannot be read or rendered; under the policy "error", if any row is too long.
    """
    from qftlab.rows.tokenizer import load_tokenizer

    tokenizer, report, stats = load_tokenizer(config.model), LoadReport(), LengthStats()
    affected, truncated, named = 0, 0, []
    options = {"thinking": ENABLE_THINKING[config.thinking], "batch_size": config.batch_size}
    for number, documents in enumerate(row_documents(tokenizer, config.read(report), **options), 1):
        stats.add(map(len, documents))
        longest = max(map(len, documents), default=0)
        if documents and longest <= (config.max_length or longest):
            continue
        affected += 1
        done_to = [what for e in documents if (what := limited(e, config.max_length, config.policy)[1])]
        truncated += "truncated" in done_to
        if len(named) < FIRST:
            reason = done_to[0] if done_to else "nothing to train in it"
            named.append(f" row {number}: {longest:,} tokens, {reason}")
    lines = [report.summary(), stats.summary()]
    if affected:
        limit = f"max_length {config.max_length}, {config.policy}" if config.max_length else "no max_length"
        lines += [f"{affected:,} rows affected ({limit}), {truncated:,} of them truncated and kept:", *named]
    if affected and config.policy == "error" and config.max_length is not None:
        raise ValueError("\n".join([*lines, "raise max_length, or choose the policy truncate or skip"]))
    return "\n".join(lines)
