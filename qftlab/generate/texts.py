"""Token ids → text as it is written: what follows the prompt, where a stop string begins, what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how half a UTF-8 sequence decodes


def continuation_text(tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Text of `token_ids` as it follows the prompt, special tokens shown.

    The prompt's last token is decoded with them and cut off again: some tokenizers (Llama's) drop the blank before the
    first word of what they decode.
    """
    head = tokenizer.decode(list(prompt_ids[-1:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    joined = [*prompt_ids[-1:], *token_ids]
    text = tokenizer.decode(joined, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text.startswith(head):
        return text[len(head) :]
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def find_stop(tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in the text of `token_ids`, looked for in its end; None if there is none.

    Called after each token, it reads only as many tokens as a stop string may span (a token is at least one byte); the
    whole text is decoded only for a hit.
    """
    if not stop:
        return None
    span = max(len(s.encode()) for s in stop) + 8
    before = [*prompt_ids, *token_ids[:-span]]
    tail = continuation_text(tokenizer, before, token_ids[-span:])
    if not any(s in tail for s in stop):
        return None
    text = continuation_text(tokenizer, prompt_ids, token_ids)
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


class TextStream:
    """The text of a growing completion, piece by piece; the pieces joined are the finished text.

    Half a character waits for its other bytes, and an end that could begin a stop string waits until it is clear.

    Args:
        tokenizer: decodes.
        prompt_ids: of the prompt, (T,).
        stop: strings that end the completion and are not part of its text.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._prompt_ids, self._stop = tokenizer, list(prompt_ids), tuple(stop)
        self._read, self._shown, self._held = 0, 0, ""

    def take(self, token_ids: Sequence[int]) -> str:
        """What may be shown now, given all tokens so far, the last of them no stop token."""
        if len(token_ids) <= self._read:  # a row that began again after memory ran out
            return ""
        before = [*self._prompt_ids[-1:], *token_ids[: self._read]]
        fresh = continuation_text(self._tokenizer, before, token_ids[self._read :])
        if fresh.endswith(UNFINISHED):
            return ""
        self._read = len(token_ids)
        text = self._held + fresh
        waiting = _possible_stop(text, self._stop)
        self._held = text[len(text) - waiting :]
        return self._show(text[: len(text) - waiting])

    def finish(self, text: str) -> str:
        """What was still held back of the finished text."""
        return self._show(text[self._shown :])

    def _show(self, piece: str) -> str:
        self._shown += len(piece)
        return piece


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return max(lengths, default=0)
