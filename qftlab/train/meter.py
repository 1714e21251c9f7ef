"""What a log says besides losses: tokens a second, model FLOP utilisation, peak memory; samples of answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qftlab.train.distributed import Ranks
from qftlab.train.optimizer import TOKEN_ROWS

# Dense bf16 peak of tensor cores, FLOP/s, from NVIDIA's data sheets; the first that a device's name contains counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def speed_of(
    step: nn.Module, seconds: float, tokens: int, trained_tokens: int, batches: list[dict[str, Tensor]]
) -> dict[str, float]:
    """How fast an optimizer step of a module was.

    Args:
        step: holds the model.
        seconds: of wall time, held-out losses and checkpoints not counted.
        tokens: read in the step, by all processes; padding is not counted.
        trained_tokens: of them.
        batches: this process's share, for the pairs of attention.

    Returns:
        tokens_per_second of wall time; peak_gb; and mfu, operations of the step ÷ (seconds · peak · processes), where
        the device's peak is known and it computes in bf16.
    """
    device, size = next(step.parameters()).device, Ranks.current().size
    found = {"tokens_per_second": round(tokens / seconds, 1)}
    if (gigabytes := peak_gigabytes(device)) is not None:
        found["peak_gb"] = round(gigabytes, 3)
    if (peak := peak_flops(device)) and any(hasattr(m, "get_output_embeddings") for m in step.modules()):
        pairs = size * sum(map(causal_pairs, batches))  # the other processes have about as many
        found["mfu"] = round(step_flops(step, tokens, trained_tokens, pairs) / seconds / peak / size, 4)
    return found


def speed_line(found: dict[str, float]) -> str:
    """What `speed_of` has found, for a log."""
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s"]
    parts += [f"{100 * found['mfu']:.1f} % MFU"] if "mfu" in found else []
    parts += [f"{found['peak_gb']:.2f} GB at most"] if "peak_gb" in found else []
    return ", ".join(parts)


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def step_flops(step: nn.Module, tokens: int, trained_tokens: int, pairs: int) -> float:
    """Floating-point operations that forward and backward of a step need, nothing computed twice counted.

    2 a weight and token forward, 2 for the gradient of what goes into it, 2 more for that of a trained weight:
    Σ over matrices of tokens · (4 + 2 if trained) · weights, where the head sees `trained_tokens` only and the input
    embedding, a look-up, counts nothing; and 12 · layers · heads · head_dim · `pairs` for attention.

    Args:
        step: holds one causal transformers model.
        tokens: read in the step.
        trained_tokens: positions the head is computed at.
        pairs: of a token and one it attends to: n · (n + 1) / 2 for a document of n tokens.
    """
    model = next(m for m in step.modules() if hasattr(m, "get_output_embeddings"))
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    inputs = {id(p) for p in model.get_input_embeddings().parameters()} - head
    flops = 0.0
    for name, p in step.named_parameters():
        if p.ndim >= 2 and id(p) not in inputs and TOKEN_ROWS not in name:
            flops += (trained_tokens if id(p) in head else tokens) * (6 if p.requires_grad else 4) * p.numel()
    c = model.config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    return flops + 12 * c.num_hidden_layers * width * pairs


def causal_pairs(batch: dict[str, Tensor]) -> int:
    """Pairs of a token and one at or before it in its document, from `position_ids`; padding is not counted."""
    reach = batch["position_ids"] + 1
    mask = batch.get("attention_mask")
    return int((reach if mask is None else reach * mask).sum())


def peak_gigabytes(device: torch.device) -> float | None:
    """The most memory taken so far: on a GPU by torch's tensors, elsewhere by the whole process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def samples_of(rollouts: Sequence, prompts: Sequence, size: int, count: int = 4) -> list[dict]:
    """The best and the worst answer to each of the first few prompts: row, prompt, text, reward, finish_reason.

    Args:
        rollouts: of `qftlab.train.rollouts`, `size` of them for each prompt, side by side.
        prompts: of the same.
        size: answers to a prompt.
        count: prompts that are shown.
    """
    kept = []
    for i, prompt in enumerate(prompts[:count]):
        group = sorted(rollouts[i * size : (i + 1) * size], key=lambda r: -r.reward)
        shown = {"row": prompt.number, "prompt": prompt.messages[-1]["content"]}
        kept += [
            {**shown, "text": r.completion.text, "reward": r.reward, "finish_reason": r.completion.finish_reason}
            for r in (group[0], group[-1])
        ]
    return kept


def table_of(samples: Sequence[dict]) -> str:
    """Samples as lines of text."""
    lines = (f"  row {s['row']:<6} {s['reward']:7.3f}  {s['prompt']!r:.60}  {s['text']!r:.100}" for s in samples)
    return "\n".join(["  row        reward  prompt, answer", *lines])
