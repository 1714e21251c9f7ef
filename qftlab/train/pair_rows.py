"""Preference rows → pairs of examples: what is trained on, what was left out and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from qftlab.data.batching import Example, count_trained
from qftlab.data.schemas import convert_row, remarks
from qftlab.text.chat import render_chat

log = logging.getLogger(__name__)
REFUSED = ("equal pair", "score tie", "empty answer")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, tokens of the answers trained; `number` is that of its row, from 1."""

    chosen: Example
    rejected: Example
    number: int

    @property
    def length(self) -> int:
        """Tokens of both documents."""
        return len(self.chosen.input_ids) + len(self.rejected.input_ids)


@dataclass
class PairUsage:
    """What became of the rows: how many pairs and tokens, and under each reason the numbers (from 1) of rows left out.

    Reasons: "equal pair" and "empty answer", a "score tie", "too long", and "equal tokens" where texts that differ
    come to the same ids.
    """

    rows: int = 0
    pairs: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for a log."""
        line = f"{self.rows} rows, {self.pairs} pairs, {self.tokens} tokens, {self.trained_tokens} of them in answers"
        for why, numbers in self.left_out.items():
            more = ", …" if numbers[5:] else ""
            line += f"; {len(numbers)} left out: {why} (row {', '.join(map(str, numbers[:5]))}{more})"
        return line


def encode_pairs(tokenizer, rows: Sequence[dict], *, max_length: int | None = None) -> tuple[list[Pair], PairUsage]:
    """Preference rows as pairs by the loss-mask contract; pairs that teach nothing are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: "prompt" (text or messages), "chosen" and "rejected" (texts, or messages that end with the answer), and
            whatever else `qftlab.data.sources` reads as a preference row. Of equal scores neither answer is better.
        max_length: the most tokens a prompt with its answer may have; longer ones are left out, never cut.

    Raises:
        ValueError: if a row is no preference row or cannot be rendered (its number is named), or no pair is left.
    """
    usage, pairs = PairUsage(rows=len(rows)), []
    for number, row in enumerate(rows, 1):
        row = convert_row(dict(row), f"row {number}", "preference")
        why = next((r for r in remarks(row) if r in REFUSED), None)
        if why is None:
            pair = Pair(*(_encode(tokenizer, row, side, number) for side in ("chosen", "rejected")), number)
            why = _reason(pair, max_length)
        if why is None:
            pairs.append(pair)
        else:
            usage.left_out.setdefault(why, []).append(number)
    usage.pairs, usage.tokens = len(pairs), sum(p.length for p in pairs)
    usage.trained_tokens = count_trained([e for p in pairs for e in (p.chosen, p.rejected)])
    if not pairs:
        raise ValueError(f"rows must hold a pair to train on, got {usage.summary()}")
    (log.warning if usage.left_out else log.info)("%s", usage.summary())
    return pairs, usage


def _encode(tokenizer, row: dict, side: str, number: int) -> Example:
    try:
        [document] = render_chat(
            tokenizer, [*row["prompt"], {"role": "assistant", "content": row[side]}], train_on="last"
        )
    except ValueError as error:
        raise ValueError(f"row {number}, {side!r}: {error}") from error
    return Example(document.input_ids, document.loss_mask)


def _reason(pair: Pair, max_length: int | None) -> str | None:
    """Why a pair is left out, if it is."""
    if pair.chosen.input_ids == pair.rejected.input_ids:
        return "equal tokens"
    longest = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))
    return "too long" if max_length is not None and longest > max_length else None


def documents(pairs: Sequence[Pair]) -> list[Example]:
    """Chosen and rejected documents in turns, as a batch holds them."""
    return [example for pair in pairs for example in (pair.chosen, pair.rejected)]
