"""What training must not lose: the skills of the base model, asked in the plain notation it was pretrained on."""

from __future__ import annotations

from collections.abc import Sequence

from qftlab.data.style import ENDING, without_ending
from qftlab.evaluate.skills import Rate
from qftlab.generate.engine import generate


def evaluate_kept(model, tokenizer, rows: Sequence[dict], *, batch_size: int = 64) -> Rate:
    """Share of rows whose plain form ("47 + 38 =") is continued with the right answer, greedily, without any chat.

    A polite ending is taken off, as everywhere in scoring.

    Args:
        model: a causal transformers model, base or fine-tuned.
        tokenizer: its tokenizer.
        rows: rows with "plain" and "output"; rows without "plain" are left out.
        batch_size: rows decoded together.

    Raises:
        ValueError: if no row has a plain form.
    """
    asked = [row for row in rows if row.get("plain")]
    if not asked:
        raise ValueError('rows must have a "plain" form, got none: use data/instructions/heldout.jsonl')
    longest = max(len(ids) for ids in tokenizer([row["output"] + ENDING for row in asked]).input_ids)
    answers = generate(
        model,
        tokenizer,
        [row["plain"] for row in asked],
        max_new_tokens=longest + 2,
        stop=("\n",),
        batch_size=batch_size,
    )
    right = sum(without_ending(a.text.strip()) == row["output"] for a, row in zip(answers, asked, strict=True))
    return Rate("kept", right, len(asked))
