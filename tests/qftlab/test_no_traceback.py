"""No file that a user may have shows a traceback: every command reads it, or says in one message what is wrong.

JSONTestSuite in the forms in which JSON reaches us, and chat templates of the kinds that people ship.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import pytest

from qftlab import cli
from qftlab.files import bundled
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import add_adapters
from qftlab.rows.chat import render_chat, render_prompt
from qftlab.rows.examples import encode_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import LoRAConfig

ROW = b'{"instruction": "q", "output": "a"}\n'
OWN = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")
READS, TRAINS = ("data", "lengths", "split"), ("sft", "dpo", "rloo", "reward", "evaluate")
FORMS = {
    "rows.json": lambda text: text,
    "rows.jsonl": lambda text: ROW + text + b"\n",
    "value.json": lambda text: b'[{"instruction": "x", "output": ' + text + b"}]",
    "quoted.csv": lambda text: b'instruction,output\nx,"' + text.replace(b'"', b'""') + b'"\n',
    "raw.csv": lambda text: b"instruction,output\nx," + text + b"\n",
}
SHORT = {name: ["--train.max_steps", "1", "--train.save_every", "0"] for name in ("sft", "dpo", "rloo", "reward")}
SHORT["rloo"] += ["--rewards", "[exact]", "--policy.max_new_tokens", "4", "--policy.num_generations", "2"]
SHORT["evaluate"] = ["--max_new_tokens", "2", "--limit", "1"]


@pytest.fixture(scope="module")
def suite(real_data) -> list[Path]:
    return sorted((real_data / "jsontestsuite").glob("test_*/*.json"))


def ends_well(capsys, monkeypatch, *arguments: str) -> int:
    """The exit code, 0 or 2, and with 2 one message; anything raised fails the test."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    capsys.readouterr()
    code, err = cli.main(arguments), capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("qftlab ")]
    assert code in (0, 2) and len(told) == (code == 2) and "Traceback" not in err, (arguments, code, err[-500:])
    return code


def on_rows(capsys, monkeypatch, folder: Path, command: str, form: str, text: bytes) -> int:
    (folder / form).write_bytes(FORMS[form](text))
    output = ["--output", str(folder / "runs")] if command in SHORT and command != "evaluate" else []
    return ends_well(capsys, monkeypatch, command, "--data", str(folder / form), *SHORT.get(command, ()), *output)


def on_settings(capsys, monkeypatch, folder: Path, command: str, form: str, text: bytes) -> int:
    (folder / form).write_bytes(text)
    return ends_well(capsys, monkeypatch, command, "--config", str(folder / form), *SHORT.get(command, ()))


def on_model(capsys, monkeypatch, folder: Path, command: str, form: str, text: bytes) -> int:
    """A command on `tiny` with one of its files replaced."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    for path in bundled("tiny").iterdir():
        (model / path.name).symlink_to(path)
    (model / form).unlink(missing_ok=True)
    (model / form).write_bytes(text)
    (folder / "row.jsonl").write_bytes(ROW)
    asked = ["--data", str(folder / "row.jsonl")] if command == "lengths" else ["--prompt", "x"]
    asked += [] if command == "lengths" else ["--max_new_tokens", "1"]
    return ends_well(capsys, monkeypatch, command, "--model", str(model), *asked)


GRID = [(on_rows, command, form) for command in READS + TRAINS for form in FORMS]
GRID += [(on_settings, command, form) for command in (*READS, *TRAINS, "generate") for form in ("c.yaml", "c.json")]
GRID += [(on_model, command, form) for command in ("lengths", "generate") for form in OWN]


def test_a_sample_of_json_of_all_kinds_ends_well(suite, tmp_path, capsys, monkeypatch) -> None:
    """60 of the grid's cases, by seed; few of those that load a model, which take longest."""
    rng, light = random.Random(0), [c for c in GRID if c[0] is not on_model and c[1] in READS]
    heavy = [case for case in GRID if case not in light]
    codes = {run(capsys, monkeypatch, tmp_path, command, form, rng.choice(suite).read_bytes())
             for run, command, form in [*rng.choices(light, k=46), *rng.sample(heavy, 14)]}  # fmt: skip
    assert codes == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=lambda case: f"{case[1]}-{case[2]}")
