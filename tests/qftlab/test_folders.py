"""Folders of models: whatever is wrong with one is said in one sentence, and nothing of it is loaded half."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file

from qftlab import cli
from qftlab.files import BLOCK, sha256, weight_files
from qftlab.model.export import export_model
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import add_adapters, row_layers, save_adapters
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import LoRAConfig, TrainConfig
from qftlab.train.reward import ModelReward, reward_model
from qftlab.train.sft import fit_rows

IDS = torch.tensor([[5, 1000, 7, 1001, 300, 12, 4]])
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder in which nothing is wrong."""
    return save_model(random_model(), load_tokenizer("tiny"), tmp_path_factory.mktemp("sound") / "model")


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What changes the tensors of a folder."""

    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def text(name: str, content: object) -> Callable[[Path], None]:
    """What writes a file of a folder: a text, or changes of its JSON."""

    def damage(folder: Path) -> None:
        if isinstance(content, dict) and (folder / name).exists():
            content_now = json.loads((folder / name).read_text(encoding="utf-8")) | content
        else:
            content_now = content
        written = content_now if isinstance(content_now, str) else json.dumps(content_now)
        (folder / name).write_text(written, encoding="utf-8")

    return damage


def index(shard: str, damage: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], None]:
    """What puts an index in place of the weights, which stand beside the folder too."""

    def damaged(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
        names = load_file(folder / "model.safetensors")
        torch.save(names, folder / "pytorch_model.bin")
        (folder / "model.safetensors").rename(folder / "whole.safetensors")
        shard_now = shard.replace("ABOVE", str(folder.parent))
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard_now)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
        damage(folder)

    return damaged


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()

    return damage


def scorer(folder: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    save_model(reward_model(random_model(), tokenizer), tokenizer, folder)


def adapters(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """What puts adapters in place of the model, which stands beside the folder as `base`."""

    def damaged(folder: Path) -> None:
        folder.rename(folder.parent / "base")
        model = add_adapters(load_model(folder.parent / "base"), LoRAConfig(2))
        save_model(model, load_tokenizer("tiny"), folder)
        damage(folder)

    return damaged


def whole_numbers(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor.char() for name, tensor in state.items()}, folder / "adapter_model.safetensors")


def other_base(folder: Path) -> None:
    tensors(lambda state: state[UP].mul_(1.01))(folder.parent / "base")


DAMAGES = {
    "a tensor removed": (tensors(lambda s: s.pop(UP)), f"it lacks {UP} (1 such): it is not, or not wholly, a Qwen2F"),
    "two removed": (tensors(lambda s: (s.pop(UP), s.pop("model.norm.weight"))), f"it lacks {UP} (2 such)"),
    "a tensor too many": (tensors(lambda s: s.update(more=torch.ones(2))), "it has besides more (1 such)"),
    "another shape": (tensors(lambda s: s.update({UP: torch.ones(4, 32)})), f"{UP} is of shape (4, 32), and by config"),
    "fewer rows": (text("config.json", {"vocab_size": 1000}), "should be (1000, 32)"),
    "integers": (tensors(lambda s: s.update({UP: torch.ones(64, 32, dtype=torch.int8)})), f"{UP} in model.safet"),
    "flags": (tensors(lambda s: s.update({UP: torch.ones(64, 32) > 0})), "of BOOL, no float"),
    "an index of pickles": (index("pytorch_model.bin"), "must name .safetensors files of its own folder, got pytorch_"),
    "an index above": (index("../elsewhere.safetensors"), "files of its own folder, got ../elsewhere.safetensors"),
    "an index of a path": (index("ABOVE/elsewhere.safetensors"), "must name .safetensors files of its own folder"),
    "an index of nothing": (index("absent.safetensors"), "absent.safetensors"),
    "an index that is none": (index("", text("model.safetensors.index.json", "{")), "index.json must hold a JSON obj"),
    "an index without a map": (index("", text("model.safetensors.index.json", "[]")), "index.json must hold a JSON ob"),
    "an index without a size": (index("", text("model.safetensors.index.json", '{"weight_map": {}}')), "metadata"),
    "torn weights": (cut("model.safetensors", 5000), "cannot be loaded: "),
    "no weights at all": (cut("model.safetensors", 0), "cannot be loaded: "),
    "garbage": (text("model.safetensors", "not a header at all"), "cannot be loaded: "),
    "pickles only": (pickled("pytorch_model.bin"), "weights are read from .safetensors only"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
    "a config that is no JSON": (text("config.json", "{"), "config.json must hold a JSON object"),
    "a config that is a list": (text("config.json", "[]"), "config.json must hold a JSON object"),
    "a torn end of texts": (cut("generation_config.json", 20), "generation_config.json must hold a JSON object"),
    "a torn tokenizer_config": (cut("tokenizer_config.json", 40), "tokenizer_config.json must hold a JSON object"),
    "a word for a number": (text("config.json", {"num_hidden_layers": "x"}), "expected int, got str"),
    "a kind that nobody knows": (text("config.json", {"model_type": "qwen99"}), "has model type `qwen99`"),
    "no kind": (text("config.json", {"model_type": None}), "cannot be loaded: "),
    "code of its own": (text("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}),
                        "it asks for code of its own (auto_map)"),
    "no heads": (text("config.json", {"num_attention_heads": 0}), "cannot be loaded: "),
    "an encoder": (text("config.json", {"model_type": "t5"}), "cannot be loaded: "),
    "a reward model": (scorer, "it is a reward model: it scores answers (rloo --reward_model) and writes none"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has neither tokenizer.json nor vocab.json"),
    "a torn tokenizer": (cut("tokenizer.json", 1000), "cannot be loaded: "),
    "a tokenizer of another kind": (text("tokenizer.json", "[]"), "cannot be loaded: "),
    "nothing": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "it holds no config.json"),
    "adapters of no base": (adapters(text("adapter_config.json", {"base_model_name_or_path": ""})), "name its base_m"),
    "adapters without JSON": (adapters(text("adapter_config.json", "{")), "must hold a JSON object"),
    "adapters of themselves": (adapters(lambda f: text("adapter_config.json", {"base_model_name_or_path": str(f)})(f)),
                               "must hold adapters or a model, got both"),
    "torn adapters": (adapters(cut("adapter_model.safetensors", 500)), "must fit the model, got "),
    "adapters of another kind": (adapters(text("adapter_config.json", {"peft_type": "MINE"})), "must fit the model"),
    "integers in adapters": (adapters(whole_numbers), "_proj.lora_A.weight of torch.int8"),
    "pickled adapters": (adapters(lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin")),
                         "holds no adapter_model.safetensors"),
    "a base that is gone": (adapters(lambda f: shutil.rmtree(f.parent / "base")), "holds adapters, whose base is not"),
    "a base that is another now": (adapters(other_base), "got other weights in "),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_with_a_folder_is_one_sentence(name: str, sound, tmp_path, capsys, monkeypatch) -> None:
    """From the command line: exit code 2, one line that names the folder, no advice to run its code."""
    damage, words = DAMAGES[name]
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    damage(folder)
    capsys.readouterr()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler()])
    assert cli.main(["generate", "--model", str(folder), "--prompt", "hi", "--max_new_tokens", "2"]) == 2
    said = capsys.readouterr()
    [line] = said.err.strip().split("\n")
    assert words in line and str(tmp_path.resolve()) in line and not said.out, line
    assert "trust_remote_code" not in line and "Traceback" not in line and ". " not in line


def test_a_sound_folder_is_loaded_through_an_index_too(sound, tmp_path) -> None:
    wanted = load_model(sound)(IDS).logits
    index("whole.safetensors")(Path(shutil.copytree(sound, tmp_path / "model")))
    assert torch.equal(load_model(tmp_path / "model")(IDS).logits, wanted)
    assert [f.name for f in weight_files(str(tmp_path / "model"))] == ["whole.safetensors"]


def test_integers_of_a_method_that_nobody_knows_are_refused(sound, tmp_path) -> None:
    """transformers leaves such a method out, with a warning, and takes them for the values that they stand for."""
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    text("config.json", {"quantization_config": {"quant_method": "mine"}})(folder)
    assert load_model(folder)(IDS).logits.isfinite().all()
    tensors(lambda s: s.update({UP: s[UP].char()}))(folder)
    with pytest.raises(ValueError, match=f"{UP} in model.safetensors is of I8, no float"):
        load_model(folder)


def test_a_config_cannot_name_another_file(sound, tmp_path) -> None:
    """transformers would read this pickled one; adapters without their config beside the model are none."""
    wanted, folder = load_model(sound)(IDS).logits, Path(shutil.copytree(sound, tmp_path / "model"))
    state = {name: 2 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save(state, folder / "adapter_model.bin")
    save_file(state, folder / "adapter_model.safetensors")
    text("config.json", {"transformers_weights": "adapter_model.bin"})(folder)
    assert torch.equal(load_model(folder)(IDS).logits, wanted)
    assert weight_files(str(folder)) == [folder / "model.safetensors"]


def test_a_head_apart_is_one_whatever_the_config_says(sound, tmp_path, caplog) -> None:
    """transformers 5 reads two matrices, transformers 4 and vLLM would tie them: from here on the config says two."""
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    tensors(lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))(folder)
    model = load_model(folder)
    assert "holds a head apart from its embedding" in caplog.text
    assert len(row_layers(model)) == 2 and model.config.tie_word_embeddings is False
    save_model(model, load_tokenizer("tiny"), tmp_path / "again")
    caplog.clear()
    assert torch.equal(load_model(tmp_path / "again")(IDS).logits, model(IDS).logits) and not caplog.text


def test_a_causal_model_is_no_reward_model(sound) -> None:
    with pytest.raises(ValueError, match=r"it lacks score.weight .1 such.: .* a Qwen2ForSequenceClassific"):
        ModelReward.load(str(sound))


def test_a_hub_name_is_looked_at_as_a_folder_is(sound, tmp_path, monkeypatch) -> None:
    """From a cache of the hub, offline: sound, with integers, and with an index of pickles."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, damage in (("sound", lambda f: None), ("integers", DAMAGES["integers"][0]), ("pickles", index("a.bin"))):
        place = tmp_path / f"models--mine--{name}"
        damage(Path(shutil.copytree(sound, place / "snapshots" / ("0" * 40))))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    model = load_model("mine/sound")
    assert torch.equal(model(IDS).logits, load_model(sound)(IDS).logits)
    save_adapters(add_adapters(model, LoRAConfig(2)), tmp_path / "adapters")
    named = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "mine/sound" and load_model(tmp_path / "adapters").peft_config
    with pytest.raises(ValueError, match="mine/integers cannot be loaded: .* is of I8, no float"):
        load_model("mine/integers")
    with pytest.raises(ValueError, match="mine/pickles cannot be loaded: .* must name .safetensors files"):
        load_model("mine/pickles")


