"""The prompt that generation asks is the prefix that training shows, with thinking on, off, or as each answer is."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest

from qftlab import cli
from qftlab.decoding.beam import beam_search
from qftlab.decoding.engine import encode_prompts, generate
from qftlab.model.loading import load_model, save_model
from qftlab.rows import examples
from qftlab.rows.chat import render_chat, render_prompt
from qftlab.rows.encoding import Chunks, chats_of
from qftlab.rows.sources import stream
from qftlab.rows.tokenizer import load_tokenizer, set_thinking_
from qftlab.train.dpo import fit_pairs
from qftlab.train.rloo import fit_policy
from qftlab.train.sft import fit_rows

ASK, SAY = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
THINK = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"}


@pytest.fixture(scope="module")
def qwen3(real_data):
    return load_tokenizer(real_data / "qwen3-0.6b")


def asked(tokenizer, messages: list[dict], thinking: bool | None = None) -> list[int]:
    [ids] = encode_prompts(tokenizer, [messages], thinking)
    return ids


def shown(example) -> list[int]:
    """What stands before the first trained token."""
    return example.input_ids[: example.loss_mask.index(True)]


def test_an_answer_without_thinking_is_trained_as_asked_with_thinking_off(qwen3) -> None:
    [plain], [thoughtful] = (render_chat(qwen3, [ASK, turn]) for turn in (SAY, THINK))
    assert shown(plain) == asked(qwen3, [ASK], False) != asked(qwen3, [ASK])
    assert shown(thoughtful) == asked(qwen3, [ASK], True) == asked(qwen3, [ASK])
    assert render_chat(qwen3, [ASK, SAY], thinking=False) == [plain]
    assert render_chat(qwen3, [ASK, THINK], thinking=True) == [thoughtful]
    with pytest.raises(ValueError, match="turn 2 .*it has no thinking, which its prompt asks for"):
        render_chat(qwen3, [ASK, SAY], thinking=True)
    with pytest.raises(ValueError, match="must be a prefix"):
        render_chat(qwen3, [ASK, THINK], thinking=False)
    several = render_chat(qwen3, [ASK, THINK, ASK, SAY])
    assert [shown(e) for e in several] == [asked(qwen3, [ASK], True), asked(qwen3, [ASK, THINK, ASK], False)]


def test_a_template_that_knows_no_thinking_refuses_to_be_asked_for_it(real_data) -> None:
    qwen = load_tokenizer(real_data / "qwen2.5-0.5b-instruct")
    [plain] = render_chat(qwen, [ASK, SAY])
    assert shown(plain) == asked(qwen, [ASK])
    for ask in (lambda: render_prompt(qwen, [ASK], thinking=True), lambda: set_thinking_(qwen, False)):
        with pytest.raises(ValueError, match="thinking must be left .*no enable_thinking"):
            ask()


def test_everything_that_asks_or_trains_takes_thinking() -> None:
    for function in (generate, beam_search, fit_rows, fit_pairs, fit_policy, examples.encode_rows, render_prompt):
        names = inspect.signature(function).parameters
        assert "thinking" in names or "`thinking`" in function.__doc__, function.__name__


OPENS = "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{%- endif %}"  # as QwQ and R1 do
TURNS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
KEEPS = "{%- for m in messages %}" + TURNS + "{%- endfor %}\n" + OPENS
DROPS = KEEPS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\\n') }}")


@pytest.mark.parametrize("template", [KEEPS, DROPS], ids=["keeps thinking", "drops thinking"])
def test_templates_that_open_the_thinking_in_the_prompt(template: str) -> None:
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = template
    [example] = render_chat(tokenizer, [ASK, THINK])
    assert shown(example) == asked(tokenizer, [ASK])
    said = tokenizer.decode([i for i, kept in zip(example.input_ids, example.loss_mask, strict=True) if kept])
    assert "".join(said.split()) == "twoandtwo</think>4<|im_end|>"
    hint = "prefix.*give its answer the thinking that the prompt opens|stand as it is"
    with pytest.raises(ValueError, match=hint):  # nothing closes what the prompt has opened
        render_chat(tokenizer, [ASK, SAY])


def test_a_template_whose_thinking_stands_in_the_system_turn() -> None:
    tokenizer = load_tokenizer("tiny")  # as SmolLM3's
    mode = "{{ '/no_think' if enable_thinking is defined and not enable_thinking else '/think' }}"
    plain = KEEPS.replace("<think>\n", "")
    tokenizer.chat_template = f"<|im_start|>system\n{mode}<|im_end|>\n{plain}"
    for turn, thinking in ((SAY, False), (THINK, False)):
        [example] = render_chat(tokenizer, [ASK, turn], thinking=thinking)
        assert shown(example) == asked(tokenizer, [ASK], thinking)
    assert shown(render_chat(tokenizer, [ASK, SAY])[0]) == asked(tokenizer, [ASK], False)


def test_the_default_of_a_template_can_be_set_and_changed(qwen3, real_data) -> None:
    tokenizer = load_tokenizer(real_data / "qwen3-0.6b")
    set_thinking_(tokenizer, False)
    assert asked(tokenizer, [ASK]) == asked(qwen3, [ASK], False) and asked(tokenizer, [ASK], True) == asked(
        qwen3, [ASK]
    )
    assert render_chat(tokenizer, [ASK, THINK]) == render_chat(qwen3, [ASK, THINK])
    set_thinking_(tokenizer, True)
    set_thinking_(tokenizer, True)
    assert asked(tokenizer, [ASK]) == asked(qwen3, [ASK]) and tokenizer.chat_template.count("is not defined") == 1


@pytest.fixture(scope="module")
def small(qwen3, tmp_path_factory) -> Path:
    """The small model, with Qwen3's template."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = qwen3.chat_template
    return save_model(load_model("tiny"), tokenizer, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(("turns", "options", "default"), [
    ([SAY], [], False), ([SAY, THINK], [], None), ([THINK], ["--thinking", "on"], True),
])  # fmt: skip
def test_the_saved_template_asks_what_was_trained(small, tmp_path, turns, options, default) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": [ASK, turn]}) + "\n" for turn in turns))
    run = ["sft", "--model", str(small), "--data", str(data), "--output", str(tmp_path / "runs"), *options]
    assert cli.main([*run, "--train.max_steps", "1", "--train.save_every", "0", "--new_tokens", "[]"]) == 0
    saved, before = load_tokenizer(tmp_path / "runs/latest/model"), load_tokenizer(small)
    assert asked(saved, [ASK]) == asked(before, [ASK], default)
    assert (saved.chat_template == before.chat_template) == (default is None)


def test_rows_that_do_not_fit_the_thinking_asked_for_are_named(small, tmp_path, capsys) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": [ASK, turn]}) + "\n" for turn in (SAY, THINK)))
    for thinking, row in (("on", 1), ("off", 2)):
        options = ["--model", str(small), "--data", str(data), "--output", str(tmp_path / thinking)]
        assert cli.main(["sft", *options, "--thinking", thinking]) == 2
        assert f"row {row}: " in (said := capsys.readouterr().err) and "Traceback" not in said


def test_generate_asks_with_thinking_on_or_off(small, capsys) -> None:
    model, tokenizer = load_model(small), load_tokenizer(small)
    for thinking in ("on", "off"):
        command = ["generate", "--model", str(small), "--prompt", "2+2", "--max_new_tokens", "8"]
        assert cli.main([*command, "--thinking", thinking]) == 0
        [answer] = generate(model, tokenizer, [asked(tokenizer, [ASK], thinking == "on")], max_new_tokens=8)
        assert capsys.readouterr().out.rstrip("\n") == answer.text
        assert generate(model, tokenizer, [[ASK]], max_new_tokens=8, thinking=thinking == "on") == [answer]
    assert cli.main(["generate", "--prompt", "2+2", "--thinking", "off"]) == 2
    assert "no enable_thinking" in capsys.readouterr().err


NOT_ROWS = ("config", "tokenizer", "vocab", "jsontestsuite", "naughty", "mbpp", "humanevalpack", "s1_overlap", "hw3_1")
# Documents of the first rows of every file, by how they were asked; refused: rows that think, asked with it off.
COUNTS = {
    ("qwen2.5-0.5b-instruct", None, 6): {"prompts": 30, "asked": 162},
    ("qwen3-0.6b", None, 6): {"prompts": 30, "off": 163, "on": 24},
    ("qwen3-0.6b", True, 6): {"prompts": 30, "on": 24, "refused": 113},
    ("qwen3-0.6b", False, 6): {"prompts": 30, "off": 163, "refused": 18},
    ("qwen2.5-0.5b-instruct", None, 300): {"prompts": 1210, "asked": 5463},
    ("qwen3-0.6b", None, 300): {"prompts": 1210, "off": 5789, "on": 136},
    ("qwen3-0.6b", True, 300): {"prompts": 1210, "on": 136, "refused": 4154},
    ("qwen3-0.6b", False, 300): {"prompts": 1210, "off": 5789, "refused": 80},
}


def walk(tokenizer, folder: Path, thinking: bool | None, limit: int) -> Counter:
    """Compares every document's prefix with the prompts of its conversation; counts how they were asked."""
    found: Counter = Counter()
    files = (p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".jsonl", ".csv", ".parquet"))
    for file in (p for p in files if not any(word in str(p.relative_to(folder)) for word in NOT_ROWS)):
        chunks = Chunks(tokenizer, (), "", examples.Usage(), "all", thinking)
        for number, row in enumerate(stream(file, limit=limit), 1):
            for _, where, made in examples.Usage().fit([row], "", number):
                try:
                    [(_, documents)] = chunks.encoded([(number, where, made)])
                except ValueError as error:
                    assert thinking is not None and ("thinking" in str(error)), (file, error)
                    found["refused"] += 1
                    continue
                chats = [messages for _, messages, on in chats_of(made, where, "all") if on != "none"]
                found["prompts"] += len(documents) if not chats else 0
                for document in documents if chats else ():
                    found[how_asked(tokenizer, document, chats, thinking)] += 1
    return found