def test_json_of_all_kinds_ends_well(suite, tmp_path, capsys, monkeypatch, case) -> None:
    """All files where nothing is trained or loaded, every seventh elsewhere; those nested deepest always."""
    run, command, form = case
    deep = [path for path in suite if "100000" in path.name or "open_array_object" in path.name]
    for path in suite if run is on_rows and command in READS else [*deep, *suite[::7]]:
        run(capsys, monkeypatch, tmp_path, command, form, path.read_bytes())


@pytest.mark.parametrize("text", [b"[[" * 50_000, b"data: \n" + b"- " * 50_000, b'{"a":' * 30_000])
def test_settings_without_end_are_refused(tmp_path, capsys, monkeypatch, text: bytes) -> None:
    """Their reader would end the process with a segmentation fault."""
    for form in ("c.yaml", "c.json"):
        assert on_settings(capsys, monkeypatch, tmp_path, "data", form, text) == 2
    assert ends_well(capsys, monkeypatch, "data", "--data", text.decode()) == 2


@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 100_000, '{"r": "x"}', '{"peft_type": "FOO"}',
                                  '{"target_modules": 5}', '{"trainable_token_indices": "x"}'])  # fmt: skip
def test_broken_adapters_are_named(tmp_path, capsys, monkeypatch, text: str) -> None:
    save_model(add_adapters(load_model("tiny"), LoRAConfig(rank=2)), load_tokenizer("tiny"), tmp_path)
    config = tmp_path / "adapter_config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | json.loads(text)) if text.startswith('{"') else text)
    assert ends_well(capsys, monkeypatch, "generate", "--model", str(tmp_path), "--prompt", "x") == 2
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        load_model(tmp_path)


def test_case_files_end_well(cases, tmp_path, capsys, monkeypatch) -> None:
    for path in sorted(cases.iterdir()):
        if path.suffix not in (".md", ".py"):
            for command in READS:
                ends_well(capsys, monkeypatch, command, "--data", str(path))


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINS)
def test_case_files_train_or_are_refused(cases, tmp_path, capsys, monkeypatch, command: str) -> None:
    for path in sorted(cases.iterdir()):
        if path.suffix not in (".md", ".py"):
            output = ["--output", str(tmp_path)] if command != "evaluate" else []
            ends_well(capsys, monkeypatch, command, "--data", str(path), *SHORT[command], *output)


# Templates


def loop(turn: str, prompt: str = "") -> str:
    asked = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{asked}"


