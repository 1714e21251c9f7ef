"""C9: rows become examples with masks, against TRL's preparation; and what they take in memory and on disk."""

from __future__ import annotations

import json
import os
import random
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Benchmark, MismatchError, Options, Side, compare, judge
from qftlab.rows.encoding import Chunks, encode
from qftlab.rows.examples import Usage, encode_rows
from qftlab.rows.tokenizer import load_tokenizer

REAL = "QFTLAB_REAL_DATA"
TURNS = 6  # questions and answers of a conversation


def tokenizer():
    """Qwen2.5's, which is not in the repository.

    Raises:
        FileNotFoundError: where the folder of real files is not named.
    """
    if not os.environ.get(REAL):
        raise FileNotFoundError(f"C9 needs Qwen2.5's tokenizer: {REAL} must name the folder that holds it")
    return load_tokenizer(Path(os.environ[REAL]) / "qwen2.5-0.5b-instruct")


def conversations(count: int, tokens: int = 1000, seed: int = 0) -> list[dict]:
    """Conversations of about so many tokens, each of its own text, put together from real instructions and answers."""
    rows = json.loads((Path(os.environ[REAL]) / "alpaca/alpaca_data_1k.json").read_text(encoding="utf-8"))
    words = " ".join(f"{row['instruction']} {row['input']} {row['output']}" for row in rows).split(" ")
    rng, made = random.Random(seed), []
    for _ in range(count):
        said, shares = [], [rng.uniform(0.3, 1.7) for _ in range(2 * TURNS)]
        for i, share in enumerate(shares):
            length = max(4, round(0.72 * tokens * share / sum(shares)))
            start = rng.randrange(len(words) - length)
            text = " ".join(words[start : start + length]).strip()
            said.append({"role": "assistant" if i % 2 else "user", "content": text})
        made.append({"messages": said})
    return made


def c9(options: Options) -> Iterator[dict]:
    """3,000 conversations of 1,000 tokens, one process; then 50,000 to disk and back, in a process of its own."""
    qwen, rows = tokenizer(), conversations(options.sized(3000, 60))

    def ours() -> list:
        return encode_rows(qwen, rows)[0]

    def theirs() -> list[tuple[list[int], list[bool]]]:
        from datasets import Dataset, disable_progress_bars
        from trl.chat_template_utils import get_training_chat_template

        disable_progress_bars()
        template = get_training_chat_template(qwen)

        def prepare(row: dict) -> dict:
            made = qwen.apply_chat_template(row["messages"], chat_template=template, tokenize=True, return_dict=True,
                                            return_assistant_tokens_mask=True)  # fmt: skip
            return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

        data = Dataset.from_list(rows)
        done = data.map(prepare, remove_columns=data.column_names, load_from_cache_file=False, keep_in_memory=True)
        return list(zip(done["input_ids"], done["assistant_masks"], strict=True))

    row = compare(f"{len(rows)} conversations, one process", [Side("qftlab", ours), Side("TRL", theirs, 1.2, 2.0)],
                  options, count=count_tokens, same=same_ids)  # fmt: skip
    tracemalloc.start()
    examples = encode_rows(qwen, rows[:500])[0]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    row["judged"].append(judge("bytes a token", [size / count_tokens(examples)], 6, 4.2, at_most=True))
    yield row
    yield checked(qwen, conversations(options.sized(10_000, 60), 100), options)
    yield large(options)


def checked(qwen, rows: list[dict], options: Options) -> dict:
    """The share of encoding that goes into comparing what is trained with what was said."""
    mine = Chunks.check

    def without() -> list:
        Chunks.check = lambda *_: None
        try:
            return encode_rows(qwen, rows)[0]
        finally:
            Chunks.check = mine

    sides = [Side("qftlab, unchecked", without), Side("qftlab", lambda: encode_rows(qwen, rows)[0])]
    row = compare(f"{len(rows)} rows of 100 tokens, every trained text compared", sides, options, count=count_tokens,
                  same=lambda ours, theirs: "examples" if ours == theirs else "")  # fmt: skip
    shares = [b / a - 1 for a, b in zip(*(side["rounds"] for side in row["sides"]), strict=True)]
    row["judged"] = [judge("more with the check", shares, 0.1, None, at_most=True, is_judged=not options.quick)]
    return row


def large(options: Options) -> dict:
    """Memory of encoding many conversations and the time of loading them again, measured in a child process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        found = _large(options.sized(50_000, 200))
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    found = json.loads(os.read(read, 10_000))
    os.waitpid(child, 0)
    bars = {"GB more while encoding": ("encode_gb", 1.0), "CPU seconds to load again": ("load_s", 2.0)}
    judged = [judge(what, [found[name]], bar, None, at_most=True, is_judged=not options.quick)
              for what, (name, bar) in bars.items()]  # fmt: skip
    return {"name": f"{found['rows']} conversations, kept on disk", "unit": "tokens", "checked": {}, "sides": [],
            "judged": judged, "skipped": [], **found}  # fmt: skip


def _large(count: int) -> dict:
    from qftlab.rows import encoding

    encoding.KEPT_FROM = min(encoding.KEPT_FROM, count)
    qwen, rows = tokenizer(), conversations(count)
    encode(qwen, rows[:1], "sft", Usage())  # what is loaded on first use is not the rows'
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        first = encode(qwen, rows, "sft", Usage(), cache=folder)
        encoded, tokens = time.process_time() - began, count_tokens([d for _, several in first for d in several])
        grown = _peak() - before
        del first
        began = time.process_time()
        again = encode(qwen, rows, "sft", Usage(), cache=folder)
        loaded = time.process_time() - began
        assert count_tokens([d for _, several in again for d in several]) == tokens
    return {"rows": count, "tokens": tokens, "encode_gb": round(grown, 3), "encode_s": round(encoded, 1),
            "load_s": round(loaded, 2)}  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def count_tokens(answer) -> int:
    """Tokens of examples, or of TRL's pairs of ids and masks."""
    return sum(len(row[0]) if isinstance(row, tuple) else len(row) for row in answer)


def same_ids(ours, theirs, newline: int = 198) -> str:
    """Ids and masks equal, row by row; `newline` is the token of one in Qwen's vocabulary."""
    for number, (mine, (ids, mask)) in enumerate(zip(ours, theirs, strict=True), 1):
        if mine.input_ids != list(ids):
            raise MismatchError(f"row {number}: other ids than TRL's")
        # TRL also trains the newline behind the end of a turn, which no model is ever asked for.
        if [kept for kept, token in zip(mine.loss_mask, ids, strict=True) if token != newline] != [
            bool(kept) for kept, token in zip(mask, ids, strict=True) if token != newline
        ]:
            raise MismatchError(f"row {number}: another mask than TRL's")
    return f"ids and masks (newlines aside) of {len(ours)} conversations"


BENCHMARKS = {"C9": Benchmark("rows → examples with masks, conversations of 1,000 tokens", "TRL's preparation", c9)}
