"""Models: loading and saving them, and rows for new tokens."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qftlab.files import resolve
from qftlab.model.attention import NAME as PACKED
from qftlab.model.attention import PACKABLE, register_packed_attention
from qftlab.model.head import language_head, module_mode
from qftlab.model.lora import adapter_base, is_adapted, load_adapters, row_layers, save_adapters
from qftlab.rows.tokenizer import ExtensionReport, not_loadable
from qftlab.settings import check_choice


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: ExtensionReport,
    *,
    init: str = "mean",
    descriptions: Mapping[str, str] | None = None,
) -> None:
    """Gives each new token a row: the mean of the rows of its old pieces, or of a description's tokens; in place.

    Input and output rows are both set where they are two matrices. Rows are added only if the tokenizer has outgrown
    them; a real Qwen has hundreds to spare (151,936 rows for 151,665 tokens).

    Args:
        model: changed in place; tied or untied.
        tokenizer: already extended.
        report: what `extend_tokenizer` returned; tokens that are not new are left alone.
        init: "mean" of the pieces, or "description".
        descriptions: token → a few words, for `init="description"`.

    Raises:
        ValueError: for another `init`, a new token without a description, the report of another tokenizer, or a model
            that has adapters already.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    if init not in ("mean", "description"):
        raise ValueError(f'init must be "mean" or "description", got {init!r}')
    if hasattr(model, "peft_config"):
        raise ValueError("model must be extended before it gets adapters, got one with adapters")
    lacking = [t.text for t in report.new if init == "description" and not (descriptions or {}).get(t.text)]
    if lacking:
        raise ValueError(f"descriptions must have an entry for each new token, missing {', '.join(lacking)}")
    for token in report.tokens:
        if (found := tokenizer.convert_tokens_to_ids(token.text)) != token.id:
            raise ValueError(
                f"report must be of this tokenizer, but {token.text} is {token.id} in it and {found} here: "
                "pass what extend_tokenizer(tokenizer) returned"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for token in report.new:
            pieces = list(token.pieces_before)
            if init == "description":
                pieces = tokenizer(descriptions[token.text], add_special_tokens=False).input_ids
            for layer in row_layers(model):
                layer.weight[token.id] = layer.weight[pieces].float().mean(0).to(layer.weight.dtype)


log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
ATTENTIONS = (PACKED, "sdpa", "eager")
QUANTS = ("none", "8bit", "4bit")


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = PACKED,
    quant: str = "none",
    lora: str | Path | None = None,
) -> PreTrainedModel:
    """Loads a causal language model from safetensors, without running any code of its repository.

    Args:
        name_or_path: "tiny", the folder of a saved model, or a name on the hub. A folder of adapters stands for the
            base it names, with the adapters on it.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
        device: where the weights go, such as "cpu" or "cuda".
        attention: "packed" (trains packed batches, otherwise as "sdpa"; for families that cannot, what transformers
            chooses), "sdpa" or "eager".
        quant: "8bit" or "4bit" (NF4) weights by bitsandbytes, frozen: for QLoRA; they need a GPU.
        lora: a folder of adapters to put on; see `qftlab.model.lora` for fresh ones.

    Raises:
        ValueError: for an unknown dtype, attention or quant, what is no causal language model, or adapters that do not
            fit.
        ImportError: if bitsandbytes or peft is needed and missing.
        RuntimeError: for quantised weights without a GPU.
        FileNotFoundError: if the folder is not there or lacks config.json or whole safetensors weights, or the hub
            does not give the name.
    """
    check_choice(tuple(DTYPES), dtype=dtype)
    check_choice(ATTENTIONS, attention=attention)
    check_choice(QUANTS, quant=quant)
    source = resolve(name_or_path)
    if lora is None and (base := adapter_base(source)):
        source, lora = resolve(base), source
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: is it the model's folder?")
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "trust_remote_code": False}
    if quant != "none":
        options |= {"quantization_config": _quantisation(quant, dtype, device), "device_map": {"": device}}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
            raise ValueError(f"{source} is a reward model: it scores answers (rloo --reward_model) and writes none")
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{source} must be a causal language model, such as Qwen3, got a {config.model_type}")
        if attention == register_packed_attention() and config.model_type not in PACKABLE:
            log.info("%s takes no packed rows: it is loaded with the attention that transformers chooses", source)
            attention = None
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention, **options)
    except (OSError, SafetensorError) as error:
        raise not_loadable(source, error) from error
    model = (model.to(device) if quant == "none" else model).eval()
    return model if lora is None else load_adapters(model, lora)


@torch.no_grad()
def check_loss(model: nn.Module) -> None:
    """Refuses a model whose own logits are not its head of its backbone, or whose loss is not their cross entropy.

    Args:
        model: is asked for both, on eight tokens.

    Raises:
        ValueError: saying how far off they are, or why it cannot be asked.
    """
    ids, head, family = torch.arange(1, 9, device=model.device)[None], language_head(model), model.config.model_type
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids - 1, "use_cache": False}
    try:
        with module_mode(model, False):
            own, logits = model(input_ids=ids, labels=ids), head(model.get_decoder()(**inputs).last_hidden_state)
        # The same products on both sides, so a few roundings of the largest; the loss is fp32 on both.
        room = 4 * torch.finfo(logits.dtype).eps * logits.abs().max()
        loss = F.cross_entropy(own.logits[0, :-1].float(), ids[0, 1:])
        is_own = (own.logits - logits).abs().max() <= room and (own.loss - loss).abs() <= 1e-5 * loss
    except Exception as error:  # whatever a family says that takes, or gives, something else
        raise ValueError(f"model must give loss and hidden states of tokens, got {family}, saying {error!r}") from error
    if not is_own:
        raise ValueError(f"logits must be the head's and loss theirs alone, got {family} (scale, cap, router, encoder)")


def _quantisation(quant: str, dtype: str, device: str):
    """transformers' settings for bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"quant {quant!r} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        # bitsandbytes 0.50 also runs on CPUs, but refuses or garbles 4-bit matrices whose width is no multiple of 64.
        raise RuntimeError(f'quant {quant!r} needs a CUDA GPU, got device {device!r}: leave it "none" here')
    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Writes weights (safetensors), config and tokenizer to `folder`, as transformers and vLLM load them.

    Of an adapted model it writes the adapters only, beside the tokenizer: `load_model` finds their base by its name.
    """
    folder = Path(folder)
    with _without_bars():
        if is_adapted(model):
            save_adapters(model, folder)
        else:
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share(folder)
    return folder


def share(folder: Path) -> None:
    """Gives a folder's weights the rights that other new files get; safetensors writes for the owner alone."""
    probe = folder / ".rights"
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(rights)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silences transformers' progress bars, which go to stderr and into notebooks, and gives them back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
