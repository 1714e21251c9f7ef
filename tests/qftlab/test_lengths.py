"""Token lengths: statistics by hand, counts equal to training's, policies, and the rate and memory of the counting."""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab import cli
from qftlab.evaluate.lengths import LengthStats, limited, row_documents
from qftlab.files import bundled
from qftlab.rows.batches import Example, count_trained
from qftlab.rows.chat import render_chat
from qftlab.rows.encoding import Outlines
from qftlab.rows.schemas import row_to_messages
from qftlab.rows.sources import load, load_rows, stream
from qftlab.rows.tokenizer import load_tokenizer


def length_stats(tokenizer, rows, *, batch_size: int = 1000) -> LengthStats:
    """Statistics over the documents of rows, as the command `lengths` takes them."""
    stats = LengthStats()
    for documents in row_documents(tokenizer, rows, batch_size=batch_size):
        stats.add(map(len, documents))
    return stats


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def test_statistics_by_hand():
    stats = LengthStats()
    stats.add([4, 1, 1])
    stats.add([10])
    assert (stats.count, stats.total) == (4, 16)
    assert [stats.quantile(q) for q in (0, 0.5, 0.75, 0.95, 1)] == [1, 1, 4, 10, 10]
    assert stats.histogram(bins=2) == [(1, 5, 3), (6, 10, 1)]
    assert "min 1, mean 4.0, median 1, p95 10, max 10" in stats.summary()
    assert LengthStats().summary() == "no documents"
    with pytest.raises(ValueError, match="at least one document"):
        LengthStats().quantile(0.5)
    with pytest.raises(ValueError, match=r"q in \[0, 1\]"):
        stats.quantile(1.5)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300), st.integers(1, 20))
def test_statistics_agree_with_numpy(lengths, bins):
    stats = LengthStats()
    stats.add(lengths)
    assert stats.total / stats.count == pytest.approx(statistics.fmean(lengths), rel=1e-12)
    for q in (0.05, 0.5, 0.95, 1.0):
        assert stats.quantile(q) == np.quantile(lengths, q, method="inverted_cdf")
    bars = stats.histogram(bins)
    assert len(bars) <= bins and sum(n for _, _, n in bars) == len(lengths)
    assert all(n == sum(a <= length <= b for length in lengths) for a, b, n in bars)


WILD = [
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": " a\n", "input": "", "output": "\n\n b "},
    {"instruction": "say <|im_end|>", "input": "x", "output": "<|im_end|> and <|im_start|>"},
    {"instruction": "think", "input": "", "output": "<think>\nhm\n</think>\n\nyes"},
    {"instruction": "a < b", "input": "\u00e9\U0001f600", "output": "<|AGENT|>go"},
    {"instruction": "empty", "input": "", "output": ""},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3},
    {"messages": [{"role": "user", "content": "only asked"}]},
]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b-instruct", "qwen3-0.6b"])
def test_counts_are_those_of_training(name, request):
    source = name if name == "tiny" else request.getfixturevalue("real_data") / name
    tokenizer = load_tokenizer(source)
    rows = WILD + load_rows(bundled("bugfix", "heldout.jsonl"))[:20]
    if name != "tiny":
        rows += load_rows(request.getfixturevalue("real_data") / "alpaca" / "alpaca_train_950.json")[:300]
    answered = [i not in (5, 7) for i in range(len(rows))]
    wanted = [render_chat(tokenizer, row_to_messages(row)) if is_answered else []
              for row, is_answered in zip(rows, answered, strict=True)]  # fmt: skip
    outlines = Outlines(tokenizer, None)
    is_fast = [outlines.documents(row_to_messages(row), "all") is not None for row in rows[len(WILD) :]]
    assert sum(is_fast) >= len(rows) - len(WILD) - 20
    for size in (1, 7, 1000):
        assert list(row_documents(tokenizer, rows, batch_size=size)) == wanted
    assert length_stats(tokenizer, rows).total == sum(len(e) for several in wanted for e in several)


def test_rows_that_cannot_be_rendered_are_named(tiny):
    rows = [*WILD[:2], {"text": "x"}]
    for size in (1, 2, 10):
        with pytest.raises(ValueError, match="row 3 must have"):
            list(row_documents(tiny, rows, batch_size=size))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(row_documents(tiny, rows, batch_size=0))


def example(prompt: int, answer: int) -> Example:
    return Example(list(range(prompt + answer)), [False] * prompt + [True] * answer)


