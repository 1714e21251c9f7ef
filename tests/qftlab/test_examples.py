"""Rows as examples, by hand: the counts of what was read, and where a row is said to stand."""

from __future__ import annotations

import json
import logging

import pytest

from qftlab.rows.batches import Example
from qftlab.rows.examples import (
    NOTHING,
    Pair,
    Usage,
    documents,
    encode_pairs,
    encode_rows,
    load_wanted,
    place_of,
    places_of,
)
from qftlab.rows.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def answers(*lengths: int) -> list[dict]:
    """Rows whose answers have so many words."""
    return [{"instruction": "q", "input": "", "output": "no " * n} for n in lengths]


def test_the_counts_of_kept_rows_by_hand(tokenizer) -> None:
    examples, usage = encode_rows(tokenizer, answers(*range(1, 22)))
    lengths = sorted(len(e.input_ids) for e in examples)
    assert len(set(lengths)) == 21, "the test needs rows of different lengths"
    assert (usage.rows, usage.documents, usage.tokens) == (21, 21, sum(lengths))
    assert (usage.longest, usage.median_length, usage.p95_length) == (lengths[20], lengths[10], lengths[19])
    assert usage.mean_length == pytest.approx(sum(lengths) / 21)
    assert usage.trained_tokens == sum(sum(e.loss_mask) for e in examples)


def test_rows_exactly_as_long_as_allowed_stay(tokenizer) -> None:
    [example], _ = encode_rows(tokenizer, answers(5))
    limit = len(example.input_ids)
    kept, usage = encode_rows(tokenizer, answers(5, 6), max_length=limit)
    assert kept == [example] and usage.left_out == {"too long": [2]}
    with pytest.raises(ValueError, match="rows must hold something to train on, got 1 rows read, 0 documents kept"):
        encode_rows(tokenizer, answers(5), max_length=limit - 1)
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("yes yes", "no"), ("no", "yes " * 9))]
    [pair], _ = encode_pairs(tokenizer, rows[:1])
    longest = len(pair.chosen.input_ids)
    assert longest > len(pair.rejected.input_ids)
    pairs, usage = encode_pairs(tokenizer, rows, max_length=longest)
    assert pairs == [pair] and usage.left_out == {"too long": [2]}


def test_a_tool_call_is_something_said(tokenizer) -> None:
    """This template cannot write it, and says so: it is no empty answer."""
    turns = [{"content": ""}, {"content": "a"}, {"content": None, "tool_calls": []}]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]} for turn in turns]
    assert encode_rows(tokenizer, rows)[1].left_out == {NOTHING: [1, 3]}
    rows[2]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    with pytest.raises(ValueError, match="row 3: .*tool_calls"):
        encode_rows(tokenizer, rows)


def test_a_log_line_warns_where_rows_were_left_out(tokenizer, caplog) -> None:
    with caplog.at_level(logging.INFO):
        encode_rows(tokenizer, answers(1, 2))
        encode_rows(tokenizer, answers(1, 0))
        encode_rows(tokenizer, answers(1, 99), max_length=50)
        pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
        encode_pairs(tokenizer, [pair])
        encode_pairs(tokenizer, [pair, {**pair, "chosen": "r"}])
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "WARNING", "INFO", "WARNING"]


def test_at_most_five_rows_are_named() -> None:
    usage = Usage(9, 1, 20, 7, 20, 20.0, 20, 20, {"too long": [1, 2, 3, 4, 5], "score tie": [1, 2, 3, 4, 5, 6]})
    start = "9 rows read, 1 documents kept, 20 tokens, 7 of them trained, 20 tokens in the median document"
    assert usage.summary() == (
        f"{start}; 5 left out: too long (row 1, 2, 3, 4, 5); 6 left out: score tie (row 1, 2, 3, 4, 5, …)"
    )
    usage.sources, usage.unrendered = {"a": 2, "b": 7}, {"images": 2, "id": 9}
    assert usage.summary() == (
        f"{start}; 5 left out: too long (a, row 1, 2; b, row 1, 2, 3); 6 left out: score tie (a, row 1, 2; b, row 1, "
        "2, 3, …); fields that no template shows: id (9), images (2)"
    )
    assert Usage() == Usage(0, 0, 0, 0, 0, 0.0, 0, 0, {}, {}, {})


def test_places_by_hand() -> None:
    sources = {"a": 2, "b": 1, "c": 4}
    places = [place_of(n, sources) for n in (1, 2, 3, 4, 7)]
    assert places == ["a, row 1", "a, row 2", "b, row 1", "c, row 1", "c, row 4"]
    assert place_of(8, sources) == "row 1" and place_of(8, {}) == "row 8"
    assert places_of([1, 3, 2, 5], sources) == "a, row 1, 2; b, row 1; c, row 2" and places_of([4], {}) == "row 4"


def test_pairs_count_both_documents(tokenizer, tmp_path) -> None:
    pair = Pair(Example([1, 2, 3], [False, False, True]), Example([1, 2], [False, True]), 1)
    assert pair.length == 5 and documents([pair, pair]) == [pair.chosen, pair.rejected] * 2
    rows = [{"prompt": "p", "chosen": "one two", "rejected": "no"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]
    pairs, usage = encode_pairs(tokenizer, rows)
    assert usage.tokens == sum(p.length for p in pairs) and usage.documents == 4
    assert usage.trained_tokens == sum(sum(e.loss_mask) for e in documents(pairs))
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    loaded, counts = load_wanted(paths, "preference")
    assert len(loaded) == 4 and list(counts.values()) == [2, 2]
    assert load_wanted([paths[0], paths[0]], "preference")[1] == {}, "a file that is read twice cannot be told apart"
