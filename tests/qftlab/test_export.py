"""Export: what is on the disk does what was in memory, in plain transformers; what does not is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from random_models import random_model
from test_lora import NEW, shaken
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qftlab.model import export
from qftlab.model.export import CEILINGS, ExportError, export_model
from qftlab.model.loading import extend_model, load_model, save_model
from qftlab.model.lora import add_adapters, merge_adapters
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
from qftlab.settings import LoRAConfig


@pytest.fixture(params=["quick", "full"])
def check(request) -> str:
    return request.param


def adapted_tiny(dtype: str = "float32", rank: int = 4, far: float = 0.05):
    model, tokenizer = load_model("tiny", dtype=dtype), load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    return shaken(add_adapters(model, LoRAConfig(rank), token_ids=NEW), far), tokenizer


def test_plain_transformers_loads_the_folder_and_writes_the_same(tmp_path) -> None:
    model, tokenizer = adapted_tiny()
    report = export_model(model, tokenizer, tmp_path / "out", check="full")
    assert report.path == tmp_path / "out" and report.is_tied and report.rows == 1024
    assert report.positions == 16 * 5, "three prompts and one for each trained row"
    assert 0 < report.largest_difference <= report.tolerance < 1e-4
    names = {p.name for p in report.path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [p for p in tmp_path.iterdir() if p.name != "out"], "nothing is left aside"
    plain = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(report.path)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and not hasattr(plain, "peft_config")
    messages = [{"role": "user", "content": "Add 2 and 3."}]
    ids = [t.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for t in (theirs, tokenizer)]
    assert ids[0] == ids[1]
    inputs = torch.tensor([ids[0]])
    wanted = model.generate(input_ids=inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain.generate(inputs, max_new_tokens=20, do_sample=False), wanted)


@pytest.mark.skipif(os.name == "nt", reason="rights are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_new_files_get(tmp_path, mask: int) -> None:
    """safetensors writes weights for the owner alone, and a temporary folder is closed to others."""
    before = os.umask(mask)
    try:
        report = export_model(*adapted_tiny(), tmp_path / "out")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in report.path.iterdir()} == {
        p.name: 0o666 & ~mask for p in report.path.iterdir()
    }
    assert report.path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_config_says_what_vllm_reads(tmp_path) -> None:
    for kind, tied in (("qwen2", True), ("qwen3", False), ("llama", True)):
        model, tokenizer = random_model(kind, tie_word_embeddings=tied), load_tokenizer("tiny")
        export_model(model, tokenizer, tmp_path / kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["architectures"] == [type(model).__name__] and config["tie_word_embeddings"] is tied
        assert config["dtype"] == "float32" and config["vocab_size"] == 1024
        # A chat must end where the template ends a turn, not only where a document does.
        eos = json.loads((tmp_path / kind / "generation_config.json").read_text())["eos_token_id"]
        assert tokenizer.convert_ids_to_tokens(eos)[0] == "<|im_end|>" and tokenizer.eos_token_id in eos


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_its_own_tolerance(dtype: str, tmp_path) -> None:
    model, tokenizer = adapted_tiny(dtype)
    report = export_model(model, tokenizer, tmp_path / "out")
    assert 1e-3 < report.tolerance <= CEILINGS[getattr(torch, dtype)]
    assert load_model(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("rank, far", [(4, 0.3), (16, 0.3)])
def test_an_honest_merge_is_not_refused_however_far_its_adapters_moved(rank: int, far: float, tmp_path) -> None:
    """Here rounding makes 2e-5 to 8e-5 of the largest logit; an allowance of 1e-5 for all models refused it."""
    report = export_model(*adapted_tiny(rank=rank, far=far), tmp_path / "out")
    assert 1e-5 < report.largest_difference <= report.tolerance < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("layers, spread", [(24, 0.08), (48, 0.2)])
def test_depth_does_not_eat_up_the_tolerance(layers: int, spread: float, tmp_path) -> None:
    """As deep as Qwen2.5-0.5B, and twice: rounding adds up over the layers."""
    model = random_model("qwen3", num_hidden_layers=layers, initializer_range=spread)
    report = export_model(
        shaken(add_adapters(model, LoRAConfig(8), token_ids=NEW)), load_tokenizer("tiny"), tmp_path / "x"
    )
    assert report.largest_difference < 0.7 * report.tolerance


@pytest.mark.long
def test_the_model_in_memory_is_left_alone(tmp_path) -> None:
    model, tokenizer = adapted_tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_model(model, tokenizer, tmp_path / "out")
    assert model.training and model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert export_model(model, tokenizer, tmp_path / "again", in_place=True).positions == 16 * 2


def test_greedy_tokens_are_those_of_whole_passes_whatever_the_draft(monkeypatch) -> None:
    """The cache only drafts: transformers' own greedy tokens come out of a good draft, a bad one and none."""
    model, tokenizer = adapted_tiny()
    ids = tokenizer("47 + 38 =").input_ids
    wanted = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=-1)
    bar, drafts, draft = tqdm(disable=True), [], export._draft

    def counted(model, ids, count, limit):
        drafts.append(count)
        return draft(model, ids, count, limit)

    monkeypatch.setattr(export, "_draft", counted)
    assert export._greedy(model, tokenizer, "47 + 38 =", bar).ids == wanted[0].tolist() and drafts == [16]
    monkeypatch.setattr(export, "_draft", lambda model, ids, count, limit: [*ids, *[7] * count])
    assert export._greedy(model, tokenizer, "47 + 38 =", bar).ids == wanted[0].tolist()
    model.config.use_cache = False
    assert draft(model, ids, 16, len(tokenizer)) == wanted[0].tolist()


