"""What a token says, made visible: blanks as signs, invisible characters and halves of UTF-8 sequences by number."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# Signs that common fonts have: U+2420, the symbol for space, is an empty box in Chromium on Debian.
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
NOTHING = "∅"
LEFT_TO_RIGHT_MARK = "\u200e"
MAX_MARKS = 2  # accents that one letter may carry before they are written as numbers
# Characters of a visible category that draw nothing: Hangul and Braille blanks, joiners, variation selectors.
UNSEEN = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0,
                    *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])  # fmt: skip


@dataclass(frozen=True)
class Token:
    """One token as the views show it.

    Attributes:
        position: where it stands, from 0.
        id: its id.
        text: its text, made visible.
        is_special: whether it was added to the vocabulary and is not built from pieces.
        is_trained: whether its own label counts in the loss; None where no mask was given.
        predicts: visible text of the next token, which this position learns to predict; None at the end.
        is_loss_here: whether that prediction counts in the loss, which is the mask shifted by one; None without mask.
        gain: how much more likely one model finds it than another, in nats; None where nobody measured.
    """

    position: int
    id: int
    text: str
    is_special: bool
    is_trained: bool | None
    predicts: str | None
    is_loss_here: bool | None
    gain: float | None = None


def visible(text: str | bytes, *, prose: bool = False) -> str:
    """Text in which nothing hides: `␣` space, `⏎` newline, `⇥` tab, `<U+200B>` unseen, `<0xE2>` half a character.

    Args:
        text: characters, or the bytes of a token, which need not be whole characters.
        prose: leave spaces and newlines as they are (for answers, which are read as text).

    Returns:
        Printable text without control, format or unpaired surrogate characters; `∅` for the empty token. More than
        eight equal blanks in a row become `␣×12`.
    """
    is_bytes = isinstance(text, bytes)
    signs = {"\t": "    ", " ": " ", "\n": "\n"} if prose else SIGNS
    shown, marks, base = [], 0, False  # base: the character before is one that an accent can stand on
    for char in text.decode("utf-8", errors="surrogateescape") if is_bytes else text:
        category = unicodedata.category(char)
        if char in signs:
            shown.append(signs[char])
            base = False
        elif is_bytes and category == "Cs":
            shown.append(f"<0x{ord(char) - 0xDC00:02X}>")
            base = False
        elif _is_unseen(char, category) or (not prose and char in SIGNS.values()):
            shown.append(f"<U+{ord(char):04X}>")
            base = False
        elif category in ("Mn", "Me", "Mc"):
            marks += 1
            shown.append(char if base and marks <= MAX_MARKS else f"<U+{ord(char):04X}>")
            continue
        else:
            shown.append(char)
            base = True
        marks = 0
    if prose:
        return "".join(shown)
    return re.sub(r"([␣⏎⇥])\1{8,}", lambda run: f"{run[1]}×{len(run[0])}", "".join(shown)) or NOTHING


def _is_unseen(char: str, category: str) -> bool:
    return category[0] == "C" or category in ("Zl", "Zp", "Zs") or ord(char) in UNSEEN


def cells(text: str) -> int:
    """Width of visible text in monospace cells: 2 for a wide character, 0 for an accent."""
    return sum(_cell(char) for char in text)


def _cell(char: str) -> int:
    if char == LEFT_TO_RIGHT_MARK or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` cells, with `…` where it was cut."""
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for char in text:
        used += _cell(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"


def column(text: str, width: int) -> str:
    """`text` cut or filled to `width` cells of a text table; right-to-left text cannot reorder its neighbours."""
    text = shorten(text, width)
    if any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in text):
        return LEFT_TO_RIGHT_MARK + text + LEFT_TO_RIGHT_MARK + " " * (width - cells(text))
    return text + " " * (width - cells(text))


def token_bytes(tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes each token stands for; joined, they are the text.

    Args:
        tokenizer: a transformers tokenizer: byte-level BPE (Qwen, GPT-2, Llama 3) or sentencepiece with byte fallback.
        ids: token ids; an id that has a row but no token gives no bytes.

    Raises:
        ValueError: for a negative id.
    """
    added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "ByteLevel"))
    from_char = _byte_of_char() if is_byte_level else {}
    pieces = tokenizer.convert_ids_to_tokens(_checked(ids))
    return [added[number].encode("utf-8", errors="replace") if number in added else _bytes_of(piece, from_char)
            for number, piece in zip(ids, pieces, strict=True)]  # fmt: skip


def _checked(ids: Sequence[int]) -> list[int]:
    for position, number in enumerate(ids):
        if number < 0:
            raise ValueError(
                f"ids must be 0 or more, got {number} at position {position}; "
                "labels are not ids: pass input_ids, and mask=[label != -100 for label in labels]"
            )
    return list(ids)


def _bytes_of(piece: str | None, from_char: dict[str, int]) -> bytes:
    """Of one piece of the vocabulary; `from_char` is empty for sentencepiece."""
    if not piece:
        return b""
    if from_char:
        return b"".join(bytes([from_char[c]]) if c in from_char else c.encode("utf-8", "replace") for c in piece)
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(fallback[1], 16)]) if fallback else piece.replace("▁", " ").encode("utf-8", "replace")


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or the next free one from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def read_tokens(tokenizer, ids: Sequence[int], mask: Sequence[bool] | None = None) -> tuple[Token, ...]:
    """The tokens of one row, each with what it predicts.

    Args:
        tokenizer: a transformers tokenizer.
        ids: T token ids (a list or a 1-D tensor).
        mask: T values, true where the token's own label counts in the loss (unshifted, as `Example.loss_mask`).

    Raises:
        ValueError: if the mask has another length than the ids, or an id is negative.
    """
    ids = [int(number) for number in ids]
    mask = None if mask is None else [bool(value) for value in mask]
    if mask is not None and len(mask) != len(ids):
        raise ValueError(f"mask must have one value for each of the {len(ids)} ids, got {len(mask)}")
    texts = [visible(piece) for piece in token_bytes(tokenizer, ids)]
    added = set(tokenizer.added_tokens_decoder)
    trained = [None] * len(ids) if mask is None else mask
    following = zip([*texts[1:], None], [*trained[1:], None if mask is None else False], strict=True) if ids else ()
    return tuple(
        Token(position, number, text, number in added, is_trained, predicts, is_loss_here)
        for position, (number, text, is_trained, (predicts, is_loss_here))
        in enumerate(zip(ids, texts, trained, following, strict=True))
    )  # fmt: skip
