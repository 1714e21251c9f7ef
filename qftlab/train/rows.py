"""Rows → examples: what is trained on, what was left out and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from qftlab.rows.batches import Example, count_trained
from qftlab.rows.chat import render_chat, row_to_messages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenUsage:
    """What became of the rows. Row numbers are 1-based; lengths are in tokens, of the documents that are kept."""

    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    longest: int
    mean_length: float
    median_length: int
    p95_length: int
    without_trained_token: tuple[int, ...]
    too_long: tuple[int, ...]
    max_length: int | None

    def summary(self) -> str:
        """One line for a log."""
        left_out = "".join(
            f"; {len(numbers)} left out: {why} (row {', '.join(map(str, numbers[:5]))}{', …' if numbers[5:] else ''})"
            for numbers, why in (
                (self.without_trained_token, "the assistant says nothing in them (an empty output?)"),
                (self.too_long, f"longer than {self.max_length} tokens"),
            )
            if numbers
        )
        return (
            f"{self.rows} rows read, {self.documents} documents kept, {self.tokens} tokens, "
            f"{self.trained_tokens} of them trained, {self.median_length} tokens in the median row{left_out}"
        )


def encode_rows(
    tokenizer, rows: Sequence[dict], *, max_length: int | None = None, train_on: str = "all"
) -> tuple[list[Example], TokenUsage]:
    """Rows as examples by the loss-mask contract; rows that cannot be trained on are left out and counted.

    Args:
        tokenizer: one with a chat template.
        rows: alpaca rows, or rows with "messages".
        max_length: the most tokens an example may have; longer ones are left out, never cut.
        train_on: "all" assistant turns or the "last".

    Raises:
        ValueError: if a row cannot be rendered (its number is named), or no row is left.
    """
    examples: list[Example] = []
    empty, too_long = [], []
    for number, row in enumerate(rows, 1):
        messages = row_to_messages(row)
        if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
            empty.append(number)
            continue
        try:
            rendered = render_chat(tokenizer, messages, train_on=train_on)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        for document in rendered:
            example = Example(document.input_ids, document.loss_mask)
            if max_length is not None and len(example.input_ids) > max_length:
                too_long.append(number)
            elif not count_trained([example]):
                empty.append(number)
            else:
                examples.append(example)
    usage = _usage(examples, len(rows), empty, too_long, max_length)
    if not examples:
        raise ValueError(f"rows must hold something to train on, got {usage.summary()}")
    (log.warning if empty or too_long else log.info)("%s", usage.summary())
    return examples, usage


def _usage(examples: list[Example], rows: int, empty: list[int], too_long: list[int], limit: int | None) -> TokenUsage:
    lengths = sorted(len(e.input_ids) for e in examples) or [0]
    return TokenUsage(
        rows=rows,
        documents=len(examples),
        tokens=sum(lengths),
        trained_tokens=count_trained(examples),
        longest=lengths[-1],
        mean_length=sum(lengths) / len(lengths),
        median_length=lengths[len(lengths) // 2],
        p95_length=lengths[int(0.95 * (len(lengths) - 1))],
        without_trained_token=tuple(dict.fromkeys(empty)),
        too_long=tuple(dict.fromkeys(too_long)),
        max_length=limit,
    )
