"""LoRA through peft: adapters on the blocks, trained rows for new tokens, and nothing else moves.

The head of a tied model stays tied; the rows are trained in the embedding and in the head alike.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qftlab.files import bundled, read_json, resolve, sha256, weight_files
from qftlab.model.head import causal_model, weights_version
from qftlab.settings import LoRAConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
DIGEST = "base_sha256"  # in the metadata of WEIGHTS: the quick sha256 of the files that the base was loaded from


@dataclass(frozen=True)
class ParameterCount:
    """Numbers in a model: `trained` of them move, `total` counts adapters as well."""

    trained: int
    total: int


def add_adapters(model: PreTrainedModel, config: LoRAConfig, *, token_ids: Sequence[int] = (), seed: int = 0):
    """Wraps a model with fresh adapters, which change nothing yet; they and the rows of `token_ids` train.

    Args:
        model: a causal transformers model, quantised or not; its weights are frozen, its block matrices replaced by
            peft's layers: use what is returned from here on.
        config: rank, scale and targets.
        token_ids: tokens whose rows are trained, such as those just added by `extend_model`; their rows travel with
            the adapters, so a base that was never extended can take them up.
        seed: of the adapters' A; B starts at 0.

    Returns:
        peft's PeftModel around `model`, in the mode `model` was in; whatever trains is fp32.

    Raises:
        ValueError: for rank 0, token ids that are no rows, a model that has adapters, or one without such matrices.
    """
    from peft import LoraConfig

    if not config.rank:
        raise ValueError("rank must be at least 1, got 0: LoRAConfig(rank=16), or train the model as it is")
    if is_adapted(model):
        raise ValueError("model must be without adapters, got one that has some: merge_adapters(model) first")
    num_rows = model.get_input_embeddings().weight.shape[0]
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < num_rows:
        said = f"token_ids must be from 0 to {num_rows - 1}, the rows of the embedding, got {list(token_ids)}"
        raise ValueError(f"{said}: call extend_model first")
    names = [name.rpartition(".")[2] for name, module in model.named_modules()]
    targets = [target for target in TARGETS[config.targets] if target in names]
    if not targets:
        raise ValueError(f"model must have one of {', '.join(TARGETS[config.targets])}, got a {type(model).__name__}")
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        trainable_token_indices=_trained_rows(model, sorted(set(token_ids))),
    )
    with torch.random.fork_rng():  # peft draws from torch's own generator
        torch.manual_seed(seed)
        return _wrapped(model, settings)


def row_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that hold one row a token: the embedding, and the head where it is a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or _matrix(head) is _matrix(embedding) else [embedding, head]


def _matrix(layer: nn.Module) -> Tensor:
    """The weight that a layer is made of; one whose rows peft trains answers `.weight` with a new tensor each time."""
    return (layer.token_adapter.base_layer if hasattr(layer, "token_adapter") else layer).weight


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(model, "get_base_model")


def trained_token_ids(model: nn.Module) -> list[int]:
    """The tokens whose rows an adapted model trains; none for any other model."""
    rows = model.peft_config["default"].trainable_token_indices if is_adapted(model) else None
    return list(next(iter(rows.values())) if isinstance(rows, dict) else rows or [])


def count_parameters(model: nn.Module) -> ParameterCount:
    """How many numbers of a model are trained, and how many there are; tied ones count once."""
    if is_adapted(model):  # peft counts packed 4-bit weights for what they hold
        return ParameterCount(*model.get_nb_trainable_parameters())
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes))


def check_continued(model, config: LoRAConfig, tokens: Mapping[str, int]) -> None:
    """Refuses settings and tokens that are not those of a model's adapters: adapters that train on keep their own.

    Args:
        model: with adapters.
        config: what is asked; a value that is the default asks for nothing.
        tokens: those whose rows shall train, with their ids.

    Raises:
        ValueError: naming the first setting that differs.
    """
    own, none, known = model.peft_config["default"], LoRAConfig(), trained_token_ids(model)
    targets = next((name for name, found in TARGETS.items() if {*found} == {*own.target_modules}), "others")
    has = {"rank": own.r, "alpha": own.lora_alpha, "dropout": own.lora_dropout, "targets": targets}
    asked = {name: getattr(config, name) for name in has}
    wrong = [f"lora.{n} {asked[n]} for {has[n]}" for n in has if asked[n] not in (has[n], getattr(none, n))]
    wrong += [f"a row for {text}, which they do not train" for text, number in tokens.items() if number not in known]
    if wrong:
        raise ValueError(f"adapters that train on keep theirs, got {wrong[0]}: leave it out, or --lora.from merge")


def save_adapters(model, folder: str | Path) -> Path:
    """Writes the adapters and trained rows, not the base: adapter_model.safetensors and adapter_config.json, as peft's.

    The second names the base by its whole path, or by its name on the hub; the metadata of the first have its digest.

    Raises:
        ValueError: if the model has no adapters, or rows that `extend_model` has set and no adapter trains.
    """
    from peft import get_peft_model_state_dict

    if not is_adapted(model):
        raise ValueError("model must have adapters, got one without: add_adapters(model, config), or save_model")
    if lost := sorted(getattr(causal_model(model), "_qftlab_new_rows", set()) - {*trained_token_ids(model)}):
        raise ValueError(f"new rows must be trained to be saved with adapters: add_adapters(…, token_ids={lost})")
    folder, (base, digest) = Path(folder), getattr(model, "_qftlab_base", None) or _base_of(causal_model(model))
    folder.mkdir(parents=True, exist_ok=True)
    # Never the whole embedding: its trained rows are in the state already.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", DIGEST: digest})
    settings = copy.copy(model.peft_config["default"])
    settings.inference_mode, settings.base_model_name_or_path = True, base
    settings.save_pretrained(folder)
    return folder


def load_adapters(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False):
    """Puts saved adapters and rows on the model they were trained on.

    Args:
        model: the base; rows are added where the saved tokens have outgrown it. Whether it is the one that they were
            trained on is not asked here (a base without their new tokens will do), but by `load_model`.
        folder: what `save_adapters` wrote, or peft itself with safetensors.
        is_trainable: whether training goes on.

    Returns:
        peft's PeftModel around `model`, in the mode `model` was in.

    Raises:
        FileNotFoundError: if the folder lacks one of the two files.
        ValueError: if they are damaged or were made for a model of another shape.
    """
    import peft

    folder = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(missing)}: is it the folder of saved adapters?")
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = not is_trainable
        rows = settings.trainable_token_indices or []
        last = max((i for ids in (rows.values() if isinstance(rows, dict) else [rows]) for i in ids), default=-1)
        if last >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(last + 1, mean_resizing=False)
        state = load_file(folder / WEIGHTS)
        adapted = _wrapped(model, settings)
        loaded = peft.set_peft_model_state_dict(adapted, state)
    except Exception as error:  # peft raises what it meets
        raise _misfit(folder, str(error).strip().split("\n")[-1].strip() or type(error).__name__) from error
    # Of a tied pair only one is a parameter of its own, and only that one is saved.
    own = {name for name, _ in adapted.named_parameters() if _is_adapter(name)}
    lost = sorted(own & set(loaded.missing_keys)) or loaded.unexpected_keys
    wrong = [f"{name} has no counterpart" for name in lost]
    wrong += [f"{name} of {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()]
    if wrong:
        raise _misfit(folder, wrong[0])
    return adapted


def check_base(model, folder: str | Path) -> None:
    """Refuses saved adapters on a model that was loaded from other files than their base was, where that is known.

    Raises:
        ValueError: naming the folder, the base and both digests.
    """
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        recorded = (file.metadata() or {}).get(DIGEST)
    base, found = model._qftlab_base
    if recorded and found and recorded != found:
        raise _misfit(folder, f"other weights in {base} (sha256 {found[:8]}, {recorded[:8]} when they were trained)")


def _misfit(folder: str | Path, reason: str) -> ValueError:
    way_out = "load them on the base that adapter_config.json names, as it was; --base gives its place, if it has moved"
    return ValueError(f"adapters of {folder} must fit the model, got {reason}: {way_out}")


def adapter_base(folder: str | Path) -> str | None:
    """The base that a folder of adapters names; None for any other folder or name.

    Raises:
        ValueError: if the folder holds adapters that name no base.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    if not (base := read_json(path).get("base_model_name_or_path")):
        raise ValueError(f"{path} must name its base_model_name_or_path, got {base!r}: load_model(base, lora=folder)")
    return str(base)