def test_a_digest_reads_little_of_a_large_file_and_sees_a_matrix_change(tmp_path) -> None:
    """100 MB: every block of the 4,096 is 16 KiB; what lies between them is not seen, what is longer than a gap is."""
    file = tmp_path / "large"
    with file.open("wb") as out:
        out.truncate(100_000_000)
    gap = 100_000_000 // 4096
    assert BLOCK < gap < 2 * BLOCK
    assert sha256(file) == hashlib.sha256(bytes(100_000_000)).hexdigest() != sha256(file, quick=True)
    before = sha256(file, quick=True)
    for start, size, is_seen in ((gap * 7 + BLOCK, 100, False), (gap * 7, 1, True), (50_000_000, gap, True)):
        with file.open("r+b") as out:
            out.seek(start)
            out.write(b"\1" * size)
        after = sha256(file, quick=True)
        assert (after != before) is is_seen
        before = after
    small = tmp_path / "small"
    small.write_bytes(bytes(1_000_000))
    before = sha256(small, quick=True)
    small.write_bytes(bytes(777_777) + b"\1" + bytes(222_222))
    assert sha256(small, quick=True) != before


def write_gguf(folder: Path, model, tokenizer) -> Path:
    """A folder with a GGUF file as llama.cpp's converter writes it, matrices in blocks of 8 bits; no config.json."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config, vocab = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    folder.mkdir()
    out = gguf.GGUFWriter(folder / "model-Q8_0.gguf", "qwen2")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    words = [tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(config.vocab_size)]
    out.add_token_list(words)
    out.add_token_types([3 if i in tokenizer.added_tokens_decoder else 1 for i in range(len(words))])
    out.add_token_merges([" ".join(pair) for pair in vocab["merges"]])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensor.numpy(), kind)
            with torch.no_grad():  # the model becomes what the blocks say
                tensor.copy_(torch.tensor(gguf.quants.dequantize(data, kind)).view(tensor.shape))
            out.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder


def test_a_gguf_folder_is_dequantised_and_said_to_be(tmp_path, caplog) -> None:
    """Then it is a model as any other: it trains, is saved, exported, and adapters stand on it."""
    model, tokenizer = random_model(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), load_tokenizer("tiny")
    folder = write_gguf(tmp_path / "gguf", model, tokenizer)
    loaded, own = load_model(folder), load_tokenizer(folder)
    assert "the weights of model-Q8_0.gguf are dequantised to torch.float32" in caplog.text
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    assert own("47 + 38 = def f(x):").input_ids == tokenizer("47 + 38 = def f(x):").input_ids
    own.chat_template = tokenizer.chat_template
    fit_rows(loaded, own, [{"instruction": "a", "output": "b"}], TrainConfig(lr=1e-3, max_steps=1))
    export_model(loaded, own, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, loaded(IDS).logits)
    adapted = add_adapters(load_model(folder), LoRAConfig(2))
    save_adapters(adapted, tmp_path / "adapters")
    assert torch.equal(load_model(tmp_path / "adapters")(IDS).logits, adapted(IDS).logits)
    shutil.copy(folder / "model-Q8_0.gguf", folder / "model-Q4_0.gguf")
    with pytest.raises(FileNotFoundError, match="read from .safetensors only, or one GGUF, got 2"):
        load_model(folder)