CHATML = loop("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
THOUGHTLESS = "{% set c = m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
OFF = "{% if enable_thinking is defined and not enable_thinking %}"
# Template, and of which conversations below it is refused.
TEMPLATES = {
    "ChatML": (CHATML, ""),
    "Llama 2": (ALTERNATE + loop("{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
                                 "<|im_end|>{% endif %}"), "system twice"),
    "Llama 3": (loop("<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|im_end|>",
                     "<|start_header_id|>assistant<|end_header_id|>\n\n"), ""),
    "Gemma": ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
              + loop("<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
                     "<|im_end|>\n", "<start_of_turn>model\n"), "system"),
    "Mistral": (ALTERNATE + loop("{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}"
                                 "<|im_end|>{% endif %}"), "system twice"),
    "Zephyr": (loop("<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n", "<|assistant|>\n"), ""),
    "Phi-3": (loop("<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n", "<|assistant|>\n")
              + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}", "all"),
    "Vicuna": (loop("{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}\n{% else %}USER: {{ m.content }} "
                    "{% endif %}", "ASSISTANT:"), "all"),
    "DeepSeek-R1": (loop(THOUGHTLESS + "<|{{ m.role }}|>{{ c }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}",
                         "<|assistant|><think>\n"), "plain system twice turns blank"),
    "Qwen3": (loop("{% set c = m.content %}{% if m.reasoning_content and loop.last %}{% set c = '<think>\\n' ~ "
                   "m.reasoning_content ~ '\\n</think>\\n\\n' ~ c %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}"
                   "<|im_end|>\n", "<|im_start|>assistant\n" + OFF + "<think>\n\n</think>\n\n{% endif %}"), ""),
    "Qwen3-Thinking": (CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"), "plain system twice turns blank"),
    "SmolLM3": ("<|im_start|>system\n" + OFF + "/no_think{% else %}/think{% endif %}<|im_end|>\n" + CHATML, ""),
    "Granite": ("{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are Granite."
                "<|im_end|>\n{% endif %}"
                + loop("<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|im_end|>\n",
                       "<|start_of_role|>assistant<|end_of_role|>"), ""),
    "trims": (CHATML.replace("m.content", "m.content | trim"), ""),
    "escapes HTML": (CHATML.replace("m.content", "m.content | e"), "plain system twice turns think"),
    "today": ("<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d') }}.<|im_end|>\n" + CHATML, ""),
    "no tools": ("{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}" + CHATML, "tools"),
    "broken": ("{% for m in messages %}{{ m.content }", "all"),
    "empty": ("", "all"),
    "appends": (CHATML + "{% if not add_generation_prompt %}That is all.{% endif %}", "all"),
    "thanks": (CHATML.replace("<|im_end|>", "{% if m.role == 'assistant' %} Thanks.{% endif %}<|im_end|>"), "all"),
}  # fmt: skip
ASK, SAY = {"role": "user", "content": "Is 2 < 3?"}, {"role": "assistant", "content": "It's <b>so</b> & more."}
SYSTEM = {"role": "system", "content": "Be brief."}
THINK = {"role": "assistant", "content": "<think>\ntwo & two\n</think>\n\n4"}
TOOL = {"type": "function", "function": {"name": "lamp", "description": "", "parameters": {"type": "object"}}}
CHATS = {
    "plain": [ASK, SAY], "system": [SYSTEM, ASK, SAY], "twice": [ASK, ASK, SAY], "turns": [ASK, SAY, ASK, SAY],
    "think": [ASK, THINK], "blank": [ASK, {**SAY, "content": " 4 \n"}], "tools": [{**ASK, "tools": [TOOL]}, SAY],
}  # fmt: skip


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_train_what_is_said_or_are_refused(name: str) -> None:
    """Trained: the answers, each with its end token, blanks aside; before them the prompt; or the row is refused."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template, refused = TEMPLATES[name]
    for chat, messages in CHATS.items():
        rows = [{"instruction": "", "output": ""}, {"messages": messages}]  # the first is left out: nothing is said
        if refused == "all" or chat in refused.split() or chat == "tools" and "tools" not in tokenizer.chat_template:
            for attempt in (lambda m=messages: render_chat(tokenizer, m), lambda r=rows: encode_rows(tokenizer, r)):
                with pytest.raises(ValueError, match="template|turn|prompt") as error:
                    attempt()
            assert str(error.value).startswith("row 2: "), chat
            continue
        examples = render_chat(tokenizer, messages)
        assert encode_rows(tokenizer, rows)[0] == examples, chat
        said = squeezed("".join(tokenizer.decode([i for i, kept in zip(e.input_ids, e.loss_mask, strict=True) if kept])
                                for e in examples))  # fmt: skip
        wanted = squeezed("".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"))
        assert said == wanted.removeprefix("<think>" if "<think>" not in said else ""), chat
        last = examples[-1]
        prompts = [render_prompt(tokenizer, messages[:-1], thinking=thinking) for thinking in
                   ((None, False) if "enable_thinking" in tokenizer.chat_template else (None,))]  # fmt: skip
        end = len(last.loss_mask) - last.loss_mask[::-1].index(False, last.loss_mask[::-1].index(True))
        assert last.input_ids[:end] in prompts, chat


@pytest.mark.parametrize("name", ["Llama 2", "Phi-3", "Vicuna", "broken", "empty", "thanks"])
def test_sft_ends_well_with_any_template(tmp_path, capsys, monkeypatch, name: str) -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATES[name][0]
    save_model(model, tokenizer, tmp_path / "model")
    for chat in ("plain", "system"):
        path = tmp_path / f"{chat}.jsonl"
        path.write_text(json.dumps({"messages": CHATS[chat]}) + "\n")
        code = ends_well(capsys, monkeypatch, "sft", "--model", str(tmp_path / "model"), "--data", str(path),
                         *SHORT["sft"], "--output", str(tmp_path / "runs"))  # fmt: skip
        assert code == (0 if (name, chat) == ("Llama 2", "plain") else 2)