def test_none_checks_nothing_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_logits", None)
    monkeypatch.setattr(export, "load_model", None)
    report = export_model(*adapted_tiny(), tmp_path / "out", check="none")
    assert (report.check, report.positions) == ("none", 0) and (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="check must be one of none, quick, full, got 'some'"):
        export_model(*adapted_tiny(), tmp_path / "other", check="some")


def test_the_bar_ends_full(tmp_path, capsys) -> None:
    """Two texts to continue and to compare, one nudge, the writing and what else is written."""
    export_model(*adapted_tiny(), tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    assert "greedy tokens" in said and "reading back and comparing: 100%" in said and "7/7" in said


def test_each_trained_token_is_read_by_some_text() -> None:
    assert export._probe_texts("quick", ["a", "b"], ["X", "Y"]) == ["a", "aXY"]
    assert export._probe_texts("full", ["a", "b"], ["X", "Y"]) == ["a", "b", "aX", "aY"]
    assert export._probe_texts("quick", ["a", "b"], []) == ["a"] and export._probe_texts("none", ["a"], ["X"]) == []


def test_a_wrong_row_of_any_trained_token_is_found(check: str, tmp_path, monkeypatch) -> None:
    """In an untied model nothing but its use shows the row of an embedding: each trained token is read once."""
    tokenizer = load_tokenizer("tiny")
    extend_tokenizer(tokenizer)
    merge = export.merge_adapters
    for row in NEW:
        model = shaken(add_adapters(random_model(tie_word_embeddings=False), LoRAConfig(2), token_ids=NEW))

        def wrongly(model, row=row, **options):
            merged = merge(model, **options)
            with torch.no_grad():
                merged.model.embed_tokens.weight[row] += 0.01
            return merged

        monkeypatch.setattr(export, "merge_adapters", wrongly)
        with pytest.raises(ExportError, match="logits must agree"):
            export_model(model, tokenizer, tmp_path / "out", check=check)


def test_a_folder_in_use_is_not_touched(tmp_path) -> None:
    model, tokenizer = random_model(), load_tokenizer("tiny")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be new or empty to export to: choose another, or remove it"):
        export_model(model, tokenizer, tmp_path)
    (tmp_path / "empty").mkdir()
    assert export_model(model, tokenizer, tmp_path / "empty").path.is_dir()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_tokenizer_that_outgrew_the_rows_is_refused(tmp_path) -> None:
    tokenizer = load_tokenizer("tiny")
    extend_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="rows must cover all 1002 tokens, got 1001: call extend_model first"):
        export_model(random_model(vocab_size=1001), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="prompts must have at least one token each"):
        export_model(random_model(), tokenizer, tmp_path / "out", check="full", prompts=["a", ""])


