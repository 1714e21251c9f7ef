"""Loaders and batches: what is read, what is refused and how it is said, and orders that are pure functions."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qftlab.files import bundled
from qftlab.rows.batches import Example, batches, count_trained, pack, pad
from qftlab.rows.sources import DataError, load_rows

ROW = {"instruction": "Add", "input": "", "output": "3"}


def test_bundled_rows_load():
    assert len(load_rows(bundled("countdown", "demonstrations.jsonl"))) == 2000
    both = load_rows([bundled("bugfix", "train.jsonl"), bundled("bugfix", "heldout.jsonl")])
    assert len(both) == 1900 and {r["mode"] for r in both} == {"AGENT", "EDIT"}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bundled("nowhere")


def test_real_alpaca_loads_as_json_and_as_csv(real_data, tmp_path):
    rows = load_rows(real_data / "alpaca" / "alpaca_train_950.json")
    assert len(rows) == 950
    path = tmp_path / "a.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows({k: r[k] for k in ("instruction", "input", "output")} for r in rows)
    assert load_rows(path) == [{k: r[k] for k in ("instruction", "input", "output")} for r in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"instruction": "x"}]', "a.json, row 1 must have a text 'output'"),
        ("a.json", json.dumps([ROW, {**ROW, "output": 5}]), "a.json, row 2 must have a text 'output', got 5"),
        ("a.json", '{"instruction": "x"}', "must hold a list of rows, got dict"),
        ("a.json", "[1,", "is not JSON, line 1"),
        ("a.json", "[" * 100_000, "a.json is not JSON"),
        ("a.jsonl", json.dumps(ROW) + "\n{bad}\n", "a.jsonl, line 2: "),
        ("a.jsonl", f'\n\n{json.dumps(ROW)}\n\n{{"instruction": "x"}}', "a.jsonl, line 5 must have a text 'output'"),
        ("a.json", f"[{'1' * 5000}]", "a.json is not JSON that can be read: a number has too many digits"),
        ("a.jsonl", "1" * 5000, "a.jsonl, line 1: a number has too many digits"),
        ("a.json", '[{"instruction": "\\ud800", "output": "x"}]', "row 1, 'instruction' holds half a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 5}]}', "turn 1 must have a text as content, got 5"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}', "turn 1 holds half a surrogate pair"),
        ("a.csv", "instruction,output,output\nx,y,z\n", "line 1 must name each column once"),
        ("a.jsonl", '{"messages": []}', '"messages" must be a list of turns'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "turn 1 must have role and content"),
        ("a.csv", "a,b\n1,2\n", "line 2 must have a text 'instruction', or fit another schema"),
        ("a.csv", "instruction,output\nx,y,z\n", "line 2 must have 2 cells"),
        ("a.csv", 'instruction,output\n"x,y\n', "a.csv, after line 1: unexpected end of data"),
        ("a.txt", "hello", "must end in .json, .jsonl, .csv"),
    ],
)
def test_bad_files_are_named_with_the_place_and_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / name)
    assert message in str(error.value)


def test_missing_files_folders_and_other_encodings(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows(tmp_path / "no.json")
    with pytest.raises(DataError, match="after row 0 of split .train.: .*check its files"):
        load_rows(tmp_path)
    (tmp_path / "a.json").write_bytes(json.dumps([ROW]).encode("utf-16"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_rows(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([ROW]).encode())
    assert load_rows(tmp_path / "b.json") == [ROW]


def docs() -> list[Example]:
    return [Example([5, 6, 7], [False, True, True]), Example([8, 9], [True, True]), Example([3], [True])]


def test_packed_batch_by_hand():
    batch = pack(docs())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100]]  # nothing predicts a first token
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6] and batch["max_length_q"] == 3
    assert count_trained(docs()) == 3


def test_padded_batch_masks_by_length_even_if_pad_is_a_real_token():
    batch = pad(docs(), pad_id=6)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 6], [3, 6, 6]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100], [-100, -100, -100]]
    assert batch["attention_mask"].sum() == 6
    left = pad(docs(), pad_id=0, side="left")
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9], [0, 0, 3]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_example_once_and_is_a_pure_function(count, size, seed, epoch):
    order = batches(count, batch_size=size, seed=seed, epoch=epoch)
    assert sorted(i for batch in order for i in batch) == list(range(count))
    assert all(len(batch) == size for batch in order[:-1])
    assert order == batches(count, batch_size=size, seed=seed, epoch=epoch)


def test_batches_refuse_nonsense():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batches(3, batch_size=0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="loss_mask must have 2"):
        Example([1, 2], [True])
    with pytest.raises(ValueError, match="at least one example"):
        pack([])
    with pytest.raises(ValueError, match="side must be"):
        pad(docs(), 0, side="both")
    assert torch.equal(pack(docs())["cu_seq_lens_k"], pack(docs())["cu_seq_lens_q"])
