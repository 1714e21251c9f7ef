"""Many rows at once give what `render_chat` gives one by one; by several processes, and again from disk."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qftlab import cli
from qftlab.files import bundled
from qftlab.rows import encoding
from qftlab.rows.batches import Example
from qftlab.rows.chat import DataError, render_chat, render_prompt
from qftlab.rows.encoding import Outlines, encode
from qftlab.rows.examples import Usage, encode_pairs, encode_rows
from qftlab.rows.schemas import row_to_messages
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer

TALK = [
    {"role": r, "content": c} for r, c in (("user", "Hi <b>"), ("assistant", "Oh!"), ("user", "é?"), ("assistant", "x"))
]
ODD = [
    {"instruction": " a\n", "input": "", "output": "\n\n b "}, {"instruction": "q", "input": "", "output": ""},
    {"instruction": "say <|im_end|>", "input": "x", "output": "<|im_end|> <|im_start|>"}, {"messages": TALK},
    {"messages": [{"role": "system", "content": "s"}, *TALK]}, {"messages": [*TALK[:3], {**TALK[3], "weight": 0}]},
    {"prompt": "q", "completion": "c", "system": "s", "id": 7}, {"messages": [TALK[1], *TALK[:2]]},
]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    real = load_rows(bundled("bugfix", "heldout.jsonl"))[:20] + load_rows(bundled("instructions", "heldout.jsonl"))[:40]
    return [row for odd in ODD for row in (*real[:8], odd)] + real


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def one_by_one(tokenizer, rows: list[dict], **options) -> list[list[Example]]:
    return [render_chat(tokenizer, row_to_messages(row), **options) if row.get("output", "x") else [] for row in rows]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5-0.5b-instruct", "qwen3-0.6b"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_many_rows_are_what_each_is_by_itself(name, train_on, rows, request, monkeypatch) -> None:
    tokenizer = load_tokenizer(name if name == "tiny" else request.getfixturevalue("real_data") / name)
    wanted = one_by_one(tokenizer, [row for row in rows if row != ODD[5] or train_on == "all"], train_on=train_on)
    examples, usage = encode_rows(tokenizer, rows, train_on=train_on)
    assert examples == [example for several in wanted for example in several]
    monkeypatch.setattr(encoding, "CHUNK", 3)
    assert encode_rows(tokenizer, rows, train_on=train_on) == (examples, usage), "whatever is encoded together"
    assert usage.rows == len(rows) and usage.unrendered["id"] == 1
    assert [len(numbers) for numbers in usage.left_out.values()] == [1 + (train_on == "last")]


def test_plain_rows_take_the_fast_way(tiny, rows) -> None:
    outlines = Outlines(tiny, None)
    is_fast = [outlines.documents(row_to_messages(row), "all") is not None for row in rows]
    slow = [rows[i] for i, fast in enumerate(is_fast) if not fast]
    assert all(row in (*ODD[:3], ODD[5]) or "<|" in row["output"] for row in slow) and sum(is_fast) > 60


def templated(content: str):
    """A tokenizer whose template writes what the assistant says in this way."""
    tokenizer = load_tokenizer("tiny")
    said = "{{ m.content if m.role == 'user' else (" + content + ") }}"
    turns = "{%- for m in messages %}<|im_start|>{{ m.role }}\n" + said + "<|im_end|>\n{%- endfor %}\n"
    tokenizer.chat_template = turns + "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
    return tokenizer


CHANGES = ["m.content | upper", "m.content | e", "m.content.replace('z', '!')", "m.content[:30]",
           "m.content if m.content | length < 40 else m.content[:40]"]  # fmt: skip


@pytest.mark.parametrize("content", CHANGES)
def test_a_template_that_changes_texts_is_found_out_and_the_row_refused(content: str) -> None:
    tokenizer = templated(content)
    rows = [{"instruction": "q", "input": "", "output": f"zebra & {i} " + "go on " * 8 + "."} for i in range(5)]
    with pytest.raises(ValueError, match="row 1: turn 2 must stand as it is"):
        encode_rows(tokenizer, rows)


def test_a_template_that_changes_one_text_in_many_is_found_out(caplog) -> None:
    outlines = Outlines(templated("m.content | replace('zz', 'Z')"), None)

    def chat(text: str) -> list[dict]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]

    assert outlines.documents(chat("b"), "all") is not None  # the first and the second are compared
    with caplog.at_level(logging.INFO, "qftlab"), pytest.raises(ValueError, match="must stand as it is"):
        outlines.documents(chat("zz"), "all")


def test_a_tokenizer_that_begins_every_text_with_a_blank_encodes_pieces_as_the_whole(real_data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tinylm/hf")  # SentencePiece's
    turns = "{%- for m in messages %}{{ m.role }}\n{{ m.content }}</s>\n{%- endfor %}\n"
    tokenizer.chat_template = turns + "{%- if add_generation_prompt %}assistant\n{%- endif %}"
    said = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": "a time"}]
    [example], _ = encode_rows(tokenizer, [{"messages": said}])
    text = tokenizer.apply_chat_template(said, tokenize=False)
    whole = tokenizer(text[: text.rindex("</s>") + 4], add_special_tokens=False).input_ids
    assert example.input_ids[: len(whole)] == whole and [example] == render_chat(tokenizer, said)
    prompt = render_prompt(tokenizer, said[:1])
    assert example.input_ids[: len(prompt)] == prompt and example.loss_mask.index(True) == len(prompt)


@pytest.mark.parametrize("answer", ["seen unseen", " seen <|im_end|> unseen"])
def test_what_a_tokenizer_cannot_spell_is_refused_by_its_row(answer: str) -> None:
    words = {"[UNK]": 0, "<|im_end|>": 1, "user": 2, "assistant": 3, "seen": 4, "im_end": 5}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = Whitespace(), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<|im_end|>"])
    turns = "{%- for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{%- endfor %}"
    tokenizer.chat_template = turns + "{%- if add_generation_prompt %}assistant {%- endif %}"
    rows = [{"instruction": "seen", "input": "", "output": text} for text in ("seen seen", answer)]
    assert encode_rows(tokenizer, rows[:1])[0][0].input_ids == [2, 4, 1, 3, 4, 4, 1]
    with pytest.raises(ValueError, match="row 2: the tokenizer must spell what is trained, but makes '.*UNK"):
        encode_rows(tokenizer, rows)


def test_several_processes_give_the_same_and_name_the_same_rows(tiny, rows, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 16)
    state = torch.get_rng_state()
    assert encode_rows(tiny, rows, num_proc=2) == encode_rows(tiny, rows)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn from the generator that others draw from"
    pairs = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad" if i % 9 else "good"} for i in range(40)]
    found, usage = encode_pairs(tiny, pairs, num_proc=2)
    assert (found, usage) == encode_pairs(tiny, pairs) and usage.left_out == {"equal pair": [1, 10, 19, 28, 37]}
    broken = [*rows[:30], {"text": "no row"}, *rows[:4]]
    for processes in (1, 2):
        with pytest.raises(DataError, match="row 31 must have"):
            encode_rows(tiny, broken, num_proc=processes)


def test_what_was_encoded_is_kept_and_taken_up_again(tiny, rows, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(encoding, "KEPT_FROM", 20)
    fresh = encode_rows(tiny, rows, max_length=100)
    assert encode_rows(tiny, rows, max_length=100, cache=tmp_path) == fresh
    [file] = tmp_path.glob("*.safetensors")
    monkeypatch.setattr(encoding, "_encode", lambda *_: pytest.fail("encoded anew"))
    assert encode_rows(tiny, rows, max_length=100, cache=tmp_path) == fresh
    assert encode_rows(tiny, rows, cache=tmp_path)[0] != fresh[0], "the limit is applied to what is kept"
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "KEPT_FROM", 20)
    changed = load_tokenizer("tiny")
    changed.chat_template = "{# another #}" + changed.chat_template
    ways = [(tiny, rows[1:], {}), (tiny, [*rows[:-1], {**rows[-1], "id": 1}], {}), (tiny, rows, {"train_on": "last"}),
            (changed, rows, {})]  # fmt: skip
    for tokenizer, other, options in ways:
        encode_rows(tokenizer, other, cache=tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + len(ways), "each has a digest of its own"
    file.write_bytes(file.read_bytes()[:100])
    assert encode_rows(tiny, rows, max_length=100, cache=tmp_path) == fresh
    assert "cannot be read" in caplog.text and encode_rows(tiny, rows, max_length=100, cache=tmp_path) == fresh
    encode_rows(tiny, rows[:19], cache=tmp_path / "few")
    assert not (tmp_path / "few").exists()


def test_a_run_keeps_many_rows_in_its_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "KEPT_FROM", 20)
    command = ["sft", "--data", str(bundled("instructions", "heldout.jsonl")), "--output", str(tmp_path),
               "--train.max_steps", "1", "--train.batch_size", "4", "--train.save_every", "0"]  # fmt: skip
    assert cli.main(command) == 0 and cli.main([*command, "--num_proc", "2"]) == 0
    assert len(list((tmp_path / "encoded").glob("*.safetensors"))) == 1


def test_an_example_takes_four_bytes_and_a_bit_a_token() -> None:
    ids, mask = list(range(1000)), [i % 3 == 0 for i in range(1000)]
    example = Example(ids, mask)
    assert (example.ids.nbytes, example.bits.nbytes, len(example)) == (4000, 125, 1000)
    assert (example.input_ids, example.loss_mask, example.num_trained) == (ids, mask, 334)
    assert example.labels()[:4] == [-100, -100, -100, 3]
    again = pickle.loads(pickle.dumps(example))
    assert again == example != Example(ids, [*mask[:-1], not mask[-1]]) and example != Example(ids[:-1], mask[:-1])
    assert repr(Example([1, 2], [False, True])) == "Example(input_ids=[1, 2], loss_mask=[False, True])"
    assert Example(np.array([1, 2], np.int64), np.array([0, 1])) == Example([1, 2], [False, True])
    with pytest.raises(OverflowError):
        Example([2**40], [True])


def test_usage_is_counted_where_rows_are_encoded(tiny) -> None:
    usage = Usage()
    found = encode(tiny, [{"prompt": "q"}, {"prompt": "q", "chosen": "a", "rejected": "b"}], "", usage)
    assert [(number, len(documents)) for number, documents in found] == [(1, 1), (2, 2)] and usage.rows == 2
    assert not any(found[0][1][0].loss_mask)
