"""How well a model foretells the answers that rows have: loss, perplexity and token accuracy, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qftlab.evaluate.statistics import clustered_interval
from qftlab.maths.logprobs import chunk_tokens
from qftlab.maths.losses import sum_by_document
from qftlab.model.head import causal_model, context_length, language_head, module_mode
from qftlab.rows.batches import pack
from qftlab.rows.examples import encode_rows
from qftlab.train.step import IGNORED, Step, to_device


@dataclass(frozen=True)
class References:
    """How well a model foretells the rows' own answers: means over their trained tokens, with 95 % intervals.

    Args:
        loss: (mean, low, high) in nats a token; the intervals count rows, because tokens of one answer are alike.
        token_accuracy: (mean, low, high) of the share of tokens that are the likeliest.
        rows: answers that were measured.
    """

    loss: tuple[float, float, float]
    token_accuracy: tuple[float, float, float]
    rows: int

    @property
    def perplexity(self) -> tuple[float, float, float]:
        """(mean, low, high): e to the loss."""
        return tuple(map(math.exp, self.loss))

    def to_dict(self) -> dict:
        """{"loss": {"mean", "low", "high", "rows"}, "perplexity": …, "token_accuracy": …}."""
        kinds = {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}
        return {kind: {**dict(zip(("mean", "low", "high"), ends, strict=True)), "rows": self.rows}
                for kind, ends in kinds.items()}  # fmt: skip


def measure_references(
    model, tokenizer, rows: Sequence[dict], *, sources: Mapping[str, int] | None = None, batch_size: int = 64
) -> References:
    """Loss, perplexity and token accuracy of the rows' last answers.

    Each answer stands behind the prompt that it answers, one without thinking behind that with thinking off. What is
    longer than the context is left out, which a log line says.

    Raises:
        ValueError: if a row cannot be rendered (its place is named), or none is left.
    """
    limit = context_length(model)
    examples, _ = encode_rows(tokenizer, rows, max_length=limit, train_on="last", sources=sources)
    examples, totals, hits, step = sorted(examples, key=len), [], [], Step(model)
    for start in range(0, len(examples), batch_size):
        batch = to_device(pack(examples[start : start + batch_size]), model.device)
        with module_mode(step, False), torch.no_grad():
            totals += (-sum_by_document(step(**batch, want="logprobs"), batch["cu_seq_lens_q"])).tolist()
            hits += sum_by_document(are_likeliest(model, **batch), batch["cu_seq_lens_q"]).tolist()
    tokens = [sum(example.loss_mask[1:]) for example in examples]
    means = ([total / count for total, count in zip(sums, tokens, strict=True)] for sums in (totals, hits))
    loss, accuracy = (clustered_interval(each, range(len(tokens)), weights=tokens) for each in means)
    return References(loss, accuracy, len(tokens))


def are_likeliest(model, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """1.0 where a label is the likeliest token, else 0: (B, T − 1) fp32, column t for the label at t + 1."""
    targets = labels[:, 1:]
    keep = targets != IGNORED  # (B, T - 1)
    hidden = causal_model(model).get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
    head, size = language_head(model), chunk_tokens(causal_model(model).config.vocab_size, labels.device)
    found = [head(part).argmax(-1) for part in hidden[:, :-1][keep].split(size)]
    return torch.zeros(keep.shape, device=labels.device).masked_scatter(
        keep, (torch.cat(found) == targets[keep]).float()
    )
