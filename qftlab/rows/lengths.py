"""How long rows are in tokens, and what to do with those that are too long.

Counting is batched and streams: rows come as an iterator, memory holds one batch and one number for each *distinct*
length. The fast way renders the chat template once, around two marks, and hands whole batches to the tokenizer; rows
it might get wrong by a token go through `render_chat`, so that counts are those of training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from qftlab.rows.batches import Example, count_trained
from qftlab.rows.chat import render_prompt
from qftlab.rows.examples import REFUSED, encoded, pair_side, prompt_row
from qftlab.rows.schemas import KNOWN, PICTURES, kind_of, messages_of, remarks, row_to_prompt
from qftlab.settings import check_at_least

NOT_PLAIN = {*KNOWN, *PICTURES, "label", "kto_tag"} - {"instruction", "input", "output"}
FIRST = 10  # affected rows that are named
QUESTION, ANSWER = "qftlabquestionmark", "qftlabanswermark"


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

    @property
    def mean(self) -> float:
        """Tokens per document.

        Raises:
            ValueError: if nothing was counted; so do `min`, `max` and `quantile`.
        """
        return self.total / self._counted()

    @property
    def min(self) -> int:
        """The shortest length."""
        return min(self.counts, default=0) if self._counted() else 0

    @property
    def max(self) -> int:
        """The longest length."""
        return max(self.counts, default=0) if self._counted() else 0

    def quantile(self, q: float) -> int:
        """The smallest length that at least a share q in [0, 1] of the documents does not exceed."""
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        wanted, seen = max(1, math.ceil(q * self._counted() - 1e-9)), 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= wanted:
                return length
        return self.max

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """(from, to, documents) of equally wide bins over [min, max], both ends included."""
        check_at_least(1, bins=bins)
        low, width = self.min, max(1, math.ceil((self.max - self.min + 1) / bins))
        filled = Counter()
        for length, count in self.counts.items():
            filled[(length - low) // width] += count
        used = (self.max - low) // width + 1
        return [(low + i * width, low + (i + 1) * width - 1, filled[i]) for i in range(used)]

    def summary(self) -> str:
        """The statistics and the histogram as text."""
        if not self.count:
            return "no documents"
        lines = [
            f"documents {self.count:,}, tokens {self.total:,}",
            f"min {self.min:,}, mean {self.mean:,.1f}, median {self.quantile(0.5):,}, p95 {self.quantile(0.95):,}, "
            f"max {self.max:,}",
        ]
        bars = self.histogram()
        most = max(count for _, _, count in bars)
        lines += [f"{a:>7,}-{b:<7,} {n:>8,} {'#' * math.ceil(40 * n / most)}" for a, b, n in bars]
        return "\n".join(lines)

    def _counted(self) -> int:
        if not self.count:
            raise ValueError("lengths must hold at least one document, got none")
        return self.count


def row_lengths(tokenizer, rows: Iterable[dict], *, batch_size: int = 1000) -> Iterator[list[list[int]]]:
    """Token counts of rows as `render_chat` renders them, a batch at a time.

    Args:
        tokenizer: a fast one with a chat template.
        rows: of any layout; may be a generator, read one batch ahead at most.
        batch_size: rows tokenised at once; changes speed, not results.

    Yields:
        For each batch, for each row the tokens of its documents: mostly one; none where there is no answer to train
        on; several where the template rewrites earlier turns.

    Raises:
        ValueError: for a row that cannot be rendered (its number, from 1, is named), or batch_size below 1.
    """
    check_at_least(1, batch_size=batch_size)
    fill, rows, done = _template(tokenizer), iter(rows), 0
    while batch := list(islice(rows, batch_size)):
        texts = [fill(row) for row in batch]
        fast = tokenizer.backend_tokenizer.encode_batch_fast(
            [text for text in texts if text is not None], add_special_tokens=False
        )
        counted = iter(fast)
        yield [
            [len(next(counted))] if text is not None else [len(e.input_ids) for e in row_examples(tokenizer, row, i)]
            for i, (row, text) in enumerate(zip(batch, texts, strict=True), start=done + 1)
        ]
        done += len(batch)


def row_examples(tokenizer, row: dict, number: int) -> list[Example]:
    """A row's documents by the loss-mask contract: a pair's two, a problem's prompt; none where nothing is trained.

    Raises:
        ValueError: if the row cannot be rendered, naming its number.
    """
    where = f"row {number}"
    row = prompt_row(row, where)
    kind = kind_of(row)
    if set(REFUSED[kind]).intersection(remarks(row)):
        return []
    if kind == "sft":
        return encoded(tokenizer, messages_of(row), where)
    if kind == "preference":
        return [pair_side(tokenizer, row, side, where) for side in ("chosen", "rejected")]
    ids = render_prompt(tokenizer, row_to_prompt(row))
    return [Example(ids, [False] * len(ids))]


def _template(tokenizer) -> Callable[[dict], str | None]:
    """What writes a plain alpaca row as chat text, or gives None where `render_chat` has to decide.

    It has to for messages, for white space at the ends of an answer (the contract cuts there, templates may strip),
    and wherever the first letter of a control token occurs, if the rest of it follows.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return lambda row: None
    marks = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    text = tokenizer.apply_chat_template(marks, tokenize=False)
    if text.count(QUESTION) != 1 or text.count(ANSWER) != 1 or text.index(QUESTION) > text.index(ANSWER):
        return lambda row: None
    before, _, rest = text.partition(QUESTION)
    between, _, after = rest.partition(ANSWER)
    control = sorted({*tokenizer.get_added_vocab(), "<think>", "</think>"})
    starts, pattern = {token[0] for token in control}, re.compile("|".join(map(re.escape, control)))

    def fill(row: dict) -> str | None:
        question, answer = row.get("instruction"), row.get("output")
        if not question or not answer or not row.keys().isdisjoint(NOT_PLAIN):
            return None
        if row.get("input"):
            question = f"{question}\n{row['input']}"
        if question != question.strip() or answer != answer.strip():
            return None
        both = question + answer
        if any(start in both for start in starts) and pattern.search(both):
            return None
        return f"{before}{question}{between}{answer}{after}"

    return fill


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
    if max_length is None or len(example.input_ids) <= max_length:
        return example, ""
    if policy != "truncate":
        return None, "too long"
    short = Example(example.input_ids[:max_length], example.loss_mask[:max_length])
    return (short, "truncated") if count_trained([short]) else (None, "its prompt alone fills max_length")
