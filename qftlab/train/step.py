"""The one module that is trained: backbone, head and loss in a single forward.

Only `Step` is prepared, wrapped or sharded, and only it is called: losses and log-probabilities alike go through its
`__call__`, and the backbone inside is entered by its own, where sharding and checkpointing hook in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qftlab.maths.logprobs import chunk_tokens, linear_cross_entropy, linear_logprobs, module_logprobs
from qftlab.model.attention import check_rows
from qftlab.model.head import causal_model, check_bare, head_terms, is_known, language_head, module_mode, put_around
from qftlab.settings import check_choice

log = logging.getLogger(__name__)
IGNORED = -100
MOST_ROWS = 0.9  # of the tokens: with more, gathering them costs about what it saves


class Step(nn.Module):
    """Loss or log-probabilities (nats, fp32) of a batch.

    The head and the MLP of the last layer are computed only at positions whose next token is trained, as nothing else
    reads them; the head a chunk at a time: nothing of size (B, T, V) and nothing of size (trained tokens, V) exists.

    Args:
        model: a causal transformers model, or one wrapped by peft; unless it is Qwen2, Qwen3 or Llama, it is asked for
            its own loss of a few tokens first.

    Raises:
        ValueError: if that is another than backbone, head and cross entropy give (logits that are scaled or capped, a
            router's loss); for a model without a head, or adapters that act elsewhere.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not is_known(causal_model(model)):
            from qftlab.model.loading import check_loss

            check_loss(causal_model(model))
        self.model = model
        self._said_called = False

    def forward(
        self,
        labels: Tensor,
        num_tokens: int | Tensor | None = None,
        *,
        want: str = "loss",
        temperature: float = 1.0,
        **inputs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, a scalar in nats per token, or the log-probability of each label.

        Args:
            labels: (B, T) int64, the input ids where trained and −100 elsewhere; the first of each document is −100.
            num_tokens: for the loss: trained tokens of the whole optimizer step, over all micro-batches and processes.
            want: "loss", "logprobs", or "logprobs+entropy".
            temperature: divides the logits of the log-probabilities and entropies.
            inputs: what the backbone takes: input_ids, position_ids, attention_mask or cu_seq_lens.

        Returns:
            Σ −log p(label) ÷ num_tokens, fp32. Dividing by the step's count and not the batch's makes every split of
            the step into micro-batches add up to the same loss (transformers does so with `num_items_in_batch`).
            For "logprobs" (B, T − 1) fp32, column t for the label at t + 1, 0 where that is −100; for
            "logprobs+entropy" a pair of such, the entropies without gradient.

        Raises:
            ValueError: for another `want`, a loss without num_tokens, or a loss at a temperature; for a packed row that
                the model would mix up, or hooks on the model itself, which would not be run.
        """
        check_choice(("loss", "logprobs", "logprobs+entropy"), want=want)
        if want == "loss" and (num_tokens is None or temperature != 1):
            raise ValueError(
                "a loss must have num_tokens and temperature 1, got "
                f'{num_tokens} and {temperature}: pass count_trained_tokens(batch), or want="logprobs"'
            )
        check_rows(self.model, inputs)
        check_bare([("", self.model), ("", causal_model(self.model))])
        targets = labels[:, 1:]
        keep = targets != IGNORED  # (B, T - 1)
        decoder = causal_model(self.model).get_decoder()
        with last_mlp_on(decoder, F.pad(keep, (0, 1))):
            hidden = decoder(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        x, y = hidden[:, :-1][keep], targets[keep]  # (N, D), (N,)
        if want == "loss":
            return self._sum_nll(x, y) / num_tokens
        outputs = self._logprobs(x, y, temperature, want != "logprobs")
        spread = [o.new_zeros(keep.shape).masked_scatter(keep, o) for o in outputs]
        return tuple(spread) if len(spread) > 1 else spread[0]

    def _sum_nll(self, x: Tensor, y: Tensor) -> Tensor:
        head = language_head(self.model)
        if (parts := head_terms(head, x)) is None:
            return -self._called(head, x, y).sum()
        return linear_cross_entropy(parts[0], y, bias=parts[1])

    def _logprobs(self, x: Tensor, y: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
        head = language_head(self.model)
        options = {"temperature": temperature, "with_entropy": with_entropy}
        if (parts := head_terms(head, x)) is None:
            outputs = self._called(head, x, y, **options)
        else:
            outputs = linear_logprobs(parts[0], y, bias=parts[1], **options)
        return outputs if with_entropy else (outputs,)

    def _called(self, head: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
        if not self._said_called:
            log.info("the head, %s, is no sum of matrix products: it is called chunk by chunk, and again in backward",
                     type(head).__name__)  # fmt: skip
            self._said_called = True
        size = chunk_tokens(causal_model(self.model).config.vocab_size, x.device)
        return module_logprobs(head, x, y, chunk=size, **options)


class Frozen:
    """A policy as it is now, whatever becomes of its weights: what DPO and RLOO hold the policy to.

    Only trained weights are copied, so that adapters need no second model.

    Args:
        step: of the policy before its first update.
        which: "start" (as it is) or "base" (its adapters off).
        moves: whether the weights move before the last time that it is asked; if not, nothing is copied.

    Raises:
        ValueError: for "base" without adapters.
    """

    def __init__(self, step: Step, which: str, *, moves: bool = True) -> None:
        if which == "base" and not hasattr(step.model, "disable_adapter"):
            raise ValueError("reference must be start without adapters, got base: add some (lora.rank 16)")
        self.step, self.is_base = step, which == "base"
        named = step.named_parameters() if moves and not self.is_base else ()
        self.weights = {name: p.detach().clone() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the labels, (B, T − 1) fp32 nats, 0 where there is none."""
        arguments = {**batch, "want": "logprobs", "temperature": temperature}
        with module_mode(self.step, False), self.step.model.disable_adapter() if self.is_base else nullcontext():
            if not self.weights:
                return self.step(**arguments)
            return torch.func.functional_call(self.step, self.weights, (), arguments)


@contextmanager
def last_mlp_on(decoder: nn.Module, keep: Tensor) -> Iterator[None]:
    """Inside, the MLP of the decoder's last layer runs on some tokens only, and gives zeros at the others.

    Attention of that layer needs every token, what comes after it only those that the head reads: the hidden states
    there, the loss and all gradients are what they would be. Where it cannot be done it is left out, and logged.

    Args:
        decoder: of a transformers model.
        keep: (B, T) bool, the tokens that the head reads.
    """
    rows = keep.flatten().nonzero().squeeze(-1)
    if not 0 < len(rows) < MOST_ROWS * keep.numel() or torch.compiler.is_compiling():
        yield
        return
    if (reason := _why_whole(decoder)) is not None:
        _say_whole(reason)
        yield
        return

    def gather(_, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].flatten(0, 1)[rows].unsqueeze(0)

    def spread(_, inputs, output: Tensor) -> Tensor:
        zeros = output.new_zeros(keep.numel(), output.shape[-1])
        return zeros.index_copy(0, rows, output[0]).unflatten(0, keep.shape)

    mlp = decoder.layers[-1].mlp
    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _why_whole(decoder: nn.Module) -> str | None:
    """What keeps the last MLP from running on some tokens only, or None."""
    if not is_known(decoder):
        return f"it is known to be possible for Qwen2, Qwen3 and Llama, and this is {decoder.config.model_type}"
    layer = decoder.layers[-1]
    if any(put_around(m, True) for m in (decoder, decoder.norm, layer, *layer.mlp.modules())):
        return "hooks are on it, or after it"
    if decoder.training and getattr(decoder.layers[-1], "gradient_checkpointing", False):
        return "gradient checkpointing computes the layer again later"
    return None


@cache
def _say_whole(reason: str) -> None:
    log.info("the last MLP runs on all tokens, not only where the next one is trained: %s", reason)


def count_trained_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that carry loss: labels other than −100, the first of each row aside (nothing predicts it)."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


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
