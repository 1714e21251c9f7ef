"""The one module that is trained: backbone, head and loss in a single forward.

Only `Step` is prepared, wrapped or sharded; the backbone inside is entered by its `__call__`, where sharding and
checkpointing hook in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
# Some families scale or squash their logits after the head; a loss that skips that would be another model's loss.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Step(nn.Module):
    """Sum of token NLLs (nats, fp32) of a batch, divided by a token count that the caller gives.

    The head is computed only at positions whose next token is trained; nothing of size (B, T, V) exists.

    Args:
        model: a causal transformers model (Qwen2, Qwen3, Llama), or one wrapped by peft.

    Raises:
        ValueError: if the model changes its logits after the head, which this loss would miss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = causal_model(model).config
        for name in LOGIT_CHANGES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{name} must be unset, got {getattr(config, name)}: Step takes the head's logits as they are"
                )
        self.model = model

    def forward(self, labels: Tensor, num_tokens: int | Tensor, **inputs) -> Tensor:
        """The loss, a scalar in nats per token.

        Args:
            labels: (B, T) int64, the input ids where trained and −100 elsewhere; the first of each document is −100.
            num_tokens: trained tokens of the whole optimizer step, over all micro-batches and processes.
            inputs: what the backbone takes: input_ids, position_ids, attention_mask or cu_seq_lens.

        Returns:
            Σ −log p(label) ÷ num_tokens, fp32. Dividing by the step's count and not the batch's makes every split of
            the step into micro-batches add up to the same loss (transformers does so with `num_items_in_batch`).
        """
        model = causal_model(self.model)
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        targets = labels[:, 1:]
        keep = targets != IGNORED  # (B, T - 1)
        logits = model.get_output_embeddings()(hidden[:, :-1][keep])  # (N, V)
        return F.cross_entropy(logits.float(), targets[keep], reduction="sum") / num_tokens


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with a head inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_trained_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that carry loss: labels other than −100, the first of each row aside (nothing predicts it)."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@contextmanager
def module_mode(module: nn.Module, is_training: bool) -> Iterator[None]:
    """Training or evaluation mode inside; outside, every submodule's own mode again."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(is_training)
    try:
        yield
    finally:
        for m, was_training in modes:
            m.training = was_training


def no_grad_loss(step: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean NLL (nats a token) of the trained tokens of all batches together, without gradients or dropout.

    Raises:
        ValueError: if no token of the batches is trained.
    """
    num_tokens = sum(map(count_trained_tokens, batches))
    if not num_tokens:
        raise ValueError("held-out rows must have a trained token, got none: check their assistant turns")
    device = next(step.parameters()).device
    with module_mode(step, False), torch.no_grad():
        losses = [step(**to_device(batch, device), num_tokens=num_tokens) for batch in batches]
        return torch.stack(losses).sum().item()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch with its tensors on `device`; plain numbers among its values stay as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
