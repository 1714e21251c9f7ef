"""The settings of `evaluate` on the command line; torch is not imported, so `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qftlab.core.checks import check_at_least


@dataclass(frozen=True)
class EvaluateConfig:
    """Asks a model every row of a file and prints the accuracy of each skill, with 95 % intervals.

    Args:
        model: `tiny`, a run folder (runs/sft/latest), a model folder, or a name on the Hugging Face hub.
        data: rows with instruction, input and output, one file or [several]; the bundled held-out rows by default.
        few_shot: 0 asks in the chat format; k shows k solved examples as plain text: the fair way to ask a base model.
        limit: ask only so many rows.
        max_new_tokens: the most tokens an answer may have; by default half as many again as the longest reference.
        output: also write a page with the table, .html or .md.
        seed: of the choice of examples.
        batch_size: rows asked at once.
        dtype: of the weights; `auto` is the checkpoint's own.
        device: `auto` is the GPU where there is one.

    Raises:
        ValueError: for a value out of range.
    """

    model: str = "tiny"
    data: tuple[str, ...] | str = ()
    few_shot: int = 0
    limit: int | None = None
    max_new_tokens: int | None = None
    output: str = ""
    seed: int = 0
    batch_size: int = 64
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(0, few_shot=self.few_shot)
        check_at_least(1, limit=self.limit, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(self.data))
        if self.output and not self.output.endswith((".html", ".md")):
            raise ValueError(f"output must end in .html or .md, got {self.output!r}")
