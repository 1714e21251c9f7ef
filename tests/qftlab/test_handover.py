"""Handing over: a card of what the runs recorded, a GGUF that is read as it was written, an upload of just that."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import openai
import pytest
import torch
import yaml
from random_models import random_model
from test_export import adapted_tiny
from test_lora import NEW, shaken
from transformers import PreTrainedTokenizerFast

from qftlab import cli
from qftlab.files import bundled
from qftlab.model.export import ExportError, export_model
from qftlab.model.loading import extend_model, load_model
from qftlab.model.lora import add_adapters
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.serve import ExportConfig
from qftlab.serve.app import serving
from qftlab.serve.card import card_of, card_text, licence_of, run_of
from qftlab.serve.handover import hand_over, push
from qftlab.settings import DPOConfig, LoRAConfig, SFTConfig, TrainConfig
from qftlab.train.dpo import dpo
from qftlab.train.sft import sft

STEPS = TrainConfig(max_steps=2, batch_size=2, lr=1e-3, save_every=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """SFT of all weights on `tiny` with new tokens, and DPO with adapters on that; another SFT came after, so that
    `sft/latest` leads elsewhere."""
    folder = tmp_path_factory.mktemp("machine") / "runs"
    folder.mkdir()
    rows = [{"instruction": f"{n} + 1?", "output": f"<|AGENT|> {n + 1}"} for n in range(6)]
    pairs = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": "7"} for n in range(4)]
    for name, content in (("rows", rows), ("held", rows[:2]), ("pairs", pairs), ("other", rows)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    options = {"device": "cpu", "train": STEPS}
    sft(SFTConfig("tiny", str(folder / "rows.jsonl"), held_out=str(folder / "held.jsonl"), output=str(folder / "sft"),
                  **options))  # fmt: skip
    dpo(DPOConfig(str(folder / "sft" / "latest"), str(folder / "pairs.jsonl"), output=str(folder / "dpo"),
                  lora=LoRAConfig(2), **options))  # fmt: skip
    sft(SFTConfig("tiny", str(folder / "other.jsonl"), output=str(folder / "sft"), **options))
    return folder


def exported_card(capsys, out: Path, *arguments: str) -> str:
    assert cli.main(["export", "--output", str(out), "--device", "cpu", *arguments]) == 0
    capsys.readouterr()
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_chain_of_runs(runs, tmp_path, capsys) -> None:
    """The DPO run began with the first SFT run, whatever `latest` says today."""
    text = exported_card(capsys, tmp_path / "mine", "--model", str(runs / "dpo" / "latest"), "--data", "a talk")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "tiny"}
    first, second = re.findall(r"^\d\. \*\*(\w+)\*\*\n((?:   - .*\n)+)", text, flags=re.MULTILINE)
    assert (first[0], second[0]) == ("sft", "dpo")
    assert "   - data: rows.jsonl (6 rows)\n" in first[1] and "   - data: pairs.jsonl (4 rows)\n" in second[1]
    assert "lr 0.001" in first[1] and "batch_size 2" in first[1] and "rank" not in first[1]
    assert "new_tokens <|AGENT|>, <|EDIT|>" in first[1]
    assert "rank 2" in second[1] and "loss_type sigmoid" in second[1] and "beta 0.1" in second[1]
    metrics = (run_of(card_start(runs)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held = [json.loads(line)["held_out_loss"] for line in metrics if "held_out_loss" in line]
    assert f"   - held out: held.jsonl: loss {held[0]:.4g} → {held[-1]:.4g} in 2 steps\n" in first[1]
    assert "held out" not in second[1] and "- a talk\n" in text and "## Scores" not in text
    assert "unknown: tiny has no LICENSE, and no card that names one" in text
    assert str(runs.parent) not in text and str(tmp_path) not in text and str(bundled()) not in text
    assert "1024 embedding rows for 1002 tokens, tied to the head." in text and "id 999" in text
    assert re.search(r"at 16 greedy tokens were within \de-\d\d of .* check `quick`", text)
    assert "vllm serve ./mine" in text and "llama.cpp:" not in text and "Modelfile" not in text


def card_start(runs: Path) -> str:
    """The model that the DPO run began with."""
    return json.loads((run_of(runs / "dpo" / "latest") / "config.json").read_text(encoding="utf-8"))["start"]


def test_a_run_records_the_model_it_began_with(runs) -> None:
    first, second = sorted(path for path in (runs / "sft").iterdir() if not path.is_symlink())
    assert (runs / "sft" / "latest").resolve() == second.resolve()
    assert Path(card_start(runs)) == (first / "model").resolve()
    assert run_of(runs / "dpo" / "latest" / "model") == run_of(runs / "dpo" / "latest")
    assert run_of("tiny") is None and run_of("someone/model") is None


def test_without_a_start_nothing_is_followed(runs, tmp_path) -> None:
    """Runs of before name `…/latest`, which may lead to another run by now."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}", encoding="utf-8")
    (run / "metrics.jsonl").touch()
    settings = {"model": str(runs / "sft" / "latest"), "data": [], "problems": 48, "held_out": [], "lora": {"rank": 0}}
    (run / "config.json").write_text(json.dumps({"config": settings}), encoding="utf-8")
    card = card_of(ExportConfig(model=str(run)))
    assert [stage["stage"] for stage in card.stages] == ["trained"] and card.base == "latest"
    assert card.stages[0]["data"] == "48 fresh Countdown problems" and not card.stages[0]["held out"]