def test_an_untied_head_that_the_config_calls_tied_is_refused(tmp_path) -> None:
    """What peft's modules_to_save leaves behind: transformers reads two matrices, vLLM one."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = shaken(get_peft_model(random_model(), settings))
    with pytest.raises(ValueError, match="got tie_word_embeddings=True and 2 matrices: vLLM .*modules_to_save"):
        export_model(model, load_tokenizer("tiny"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    # peft sets the config right when it merges: then it is another model, with a head of its own, and says so.
    assert not export_model(model.merge_and_unload(), load_tokenizer("tiny"), tmp_path / "out").is_tied


FAR = r"logits must agree within \d\.\de-0[56] of the largest, what rounding explains, got .*: look for trained layers"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda m: m.model.embed_tokens.weight[3].add_(1.0), "rows that no adapter trains must stay, got 1 changed"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.01), FAR),
        (lambda m: m.model.layers[0].self_attn.v_proj.weight.mul_(1.0003), FAR),  # less than a bfloat16 can hold
        (lambda m: m.model.layers[3].mlp.down_proj.bfloat16().float(), FAR),
        (lambda m: m.model.norm.weight.fill_(torch.nan), "what rounding explains, got nan: look for trained layers"),
        (lambda m: m.resize_token_embeddings(1010, mean_resizing=False), "rows must stay 1024, got 1010"),
    ],
)
def test_what_a_merge_or_a_write_did_wrong_is_found(damage, words, check, tmp_path, monkeypatch) -> None:
    """The damage is done between the model in memory and the disk, where a bug of ours or of a library would do it."""
    model, tokenizer = adapted_tiny()
    merge = export.merge_adapters

    def wrongly(model, **kwargs):
        merged = merge(model, **kwargs)
        with torch.no_grad():
            damage(merged)
        return merged

    monkeypatch.setattr(export, "merge_adapters", wrongly)
    with pytest.raises(ExportError, match=words):
        export_model(model, tokenizer, tmp_path / "out", check=check)
    assert not list(tmp_path.iterdir())


def test_a_thousandth_too_much_of_one_adapter_is_found_where_rounding_is_allowed_most(
    check, tmp_path, monkeypatch
) -> None:
    model, tokenizer = adapted_tiny(rank=4, far=0.3)
    merge = export.merge_adapters

    def wrongly(model, **kwargs):
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(1.001)
        return merge(model, **kwargs)

    monkeypatch.setattr(export, "merge_adapters", wrongly)
    with pytest.raises(ExportError, match="what rounding explains"):
        export_model(model, tokenizer, tmp_path / "out", check=check)


def test_half_precision_that_is_too_coarse_is_told_the_way_out_and_fp32_is_not(tmp_path) -> None:
    """0.16 of the largest logit at rank 16: bf16 cannot tell a right merge from a wrong one there."""
    with pytest.raises(ExportError, match="within 6.2e-02 .* got .*: export from float32 weights, or look for trained"):
        export_model(*adapted_tiny("bfloat16", rank=16, far=0.15), tmp_path / "out")


def test_another_greedy_token_is_found_even_within_the_tolerance(tmp_path, monkeypatch) -> None:
    """Two tokens with one row are a tie; the merge lifts the second a hair, and the likelier one has changed."""
    model, tokenizer = random_model(tie_word_embeddings=False), load_tokenizer("tiny")
    first = export._greedy(model, tokenizer, "47", tqdm(disable=True)).ids[-export.NEW_TOKENS]
    with torch.no_grad():
        model.lm_head.weight[first + 1] = model.lm_head.weight[first]
    write = export._write

    def lifted(model, tokenizer, folder):
        with torch.no_grad():
            model.lm_head.weight[first].mul_(1 - 1e-6)
        write(model, tokenizer, folder)

    monkeypatch.setattr(export, "_write", lifted)
    monkeypatch.setattr(export, "_unchanged_rows", lambda *args: None)
    with pytest.raises(ExportError, match="greedy tokens must be equal, got another one 0 tokens after '47'"):
        export_model(model, tokenizer, tmp_path / "out", prompts=["47"])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that this user may not write to")
def test_a_read_only_place_gives_a_clear_error(tmp_path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            export_model(random_model(), load_tokenizer("tiny"), tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


# Other readers

ROPES = {
    "qwen2": {"rope_theta": 1e6, "rope_type": "default"},
    "qwen3": {"rope_theta": 1e6, "rope_type": "default"},
    "llama": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64},
}  # fmt: skip


def exported(family: str, folder: Path, tokenizer=None):
    """A random model with another rotary base and two new tokens, and its tokenizer, exported."""
    model, tokenizer = random_model(family, rope_parameters=ROPES[family]), tokenizer or load_tokenizer("tiny")
    extend_model(model, tokenizer, extend_tokenizer(tokenizer))
    export_model(model, tokenizer, folder)
    return model, tokenizer


@pytest.mark.parametrize("family", ROPES)
def test_an_export_says_in_both_forms_what_transformers_4_and_5_read(family: str, tmp_path) -> None:
    model, tokenizer = exported(family, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == ROPES[family]["rope_theta"]
    assert ("rope_scaling" in config) == (family == "llama") and config["model_type"] == family
    names = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {"<|AGENT|>", "<|EDIT|>", "<|im_end|>"} <= set(names["additional_special_tokens"])
    assert "extra_special_tokens" not in names, "transformers 4 refuses a list by that name"
    again = load_tokenizer(tmp_path / "out")
    assert again.extra_special_tokens == tokenizer.extra_special_tokens and again.get_vocab() == tokenizer.get_vocab()
    assert load_model(tmp_path / "out").config.rope_parameters == model.config.rope_parameters


def test_the_model_of_a_run_stops_where_an_export_stops(tmp_path) -> None:
    """In plain transformers, which reads generation_config.json: at the end of a turn, not of a document only."""
    model, tokenizer = adapted_tiny()
    base = merge_adapters(model)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    save_model(base, tokenizer, tmp_path / "run")
    save_model(model, tokenizer, tmp_path / "adapters")
    export_model(model, tokenizer, tmp_path / "out")
    found = [GenerationConfig.from_pretrained(tmp_path / name) for name in ("run", "adapters", "out")]
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert [one.eos_token_id for one in found] == [ends] * 3 and [one.pad_token_id for one in found] == [997] * 3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    likely = {"sequence_bias": [[[ends[0]], 1000.0]], "max_new_tokens": 50, "do_sample": False}
    assert plain.generate(torch.tensor([[5, 6, 7]]), **likely)[0].tolist() == [5, 6, 7, ends[0]]


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
folder, ids, text, messages = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
    written = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
print(json.dumps({"version": __version__, "logits": logits.tolist(), "written": written[0].tolist(),
                  "ids": tokenizer(text).input_ids, "special": sorted(tokenizer.all_special_tokens),
                  "chat": tokenizer.apply_chat_template(messages, add_generation_prompt=True)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ROPES)
def test_transformers_4_reads_an_export_as_it_is(family: str, tmp_path, real_data) -> None:
    """QFTLAB_TRANSFORMERS4 names a Python with 4.57.6: `pip install transformers==4.57.6 torch==2.13.0` in a venv.

    Llama has a tokenizer of the general class, whose name is another in 4.
    """
    python = os.environ.get("QFTLAB_TRANSFORMERS4")
    if not python:
        pytest.skip("QFTLAB_TRANSFORMERS4 names no Python with transformers 4.57")
    tokenizer = load_tokenizer("tiny" if family != "llama" else real_data / "tinylm" / "hf")
    tokenizer.chat_template = load_tokenizer("tiny").chat_template
    model, _ = exported(family, tmp_path / "out", tokenizer)
    ids, text = list(range(5, 250, 3)), "47 + 38 = <|AGENT|>85<|im_end|>\n def f(x):"
    messages = [{"role": "user", "content": "Add 2 and 3."}]
    asked = json.dumps([str(tmp_path / "out"), ids, text, messages])
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", READ, asked], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["version"].startswith("4.57"), theirs["version"]
    with torch.no_grad():
        assert (torch.tensor(theirs["logits"]) - model(torch.tensor([ids])).logits).abs().max() < 1e-5
    written = load_model(tmp_path / "out").generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    assert theirs["written"] == written[0].tolist() and theirs["ids"] == tokenizer(text).input_ids
    assert theirs["special"] == sorted(tokenizer.all_special_tokens)
    assert theirs["chat"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