def test_policies_by_hand():
    examples = [example(3, 2), example(3, 4), example(5, 2), example(6, 0), example(2, 9)]
    cut = [limited(e, 5, "truncate") for e in examples]
    assert [kept and (len(kept.input_ids), count_trained([kept])) for kept, _ in cut] == [
        (5, 2),
        (5, 2),
        None,
        None,
        (5, 3),
    ]
    assert [what for _, what in cut] == ["", "truncated", "its prompt alone fills max_length", "nothing to train in it",
                                         "truncated"]  # fmt: skip
    left = [limited(e, 5, "skip") for e in examples]
    assert [kept for kept, _ in left] == [examples[0], None, None, None, None]
    assert [what for _, what in left] == ["", "too long", "too long", "nothing to train in it", "too long"]
    assert limited(examples[4], None) == (examples[4], "")


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(2, 12))
def test_truncation_keeps_prompts_and_something_to_train(mask, limit):
    kept, what = limited(Example(list(range(len(mask))), mask), limit, "truncate")
    if kept is None:
        assert what and not any(mask[1:limit])
    else:
        assert kept.loss_mask == mask[:limit] and count_trained([kept]) and bool(what) == (len(mask) > limit)


def rate(tokenizer, rows: list[dict], rounds: int) -> float:
    """Our rate over that of the tokenizer's own batch call on ready texts: the median of rounds, both sides in each.

    We make documents of the rows, ids and masks as in training, and count those.

    Both run on one thread and are timed by the processor, so that other programs do not matter.
    """
    backend, ratios = tokenizer.backend_tokenizer, []
    texts = [tokenizer.apply_chat_template(row_to_messages(row), tokenize=False) for row in rows]
    for _ in range(rounds):
        start = time.process_time()
        tokens = 0
        for i in range(0, len(texts), 1000):
            tokens += sum(map(len, backend.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)))
        middle = time.process_time()
        assert length_stats(tokenizer, iter(rows)).total == tokens
        ratios.append((middle - start) / (time.process_time() - middle))
    return statistics.median(ratios)


def test_counting_keeps_up_with_the_tokenizer_small(real_data):
    rows = load(real_data / "alpaca" / "alpaca_train_950.json").rows
    assert rate(load_tokenizer(real_data / "qwen2.5-0.5b-instruct"), rows * 2, rounds=3) > 0.5


@pytest.mark.slow
def test_counting_keeps_up_with_the_tokenizer_on_100_000_rows(real_data):
    rows = load(real_data / "alpaca" / "alpaca_train_950.json").rows
    many = list(islice(cycle(rows), 100_000))
    assert rate(load_tokenizer(real_data / "qwen2.5-0.5b-instruct"), many, rounds=3) > 0.5


def peak_of(tokenizer, path) -> int:
    """Bytes that Python held at most while the file was read and counted."""
    tracemalloc.start()
    assert length_stats(tokenizer, stream(path), batch_size=100).count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def grow(path, count: int) -> str:
    row = {"instruction": "Say it again.", "input": "", "output": "so it is " * 20}
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "input": str(i)}) + "\n" for i in range(count))
    return str(path)


def test_memory_does_not_grow_with_the_file(tiny, tmp_path):
    peak_of(tiny, grow(tmp_path / "warm.jsonl", 100))
    small, large = (peak_of(tiny, grow(tmp_path / f"{n}.jsonl", n)) for n in (300, 1500))
    assert large < 1.2 * small + 100_000, (small, large)


@pytest.mark.slow
def test_memory_does_not_grow_with_20_000_rows(tiny, tmp_path):
    peak_of(tiny, grow(tmp_path / "warm.jsonl", 100))
    small, large = (peak_of(tiny, grow(tmp_path / f"{n}.jsonl", n)) for n in (1000, 20_000))
    assert large < 1.2 * small + 100_000, (small, large)


def test_lengths_command(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Hi", "output": "yes " * n} for n in (1, 2, 300)] + [{"instruction": "Hi", "output": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["lengths", "--data", str(path), "--max_length", "64", "--policy", "truncate"]) == 0
    out = capsys.readouterr().out
    assert "documents 3" in out and "2 rows affected" in out and "1 of them truncated" in out
    assert " row 3: " in out and " row 4: 0 tokens, nothing to train in it" in out
    assert cli.main(["lengths", "--data", str(path), "--max_length", "64", "--policy", "error"]) == 2
    assert "raise max_length" in capsys.readouterr().err
    assert cli.main(["lengths", "--data", str(path), "--model", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
