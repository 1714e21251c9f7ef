"""Chats as token ids and loss masks: what is trained, what is not, and what a user may type.

The template is always the tokenizer's own. Around it this module keeps three promises that templates alone do not:
the mask is exact (only the assistant's content and its `<|im_end|>` are trained), a prompt's ids are a prefix of the
whole conversation's ids, and special-token text that somebody typed stays text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

# Tokens an assistant may say although they are control tokens.
ASSISTANT_TOKENS = ("<|AGENT|>", "<|EDIT|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
ROLES = ("system", "user", "assistant", "tool")
EMPTY_THINKING = "<think>\n\n</think>\n\n"


# One turn of a chat: `role` ("system", "user", "assistant" or "tool") and `content`. An assistant turn may also hold
# `tool_calls`, in the form of the OpenAI protocol, and then no content, and Qwen3's `reasoning_content`; they are
# trained as the template writes them.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Args:
        input_ids: token ids, (T,).
        loss_mask: True where the token is trained (it is *predicted*, from the tokens before it), (T,).
    """

    input_ids: list[int]
    loss_mask: list[bool]

    @property
    def num_trained(self) -> int:
        """How many tokens are trained."""
        return sum(self.loss_mask)


def row_to_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An alpaca row (instruction, input, output) as a user and an assistant turn; a row of messages as it is.

    Raises:
        ValueError: if the row has neither form.
    """
    if "messages" in row:
        return list(row["messages"])
    if "instruction" not in row:
        raise ValueError(f'row must have "instruction" and "output", or "messages", got {", ".join(row) or "nothing"}')
    question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.get("output", "")}]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    thinking: bool | None = None,
    allowed: Sequence[str] | None = None,
) -> list[int]:
    """The ids of a conversation up to where the assistant is to speak.

    Args:
        tokenizer: one with a chat template.
        messages: the turns so far.
        thinking: Qwen3's `enable_thinking`; None leaves the template its default.
        allowed: control tokens the assistant may say, `ASSISTANT_TOKENS` by default.

    Raises:
        ValueError: if the tokenizer has no chat template, there is no message, or one lacks a known role or a text.
    """
    return _Renderer(tokenizer, messages, thinking, allowed).prompt()


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    train_on: str = "all",
    thinking: bool | None = None,
    allowed: Sequence[str] | None = None,
) -> list[Rendered]:
    """A conversation as ids and loss mask, by the contract of this lab.

    Trained: the assistant's content and the `<|im_end|>` after it. Not trained: headers, other roles, the newline after
    `<|im_end|>`, and a think block that the template put in by itself.

    Args:
        tokenizer: one with a chat template.
        messages: the turns; at least one by the assistant, not the first.
        train_on: "all" assistant turns, or the "last" only.
        thinking: Qwen3's `enable_thinking`; None leaves the template its default.
        allowed: control tokens the assistant may say, `ASSISTANT_TOKENS` by default.

    Returns:
        One `Rendered`; or, where the template rewrites earlier turns (Qwen3 drops their thinking) and all turns are
        trained, one for each assistant turn, rendered as the last, so that each is seen as it will be at inference.

    Raises:
        ValueError: for an unknown `train_on`, a message without role or text, no assistant turn, or a template whose
            prompt is not a prefix of the whole (the message shows the first differing token).
    """
    if train_on not in ("all", "last"):
        raise ValueError(f'train_on must be "all" or "last", got {train_on!r}')
    renderer = _Renderer(tokenizer, messages, thinking, allowed)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise ValueError(
            "messages must hold an assistant turn after a user turn, got roles "
            f"{[m['role'] for m in messages]}: there is nothing to train"
        )
    if train_on == "last":
        return [renderer.whole(turns[-1], [renderer.span(turns[-1])])]
    spans = [renderer.span(i) for i in turns]
    final = renderer.text(turns[-1] + 1)
    if all(final.startswith(renderer.text(i + 1)) for i in turns):
        return [renderer.whole(turns[-1], spans)]
    return [renderer.whole(i, [span]) for i, span in zip(turns, spans, strict=True)]


def _check(messages: Sequence[Message]) -> None:
    """Refuses what templates drop in silence (an unknown role) or fail on with an error of their own."""
    if not messages:
        raise ValueError("messages must hold at least one turn, got none")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"turn {number} must have a role among {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"turn {number} must have a text as content, got {content!r:.60}")
        used = "".join(_characters(message))
        if not used.isascii() and any("\ud800" <= c <= "\udfff" for c in used):
            raise ValueError(f"turn {number} holds half a surrogate pair, which is no character: remove it")


def _characters(value) -> set[str]:
    """Every character in the texts of a message, tool calls included."""
    if isinstance(value, str):
        return set(value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_characters, inner))


class _Renderer:
    """One conversation: its template text with typed control tokens hidden, and the way from there to ids."""

    def __init__(self, tokenizer, messages, thinking, allowed) -> None:
        _check(messages)
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(f"{name} has no chat template: set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.allowed = set(ASSISTANT_TOKENS if allowed is None else allowed)
        self.options = {} if thinking is None else {"enable_thinking": thinking}
        if any(m.get("tool_calls") for m in messages) and "tool_calls" not in str(tokenizer.chat_template):
            name = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(f"{name} has a chat template without tool_calls: write the call into the content")
        used = set().union(*(_characters(m) for m in messages))
        free = (chr(c) for c in range(0xF0000, 0xFFFFD) if chr(c) not in used)
        self.hidden = dict(zip(self.control, free, strict=False))
        self.messages = [self._hide(m) for m in messages]
        self.texts: dict[tuple[int, bool], str] = {}

    def _hide(self, message: Message) -> Message:
        """Puts one private character in the place of each control token that was typed, not meant.

        In what an assistant says the allowed ones are meant; in the arguments of its tool calls none is.
        """
        spared = self.allowed if message["role"] == "assistant" else ()
        said = ("content", "reasoning_content")
        return {
            key: value if key == "role" else self._hide_in(value, spared if key in said else ())
            for key, value in message.items()
        }

    def _hide_in(self, value, spared: Collection[str]):
        """The same for one value of a message: a text, or lists and dicts that hold texts."""
        if isinstance(value, dict):
            return {self._hide_in(key, spared): self._hide_in(inner, spared) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide_in(inner, spared) for inner in value]
        if isinstance(value, str):
            for token, stand_in in self.hidden.items():
                if token in value and token not in spared:
                    value = value.replace(token, stand_in)
        return value

    def text(self, turns: int, *, prompt: bool = False) -> str:
        """The template's text of the first turns."""
        if (turns, prompt) not in self.texts:
            self.texts[turns, prompt] = self.tokenizer.apply_chat_template(
                self.messages[:turns], tokenize=False, add_generation_prompt=prompt, **self.options
            )
        return self.texts[turns, prompt]

    def prompt(self) -> list[int]:
        """Ids of all turns and the header of the next."""
        text = self.text(len(self.messages), prompt=True)
        return self._parts(text, self._starts(text, len(self.messages)), [])[0]

    def span(self, turn: int) -> tuple[int, int]:
        """Where the trained text of an assistant turn begins and ends, in the text rendered up to this turn."""
        prompt, whole = self.text(turn, prompt=True), self.text(turn + 1)
        if not whole.startswith(prompt):
            raise ValueError(self._difference(turn, prompt, whole))
        start = len(prompt)
        said = str(self.messages[turn].get("content") or "")
        if whole.startswith(EMPTY_THINKING, start) and not said.lstrip().startswith("<think>"):
            start += len(EMPTY_THINKING)
        return start, len(whole.rstrip("\n"))

    def whole(self, turn: int, spans: list[tuple[int, int]]) -> Rendered:
        """Ids and mask of the conversation up to a turn.

        The text is cut where a trained span begins: a prompt's ids are then a prefix of the whole's by construction,
        even if the answer starts with white space that the tokenizer would merge with the header's newline.
        """
        text = self.text(turn + 1)
        return Rendered(*self._parts(text, self._starts(text, turn), spans))

    def _starts(self, text: str, turns: int) -> list[int]:
        """Where the assistant began to speak in earlier turns."""
        heads = [self.text(i, prompt=True) for i in range(1, turns) if self.messages[i]["role"] == "assistant"]
        return [len(head) for head in heads if text.startswith(head)]

    def _parts(self, text: str, starts: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids and mask of a text that is cut at `starts` and at both ends of the trained `spans`."""
        cuts = sorted({0, len(text), *starts, *(edge for span in spans for edge in span)})
        ids: list[int] = []
        mask: list[bool] = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            part = self.encode(text[start:end])
            ids += part
            mask += [any(a <= start and end <= b for a, b in spans)] * len(part)
        return ids, mask

    def encode(self, text: str) -> list[int]:
        """Template text → ids: control tokens where the template or the assistant put them, everything else as text."""
        if not any(stand_in in text for stand_in in self.hidden.values()):
            return self.tokenizer(text, add_special_tokens=False).input_ids
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, self.control))})", text):
            if piece in self.hidden:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                for token, stand_in in self.hidden.items():
                    piece = piece.replace(stand_in, token)
                ids += encode_plain(self.tokenizer, piece)
        return ids

    def _difference(self, turn: int, prompt: str, whole: str) -> str:
        a, b = self.encode(prompt), self.encode(whole)
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shown = [repr(self.tokenizer.decode(ids[at : at + 1])) for ids in (a, b)]
        return (
            f"the prompt of turn {turn} must be a prefix of the conversation, but token {at} is {shown[0]} in the "
            f"prompt and {shown[1]} in the whole: this chat template cannot be trained on as it is "
            "(try thinking=True or False)"
        )


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text → ids as if the tokenizer had no added tokens at all: `<|im_end|>` becomes its letters and signs."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]
