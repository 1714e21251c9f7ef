"""Models: loading and saving them, and rows for new tokens."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qftlab.files import read_json, resolve, weight_files
from qftlab.model.attention import NAME as PACKED
from qftlab.model.attention import PACKABLE, register_packed_attention
from qftlab.model.head import causal_model, language_head, module_mode
from qftlab.model.lora import (
    adapter_base,
    check_base,
    is_adapted,
    load_adapters,
    merge_adapters,
    row_layers,
    save_adapters,
)
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
    check_choice(("mean", "description"), init=init)
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
    model._qftlab_new_rows = getattr(model, "_qftlab_new_rows", set()) | {token.id for token in report.new}


log = logging.getLogger(__name__)
STRICT = dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = PACKED,
    quant: str = "none",
    lora: str | Path | None = None,
    adapters: str = "keep",
) -> PreTrainedModel:
    """Loads a causal language model from safetensors or GGUF, without running any code of its repository.

    Args:
        name_or_path: "tiny", the folder of a saved model, or a name on the hub. A folder of adapters stands for the
            base it names, with the adapters on it; a base may be such a folder itself.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
        device: where the weights go, such as "cpu" or "cuda".
        attention: "packed" (trains packed batches, otherwise as "sdpa"; for families that cannot, what transformers
            chooses), "sdpa" or "eager".
        quant: "8bit" or "4bit" (NF4) weights by bitsandbytes, frozen: for QLoRA; they need a GPU.
        lora: a folder of adapters to put on; see `qftlab.model.lora` for fresh ones.
        adapters: what becomes of them: "keep" them, frozen, "continue" to train them, or "merge" them.

    Raises:
        ValueError: for an unknown dtype, attention, quant or adapters, a reward model, tensors that are missing, too
            many, or of another shape or kind, quantised weights without a GPU, or adapters that do not fit.
        ImportError: if bitsandbytes is needed and missing.
        FileNotFoundError: if the folder is not there or lacks config.json or whole safetensors weights, or the hub
            does not give the name.
    """
    check_choice(tuple(DTYPES), dtype=dtype)
    check_choice((PACKED, "sdpa", "eager"), attention=attention)
    check_choice(("none", "8bit", "4bit"), quant=quant)
    check_choice(("keep", "continue", "merge"), adapters=adapters)
    source = resolve(name_or_path)
    if base := adapter_base(source) if lora is None else source:
        folder = source if lora is None else resolve(lora)
        options = {"dtype": dtype, "device": device, "attention": attention, "quant": quant}
        return _with_adapters(base, folder, adapters, options)
    register_packed_attention()
    options = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    if quant != "none":
        options |= {"quantization_config": _quantisation(quant, dtype, device), "device_map": {"": device}}
    model = model_of_files(AutoModelForCausalLM, source, **options)
    return (model.to(device) if quant == "none" else model).eval()


def _with_adapters(base: str, folder: str, adapters: str, options: dict) -> PreTrainedModel:
    """The model of a base with the adapters of a folder on it; those of a base that is adapters itself are merged."""
    try:
        if (source := resolve(base)) == folder:
            raise ValueError(f"{folder} must hold adapters or a model, got both: move the adapters to a folder")
        model = load_model(source, adapters="merge", **options)
    except FileNotFoundError as error:
        said = f"{folder} holds adapters, whose base is not to be had: {error}; --base gives its place, if it has moved"
        raise FileNotFoundError(said) from error
    model = load_adapters(model, folder, is_trainable=adapters == "continue")
    check_base(model, folder)
    if adapters == "merge":
        model = merge_adapters(model, in_place=True)
        model.config._name_or_path = folder  # what fresh adapters shall name as their base
    return model


def model_of_files(kind, source: str, **options) -> PreTrainedModel:
    """A model of one of transformers' auto classes, with every tensor that it has in its files, and no others in them.

    Args:
        kind: such as AutoModelForCausalLM.
        source: as `resolve` gives it; a folder without safetensors may hold a GGUF file, which is dequantised.
        options: of `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: in one sentence, as `load_model`.
    """
    path, files = Path(source), []
    try:
        if path.is_dir():
            if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
                raise FileNotFoundError("it holds no config.json (is it the model's folder?)")
            for file in path.glob("*config.json"):  # generation_config.json too, of which transformers says nothing
                read_json(file)
            files = weight_files(source)
        gguf = {"gguf_file": files[0].name} if files and files[0].suffix == ".gguf" else {}
        if gguf and importlib.util.find_spec("gguf") is None:
            raise ImportError("a GGUF file needs gguf, which is not installed (pip install gguf)")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
        files = files or weight_files(source)  # of the hub not before its config: without one there is nothing to find
        config.transformers_weights = None  # the name of another file, which might be a pickled one
        if kind is AutoModelForCausalLM:
            if "ForSequenceClassification" in f"{config.architectures}":
                raise ValueError("it is a reward model: it scores answers (rloo --reward_model) and writes none")
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise ValueError(f"it must be a causal language model, such as Qwen3, got a {config.model_type}")
            if options.get("attn_implementation") == PACKED and config.model_type not in PACKABLE:
                log.info("%s takes no packed rows: it is loaded with the attention that transformers chooses", source)
                options["attn_implementation"] = None
        with _quietly():
            model, report = kind.from_pretrained(source, config=config, **STRICT, **gguf, **options)
        if not gguf and not (getattr(config, "quantization_config", None) and getattr(model, "is_quantized", False)):
            _check_floats(files)
        _check_report(report, type(model).__name__)
    except Exception as error:  # of whatever kind transformers, tokenizers and safetensors raise for a damaged folder
        raise not_loadable(source, error) from error
    if gguf:
        log.warning("%s: the weights of %s are dequantised to %s", source, files[0].name, model.dtype)
        if quantizer := getattr(model, "hf_quantizer", None):  # it would forbid to train and to save
            quantizer.remove_quantization_config(model)
    if getattr(model.config, "tie_word_embeddings", False) and len(row_layers(model)) == 2:
        log.warning("%s holds a head apart from its embedding, so its tie_word_embeddings is taken for false", source)
        model.config.tie_word_embeddings = False
    return model


def _check_floats(files: Sequence[Path]) -> None:
    """Refuses integers in place of weights: they would be taken for the values that they stand for."""
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        if name := next((name for name, kind in kinds.items() if not re.match(r"B?F\d", kind)), None):
            raise ValueError(f"{name} in {file.name} is of {kinds[name]}, no float, and config.json names no method")


def _check_report(report: Mapping, name: str) -> None:
    """Refuses what transformers would replace by random weights, or leave out, with a warning."""
    for names, what in ((report["missing_keys"], "lacks"), (report["unexpected_keys"], "has besides")):
        if names:
            raise ValueError(f"it {what} {min(names)} ({len(names)} such): it is not, or not wholly, a {name}")
    for tensor, theirs, ours in sorted(report["mismatched_keys"]):
        raise ValueError(f"{tensor} is of shape {tuple(theirs)}, and by config.json it should be {tuple(ours)}")


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
        raise ValueError(f'quant {quant!r} needs a CUDA GPU, got device {device!r}: leave it "none" here')
    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


END_OF_TURN = "<|im_end|>"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Writes weights (safetensors), configs and tokenizer to `folder`, as transformers 4.57 and 5 and vLLM load them.

    The generation config ends a turn where the chat template does. Of an adapted model it writes the adapters only,
    beside the tokenizer: `load_model` finds their base by its path or name.
    """
    folder, plain = Path(folder), causal_model(model)
    with _quietly():
        if is_adapted(model):
            save_adapters(model, folder)
        else:
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*config.json"):
        _say_to_4(file)
    if plain.can_generate():
        settings = copy.deepcopy(plain.generation_config)
        known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        ends = [tokenizer.get_vocab().get(END_OF_TURN), *known, tokenizer.eos_token_id]
        settings.eos_token_id = [i for i in dict.fromkeys(ends) if i is not None]
        settings.pad_token_id = tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
        settings.save_pretrained(folder)
    rights = (folder / "tokenizer_config.json").stat().st_mode & 0o777  # safetensors writes for the owner alone
    for file in folder.glob("*.safetensors"):
        file.chmod(rights)
    return folder


def _say_to_4(file: Path) -> None:
    """Says what transformers 5 has written in the words of transformers 4 too, which 5 knows as well."""
    content = read_json(file)
    rope = dict(content.get("rope_parameters") or {})
    if "rope_theta" in rope:  # 4 would take 10,000 in silence
        content["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = rope
    if "extra_special_tokens" in content:  # 4 would refuse it
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences transformers' progress bars, which reach notebooks too, and its table of tensors that did not fit."""
    shown, reporter = transformers_logging.is_progress_bar_enabled(), logging.getLogger("transformers.modeling_utils")
    transformers_logging.disable_progress_bar()
    reporter.disabled = True  # what it warns of is refused here
    try:
        yield
    finally:
        reporter.disabled = False
        if shown:
            transformers_logging.enable_progress_bar()