def merge_adapters(model, *, in_place: bool = False) -> PreTrainedModel:
    """The plain model in which W + (alpha / rank) · B A and the trained rows have become the weights.

    Args:
        model: an adapted model, unchanged unless `in_place`.
        in_place: merges into the weights of `model`, which must not be used afterwards; saves a copy of them.

    Raises:
        ValueError: for a model without adapters, or one with quantised weights, which cannot take the sum exactly.
    """
    if not is_adapted(model):
        raise ValueError("model must have adapters to merge, got one without")
    if getattr(model, "is_quantized", False):
        raise ValueError("weights must be whole to merge, got quantised ones: load_model(folder) without quant")
    merged = (model if in_place else copy.deepcopy(model)).merge_and_unload(safe_merge=True)
    merged.config._name_or_path = ""  # it is on no disk, and no base for other adapters to name
    return merged.requires_grad_(True)


def _trained_rows(model: PreTrainedModel, token_ids: list[int]) -> list[int] | dict[str, list[int]] | None:
    """What peft's `trainable_token_indices` takes: a list follows the tie, two matrices have to be named."""
    layers = row_layers(model)
    if not token_ids or len(layers) == 1:
        return token_ids or None
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is x for x in layers)]
    return dict.fromkeys(names, token_ids)


def _wrapped(model: PreTrainedModel, settings):
    """peft's wrapper, in the model's own mode; adapters and rows in fp32, where small updates are not rounded away."""
    from peft import get_peft_model

    is_training = model.training
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a name it is about to lose.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # It puts a path in place of "tiny"; `save_adapters` writes the name.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed.*", category=UserWarning)
        adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if _is_adapter(name):
            parameter.data = parameter.data.float()
    adapted._qftlab_base = _base_of(model)
    return adapted.train(is_training)


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "trainable_tokens_delta" in name


def _base_of(model: PreTrainedModel) -> tuple[str, str]:
    """What `load_model` takes for the base, and the digest of its files; empty where it is on no disk as it is here.

    It is "tiny" for the bundled one, whose path is another on every machine.
    """
    name = model.config._name_or_path
    if not name or weights_version(model):
        return "", ""
    try:
        source = resolve(name)
        files = weight_files(source)
        return "tiny" if source == str(bundled("tiny")) else source, sha256(*files, quick=True) if files else ""
    except (OSError, ValueError):
        return name, ""