def test_scores_come_from_the_evaluation(runs, tmp_path, capsys) -> None:
    (tmp_path / "eval").mkdir()
    scores = {"exact": {"mean": 0.625, "low": 0.5814, "high": 0.6671, "rows": 300, "answers": 300}}
    scores |= {"one": {"mean": 1.0, "low": None, "high": None, "rows": 1}, "none": dict.fromkeys(scores["exact"])}
    (tmp_path / "eval" / "evaluation_results.json").write_text(json.dumps({"scores": scores}), encoding="utf-8")
    run = str(runs / "sft" / "latest")
    text = exported_card(capsys, tmp_path / "mine", "--model", run, "--evaluation", str(tmp_path / "eval"))
    assert "## Scores\n\n- exact: 0.625 [0.581, 0.667], 300 rows\n- one: 1, 1 rows\n- none: nothing scored" in text
    with pytest.raises(FileNotFoundError, match="evaluation_results.json"):
        card_of(ExportConfig(model=run, evaluation=str(tmp_path)))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"README.md": "---\nlibrary_name: x\nlicense: apache-2.0\n---\n# m\nlicense: mit\n"}, "apache-2.0"),
        ({"README.md": '---\nlicense: "mit"\n---\n', "LICENSE": "Apache License\n"}, "mit"),
        ({"README.md": "# m\n\n---\nlicense: mit\n---\n"}, ""),  # no front matter
        ({"README.md": "---\ntags: x\n---\nlicense: mit\n", "LICENSE": "\n  MIT License\nCopyright"}, ""),
        ({}, ""),
    ],
)
def test_the_licence_is_read_and_never_guessed(files: dict, wanted: str, tmp_path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found, said = licence_of(str(tmp_path))
    assert found == wanted
    if wanted:
        assert said == f"{wanted}, says the card of {tmp_path.name}."
    elif "LICENSE" in files:
        assert said == f'The LICENSE of {tmp_path.name} begins "MIT License".'
    else:
        assert said.startswith(f"unknown: {tmp_path.name} has no LICENSE")


def test_none_is_said_in_the_card_and_to_the_terminal(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", "--model", "tiny", "--output", str(out), "--device", "cpu", "--check", "none"]) == 0
    said = capsys.readouterr()
    assert re.search(r"out: nothing was checked; \d+ s\nserve it: vllm serve", said.out)
    assert "step" not in said.err, "no bar where nobody watches"
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "Nothing was checked (`--check none`)" in text and "Read back" not in text


# GGUF

ROPE = {"rope_theta": 5e5, "rope_type": "default"}
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
places, asked, texts = json.loads(sys.stdin.read())
stop = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": -1}
for folder, file in places:
    options = {"gguf_file": file} if file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].tolist() for ids in asked]
        written = [model.generate(torch.tensor([ids]), **stop)[0].tolist() for ids in asked]
    print(json.dumps({"logits": logits, "written": written, "ids": [tokenizer(text).input_ids for text in texts]}))
