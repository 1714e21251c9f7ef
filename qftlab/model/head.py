"""The parts of a model that every room asks for, and its head as the matrix products that it is made of.

With those, `qftlab.maths.logprobs` takes a loss without the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qftlab.maths.logprobs import HeadTerm

PIN = "QFTLAB_LAYOUT"  # the environment variable that names the layout of every decoder
PLAIN = (Tensor, nn.Parameter)  # no shards, no quantised storage
FAMILIES = ("qwen2", "qwen3", "llama")  # whose modules are known one by one
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
# Whose hooks leave every value as it is: sharding, counting, transformers' recording of hidden states.
MACHINERY = ("torch.distributed.", "torch.utils.", "transformers.utils.")


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with a head inside a peft wrapper, or the model itself.

    Raises:
        ValueError: for adapters that act outside the modules they adapt, so that this model would be without them.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        kind = "aLoRA" if getattr(config, "alora_invocation_tokens", None) else config.peft_type.value
        if config.is_prompt_learning or kind in ("aLoRA", "XLORA", "POLY", "SHADOW"):
            raise ValueError(f"adapters must act in modules alone, got {name!r}, {kind}: use LoRA, or peft's forward")
    return model.get_base_model()


def is_known(module: nn.Module) -> bool:
    """Whether a model, or its backbone, is of `FAMILIES`, and its class computes by transformers' own code."""
    return module.config.model_type in FAMILIES and type(module).forward.__module__.startswith("transformers.")


def language_head(model: nn.Module) -> nn.Module:
    """The layer that makes logits of what the backbone gives.

    Raises:
        ValueError: for a model without one, such as a bare backbone or a reward model.
    """
    head = causal_model(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a head for logits, got a {type(model).__name__}: use AutoModelForCausalLM")
    return head


def put_around(module: nn.Module, backward: bool = False) -> str:
    """What somebody has put around a module, and is left out where its parts are used in place of a call.

    Args:
        module: any.
        backward: whether hooks on gradients count.

    Returns:
        "hooks", "another forward" (accelerate's placing aside), or "".
    """
    own = vars(module)
    hooks = [hook for name in HOOKS[: 4 if backward else 2] if own[name] for hook in own[name].values()]
    hooks += [hook for found in EVERYWHERE if found for hook in found.values()]
    if any(not getattr(hook, "__module__", "").startswith(MACHINERY) for hook in hooks):
        return "hooks"
    # accelerate patches it too; where it offloads no weights, it only moves what comes in.
    return "another forward" if "forward" in own and getattr(own.get("_hf_hook"), "offload", True) else ""


def check_bare(modules: Iterable[tuple[str, nn.Module]], code: str | tuple[str, ...] = "") -> None:
    """Refuses modules whose parts are used in place of a call, where that would leave something out.

    Args:
        modules: with their names.
        code: how the name of the file begins by which they must compute.

    Raises:
        ValueError: naming the module and what it is.
    """
    for name, module in modules:
        around, kind = put_around(module, backward=not code), type(module)  # decoding has no gradients
        if around or not kind.forward.__module__.startswith(code):
            got = f"{name or kind.__name__} must be as transformers made it, got {around or kind.__name__}"
            raise ValueError(f"{got}, which would be left out here: use transformers' own generate or Trainer")


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


def weights_version(model: nn.Module) -> int:
    """How many updates `bump_weights_version_` has counted on this model."""
    return getattr(causal_model(model), "_qftlab_version", 0)


def bump_weights_version_(model: nn.Module) -> None:
    """Counts an update of the weights: snapshots older than it then refuse to decode.

    A training loop calls it after each optimizer step; tensors' own version counters miss fused optimizers.
    """
    causal_model(model)._qftlab_version = weights_version(model) + 1


def context_length(model) -> int | None:
    """Tokens the model can attend to at once, if its configuration says so."""
    return getattr(causal_model(model).config, "max_position_embeddings", None)


def head_terms(head: nn.Module, hidden: Tensor) -> tuple[list[HeadTerm], Tensor | None] | None:
    """Terms and bias whose sum is `head(hidden)`, in value and gradient.

    Args:
        head: `nn.Linear` (tied or not), peft's LoRA around one, peft's trainable token rows around one, or both.
        hidden: (N, D).

    Returns:
        For LoRA, W x and B (s A x); for token rows, W x and (new row − old row) x on their columns. None for a head
        that is not such a sum, such as DoRA, a quantised or sharded weight, or a module that somebody hooks: it has to
        be called.
    """
    if put_around(head, True):
        return None
    if type(head) is nn.Linear:
        return ([HeadTerm(hidden, head.weight)], head.bias) if type(head.weight) in PLAIN else None
    # peft is optional: where nobody has imported it, no head can be one of its modules.
    lora, rows = sys.modules.get("peft.tuners.lora.layer"), sys.modules.get("peft.utils.other")
    if lora is not None and type(head) is lora.Linear:
        return _lora_terms(head, hidden)
    if rows is not None and type(head) is rows.TrainableTokensWrapper:
        return _row_terms(head.token_adapter, hidden)
    return None


def _lora_terms(head: nn.Module, hidden: Tensor) -> tuple[list[HeadTerm], Tensor | None] | None:
    """peft's `lora.Linear`: the base layer's terms, and one of rank r for each active adapter."""
    base = head_terms(head.base_layer, hidden)
    if base is None or head.disable_adapters or head.merged:
        return base
    terms, bias = base
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        down, up = head.lora_A[name], head.lora_B[name]
        if name in head.lora_variant or up.bias is not None or any(put_around(m, True) for m in (down, up)):
            return None
        x = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(down.weight.dtype)
        terms.append(HeadTerm(down(head.lora_dropout[name](x)) * head.scaling[name], up.weight))
    return terms, bias


def _row_terms(adapter: nn.Module, hidden: Tensor) -> tuple[list[HeadTerm], Tensor | None] | None:
    """peft's trainable token rows: the base layer's terms, and the change of each trained row on its column."""
    base = head_terms(adapter.base_layer, hidden)
    if base is None or adapter.disable_adapters or adapter.merged or not adapter.active_adapters:
        return base
    (main,), bias = base
    if bias is not None:
        return None  # peft leaves the bias out here
    terms = [main]
    for name in adapter.active_adapters:
        columns = torch.tensor(adapter.token_indices[name], device=hidden.device)
        change = adapter.trainable_tokens_delta[name].to(main.weight) - main.weight[columns]
        terms.append(HeadTerm(hidden, change, columns))
    return terms, None


class Projections:
    """Several linear modules of one input, of any kind, each called by itself: nothing is copied."""

    num_bytes = 0  # of a snapshot

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        # A plain product needs no call of a module.
        self._each = [partial(F.linear, weight=m.weight, bias=m.bias) if is_plain_linear(m) else m for m in modules]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) → (N, sum of all out)."""
        return self._each[0](x) if len(self._each) == 1 else torch.cat([part(x) for part in self._each], dim=-1)

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """(N, in) → (N, out) of each module."""
        return [part(x) for part in self._each]

    def refresh_(self) -> None:
        """There is no snapshot that could grow old."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is `F.linear` and nothing else."""
    return type(module) is nn.Linear and not put_around(module)


def linear_groups(layer: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """The linear modules of a layer, those of one input together: queries, keys, values; output; gate, up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
