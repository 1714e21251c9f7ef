"""Loaders on real files and on hostile ones: row counts, remarks, and an error with file and row for all the rest."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest

from qftlab import cli
from qftlab.rows.schemas import SCHEMAS, convert_row
from qftlab.rows.sources import HUB, DataError, LoadReport, load, load_rows, read_file, stream

ROW = {"instruction": "Add", "input": "", "output": "3"}
COUNTS = {
    "alpaca/alpaca_train_950.json": (950, "sft"),
    "alpaca/alpaca_data_1k.json": (1000, "sft"),
    "alpaca/alpaca_test_50.json": (50, "sft"),
    "alpaca/alpaca_first100_tiny.json": (100, "sft"),
    "chat_messages/conversations.jsonl": (128, "sft"),
    "chat_messages/conversation.json": (1, "sft"),
    "chat_messages/conversation.missingturns.json": (1, "sft"),
    "chat_messages/dummy_conversation.json": (500, "sft"),
    "chat_messages/rlvr_test.jsonl": (100, "sft"),
    "countdown/nyu_countdown_test.parquet": (1024, "problem"),
    "countdown/uft_countdown_test.parquet": (1024, "problem"),
    "countdown/uft_countdown_train.parquet": (10240, "problem"),
    "gsm8k/test.jsonl": (1319, "sft"),
    "gsm8k/train_first1000.jsonl": (1000, "sft"),
    "livecodebench/lcb_400.jsonl": (400, "problem"),
    "livecodebench/few_shot_func.json": (2, "sft"),
    "llamafactory/identity.json": (91, "sft"),
    "llamafactory/alpaca_en_demo.json": (999, "sft"),
    "llamafactory/dpo_en_demo.json": (300, "preference"),
    "llamafactory/kto_en_demo.json": (300, "sft"),
    "llamafactory/reason_tool_use_demo_50.jsonl": (50, "sft"),
    "llamafactory/v1_dpo_demo.jsonl": (10, "preference"),
    "llamafactory/v1_sft_demo.jsonl": (500, "sft"),
    "rasbt_instruction/instruction-data.json": (1100, "sft"),
    "rasbt_instruction/instruction-data-with-preference.json": (1100, "preference"),
    "ultrafeedback/train_clean.jsonl": (1000, "preference"),
    "ultrafeedback/eval_clean.jsonl": (200, "preference"),
    "ultrafeedback/label_flip_30_first200.jsonl": (200, "preference"),
}


def kind(row: dict) -> str:
    if "chosen" in row:
        return "preference"
    return "sft" if "messages" in row or "output" in row else "problem"


def write(path, rows) -> str:
    """Rows as a file of the kind its ending says."""
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_load_with_their_row_counts(real_data, name):
    rows, report = load(real_data / name).rows, LoadReport()
    assert (len(rows), {kind(r) for r in rows}) == (COUNTS[name][0], {COUNTS[name][1]})
    assert sum(1 for _ in stream(real_data / name, report=report)) == report.num_rows == len(rows)


@pytest.mark.parametrize(("name", "count", "reason"), [
    ("chat_messages/s1_overlap_36.jsonl", 36, "line 1 must have a text 'instruction', or fit another schema"),
    ("humanevalfix/humanevalpack_python.jsonl", 164, "line 1 must have a text 'output'"),
    ("mbpp/mbpp.jsonl", 974, "line 1 must have a text 'instruction'"),
    ("naughty_strings/blns.json", 515, "row 1 must be an object"),
])  # fmt: skip
def test_real_files_of_other_kinds_are_refused_row_by_row(real_data, name, count, reason):
    loaded = load(real_data / name, bad="report")
    assert loaded.rows == [] and loaded.report.num_bad == count and len(loaded.report.problems) == 10
    assert reason in loaded.report.problems[0] and name in loaded.report.problems[0]
    with pytest.raises(DataError, match="1 must"):
        load(real_data / name)


def test_ultrafeedbacks_flaws_are_found_and_can_be_left_out(real_data):
    path = real_data / "ultrafeedback" / "train_clean.jsonl"
    loaded = load(path)
    assert loaded.report.remarks == {"score tie": 111, "equal pair": 4, "empty answer": 2}
    assert [p.rpartition(" ")[2] for p in loaded.report.places["equal pair"]] == ["307", "656", "911", "998"]
    assert [p.rpartition(" ")[2] for p in loaded.report.places["empty answer"]] == ["479", "834"]
    assert len(loaded.report.places["score tie"]) == 10
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    flawed = [r["chosen"] == r["rejected"] or not r["chosen"].strip() or not r["rejected"].strip() for r in raw]
    kept = load(path, skip=("equal pair", "empty answer"))
    assert len(kept.rows) == 1000 - sum(flawed) and kept.report.num_rows == 1000
    assert "4 x equal pair: line 307" in kept.report.summary()


def test_missing_turns_are_remarked(real_data):
    assert load(real_data / "chat_messages" / "conversation.missingturns.json").report.remarks == {"empty answer": 1}
    assert load(real_data / "chat_messages" / "conversation.json").report.remarks == {}
    assert load(real_data / "llamafactory" / "kto_en_demo.json").report.remarks == {"labelled bad": 150}


def test_alpaca_is_the_same_in_four_formats(real_data, tmp_path):
    names = ("instruction", "input", "output")
    rows = [{k: r[k] for k in names} for r in load_rows(real_data / "alpaca" / "alpaca_train_950.json")]
    for ending in ("json", "jsonl", "csv", "parquet"):
        path = write(tmp_path / f"rows.{ending}", rows)
        assert load(path).rows == load_rows(path) == rows


USER, GPT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PAIR = {"prompt": [USER], "chosen": "A", "rejected": "B"}
OTHER = {"role": "assistant", "content": "B"}


@pytest.mark.parametrize(("raw", "wanted"), [
    ({"prompt": "Q", "completion": "A"}, {"instruction": "Q", "input": "", "output": "A"}),
    ({"query": "Q", "completion": "A"}, {"instruction": "Q", "input": "", "output": "A"}),
    ({"question": "Q", "answer": "A", "id": 7}, {"id": 7, "instruction": "Q", "input": "", "output": "A"}),
    ({"prompt": [USER], "completion": [GPT]}, {"messages": [USER, GPT]}),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {"messages": [USER, GPT]}),
    ({"conversations": [{"from": "human", "value": "Q"}], "system": "S"},
     {"messages": [{"role": "system", "content": "S"}, USER]}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, GPT]}, {"messages": [USER, GPT]}),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, PAIR),
    ({"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"},
     {"output": "A", **PAIR}),
    ({"prompt": "Q", "chosen": [USER, GPT], "rejected": [USER, OTHER], "score_chosen": 8, "score_rejected": 7.5,
      "messages": [USER, GPT]}, {**PAIR, "score_chosen": 8.0, "score_rejected": 7.5}),
    ({"prompt": [USER], "chosen": [GPT], "rejected": [OTHER]}, PAIR),
    ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
      "rejected": {"from": "gpt", "value": "B"}}, PAIR),
    ({"chosen_messages": [USER, GPT], "rejected_messages": [USER, OTHER]}, PAIR),
    ({"nums": [1, 2], "target": 3}, {"instruction": "Use the numbers 1, 2 once each to make 3.", "input": "",
                                     "skill": "countdown", "numbers": [1, 2], "target": 3}),
    ({"question_content": "Q", "public_test_cases": '[{"input": "1", "output": "2"}]', "metadata": '{"func_name": "f"}',
      "private_test_cases": "eJ", "starter_code": "def f"},
     {"instruction": "Q\n\nBegin with this code:\ndef f", "input": "", "skill": "livecodebench",
      "tests": [{"input": "1", "output": "2"}], "func_name": "f"}),
])  # fmt: skip
def test_layouts_by_hand(raw, wanted):
    assert convert_row(raw, "here") == wanted


@pytest.mark.parametrize(("raw", "reason"), [
    ({"prompt": "Q", "chosen": "A", "rejected": None}, "\"rejected\" must be a list of turns, got None"),
    ({"chosen": [USER, GPT], "rejected": [GPT, OTHER]}, "must answer the same prompt"),
    ({"prompt": "Q", "chosen": [USER], "rejected": [USER]}, "must end with a text by the assistant"),
    ({"chosen": "A", "rejected": "B"}, "must have a text 'instruction'"),
    ({"nums": ["1"], "target": 3}, "must have whole numbers as 'nums'"),
    ({"nums": [1], "target": 3.5}, "must have whole numbers as 'nums' and one as 'target', got [1] and 3.5"),
    ({"question_content": "Q", "public_test_cases": "[1"}, "'public_test_cases' must be JSON"),
    ({"question_content": "Q", "public_test_cases": [{"input": 1}]}, "must have tests with input and output"),
    ({"conversations": [{"from": "nobody", "value": "x"}]}, "turn 1 must have a role among"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "must have parts of type"),
    ({"prompt": "Q", "completion": "\ud800"}, "half a surrogate pair"),
    ({}, "It has nothing"),
])  # fmt: skip
def test_bad_rows_say_what_is_wrong(raw, reason):
    with pytest.raises(DataError) as error:
        convert_row(raw, "x.jsonl, line 3")
    assert "x.jsonl, line 3" in str(error.value) and reason in str(error.value)


def test_files_merge_and_the_missing_are_an_error_or_a_warning(tmp_path):
    first, last = write(tmp_path / "a.json", [ROW] * 3), write(tmp_path / "b.csv", [ROW] * 2)
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        load([first, gone, last])
    loaded = load([first, gone, last], missing="warning")
    assert len(loaded.rows) == 5 and loaded.report.missing == [gone] and "missing: " in loaded.report.summary()
    assert loaded.report.counts == {first: 3, gone: 0, last: 2}
    assert len(load([first, last], limit=4).rows) == 4
    for option in ({"missing": "x"}, {"bad": "x"}, {"schema": "x"}, {"limit": 0}):
        with pytest.raises(ValueError, match="must be"):
            load(first, **option)


def test_bad_rows_are_counted_with_place_and_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROW).encode()
    path.write_bytes(b"\n".join([good, b"{bad", b"\xff\xfe{}", b"", good, b"[1]", b'{"instruction": 1}', good]))
    loaded = load(path, bad="report")
    assert len(loaded.rows) == 3 and loaded.report.num_bad == 4
    places = [p.split(f"{path}, ")[1].split(" ")[1].rstrip(":") for p in loaded.report.problems]
    assert places == ["2", "3", "6", "7"] and "is not UTF-8 (byte 0" in loaded.report.problems[1]
    other = write(tmp_path / "b.json", [ROW])
    (tmp_path / "c.json").write_text("[1,")
    assert len(load([tmp_path / "c.json", other], bad="report").rows) == 1  # a broken file ends itself only
    with pytest.raises(DataError, match="a.jsonl, line 2: "):
        load_rows(path)


def outcome(path) -> str:
    """How reading ended: "rows" or the message; any other exception than the two we promise fails the test."""
    try:
        return f"{len(load(path).rows)} rows"
    except (DataError, FileNotFoundError) as error:
        assert str(path) in str(error), error
        return str(error)


def test_json_test_suite(real_data, tmp_path):
    files = sorted((real_data / "jsontestsuite").glob("test_*/*.json"))
    assert len(files) == 340
    start, ended = time.monotonic(), {}
    for path in files:
        ended[path.name] = outcome(path)
        content = path.read_bytes()
        for ending in ("jsonl", "csv", "parquet"):
            copy = tmp_path / f"case.{ending}"
            copy.write_bytes(content)
            outcome(copy)
        # The same bytes as the value of a field, where a row is otherwise good.
        (tmp_path / "in.json").write_bytes(b'[{"instruction": "x", "output": "y", "extra": ' + content + b"}]")
        outcome(tmp_path / "in.json")
    assert time.monotonic() - start < 60
    accepted = [name for name, end in ended.items() if end.endswith(" rows")]
    # Only files that are a list of no rows, or hold nothing that a row could be, pass without a message.
    assert all(end == "0 rows" for name, end in ended.items() if name in accepted), accepted
    invalid = {name: end for name, end in ended.items() if name.startswith("n_")}
    assert len(invalid) > 180 and not any(end.endswith(" rows") for end in invalid.values())
    # Python reads NaN and Infinity, which JSON does not know; they are no rows either.
    assert {n for n, end in invalid.items() if "is not" not in end} <= {
        "n_number_NaN.json", "n_number_infinity.json", "n_number_minus_infinity.json"}  # fmt: skip
    assert "nested too deep" in ended["n_structure_100000_opening_arrays.json"]


def test_naughty_and_unicode_strings_survive_every_format(real_data, tmp_path):
    naughty = json.loads((real_data / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    assert len(naughty) == 515
    lines = [line for name in ("GraphemeBreakTest.txt", "NormalizationTest_first2000.txt")
             for line in (real_data / "unicode" / name).read_text(encoding="utf-8").splitlines()]  # fmt: skip
    points = [p for line in lines for p in line.partition("#")[0].replace("÷", " ").replace("×", " ").split()]
    chars = [chr(int(p, 16)) for p in points if 0 < len(p) <= 6 and all(c in "0123456789ABCDEF" for c in p)]
    wild = ["".join(chars[i : i + 40]) for i in range(0, len(chars), 40)]
    texts = [t for t in [*naughty, *lines, *wild] if not any("\ud800" <= c <= "\udfff" for c in t)]
    assert set(naughty) <= set(texts) and len(texts) > 3000
    rows = [{"instruction": t, "input": t[::-1], "output": t} for t in texts]
    for ending in ("json", "jsonl", "csv", "parquet"):
        assert load(write(tmp_path / f"wild.{ending}", rows)).rows == rows, ending
    for name in ("naughty_strings/blns.txt", "unicode/GraphemeBreakTest.txt"):
        assert "must end in .json, .jsonl, .csv, .parquet" in outcome(real_data / name)


def hostile(folder) -> dict[str, str]:
    """Files nobody should feed a loader, each with words its error must have."""
    cases = {}
    long = "line 1 is longer than 64 MiB"
    sparse = {"json": "has 1,073,741,824 bytes", "jsonl": long, "csv": long, "parquet": "as parquet"}
    for ending, words in sparse.items():
        with open(folder / f"sparse.{ending}", "wb") as file:
            file.truncate(2**30)
        cases[f"sparse.{ending}"] = words
    whole = write(folder / "whole.parquet", [ROW] * 500)
    data = open(whole, "rb").read()
    for name, part in (("cut", data[: len(data) // 2]), ("tail", data[-100:]), ("empty", b""),
                       ("middle", data[:20] + b"\xff" * 20 + data[40:])):  # fmt: skip
        (folder / f"{name}.parquet").write_bytes(part)
        cases[f"{name}.parquet"] = "cannot be read as parquet"
    text = json.dumps([{**ROW, "output": "é"}], ensure_ascii=False)
    for code in ("utf-16", "utf-16-le", "latin-1", "utf-32"):
        (folder / f"{code}.json").write_bytes(text.encode(code))
        (folder / f"{code}.jsonl").write_bytes(text[1:-1].encode(code))
        (folder / f"{code}.csv").write_bytes("instruction,output\nx,é\n".encode(code))
        cases |= {f"{code}.{ending}": "" for ending in ("json", "jsonl", "csv")}
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "nul.csv").write_bytes(b"instruction,output\nx\0,y,z\n")
    (folder / "none.csv").write_text("")
    return cases | {"folder.json": "", "fifo.jsonl": "is not a file", "nul.csv": "line 2 must have 2 cells",
                    "none.csv": "must name the columns"}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and sparse files")
def test_hostile_files_end_in_a_clear_error_in_bounded_time_and_memory(tmp_path):
    for name, words in hostile(tmp_path).items():
        tracemalloc.start()
        start = time.monotonic()
        end = outcome(tmp_path / name)
        peak, seconds = tracemalloc.get_traced_memory()[1], time.monotonic() - start
        tracemalloc.stop()
        assert words in end and not end.endswith(" rows"), (name, end)
        assert peak < 300 * 2**20 and seconds < 30, (name, peak, seconds)
        with pytest.raises((DataError, FileNotFoundError)):
            load_rows(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and sparse files")
def test_the_command_line_shows_no_traceback(real_data, tmp_path, capsys):
    cases = [tmp_path / name for name in hostile(tmp_path)]
    cases += sorted((real_data / "jsontestsuite" / "test_parsing").glob("n_*.json"))[::20]
    for path in cases:
        for command in ("data", "split", *(["lengths"] if path in cases[::8] else [])):
            code = cli.main([command, "--data", str(path)])
            out, err = capsys.readouterr()
            assert code == 2 and "Traceback" not in out + err and path.name in err, (command, path, err)
    for name in ("sparse.jsonl", "cut.parquet", "utf-16.json", "fifo.jsonl"):
        call = [sys.executable, "-m", "qftlab", "data", "--data", str(tmp_path / name)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr and name in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_generator_reads_only_what_it_is_asked_for(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_text("\n".join([json.dumps(ROW)] * 3 + ["{bad"]))
    rows = stream(path)
    assert [next(rows) for _ in range(3)] == [ROW] * 3
    with pytest.raises(DataError, match="line 4"):
        next(rows)
    assert next(iter(read_file(path)))[0] == "line 1"


def test_the_registry_is_whole():
    assert set(HUB) == {
        "HuggingFaceTB/smol-smoltalk", "HuggingFaceH4/ultrafeedback_binarized", "Asap7772/cog_behav_all_strategies",
        "Jiayi-Pan/Countdown-Tasks-3to4", "livecodebench/code_generation_lite",
    }  # fmt: skip
    gives = {"sft": "sft", "dpo": "preference", "rloo": "problem"}
    assert all(SCHEMAS[source.schema].gives == gives[source.recipe] for source in HUB.values())


def test_folders_in_the_hubs_format_load_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pairs"
    (folder / "data").mkdir(parents=True)
    pairs = [{"prompt": "Q", "chosen": [USER, GPT], "rejected": [USER, OTHER], "score_chosen": 8.0,
              "score_rejected": 8.0}] * 5  # fmt: skip
    write(folder / "data" / "train-00000-of-00001.parquet", pairs)
    write(folder / "data" / "test-00000-of-00001.parquet", pairs[:2])
    loaded = load(folder)
    assert len(loaded.rows) == 5 and loaded.report.remarks == {"score tie": 5} and loaded.rows[0]["chosen"] == "A"
    assert len(load(folder, split="test").rows) == 2 and len(load(folder, limit=3).rows) == 3
    with pytest.raises(DataError, match="pairs, after row 0 of split 'nosuch'"):
        load(folder, split="nosuch")
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="pairs, after row 0 of split 'train'"):
        load(folder)


@pytest.mark.parametrize("name", HUB)
def test_hub_names_ask_datasets_for_the_right_thing(name, monkeypatch):
    datasets = pytest.importorskip("datasets")
    raw = {
        "messages": {"messages": [USER, GPT], "source": "s"},
        "preference": {"prompt": "Q", "chosen": [USER, GPT], "rejected": [USER, OTHER], "messages": [USER, GPT]},
        "prompt_completion": {"query": "Q", "completion": "A"},
        "countdown": {"nums": [1, 2], "target": 3},
        "livecodebench": {"question_content": "Q", "public_test_cases": "[]", "private_test_cases": "x"},
    }[HUB[name].schema]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or [raw] * 2)
    assert len(load(name).rows) == 2 and asked[0][1]["split"] == HUB[name].split
    assert asked[0][1]["streaming"] is HUB[name].is_large
    assert asked[0][0] == ("json" if HUB[name].file else name)

    def fails(path, **options):
        raise RuntimeError("no network\n  at all")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="no network at all; check the name, the split and the connection"):
        load(name)


def test_rows_to_fine_tune_on_come_from_folders_and_names_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "warm").mkdir()
    write(tmp_path / "warm" / "train.parquet", [{"query": "Q", "completion": "A"}] * 3)
    assert load_rows(tmp_path / "warm") == [{"instruction": "Q", "input": "", "output": "A"}] * 3
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: [{"messages": [USER, GPT]}] * 2)
    assert load_rows("HuggingFaceTB/smol-smoltalk") == [{"messages": [USER, GPT]}] * 2
    with pytest.raises(DataError, match="must be paths or names, got an empty one"):
        load_rows("")


def test_data_command_words_the_instruction_and_problems_can_be_read_again(tmp_path, capsys):
    source = write(tmp_path / "a.json", [{"nums": [1, 2], "target": 3}, {"nums": [4], "target": 4}])
    target = str(tmp_path / "b.jsonl")
    words = "Use [{numbers}] for {target}."
    assert cli.main(["data", "--data", source, "--instruction", words, "--output", target]) == 0
    rows = load(target).rows
    assert [r["instruction"] for r in rows] == ["Use [1, 2] for 3.", "Use [4] for 4."]
    assert rows[0]["numbers"] == [1, 2] and rows[0]["target"] == 3 and "output" not in rows[0]
    capsys.readouterr()
    assert cli.main(["data", "--data", source, "--instruction", "{nothing}"]) == 2
    assert "instruction must name fields of the row" in capsys.readouterr().err
    chat = write(tmp_path / "c.json", [{"messages": [USER, GPT]}])
    assert cli.main(["data", "--data", chat, "--instruction", words]) == 2
    assert "instruction can word rows that have one, got a row with messages" in capsys.readouterr().err


def test_data_command_merges_and_writes(tmp_path, capsys):
    first, last = write(tmp_path / "a.json", [ROW] * 3), write(tmp_path / "b.csv", [ROW] * 2)
    target = tmp_path / "all" / "rows.jsonl"
    arguments = ["data", "--data", f"[{first},{last}]", "--output", str(target)]
    assert cli.main(arguments) == 0 and load_rows(target) == [ROW] * 5
    assert "5 rows in all, 0 refused" in capsys.readouterr().out
    assert cli.main(arguments) == 2 and "exists: choose another output" in capsys.readouterr().err
    assert [p.name for p in target.parent.iterdir()] == ["rows.jsonl"]
    assert cli.main(["data", "--data", ""]) == 2 and "at least one file" in capsys.readouterr().err