assert not [name for name in sys.modules if name.startswith("qftlab")]
"""


def read_afresh(places: list, asked: list, texts: list, folder: Path) -> list[dict]:
    """What plain transformers makes of folders and GGUF files, in a process that knows nothing of qftlab."""
    done = subprocess.run([sys.executable, "-c", READ], input=json.dumps([places, asked, texts]), capture_output=True,
                          text=True, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()[-len(places) :]))


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_fresh_process_reads_what_was_in_memory(family: str, tmp_path, real_data) -> None:
    """LoRA and new tokens, merged: the same greedy tokens and logits from the folder and from its GGUF in f32, from f16
    what its rounding allows, and the ids of hard texts. Qwen3 has heads of 128, which transformers takes for granted.
    """
    shape = {"qwen3": {"head_dim": 128}}.get(family, {})
    shape |= {"rope_parameters": ROPE, "rms_norm_eps": 1e-5, "tie_word_embeddings": family != "llama"}
    model, tokenizer = random_model(family, **shape), load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    model = shaken(add_adapters(model, LoRAConfig(4), token_ids=NEW))
    texts = [line for line in hard_texts(real_data) if unicodedata.is_normalized("NFC", line)]
    asked = [tokenizer("47 + 38 =").input_ids, [5, NEW[0], 17, NEW[1]]]
    with torch.no_grad():
        wanted = [model(input_ids=torch.tensor([ids])).logits[0] for ids in asked]
        stop = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": -1}
        written = [model.generate(input_ids=torch.tensor([ids]), **stop)[0].tolist() for ids in asked]
    for kind in ("f32", "f16"):
        hand_over(copy.deepcopy(model), tokenizer, ExportConfig("tiny", str(tmp_path / kind), gguf=kind))
        (tmp_path / f"{kind} alone").mkdir()  # so that the other files do not help
        (tmp_path / kind / "model.gguf").rename(tmp_path / f"{kind} alone" / "model.gguf")
    places = [("f32", "", 1e-5), ("f32 alone", "model.gguf", 1e-5), ("f16 alone", "model.gguf", 1e-2)]
    given = [(str(tmp_path / name), file) for name, file, _ in places]
    for (_, _, near), found in zip(places, read_afresh(given, asked, texts, tmp_path), strict=True):
        for theirs, ours in zip(found["logits"], wanted, strict=True):
            assert (torch.tensor(theirs) - ours).abs().max() <= near * ours.abs().max()
        assert near > 1e-5 or found["written"] == written
        assert found["ids"] == [tokenizer(text).input_ids for text in texts]
    assert len(texts) > 500


@pytest.mark.long
def test_what_sft_trained_writes_the_same_in_a_fresh_process(tmp_path, capsys) -> None:
    """Two new tokens, LoRA, 30 steps on the bug set by command; merged and exported by command; then nothing but
    transformers: the tokens that the run's own model writes greedily in a chat, `<|AGENT|>` and `<|EDIT|>` among them.
    Served, the folder gives the same text to the openai client, whole and streamed.
    """
    data, run = str(bundled("bugfix", "train.jsonl")), str(tmp_path / "runs")
    assert cli.main(["sft", "--data", data, "--output", run, "--device", "cpu", "--lora.rank", "8", "--train.lr",
                     "0.01", "--train.max_steps", "30", "--train.batch_size", "16"]) == 0  # fmt: skip
    out = tmp_path / "out"
    assert cli.main(["export", "--model", f"{run}/latest", "--output", str(out), "--gguf", "f32"]) == 0
    assert "32 greedy tokens as before" in capsys.readouterr().out
    (alone := tmp_path / "alone").mkdir()
    (out / "model.gguf").rename(alone / "model.gguf")
    model, tokenizer = load_model(f"{run}/latest/model"), load_tokenizer(f"{run}/latest/model")
    chats = [[{"role": "user", "content": row["instruction"]}] for row in load_rows(bundled("bugfix", "heldout.jsonl"))]
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats[:12]]
    stop = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": -1}
    with torch.no_grad():
        wanted = [model.generate(input_ids=torch.tensor([ids]), **stop)[0].tolist() for ids in asked]
    begun = {ids[len(prompt)] for ids, prompt in zip(wanted, asked, strict=True)}
    assert begun <= set(NEW) and begun, "it has learned to begin with a mode"
    for found in read_afresh([(str(out), ""), (str(alone), "model.gguf")], asked, ["<|AGENT|>"], tmp_path):
        assert found["written"] == wanted and found["ids"] == [[NEW[0]]]
    said = [
        tokenizer.decode(ids[len(prompt) :]).split("<|im_end|>")[0] for ids, prompt in zip(wanted, asked, strict=True)
    ]
    with serving(load_model(out), load_tokenizer(out), name="merged") as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        for chat, text in zip(chats[:12], said, strict=True):
            request = {"model": "merged", "messages": chat, "temperature": 0, "max_tokens": 24,
                       "extra_body": {"skip_special_tokens": False}}  # fmt: skip
            assert client.chat.completions.create(**request).choices[0].message.content == text
            parts = client.chat.completions.create(**request, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == text


def hard_texts(real_data: Path) -> list[str]:
    """llama.cpp's own tests of Qwen2's tokenizer, naughty strings, and turns of a chat with the new tokens."""
    vectors = next((real_data / "llamacpp-qwen2-vectors").glob("*.inp")).read_text(encoding="utf-8")
    naughty = "".join(p.read_text(encoding="utf-8") for p in sorted((real_data / "naughty_strings").glob("*.txt")))
    chat = "<|im_start|>user\n<|AGENT|>a<|EDIT|> b<|im_end|>\n<|endoftext|>"
    return [*vectors.split("\n__ggml_vocab_test__\n"), *filter(None, naughty.split("\n")), chat]


@pytest.mark.long
def test_the_tokens_of_a_real_qwen_are_those_of_llama_cpp(tmp_path, real_data) -> None:
    """151,643 tokens, 22 added and our two, 151,936 rows; llama.cpp's own ids of its test texts are the oracle."""
    tokenizer = load_tokenizer(real_data / "qwen2.5-0.5b-instruct")
    model = random_model(vocab_size=151_936)
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    said = hand_over(model, tokenizer, ExportConfig("tiny", str(tmp_path / "out"), gguf="f16", check="none"))
    assert "nothing was checked" in said
    (tmp_path / "out" / "model.gguf").rename(tmp_path / "model.gguf")
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="model.gguf")
    given, ids = (next((real_data / "llamacpp-qwen2-vectors").glob(f"*.{end}")) for end in ("inp", "out"))
    *texts, _ = given.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [list(map(int, line.split())) for line in ids.read_text(encoding="utf-8").splitlines()]
    assert [read(text).input_ids for text in texts] == wanted and len(texts) > 40
    chat = "<|im_start|>user\n<|AGENT|>hi<tool_call><|im_end|>\n"
    assert read(chat).input_ids == tokenizer(chat).input_ids
    assert (read.eos_token, read.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "{{- range .Messages }}" in text, "with a system message, its template is ChatML"


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_each_kind_is_written_and_read_back(kind: str, tmp_path) -> None:
    """Worked by hand: a block of 32 weights of q8_0 is 34 bytes, and no weight is further off than half a step of
    max ÷ 127 and the f16 rounding of that step."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = adapted_tiny()
    said = hand_over(model, tokenizer, ExportConfig("tiny", str(tmp_path / "out"), gguf=kind))
    assert f"model.gguf: {kind}, for llama.cpp and Ollama\n" in said
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    plain = load_model(tmp_path / "out").state_dict()
    matrix, ours = stored["blk.1.ffn_up.weight"], plain["model.layers.1.mlp.up_proj.weight"].numpy()
    assert matrix.n_bytes == ours.size * {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}[kind]
    read = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    steps = np.abs(ours.reshape(-1, 32)).max(1, keepdims=True) / 127
    allowed = {
        "f32": 0 * ours,
        "f16": np.abs(ours) * 2**-11 + 2**-25,
        "bf16": np.abs(ours) * 2**-8,
        "q8_0": np.broadcast_to(steps * (0.5 + 127 * 2**-11), (ours.size // 32, 32)).reshape(ours.shape),
    }[kind]
    assert (np.abs(read - ours) <= allowed).all() and (kind == "f32") == np.array_equal(read, ours)  # fmt: skip
    assert stored["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert "output.weight" not in stored, "tied"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2" and fields["qwen2.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.model"] == "gpt2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 1024 and tokens[1002] == "[PAD1002]" and types[1002] == 5
    assert tokens[NEW[0]] == "<|AGENT|>" and types[NEW[0]] == types[999] == 3 and types[5] == 1
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (997, 999)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template and fields["general.name"] == "out"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "llama-server -m out/model.gguf --jinja" in text and 'PARAMETER stop "<|im_end|>"' in text
    wanted = 'FROM ./model.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
    assert wanted + '{{ end }}<|im_start|>assistant\n"""\n' in text


def test_rows_that_blocks_of_32_do_not_divide_are_f16(tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    model = random_model(hidden_size=48)
    hand_over(model, load_tokenizer("tiny"), ExportConfig("tiny", str(tmp_path / "out"), gguf="q8_0"))
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")  # rows of 48 and of 64


def test_a_template_that_is_no_chatml_is_not_given_to_ollama_as_such(tmp_path) -> None:
    model, tokenizer = adapted_tiny()
    report = export_model(model, tokenizer, tmp_path / "out", check="none")
    for template in ("{{ messages[0].content }}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        text = card_text("out", card_of(ExportConfig("tiny")), report, tokenizer, "model.gguf")
        assert "TEMPLATE of its own here" in text and '"""' not in text
        assert ("no chat template: give it plain text" in text) == (template is None)


def exported_tiny(folder: Path, **changes) -> Path:
    """A random model exported, with other words in its config.json."""
    export_model(random_model(), load_tokenizer("tiny"), folder, check="none")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "model_type must be one that this GGUF writer knows, got gemma3"),
        ({"hidden_act": "gelu"}, "hidden_act must be .* got gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be .* got yarn: leave --gguf out, or convert"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be .*sliding_attention"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(changes: dict, words: str, tmp_path) -> None:
    from qftlab.serve.gguf_file import write_gguf

    with pytest.raises(ValueError, match=words):
        write_gguf(exported_tiny(tmp_path / "out", **changes), "f16", "x")


def test_another_pre_tokenizer_and_a_weight_too_large_are_refused(tmp_path, real_data) -> None:
    from qftlab.serve.gguf_file import write_gguf

    model = random_model("llama", vocab_size=512)
    export_model(model, load_tokenizer(real_data / "tinylm" / "hf"), tmp_path / "other", check="none")
    with pytest.raises(ValueError, match="the tokenizer's pattern must be one that this GGUF writer knows, got"):
        write_gguf(tmp_path / "other", "f16", "x")
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 70_000
    export_model(model, load_tokenizer("tiny"), tmp_path / "large", check="none")
    with pytest.raises(ValueError, match="fit f16, got model.layers.0.mlp.up_proj.weight: --gguf bf16"):
        write_gguf(tmp_path / "large", "f16", "x")
    write_gguf(tmp_path / "large", "bf16", "x")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("weight", "model.layers.1.mlp.up_proj.weight"),
        ("order", "self_attn.q_proj.weight"),
        ("theta", "rope_theta"),
        ("eps", "rms_norm_eps"),
        ("merges", "the merges"),
        ("kind", "the ids of"),
    ],
)
def test_a_gguf_that_reads_otherwise_is_refused_and_nothing_is_left(wrong, words, tmp_path, monkeypatch) -> None:
    """The damage is done between our words and the file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter
    model = random_model("llama")
    change = {
        "weight": ("add_tensor", lambda name, data, **o: (name, data + (name == "blk.1.ffn_up.weight"))),
        "order": ("add_tensor", lambda name, data, **o: (name, data[::-1] if "attn_q." in name else data)),
        "theta": ("add_rope_freq_base", lambda value: (1.001 * value,)),
        "eps": ("add_layer_norm_rms_eps", lambda value: (2 * value,)),
        "merges": ("add_token_merges", lambda merges: (merges[1:],)),
        "kind": ("add_token_types", lambda kinds: ([gguf.TokenType.NORMAL] * len(kinds),)),
    }[wrong]
    plain = getattr(writer, change[0])
    monkeypatch.setattr(writer, change[0], lambda self, *a, **o: plain(self, *change[1](*a, **o), **o))
    with pytest.raises(ExportError, match=f"what is read from model.gguf must be .* got other values for .*{words}"):
        hand_over(model, load_tokenizer("tiny"), ExportConfig("tiny", str(tmp_path / "out"), gguf="f32"))
    assert not list(tmp_path.iterdir())


def test_without_gguf_the_command_that_installs_it_is_said_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "qftlab.serve.gguf_file", raising=False)
    command = ["export", "--model", "tiny", "--output", str(tmp_path / "out"), "--gguf", "f16", "--device", "cpu"]
    assert cli.main(command) != 0
    assert "--gguf needs gguf, which is not installed: pip install gguf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; what came is kept."""

    asked: list = []
    private = True
    files: list = []

    def _answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
        return body

    def do_GET(self) -> None:  # noqa: N802
        self._read()
        if "/tree/" in self.path:
            return self._answer([{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in self.files])
        siblings = [{"rfilename": name} for name in self.files]
        self._answer({"id": "me/mine", "private": self.private, "sha": "1" * 40, "siblings": siblings, "tags": []})

    def do_POST(self) -> None:  # noqa: N802
        body = self._read()
        if self.path.endswith("/repos/create"):
            return self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            here = f"http://{self.headers['Host']}/me/mine/commit/1"
            return self._answer({"commitUrl": here, "commitOid": "1" * 40, "success": True})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        self._answer({"error": f"no {self.path}"}, 404)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, where huggingface_hub takes ours to be."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("asked", []), ("private", True), ("files", [])):
        setattr(Hub, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Thread(target=server.serve_forever, daemon=True).start()
    yield address
    server.shutdown()


def commit_of(asked: list) -> list[dict]:
    [body] = [body for method, path, _, body in asked if "/commit/" in path]
    return [json.loads(line) for line in body.decode().splitlines()]


def test_an_export_is_pushed_after_its_checks(hub, tmp_path) -> None:
    """The client of the hub is the real one, over HTTP."""
    Hub.files = ["README.md", "model-00001-of-00002.safetensors", "mine.txt"]
    config = ExportConfig("tiny", str(tmp_path / "out"), push_to="me/mine", private=True)
    said = hand_over(*adapted_tiny(), config)
    assert f"pushed to {hub}/me/mine\n" in said and "hf_secret" not in said
    create = json.loads(next(body for _, path, _, body in Hub.asked if path.endswith("/repos/create")))
    assert create["name"] == "mine" and create["organization"] == "me" and create["visibility"] == "private"
    assert {token for *_, token, _ in Hub.asked} == {"Bearer hf_secret"}
    lines = commit_of(Hub.asked)
    sent = {line["value"]["path"] for line in lines if line["key"] in ("file", "lfsFile")}
    assert sent == {path.name for path in (tmp_path / "out").iterdir()}
    gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
    assert gone == ["model-00001-of-00002.safetensors"], "weights of before, and nothing else"


def test_private_is_not_pushed_to_a_public_place(hub, tmp_path) -> None:
    Hub.private = False
    config = ExportConfig("tiny", str(tmp_path / "out"), push_to="me/mine", private=True, check="none")
    with pytest.raises(OSError, match="was not pushed to me/mine: it is there already, and public"):
        hand_over(*adapted_tiny(), config)
    assert not [path for _, path, *_ in Hub.asked if "/commit/" in path] and (tmp_path / "out").is_dir()


def test_what_the_hub_refuses_is_said_without_the_token(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Hub, "do_POST", lambda self: (self._read(), self._answer({"error": "no hf_secret"}, 403)))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OSError, match=f"{tmp_path} is whole, but was not pushed to me/mine: ") as caught:
        push(tmp_path, "me/mine")
    assert "hf_secret" not in str(caught.value) and caught.value.__cause__ is None


def test_a_token_that_is_missing_is_said_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = ["export", "--model", "tiny", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*command, "--push_to", "me/mine"]) == 2
    assert "push_to needs a token that may write, got none: set HF_TOKEN" in capsys.readouterr().err
    assert cli.main([*command, "--push_to", "mine"]) == 2 and not list(tmp_path.iterdir())
    assert "push_to must be owner/name, got 'mine'" in capsys.readouterr().err
