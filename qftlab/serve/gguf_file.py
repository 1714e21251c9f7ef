"""A GGUF file of an exported model, for llama.cpp and Ollama: written by PyPI's `gguf`, read back by transformers."""

from __future__ import annotations

import contextlib
import io
import json
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qftlab.files import read_json, weight_files
from qftlab.model.export import ExportError
from qftlab.model.loading import END_OF_TURN
from qftlab.serve.card import GGUF

FAMILIES = ("qwen2", "qwen3", "llama")
# How llama.cpp's `qwen2` cuts text before it merges; Qwen3 has the same.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's name of each number, and config.json's.
SHAPE = """
    vocab_size vocab_size  context_length max_position_embeddings  embedding_length hidden_size  block_count
    num_hidden_layers  feed_forward_length intermediate_size  head_count num_attention_heads  head_count_kv
    num_key_value_heads  key_length head_dim  value_length head_dim  rope_dimension_count head_dim
    rope_freq_base rope_theta  layer_norm_rms_eps rms_norm_eps
""".split()
# Composed characters only: a Qwen tokenizer composes them before it cuts, llama.cpp takes them as they come.
HARD = (
    "  I'll\tpay 12,345.60 €\r\n\n\n😀👩\u200d👧 ÅÉ łódź ςΣ 数学：１２ مرحبا हिन्दी\u00a0\u200b x = [[1],\n  {'a'}]…  "
)


def write_gguf(folder: Path, kind: str, name: str, *, check: bool = True) -> None:
    """Writes model.gguf beside an exported model's files, of which it is made.

    Args:
        folder: what `export_model` wrote: Qwen2, Qwen3 or Llama with a byte-level BPE that cuts text as Qwen does.
        kind: of the matrices: "f32", "f16", "bf16" or "q8_0"; vectors are always f32. A matrix whose rows are no
            multiple of 32 is f16 in place of q8_0.
        name: of the model, for the file's header.
        check: have transformers read it, and compare every weight, and the tokens of a hard text.

    Raises:
        ValueError: for what this writer cannot say in the format: it names the setting.
        ExportError: if what is read is not what was written.
    """
    config, tokens = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    _check_sayable(config, tokens)
    with tempfile.TemporaryDirectory(dir=folder) as alone:  # so that the other files do not help who reads it
        _write(Path(alone) / GGUF, folder, config, tokens, kind, name)
        if check:
            _check_read(Path(alone), folder, config, kind)
        (Path(alone) / GGUF).replace(folder / GGUF)


def _write(path: Path, folder: Path, config: dict, tokens: dict, kind: str, name: str) -> None:
    """Names, numbers, tokens and tensors."""
    writer = gguf.GGUFWriter(path, config["model_type"], use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    for theirs, ours in zip(SHAPE[::2], SHAPE[1::2], strict=True):
        getattr(writer, f"add_{theirs}")(config[ours])
    _add_tokens(writer, folder, tokens, config["vocab_size"])
    for _, name, tensor, stored in tensors_of(folder, config, kind):
        if config["model_type"] == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config["num_attention_heads" if "attn_q." in name else "num_key_value_heads"]
            # The two rows that turn together stand side by side in GGUF, and half a head apart in transformers.
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        writer.add_tensor(name, quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_sayable(config: dict, tokens: dict) -> None:
    """Refuses what would be read as another model."""
    cut = [part.get("pattern", {}).get("Regex") for part in (tokens["pre_tokenizer"] or {}).get("pretokenizers", [])]
    for what, got, is_known in (
        ("model_type", config["model_type"], config["model_type"] in FAMILIES),
        ("hidden_act", config["hidden_act"], config["hidden_act"] == "silu"),
        ("rope_type", rope := config["rope_parameters"]["rope_type"], rope == "default"),
        ("layer_types", kinds := {*(config.get("layer_types") or [])}, kinds <= {"full_attention"}),
        ("the tokenizer's pattern", cut, tokens["model"]["type"] == "BPE" and QWEN2 in cut),
    ):
        if not is_known:
            said = f"{what} must be one that this GGUF writer knows, got {got}"
            raise ValueError(f"{said}: leave --gguf out, or convert the folder with llama.cpp's convert_hf_to_gguf.py")


def _add_tokens(writer: gguf.GGUFWriter, folder: Path, tokens: dict, rows: int) -> None:
    """One entry a row, of which those that no token has are unused; merges, special ids and the chat template."""
    names = {number: (name, gguf.TokenType.NORMAL) for name, number in tokens["model"]["vocab"].items()}
    for token in tokens["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        names[token["id"]] = token["content"], kind
        if token["content"] == END_OF_TURN:
            writer.add_eot_token_id(token["id"])
    entries = [names.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    rest, added = gguf.SpecialVocab(folder, load_merges=True), {token["id"] for token in tokens["added_tokens"]}
    # A config.json may name ids for bos and eos that are letters in this tokenizer.
    rest.special_token_ids = {role: number for role, number in rest.special_token_ids.items() if number in added}
    rest.add_special_token.setdefault("bos", False)
    rest.add_to_gguf(writer, quiet=True)


def tensors_of(folder: Path, config: dict, kind: str) -> Iterator[tuple[str, str, Tensor, gguf.GGMLQuantizationType]]:
    """Each tensor's name in transformers and in GGUF, its values in fp32, and how GGUF stores it.

    Raises:
        ValueError: for a tensor that GGUF has no name for, or a value too large for f16.
    """
    types, arch = gguf.GGMLQuantizationType, gguf.MODEL_ARCH[config["model_type"].upper()]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for file in weight_files(str(folder)):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor, name = tensors.get_tensor(key).float(), names.get_name(key, (".weight", ".bias"))
                stored = types[kind.upper()] if tensor.ndim > 1 else types.F32
                stored = types.F16 if stored == types.Q8_0 and tensor.shape[-1] % 32 else stored
                if name is None or (stored == types.F16 and tensor.abs().max() > 65504):
                    raise ValueError(f"weights must have a name in GGUF, and fit f16, got {key}: --gguf bf16 or none")
                yield key, name, tensor, stored


def _check_read(alone: Path, folder: Path, config: dict, kind: str) -> None:
    """Has transformers read the file: every number and weight as stored, the same merges, and the same ids."""
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing turns off
        options = {"gguf_file": GGUF}
        if config["model_type"] != "qwen2":
            options["head_dim"] = config["head_dim"]  # which it does not read of Qwen3
        model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **options)
        theirs = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=GGUF)  # AutoTokenizer would read it twice
        ours = AutoTokenizer.from_pretrained(folder)
    read, numbers = model.state_dict(), {**model.config.to_dict(), **model.config.rope_parameters}
    wrong = [name for name in SHAPE[1::2] if abs(numbers.get(name, config[name]) - config[name]) > 1e-6 * config[name]]
    for key, _, tensor, stored in tensors_of(folder, config, kind):
        wanted = torch.from_numpy(dequantize(quantize(tensor.numpy(), stored), stored))
        wrong += [] if torch.equal(read[key], wanted) else [key]
    merges = [json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"] for tokenizer in (theirs, ours)]
    wrong += [] if merges[0] == merges[1] else ["the merges"]
    text = (
        HARD
        + string.printable
        + " ".join(string.printable)
        + "".join(ours.convert_ids_to_tokens(sorted(ours.added_tokens_decoder)))
    )
    wrong += [] if theirs(text).input_ids == ours(text).input_ids else [f"the ids of {text!r}"]
    if wrong:
        raise ExportError(f"what is read from {GGUF} must be what was written, got other values for {wrong[0]}")
