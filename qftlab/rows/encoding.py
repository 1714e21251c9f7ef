"""Many rows at once: ids and masks as `render_chat` gives them, faster, by several processes, and kept on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import marshal
import os
import pickle
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from qftlab.files import aside
from qftlab.rows.batches import Example
from qftlab.rows.chat import Message, Piece, Renderer, is_trained, joins_words, thinks
from qftlab.rows.schemas import kind_of, messages_of, row_to_prompt

log = logging.getLogger(__name__)
CHUNK = 512  # rows that a process takes at a time
KEPT_FROM = 10_000  # rows; fewer are encoded anew in seconds
# What stands in for the texts of turns while what surrounds them is looked at; a template must treat both kinds alike.
MARKS = ("qftlabmark{}end", "<q>Mark {} & {{{{it}}}}: \u00e9\n\n  `x`, 'y', \"z\".</q>" + 40 * " long" + " {}!")


class Outlines:
    """Pieces of plain conversations, filled into what the template wrote around marks for turns of the same roles.

    A template is a program, and may treat one text unlike another: every 2^k-th conversation is rendered by it as well,
    and if that differs all are. What is not plain always is: tool calls, thinking, typed control tokens, weights, and
    white space at the ends, which templates may trim.
    """

    def __init__(self, tokenizer, thinking: bool | None) -> None:
        self.tokenizer, self.thinking, self.joins = tokenizer, thinking, joins_words(tokenizer)
        self.control = [*tokenizer.get_added_vocab(), "<think>", "</think>", "<tool_", "</tool_"]
        self.known: dict[tuple, list | None] = {}
        self.counts: Counter[tuple] = Counter()

    def documents(self, messages: Sequence[Message], train_on: str) -> list[list[Piece]] | None:
        """Each document in pieces; None where the template has to be asked."""
        key = (train_on, *[message["role"] for message in messages])
        if self.joins or not all(map(self._is_plain, messages)):
            return None
        if key not in self.known:
            self.known[key] = self._outline(*key)
        if self.known[key] is None:
            return None
        texts = [message["content"] for message in messages]
        made = [[("".join([texts[p] if isinstance(p, int) else p for p in parts]), kept) for parts, kept in document]
                for document in self.known[key]]  # fmt: skip
        self.counts[key] += 1
        if self.counts[key].bit_count() == 1 and made != self._renderer(messages).documents(train_on):
            log.info("this chat template treats texts unlike each other: every row is rendered by it")
            self.known[key] = None
            return None
        return made

    def examples(self, messages: Sequence[Message], train_on: str) -> list[Example]:
        """The documents by the template itself.

        Raises:
            ValueError: if they cannot be rendered, or the tokenizer cannot spell them.
        """
        renderer = self._renderer(messages)
        documents = renderer.documents(train_on)
        for text in [text for pieces in documents for text, kept in pieces if kept]:
            spelled = self.tokenizer.backend_tokenizer.decode(renderer.encode(text, True), False)
            check_spelling(self.tokenizer, renderer.shown(text), spelled)
        return [renderer.example(pieces) for pieces in documents]

    def _renderer(self, messages: Sequence[Message]) -> Renderer:
        return Renderer(self.tokenizer, messages, self.thinking)

    def _is_plain(self, message: Message) -> bool:
        text = message["content"]
        is_text = len(message) == 2 and text and not (text[0].isspace() or text[-1].isspace())
        return bool(is_text) and not ("<" in text and any(token in text for token in self.control))

    def _outline(self, train_on: str, *roles: str) -> list | None:
        """For each document its pieces, each as texts and numbers of turns; None if the marks come out changed."""
        found = []
        for mark in MARKS:
            marks = [mark.format(f"n{i}n", f"n{i}n") for i in range(len(roles))]
            said = [{"role": role, "content": text} for role, text in zip(roles, marks, strict=True)]
            documents = self._renderer(said).documents(train_on)
            found.append([[(_split(text, marks), kept) for text, kept in document] for document in documents])
        return found[0] if found[0] == found[1] else None


def _split(text: str, marks: Sequence[str]) -> list[str | int]:
    """A text as what stands between marks, and their numbers."""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    return [marks.index(part) if part in marks else part for part in parts if part]


class Chunks(Dataset):
    """Rows in chunks, each encoded where it is asked for: in this process or in one of several.

    Args:
        tokenizer: one with a chat template.
        rows: of any layout.
        wanted: what they are to be, as `Usage.fit` takes it.
        usage: an empty one, copied for each chunk.
        train_on: "all" assistant turns of a conversation or the "last".
        thinking: as `render_chat` takes it.
    """

    def __init__(self, tokenizer, rows: Sequence[dict], wanted: str, usage, train_on: str, thinking) -> None:
        self.tokenizer, self.rows, self.wanted, self.usage = tokenizer, rows, wanted, copy.deepcopy(usage)
        self.train_on, self.outlines = train_on, Outlines(tokenizer, thinking)

    def __len__(self) -> int:
        return -(-len(self.rows) // CHUNK)

    def __getitem__(self, number: int):
        """Usage, and for each row that can be trained on its number and documents; or what is wrong with one."""
        usage, start = copy.deepcopy(self.usage), number * CHUNK
        rows = self.rows[start : start + CHUNK]
        try:
            kept = list(usage.fit(rows, self.wanted, start))
            chats = [messages for _, _, row in kept for _, messages, _ in chats_of(row, "", "")]
            usage.thinking = sum(any(map(thinks, messages)) for messages in chats)
            return usage, self.encoded(kept)
        except (ValueError, RecursionError) as error:
            return error

    def encoded(self, rows: Sequence[tuple[int, str, dict]]) -> list[tuple[int, list[Example]]]:
        """Number and documents of rows in the lab's form; none of a row in which nothing is trained.

        Raises:
            ValueError: naming the place of a row that cannot be rendered.
        """
        made: list[tuple[int, list]] = [(number, []) for number, _, _ in rows]
        texts: list[str] = []
        trained: list[tuple[str, int]] = []  # place, and number among the texts
        for (_, where, row), (_, found) in zip(rows, made, strict=True):
            for place, messages, train_on in chats_of(row, where, self.train_on):
                try:
                    if not has_answer(messages, train_on):
                        continue
                    documents = self.outlines.documents(messages, train_on)
                    found += self.outlines.examples(messages, train_on) if documents is None else documents
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: {error}") from error
                for text, kept in chain.from_iterable(documents or ()):
                    trained += [(place, len(texts))] if kept else ()
                    texts.append(text)
        fast = self.tokenizer.backend_tokenizer
        fast.no_truncation()
        fast.no_padding()
        encodings = fast.encode_batch_fast(texts, add_special_tokens=False)
        spelled = fast.decode_batch([encodings[i].ids for _, i in trained], skip_special_tokens=False)
        for (place, i), decoded in zip(trained, spelled, strict=True):
            check_spelling(self.tokenizer, texts[i], decoded, f"{place}: ")
        ids = iter(encodings)
        return [(number, [d if isinstance(d, Example) else _joined(d, ids) for d in found]) for number, found in made]


def check_spelling(tokenizer, text: str, decoded: str, place: str = "") -> None:
    """Refuses a text that the tokenizer cannot spell, at a place; blanks, and what it normalises, aside.

    Raises:
        ValueError: showing where they part.
    """
    if decoded == text:
        return
    normalizer = tokenizer.backend_tokenizer.normalizer
    wanted, got = (normalizer.normalize_str(each) if normalizer else each for each in (text, decoded))
    wanted, got = ("".join(each.replace("\u2581", " ").split()) for each in (wanted, got))
    if wanted != got:
        at = len(os.path.commonprefix([wanted, got]))
        raise ValueError(
            f"{place}the tokenizer must spell what is trained, but makes {got[at : at + 20]!r} of "
            f"{wanted[at : at + 20]!r}: take another tokenizer, or leave the row out"
        )


def chats_of(row: dict, where: str, train_on: str) -> list[tuple[str, Sequence[Message], str]]:
    """Place, turns and what is trained of each conversation in a row: both of a pair, the prompt alone of a problem."""
    if (kind := kind_of(row)) == "preference":
        return [(f"{where}, {side!r}", [*row["prompt"], {"role": "assistant", "content": row[side]}], "last")
                for side in ("chosen", "rejected")]  # fmt: skip
    return [(where, messages_of(row), train_on) if kind == "sft" else (where, row_to_prompt(row), "none")]


def has_answer(messages: Sequence[Message], train_on: str) -> bool:
    """Whether there is something to train on."""
    answers = [turn for turn in messages[1:] if turn["role"] == "assistant"]
    return train_on == "none" or any(map(is_trained, answers[-1:] if train_on == "last" else answers))


def _joined(pieces: Sequence[Piece], encodings: Iterator) -> Example:
    parts = [(next(encodings).ids, kept) for _, kept in pieces]
    ids = array("i", chain.from_iterable(part for part, _ in parts))  # in half the time that numpy takes for a list
    mask = np.repeat([kept for _, kept in parts], [len(part) for part, _ in parts])
    return Example(np.frombuffer(ids.tobytes(), np.int32), mask)  # a copy without room to grow


def encode(
    tokenizer, rows: Sequence[dict], wanted: str, usage, *, train_on="all", thinking=None, num_proc=1, cache=None
) -> list[tuple[int, list[Example]]]:
    """Number and documents of each row that can be trained on; what became of the others is counted in `usage`.

    Args:
        tokenizer, rows, wanted, usage, train_on, thinking: as `Chunks` takes them.
        num_proc: processes that encode.
        cache: a folder where this is kept, by a digest of rows, tokenizer, template, settings and code, if there are
            `KEPT_FROM` rows; None keeps nothing.

    Raises:
        DataError, ValueError: naming the place of a row that cannot be used or rendered.
    """
    chunks = Chunks(tokenizer, rows, wanted, usage, train_on, thinking)
    if cache is None or len(rows) < KEPT_FROM:
        return _encode(chunks, usage, num_proc)
    path = Path(cache) / f"{_digest(chunks, thinking)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # of several processes of a run one encodes
        if path.is_file():
            try:
                found = _read(path, usage)
                log.info("%d rows were encoded before: %s", len(rows), path)
                return found
            except (SafetensorError, ValueError, KeyError) as error:
                log.warning("%s cannot be read (%s): the rows are encoded anew", path, error)
        found = _encode(chunks, usage, num_proc)
        _write(path, usage, found)
    return found


def _encode(chunks: Chunks, usage, num_proc: int) -> list[tuple[int, list[Example]]]:
    found = []
    workers = num_proc if num_proc > 1 else 0
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's own threads would be as many again
    # A generator of its own: a loader draws a seed, by default from the one that everything else is drawn from.
    chance = torch.Generator()
    for part in DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=chance):
        if isinstance(part, Exception):
            raise part
        usage.merge(part[0])
        found += part[1]
    return found


def _as_it_is(part):
    return part


def _digest(chunks: Chunks, thinking: bool | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    tokenizer = chunks.tokenizer
    template = tokenizer.chat_template
    day = str(date.today()) if "strftime_now" in str(template) else ""  # which such a template writes
    settings = [chunks.wanted, chunks.train_on, thinking, template, day, chunks.usage.sources]
    digest.update(json.dumps(settings).encode() + tokenizer.backend_tokenizer.to_str().encode())
    for row in chunks.rows:
        try:
            digest.update(marshal.dumps(row, 2))
        except ValueError:  # a row that holds more than JSON does
            digest.update(pickle.dumps(row))
    return digest.hexdigest()


def _write(path: Path, usage, found: Sequence[tuple[int, list[Example]]]) -> None:
    documents = [document for _, several in found for document in several]
    tensors = {
        "numbers": np.array([number for number, _ in found], np.int64),
        "counts": np.array([len(several) for _, several in found], np.int64),
        "lengths": np.array([len(document) for document in documents], np.int64),
        "ids": np.concatenate([np.empty(0, np.int32), *[document.ids for document in documents]]),
        "bits": np.concatenate([np.empty(0, np.uint8), *[document.bits for document in documents]]),
    }
    with aside(path) as place:
        save_file(tensors, place, {"usage": json.dumps(vars(usage))})


def _read(path: Path, usage) -> list[tuple[int, list[Example]]]:
    with safe_open(path, "numpy") as file:
        numbers, counts, lengths, ids, bits = map(file.get_tensor, ("numbers", "counts", "lengths", "ids", "bits"))
        vars(usage).update(json.loads(file.metadata()["usage"]))
    ids, bits = (np.split(x, np.cumsum(n)[:-1]) for x, n in ((ids, lengths), (bits, -(-lengths // 8))))
    documents = (Example(i, np.unpackbits(b, count=len(i))) for i, b in zip(ids, bits, strict=True))
    return [(number, [next(documents) for _ in range(count)])
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)]  # fmt: skip
