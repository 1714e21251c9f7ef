"""What a row says is rendered, or counted: fields, answers to choose among, and turns that are not to be trained.

The files of `cases` are read where they lie beside the real data; each kind has neighbours of our own.
"""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qftlab import cli
from qftlab.model.loading import load_model, save_model
from qftlab.rows.chat import render_chat, render_prompt
from qftlab.rows.examples import NOTHING, REFUSED, encode_pairs, encode_rows
from qftlab.rows.schemas import KNOWN, SCHEMAS, DataError, convert_row, remarks, row_to_messages, unrendered
from qftlab.rows.sources import load, load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.rollouts import encode_prompts

PIRATE, GOLD = {"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Where is the gold?"}
ARR, HELLO = {"role": "assistant", "content": "Arr!"}, {"role": "user", "content": "Hello."}
BELOW = {"role": "assistant", "content": "Arr, below deck."}
TOOL = {"type": "function", "function": {"name": "lamp", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module", params=["qwen2.5-0.5b-instruct", "qwen3-0.6b"])
def qwen(request, real_data):
    return load_tokenizer(real_data / request.param)


def trained(tokenizer, *rows: dict) -> list[str]:
    """The stretches that are trained, of all documents."""
    found = []
    for example in encode_rows(tokenizer, list(rows))[0]:
        stretch: list[int] = []
        for token, kept in zip([*example.input_ids, 0], [*example.loss_mask, False], strict=True):
            if kept:
                stretch.append(token)
            elif stretch:
                found.append(tokenizer.decode(stretch))
                stretch = []
    return found


# Fields (01, 06)


def test_system_and_history_come_first(cases, qwen) -> None:
    first, second, third = load_rows(cases / "01_system_history.jsonl")
    assert first["messages"] == third["messages"] == [PIRATE, HELLO, ARR, GOLD, BELOW]
    assert second["messages"] == [PIRATE, GOLD, BELOW]
    [pair] = load(cases / "01_pair_system.jsonl").rows
    assert pair["prompt"] == [PIRATE, GOLD]
    [both] = encode_pairs(qwen, [pair])[0]
    head = render_prompt(qwen, [PIRATE, GOLD])
    assert both.chosen.input_ids[: len(head)] == both.rejected.input_ids[: len(head)] == head
    [prompt] = encode_prompts(qwen, [first])
    assert prompt.messages == [PIRATE, HELLO, ARR, GOLD]


@pytest.mark.parametrize(("raw", "wanted"), [
    ({"system": "You are a pirate.", "prompt": [GOLD], "completion": [BELOW]}, [PIRATE, GOLD, BELOW]),
    ({"history": [HELLO, ARR], "question": GOLD["content"], "answer": BELOW["content"]}, [HELLO, ARR, GOLD, BELOW]),
    ({"System": "You are a pirate.", "conversations": [GOLD, BELOW]}, [PIRATE, GOLD, BELOW]),
    ({"system": "", "messages": [GOLD, BELOW]}, [GOLD, BELOW]),
    ({"system": "Another.", "messages": [PIRATE, GOLD, BELOW]}, [PIRATE, GOLD, BELOW]),
    ({"tools": json.dumps([TOOL]), "messages": [GOLD, BELOW]}, [{**GOLD, "tools": [TOOL]}, BELOW]),
    ({"instruction": GOLD["content"], "output": BELOW["content"], "reasoning": "Hm."},
     [GOLD, {**BELOW, "reasoning_content": "Hm."}]),
])  # fmt: skip
def test_context_of_other_layouts(raw, wanted) -> None:
    row = convert_row(raw, "here")
    assert row["messages"] == wanted and convert_row(row, "here") == row
    assert row.get("system") == ("Another." if raw.get("system") == "Another." else None)


def test_tools_go_into_the_template(cases, qwen) -> None:
    raw = json.loads((cases / "01_tools.jsonl").read_text())
    examples, usage = encode_rows(qwen, [raw])
    whole = qwen.apply_chat_template(raw["messages"], tools=raw["tools"], tokenize=False)
    assert examples[-1].input_ids == qwen(whole).input_ids and not usage.unrendered
    assert len(encode_prompts(qwen, [{"prompt": [GOLD], "tools": [TOOL]}])[0].ids) > len(render_prompt(qwen, [GOLD]))
    with pytest.raises(ValueError, match="row 1: .*has a chat template without tools"):
        encode_rows(load_tokenizer("tiny"), [{"messages": [GOLD, BELOW], "tools": [TOOL]}])
    typed = {**TOOL, "function": {**TOOL["function"], "description": "<|im_end|>"}}
    end = qwen.convert_tokens_to_ids("<|im_end|>")
    counts = [render_prompt(qwen, [{**GOLD, "tools": [tool]}]).count(end) for tool in (TOOL, typed)]
    assert counts[0] == counts[1], "what a tool's description says is text"


def test_fields_that_no_template_shows_are_counted(cases, tmp_path, capsys, caplog) -> None:
    tiny = load_tokenizer("tiny")
    rows = [{"messages": [GOLD, {**BELOW, "id": 7}], "source": "x", "split": "", "tags": []}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(path).report.unrendered == {"source": 2, "messages.id": 2}
    assert encode_rows(tiny, rows)[1].unrendered == {"source": 2, "messages.id": 2}
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "output": "o"}
    assert encode_pairs(tiny, [pair])[1].unrendered == {"output": 1}
    with caplog.at_level("INFO"):
        encode_prompts(tiny, rows)
    assert "fields that no template shows: messages.id (2), source (2)" in caplog.text
    assert cli.main(["data", "--data", str(path)]) == 0
    assert "2 x a field that no template shows: source" in capsys.readouterr().out


def test_pictures_are_left_out(cases) -> None:
    tiny = load_tokenizer("tiny")
    [row] = load_rows(cases / "01_images.jsonl")
    with pytest.raises(ValueError, match=r"1 left out: pictures or sound \(row 1\)"):
        encode_rows(tiny, [row])
    for name in ("videos", "image"):
        usage = encode_rows(tiny, [{"messages": [GOLD, BELOW]}, {"messages": [GOLD, BELOW], name: ["x.mp4"]}])[1]
        assert usage.left_out == {"pictures or sound": [2]}
    assert encode_rows(tiny, [{"messages": [GOLD, BELOW], "images": []}])[1].left_out == {}


def test_thinking_in_a_field_of_its_own_is_trained(cases, qwen) -> None:
    said = trained(qwen, *load_rows(cases / "06_reasoning_field.jsonl"))
    assert said == ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"] * 2
    neighbour = {"role": "assistant", "content": "4", "thinking": "Hm."}
    assert trained(qwen, {"messages": [GOLD, neighbour]}) == ["<think>\nHm.\n</think>\n\n4<|im_end|>"]
    assert trained(qwen, {"problem": "q", "message_thinking": "t", "message_content": "a"}) == [
        "<think>\nt\n</think>\n\na<|im_end|>"
    ]
    assert trained(qwen, {"messages": [GOLD, {**BELOW, "reasoning_content": None}]}) == ["Arr, below deck.<|im_end|>"]


# Answers to choose among (02)


def test_the_worked_answer_is_trained_and_what_is_unclear_refused(cases) -> None:
    [row] = load_rows(cases / "02_answer_or_solution.jsonl")
    assert row["output"].startswith("Divide both sides") and row["answer"] == "42"
    with pytest.raises(DataError, match="line 1 must say which field is its 'question'"):
        load_rows(cases / "02_choice_letter.jsonl")
    chosen = {"question": "Question", "output": "Response", "reasoning": "Complex_CoT"}
    [row] = load(cases / "02_choice_letter.jsonl", columns=chosen).rows
    said = row["messages"][1]
    assert said["content"].startswith("7 is the prime") and said["reasoning_content"].startswith("4 is 2 times 2")
    assert row["messages"][0]["content"] == "Which of 4 and 7 is a prime?"


@pytest.mark.parametrize(("raw", "output"), [
    ({"question": "q", "answer": "#### 4"}, "#### 4"),
    ({"question": "q", "response": "It is 4, because.", "answer": "4"}, "It is 4, because."),
    ({"question": "q", "solution": "4", "answer": "4"}, "4"),
    ({"instruction": "q", "output": "", "response": "a"}, "a"),
    ({"instruction": "q", "output": "a", "answer": "longer than a"}, "a"),
])  # fmt: skip
def test_answers_by_hand(raw, output) -> None:
    assert convert_row(raw, "here")["output"] == output


@pytest.mark.parametrize("raw", [
    {"question": "q", "solution": "4", "answer": "It is 4, because."},
    {"question": "q", "solution": "so", "response": "or so"},
])  # fmt: skip
def test_two_answers_are_refused(raw) -> None:
    with pytest.raises(DataError, match="here has .*either could be the answer: choose with --columns"):
        convert_row(raw, "here")
    [name] = raw.keys() - {"question", "solution"}
    assert convert_row(raw, "here", columns={"output": name})["output"] == raw[name]


# What is not trained (03, 07)


def test_turns_with_a_weight_of_0_are_not_trained(cases, qwen) -> None:
    assert trained(qwen, *load_rows(cases / "03_not_trained.jsonl")) == ["No, 4.<|im_end|>"] * 3
    rows = [{"messages": [GOLD, {**ARR, "train": None}, GOLD, {**BELOW, "weight": 0}]}, {"messages": [GOLD, BELOW]}]
    assert trained(qwen, *rows) == ["Arr!<|im_end|>", "Arr, below deck.<|im_end|>"]
    assert encode_rows(qwen, rows, train_on="last")[1].left_out == {NOTHING: [1]}
    with pytest.raises(DataError, match="turn 2 must have weight 0 or 1, got 0.5"):
        encode_rows(qwen, [{"messages": [GOLD, {**BELOW, "weight": 0.5}]}])


def test_rows_labelled_bad_are_left_out(cases, tmp_path, capsys) -> None:
    tiny = load_tokenizer("tiny")
    rows = load_rows(cases / "03_labelled_bad.jsonl")
    examples, usage = encode_rows(tiny, rows)
    assert usage.left_out == {"labelled bad": [1, 2]} and len(examples) == 1
    assert cli.main(["data", "--data", str(cases / "03_labelled_bad.jsonl")]) == 0
    assert "2 x labelled bad: line 1, line 2" in capsys.readouterr().out
    kto = [{"prompt": "q", "completion": "a", "label": is_good} for is_good in (True, False)]
    assert encode_rows(tiny, kto)[1].left_out == {"labelled bad": [2]}


def test_an_empty_turn_never_trains_a_lone_end(cases, qwen) -> None:
    rows = load_rows(cases / "07_empty_turn.jsonl")
    assert trained(qwen, *rows) == ["c<|im_end|>", "x<|im_end|>"]
    assert encode_rows(qwen, rows)[1].left_out == {NOTHING: [3]}
    blank = [{"role": "assistant", "content": said} for said in ("\n", None)]
    assert (
        trained(qwen, *({"messages": [GOLD, one, GOLD, BELOW]} for one in blank)) == ["Arr, below deck.<|im_end|>"] * 2
    )
    assert sum(render_chat(qwen, [GOLD, blank[0]])[0].loss_mask) == 0


# A bad row never ends a run with a traceback


KEYS = [*sorted(KNOWN), "Query", "Output", "label", "target", "reward_model", "images", "question_content", "metadata"]
TURN_KEYS = [
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "type",
    "text",
    "function",
    "arguments",
    "human",
    "weight",
]
odd = st.recursive(
    st.sampled_from([None, "", "q", "{", "user", "assistant", "text", "\ud800", 0, 1, 0.5, True, float("nan")]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(TURN_KEYS), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=1000)
@given(st.dictionaries(st.sampled_from(KEYS), odd, max_size=4))
def test_any_row_is_read_or_refused_by_its_place(row) -> None:
    for schema in ("auto", *SCHEMAS):
        try:
            made = convert_row(row, "f.jsonl, line 3", schema)
        except DataError as error:
            assert str(error).startswith("f.jsonl, line 3")
            continue
        assert set(remarks(made)) <= {*sum(REFUSED.values(), ()), "empty answer"}
        assert all("." in name or name in made for name in unrendered(made))


def test_a_template_that_fails_names_file_and_row(tmp_path, capsys) -> None:
    from qftlab.files import bundled

    folder = tmp_path / "model"
    tokenizer = load_tokenizer("tiny")
    model = load_model(bundled("tiny"))
    tokenizer.chat_template = (
        "{{ raise_exception('roles must alternate') if messages|length > 2 }}" + tokenizer.chat_template
    )
    save_model(model, tokenizer, folder)
    row, long = {"prompt": [GOLD], "completion": [BELOW]}, {"messages": [HELLO, ARR, GOLD, BELOW]}
    pair = {"prompt": [HELLO, ARR, GOLD], "chosen": "a", "rejected": "b"}
    for command, rows in (("sft", [row, long]), ("dpo", [pair]), ("rloo", [row, long]), ("lengths", [row, long])):
        path = tmp_path / f"{command}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        more = [] if command == "lengths" else ["--output", str(tmp_path / "runs")]
        more += ["--rewards", "answer"] if command == "rloo" else []
        assert cli.main([command, "--data", str(path), "--model", str(folder), *more]) == 2
        err = capsys.readouterr().err
        assert "the chat template cannot write these turns: roles must alternate" in err and "Traceback" not in err
        assert f"row {len(rows)}" in err and (command == "lengths" or f"{path}, row {len(rows)}" in err)


@pytest.mark.parametrize("template", [
    "{{ messages[5].content }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages | tojson(indent='x') }}",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
])  # fmt: skip
def test_whatever_a_template_raises_is_one_sentence(template) -> None:
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="row 1: "):
        encode_rows(tokenizer, [{"messages": [GOLD, BELOW]}])


# The trained text is the content (04)


def test_answers_with_think_tags_are_trained_whole(cases, qwen) -> None:
    for name in ("two_think_blocks", "talks_of_the_tag", "cut_thinking"):
        [row] = load_rows(cases / f"04_{name}.jsonl")
        [said] = trained(qwen, row)
        assert said == row["messages"][1]["content"] + "<|im_end|>", name


@pytest.mark.parametrize("content", [
    "<think>\nhm\n</think>\n\n4", "<think>hm</think>4", "hm\n</think>\n\n4", "<think>\n\n</think>\n\n4",
    "Sure. <think>hm</think> 4", "<think>\na </think> b\n</think>\n\n4", "4 </think>",
])  # fmt: skip
def test_nothing_of_an_answer_is_dropped(content, qwen) -> None:
    [said] = trained(qwen, {"messages": [GOLD, {"role": "assistant", "content": content}]})
    wanted = "".join(content.split()) + "<|im_end|>"
    assert "".join(said.split()).removeprefix("<think>") == wanted.removeprefix("<think>")


@pytest.mark.parametrize(("tail", "is_fit"), [
    ("{{ m.content }}<|im_end|>\n", True), ("{{ m.content | trim }}<|im_end|>", True), ("{{ m.content }}", False),
    ("{{ m.content | upper }}<|im_end|>", False), ("{{ m.content }}<|im_end|>\nBye.", False),
])  # fmt: skip
def test_a_template_writes_an_answer_as_it_is_and_then_an_end(tail, is_fit) -> None:
    tokenizer = load_tokenizer("tiny")
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    tokenizer.chat_template = (
        f"{head}{tail}{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    )
    rows = [{"messages": [GOLD, BELOW]}]
    if is_fit:
        assert trained(tokenizer, *rows) == ["Arr, below deck.<|im_end|>"]
    else:
        with pytest.raises(ValueError, match="row 1: turn 2 must stand as it is before an end token"):
            encode_rows(tokenizer, rows)


def test_decoded_ids_are_the_content_of_real_rows(real_data, qwen) -> None:
    """The check of the encoder compares texts; here ids, on real answers: only blanks and NFC may differ."""
    rows = load_rows(real_data / "alpaca" / "alpaca_train_950.json")
    rows += load_rows(real_data / "chat_messages" / "conversations.jsonl")
    wanted = [
        m["content"] for row in rows for m in row_to_messages(row) if m["role"] == "assistant" and m["content"].strip()
    ]
    found = trained(qwen, *rows)
    assert len(found) == len(wanted) > 1000
    same = [unicodedata.normalize("NFC", "".join(text.split())) for text in wanted]
    assert ["".join(text.removesuffix("<|im_end|>").split()) for text in found] == same


def test_an_empty_question_is_left_out_and_counted() -> None:
    rows = [{"instruction": text, "input": "", "output": "It is 5."} for text in ("What is it?", "", " \n")]
    rows.append({"messages": [PIRATE, {"role": "user", "content": ""}, ARR]})  # what is asked stands with the system
    examples, usage = encode_rows(load_tokenizer("tiny"), rows)
    assert len(examples) == 2 and usage.left_out == {"empty question": [2, 3]}
    assert remarks(convert_row(rows[1], "here")) == ["empty question"]
    assert encode_prompts(load_tokenizer("tiny"), [{"prompt": "q"}, {"prompt": " "}])[0].number == 1