def how_asked(tokenizer, document, chats: list[list[dict]], thinking: bool | None) -> str:
    modes = [thinking] if thinking is not None or "enable_thinking" not in tokenizer.chat_template else [False, True]
    for messages in chats:
        for i, turn in enumerate(messages):
            for mode in modes if turn["role"] == "assistant" and i else ():
                if shown(document) == asked(tokenizer, messages[:i], mode):
                    return {None: "asked", False: "off", True: "on"}[mode]
    raise AssertionError(f"no prompt is {tokenizer.decode(shown(document))!r:.300}")


@pytest.mark.parametrize("limit", [6, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "thinking"), [("qwen2.5-0.5b-instruct", None), ("qwen3-0.6b", None),
                                                ("qwen3-0.6b", True), ("qwen3-0.6b", False)])  # fmt: skip
def test_every_file_of_real_rows_is_asked_as_it_is_trained(real_data, name, thinking, limit) -> None:
    found = walk(load_tokenizer(real_data / name), real_data, thinking, limit)
    assert found == COUNTS.get((name, thinking, limit)), dict(found)


def test_of_a_row_of_several_documents_only_the_long_ones_are_left_out(qwen3) -> None:
    """Of three documents, each longer than the one before, the first is within the limit."""
    row = {"messages": [ASK, THINK, ASK, THINK, ASK, THINK]}
    whole, _ = examples.encode_rows(qwen3, [row])
    short, usage = examples.encode_rows(qwen3, [row], max_length=len(whole[0]))
    assert short == whole[:1] and len(whole) == 3
    assert usage.left_out == {examples.IN_PART: [1, 1]} and usage.documents == 1
    with pytest.raises(ValueError, match=r"1 left out: too long \(row 1\)"):
        examples.encode_rows(qwen3, [row], max_length=5)
