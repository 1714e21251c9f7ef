"""Layouts that people have: read as they are, or by --columns; a row's own prompt is what is asked.

The files of `cases` are read where they lie beside the real data; each kind has neighbours of our own.
"""

from __future__ import annotations

import json

import pytest

from qftlab import cli
from qftlab.evaluate.lengths import row_documents
from qftlab.files import bundled
from qftlab.rows.examples import encode_pairs, encode_rows
from qftlab.rows.schemas import DataError, convert_row, kind_of, row_to_prompt
from qftlab.rows.sources import load, load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.train.rollouts import encode_prompts

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW = {"instruction": "q", "input": "", "output": "a"}
CALL = {"function": {"name": "lamp", "arguments": {"on": True}}}


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def lines(path, *rows: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Layouts (11)


def test_case_layouts(cases, real_data) -> None:
    assert load_rows(cases / "11_capitals.jsonl")[0]["output"] == "<|EDIT|>\nreturn a + b"
    rows = load(cases / "11_others.jsonl").rows
    assert rows[0] == ROW and rows[1] == {**ROW, "input": "c"} and rows[2] == {"messages": [Q, A]}
    assert rows[3] == {"prompt": [Q], "chosen": "a", "rejected": "b"}
    assert rows[4] == {"messages": [Q, {**A, "reasoning_content": "t"}]}
    assert len(load_rows(real_data / "agent_edit" / "query_and_output.json")) == 20
    assert len(load(real_data / "agent_edit" / "query_only.json").rows) > 0


@pytest.mark.parametrize(("raw", "wanted"), [
    ({"Prompt": "q", "Completion": "a"}, ROW),
    ({"QUESTION": "q", "RESPONSE": "a"}, ROW),
    ({"instruction": "q", "context": "", "response": "a"}, {**ROW, "context": ""}),
    ({"question": "q", "context": {"title": "t"}, "answer": "a"}, {**ROW, "context": {"title": "t"}}),
    ({"messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]}, {"messages": [Q, A]}),
    ({"messages": [{"role": "developer", "content": "s"}, Q, A]},
     {"messages": [{"role": "system", "content": "s"}, Q, A]}),
    ({"conversation": [{"system": "s", "user": "q", "gpt": "a"}]},
     {"messages": [{"role": "system", "content": "s"}, Q, A]}),
    ({"messages": [Q, {"role": "tool_call", "content": "{}"}]},
     {"messages": [Q, {**A, "content": "<tool_call>\n{}\n</tool_call>"}]}),
    ({"messages": None, "prompt": "q", "completion": "a", "chosen": None}, ROW),
    ({"prompt": "q", "completion": "a", "label": float("nan")}, ROW),
])  # fmt: skip
def test_layouts_by_hand(raw, wanted) -> None:
    row = convert_row(raw, "here")
    assert row == wanted and convert_row(row, "here") == row


def test_columns_name_everything_else(tmp_path, capsys, tiny) -> None:
    path = lines(tmp_path / "rows.jsonl", {"frage": "q", "antwort": "a", "prompt": "another"})
    columns = {"prompt": "frage", "output": "antwort"}
    [row] = load(path, columns=columns, wanted="sft").rows
    assert row == {**ROW, "unused prompt": "another"}
    assert load(path, columns={"prompt": "frage", "chosen": "antwort", "rejected": "prompt"}).rows == [
        {"prompt": [Q], "chosen": "a", "rejected": "another"}
    ]
    for command in (["data"], ["lengths"], ["sft", "--output", str(tmp_path / "runs"), "--train.max_steps", "1"]):
        assert cli.main([*command, "--data", path, "--columns", "{prompt: frage, output: antwort}"]) == 0
    assert "1 x a field that no template shows: unused prompt" in capsys.readouterr().out
    for wrong, reason in (
        ({"promt": "frage"}, "columns must name fields among"),
        ({"output": "nichts"}, "must have 'nichts'"),
    ):
        with pytest.raises(DataError, match=reason):
            load(path, columns=wrong)


def test_the_right_command_is_named(tmp_path, capsys) -> None:
    pair, row = (
        lines(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        lines(tmp_path / "r.jsonl", ROW),
    )
    asked = lines(tmp_path / "asked.jsonl", {"prompt": "q"})
    for command, path, way_out in (("sft", pair, "`dpo` trains on it"), ("dpo", row, "`sft` trains on it"),
                                   ("sft", asked, "`rloo` asks it"), ("reward", asked, "`rloo` asks it")):  # fmt: skip
        assert cli.main([command, "--data", path, "--output", str(tmp_path / "runs")]) == 2
        err = capsys.readouterr().err
        assert way_out in err and f"{path}, line 1" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# Files (12, 14, 15) and several of them


def test_case_files(cases) -> None:
    two = {"instruction": "2 + 2?", "input": "", "output": "4"}
    for name in ("12_wrapped.json", "12_columns.json", "12_nan.json", "12_question_answer.csv"):
        assert load_rows(cases / name) == load(cases / name).rows == [two], name
    [row] = load_rows(cases / "12_long_cell.csv")
    assert len(row["output"]) == 180_000


@pytest.mark.parametrize("found", [
    {"version": 1, "rows": [ROW]},
    {"columns": list(ROW), "index": [0], "data": [list(ROW.values())]},
    {name: {"a": cell} for name, cell in ROW.items()},
])  # fmt: skip
def test_a_json_object_that_holds_rows(found, tmp_path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(found))
    assert load_rows(tmp_path / "rows.json") == [ROW]
    for other in ({"a": [ROW], "b": [ROW]}, {"a": {"0": 1}, "b": {"1": 1}}, {}, ROW):
        (tmp_path / "rows.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"must hold a list of rows, got dict: a row alone needs \[ \] around it"):
            load_rows(tmp_path / "rows.json")


def test_nulls_that_a_table_filled_in_are_not_trained(cases, tmp_path, real_data) -> None:
    rows = load(cases / "14_filled_arguments.parquet").rows
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert calls == [{"on": True}, {"a": 6, "b": 7}]
    datasets = pytest.importorskip("datasets")
    tools = [{"function": {"name": "f", "arguments": {key: 1}}} for key in "xy"]
    said = [{"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [tool]}]} for tool in tools]
    datasets.Dataset.from_list(said).to_parquet(str(tmp_path / "rows.parquet"))
    assert load(tmp_path / "rows.parquet").rows == load(lines(tmp_path / "rows.jsonl", *said)).rows
    # Where the row itself says null, it stays.
    null = {"messages": [Q, {**A, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}]}
    [row] = load(lines(tmp_path / "null.jsonl", null)).rows
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": None}


def test_a_configuration_stands_behind_a_colon(cases, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert load_rows(f"{cases / '15_two_configs'}:main") == [{"instruction": "1 + 1?", "input": "", "output": "2"}]
    with pytest.raises(DataError, match="a configuration is named as .*15_two_configs:NAME"):
        load_rows(cases / "15_two_configs")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or [ROW])
    assert load_rows("openai/gsm8k:main") == load_rows("openai/gsm8k") == [ROW]
    assert [(path, options.get("name")) for path, options in asked] == [
        ("openai/gsm8k", "main"),
        ("openai/gsm8k", None),
    ]


def test_several_sources_one_by_one_as_a_list_and_as_a_pattern(tmp_path, capsys) -> None:
    one, two = lines(tmp_path / "a1.jsonl", ROW), lines(tmp_path / "a2.jsonl", ROW, ROW)
    more = lines(tmp_path / "sub" / "b.jsonl", ROW)
    assert cli.parse("sft", ["--data", one, "--train.epochs", "2", f"--data={two}", "--data", f"[{more}]"]).data == (
        one,
        two,
        more,
    )
    assert cli.parse("split", ["--data", one, "--against", one, "--against", two]).against == (one, two)
    assert cli.parse("sft", ["--data", one]).data == (one,)
    assert cli.main(["data", "--data", str(tmp_path / "a*.jsonl"), "--data", more]) == 0
    assert "4 rows in all" in capsys.readouterr().out
    assert len(load(tmp_path / "**" / "*.jsonl").rows) == 4
    with pytest.raises(FileNotFoundError, match=r"c\*.jsonl does not exist"):
        load(tmp_path / "c*.jsonl")


# Tool calls (05)


def test_tool_calls_in_every_form(cases, real_data) -> None:
    qwen = load_tokenizer(real_data / "qwen2.5-0.5b-instruct")
    raw = [json.loads((cases / f"05_{name}.jsonl").read_text()) for name in ("string_arguments", "no_content_key")]
    for row in raw:
        plain = json.loads(json.dumps(row))
        call = plain["messages"][1]["tool_calls"][0]["function"]
        call["arguments"] = json.loads(call["arguments"])
        plain["messages"][1].setdefault("content", None)
        assert encode_rows(qwen, [row])[0] == encode_rows(qwen, [plain])[0]
        shown = qwen.decode(encode_rows(qwen, [row])[0][0].input_ids)
        assert '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call><|im_end|>' in shown
    whole = encode_rows(qwen, [{"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}])[0]
    for calls in (json.dumps([CALL]), [{"name": "lamp", "arguments": '{"on": true}'}]):
        assert encode_rows(qwen, [{"messages": [Q, {"role": "assistant", "tool_calls": calls}]}])[0] == whole
    broken = {"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{on"}]}]}
    with pytest.raises(DataError, match="turn 2, 'arguments' of a tool call must be JSON"):
        encode_rows(qwen, [broken])


# Conversations (08, 09) and prompts (10)


def test_a_greeting_is_context(cases, tiny) -> None:
    examples, usage = encode_rows(tiny, load_rows(cases / "09_assistant_first.jsonl"))
    said = [tiny.decode([t for t, kept in zip(e.input_ids, e.loss_mask, strict=True) if kept]) for e in examples]
    assert said == ["4<|im_end|>"] * 2 and "How can I help?" in tiny.decode(examples[1].input_ids)
    assert not usage.left_out
    usage = encode_rows(tiny, [{"messages": [A]}, {"messages": [Q, A]}])[1]
    assert [*usage.left_out.values()] == [[1]]


def test_rows_rendered_already_are_left_out(cases, tiny, tmp_path, capsys) -> None:
    rendered = str(cases / "08_rendered_already.jsonl")
    with pytest.raises(ValueError, match=r"1 left out: rendered already \(row 1\)"):
        encode_rows(tiny, load_rows(rendered))
    assert cli.main(["data", "--data", rendered]) == 0 and "1 x rendered already" in capsys.readouterr().out
    ended = {**ROW, "output": "a</s>"}
    begun = {"messages": [{**Q, "content": "<s>[INST] q [/INST]"}, A]}
    spoken = {**ROW, "instruction": "What does <|im_start|>user mean?", "output": "<|im_start|> begins a turn."}
    assert encode_rows(tiny, [ended, begun, spoken])[1].left_out == {"rendered already": [1, 2]}
    pair = {"prompt": "q", "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"}
    assert encode_pairs(tiny, [pair, {**pair, "chosen": "a", "rejected": "b"}])[1].left_out == {"rendered already": [1]}


def test_a_row_s_own_prompt_is_asked(cases, tiny) -> None:
    [own] = load(cases / "10_own_wording.jsonl").rows
    assert own["instruction"] == "Using the numbers [1, 2], create an equation that equals 3. Think first."
    [verl] = load(cases / "10_verl.jsonl").rows
    assert (verl["numbers"], verl["target"]) == ([1, 2], 3) and verl["instruction"].endswith("create 3.")
    prompts = encode_prompts(tiny, load(cases / "10_prompt_only.jsonl").rows)
    assert [p.messages for p in prompts] == [[{"role": "user", "content": "Say <answer>3</answer>."}]] * 2
    system = {"role": "system", "content": "s"}
    long = convert_row({"prompt": [system, Q], "nums": [1], "target": 1}, "here")
    assert long["prompt"] == [system, Q] and row_to_prompt(long) == [system, Q] and convert_row(long, "here") == long
    assert convert_row({"question": "q", "nums": [1], "target": 1}, "here")["instruction"] == "q"
    assert row_to_prompt({"messages": [Q, A, Q]}) == [Q, A, Q] and row_to_prompt({"instruction": "q"}) == [Q]


def test_lengths_take_what_the_other_commands_take(tiny, tmp_path, capsys) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b b"}
    found = [[*map(len, several)] for several in row_documents(tiny, [pair, {"prompt": "q"}, ROW])]
    [both] = encode_pairs(tiny, [pair])[0]
    [prompt] = encode_prompts(tiny, [{"prompt": "q"}])
    assert found == [[len(both.chosen.input_ids), len(both.rejected.input_ids)], [len(prompt.ids)],
                     [len(encode_rows(tiny, [ROW])[0][0].input_ids)]]  # fmt: skip
    path = lines(tmp_path / "rows.jsonl", pair, {"prompt": "q"}, ROW)
    assert cli.main(["lengths", "--data", path, "--max_length", "4"]) == 0
    assert "documents 4" in capsys.readouterr().out


# Countdown rows that also have an answer


@pytest.mark.parametrize("raw", [
    {"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}, {"query": "q", "response": "a"},
    {"prompt": [Q], "completion": [A]}, {"messages": [Q, A]}, {"system": "s", "instruction": "q", "output": "a"},
    {"output": "a"}, {"chosen": "a", "rejected": "b", "prompt": "q"},
])  # fmt: skip
def test_countdown_rows_with_an_answer_are_validated(raw: dict) -> None:
    for name, numbers, target in (("nums", [1, -2], -1), ("numbers", "[1, -2]", "-1")):
        row = convert_row({**raw, name: numbers, "target": target}, "here")
        assert (row["numbers"], row["target"]) == ([1, -2], -1) and "nums" not in row
        assert kind_of(row) == ("preference" if "chosen" in raw else "sft") and convert_row(row, "here") == row
    for numbers, target in (
        (["a"], 3),
        (5, 3),
        ([], 3),
        ([1, True], 3),
        ([1.5], 3),
        ([1], 3.5),
        ("one", 1),
        ([1], "x"),
    ):
        with pytest.raises(DataError, match="^here.*(must have .*whole number|must be JSON)"):
            convert_row({**raw, "nums": numbers, "target": target}, "here")
    with pytest.raises(DataError, match="must have a text 'output'"):
        convert_row({"nums": [1, 2], "target": 3, "output": 5}, "here")


def test_numbers_or_a_target_alone_are_no_problem() -> None:
    for extra in (
        {"numbers": "one"},
        {"target": "x"},
        {"nums": None, "target": 3},
        {"reward_model": {"ground_truth": "4"}},
    ):
        assert kind_of(convert_row({"instruction": "q", "output": "a", **extra}, "here")) == "sft"


def test_a_wrong_solution_is_remarked_and_said(tmp_path, caplog, capsys) -> None:
    right = {"prompt": "q", "completion": "<think>\n<answer>2</answer>\n</think>\n\n<answer>2 - -1</answer>"}
    rows = [{**right, "nums": [-1, 2], "target": 3}, {**right, "nums": [1, 2], "target": 4},
            {"prompt": "q", "completion": "It is 3.", "nums": [1, 2], "target": 4},
            {"messages": [Q, {**A, "content": "<answer>2 + 1</answer>"}], "nums": [1, 2], "target": 4}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(path)
    assert loaded.report.places["wrong solution"] == [f"{path}, line 4"], "the second has a sign that no number has"
    assert f"1 x wrong solution of the row's own problem, first: {path}, line 4" in caplog.text
    assert cli.main(["data", "--data", str(path), "--skip", "[wrong solution]"]) == 0
    assert "3 rows kept" in capsys.readouterr().out
    for name in ("demonstrations", "development", "heldout"):
        assert not load(bundled("countdown", f"{name}.jsonl")).report.remarks
