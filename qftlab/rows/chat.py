"""Chats as token ids and loss masks: what is trained, what is not, and what a user may type.

The template is always the tokenizer's own. Around it this module keeps three promises that templates alone do not:
the mask is exact (only the assistant's content and its `<|im_end|>` are trained), a prompt's ids are a prefix of the
whole conversation's ids, and special-token text that somebody typed stays text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qftlab.rows.batches import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens an assistant may say although they are control tokens.
ASSISTANT_TOKENS = ("<|AGENT|>", "<|EDIT|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
ROLES = {
    name: role
    for role, names in {
        "system": "system developer",
        "user": "user human",
        "assistant": "assistant gpt model chatgpt bing bard function_call tool_call",
        "tool": "tool observation function function_response tool_response",
    }.items()
    for name in names.split()
}
PART_FORMS = {"text": "{}", "reasoning": "<think>\n{}\n</think>\n\n", "tool_call": "<tool_call>\n{}\n</tool_call>",
}  # as Qwen's template writes them  # fmt: skip
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "complex_cot", "message_thinking")
MASKS = ("weight", "train", "loss_weight")  # of a turn; 0 or false: it is not trained
THINKING = re.compile(r"(?:\s*<think>(.*?)</think>|((?:(?!<think>).)*?)\n</think>\n)(.*)", re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
OPEN, CLOSE = "<think>", "</think>"


class DataError(ValueError):
    """A file or row that cannot be used; the message names the file, the row, the reason and the way out."""


# One turn of a chat: `role` ("system", "user", "assistant" or "tool") and `content`. An assistant turn may also hold
# `tool_calls`, in the form of the OpenAI protocol, and then no content, and `reasoning_content`; they are trained as
# the template writes them. A weight of 0 keeps a turn from that (`MASKS`). The first turn may hold `tools`, for all.
Message = Mapping[str, Any]
Piece = tuple[str, bool]  # of a rendered text, and whether it is trained


def render_prompt(
    tokenizer, messages: Sequence[Message], *, thinking: bool | None = None, allowed: Collection[str] = ASSISTANT_TOKENS
) -> list[int]:
    """The ids of a conversation up to where the assistant is to speak.

    Args:
        tokenizer: one with a chat template.
        messages: the turns so far.
        thinking: Qwen3's `enable_thinking`; None leaves the template its default.
        allowed: control tokens the assistant may say.

    Raises:
        ValueError: if the tokenizer has no chat template, there is no message, one lacks a known role or a text, or
            thinking is asked for of a template that knows none.
    """
    renderer = Renderer(tokenizer, messages, thinking, allowed)
    pieces = enumerate(renderer.documents("none")[0])
    return [token for i, (text, _) in pieces for token in renderer.encode(text, i > 0)]


def render_chat(
    tokenizer, messages: Sequence[Message], *, train_on: str = "all", thinking: bool | None = None,
    allowed: Collection[str] = ASSISTANT_TOKENS,
) -> list[Example]:  # fmt: skip
    """A conversation as ids and loss mask, by the contract of this lab.

    Trained: the assistant's content and the `<|im_end|>` after it. Not trained: headers, other roles, the newline after
    `<|im_end|>`, a think block that the template put in by itself, a greeting before the first question, and turns that
    say nothing or that `MASKS` keep from it.

    Args:
        tokenizer: one with a chat template.
        messages: the turns; at least one by the assistant, not the first, which is a greeting.
        train_on: "all" assistant turns, or the "last" only.
        thinking: Qwen3's `enable_thinking`, as the prompt will be asked with. By None each turn is rendered as it is:
            one without thinking as the answer to a prompt with thinking off.
        allowed: control tokens the assistant may say.

    Returns:
        One `Example`; or, where the template rewrites earlier turns (Qwen3 drops their thinking) and all turns are
        trained, one for each assistant turn, rendered as the last, so that each is seen as it will be at inference.

    Raises:
        ValueError: for an unknown `train_on`, a message without role or text, no assistant turn, or a template whose
            prompt is not a prefix of the whole (the message shows where they part); for thinking asked for of
            a template that knows none, or of a turn that has none.
    """
    renderer = Renderer(tokenizer, messages, thinking, allowed)
    return [renderer.example(pieces) for pieces in renderer.documents(train_on)]


def knows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template can be asked with thinking on or off, as Qwen3's can."""
    return "enable_thinking" in str(tokenizer.chat_template)


def thinks(turn: Message) -> bool:
    """Whether a turn holds thinking."""
    return bool(turn.get("reasoning_content")) or CLOSE in str(turn.get("content"))


def is_trained(turn: Message) -> bool:
    """Whether an answer says something, and nothing keeps it from being trained (a weight of 0, train: false)."""
    says = str(turn.get("content") or "").strip() or turn.get("tool_calls") or turn.get("reasoning_content")
    return bool(says) and not any(turn.get(name) is not None and not turn[name] for name in MASKS)


def checked_text(text: str, where: str) -> str:
    """The text, unless it holds half a surrogate pair, which JSON can spell (\\ud800).

    Raises:
        DataError: if it does.
    """
    if not text.isascii() and SURROGATE.search(text):
        raise DataError(f"{where} holds half a surrogate pair, which is no character: remove it")
    return text


def turns(messages: object, where: str, name: str = "messages") -> list[dict]:
    """Messages in the lab's form: role and content, from role/content or ShareGPT's from/value, text or parts.

    Tool calls have their arguments as an object, thinking is `reasoning_content`, and an assistant that says nothing
    says "".

    Raises:
        DataError: naming the turn, for a missing or unknown role, or content that is no text.
    """
    is_list = isinstance(messages, list | tuple)
    said = [turn for message in messages for turn in _spelled_out(message)] if is_list else []
    if not said:
        raise DataError(f'{where}: "{name}" must be a list of turns, got {messages!r:.60}')
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(said, start=1)]


def _spelled_out(message: object) -> list:
    """{"human": "q", "assistant": "a"} as two turns; anything else as it is."""
    if not isinstance(message, dict) or not message or not all(str(key).lower() in ROLES for key in message):
        return [message]
    return [{"role": key, "content": value} for key, value in message.items() if value]


def _turn(turn: object, where: str) -> dict:
    keys = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
    if not isinstance(turn, Mapping) or not isinstance(turn.get(keys[0]), str):
        raise DataError(f"{where} must have role and content, got {turn!r:.60}")
    name, content = turn[keys[0]].lower(), turn.get(keys[1])
    if name not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise DataError(f"{where} must have a role among {known}, or another name of one, got {turn[keys[0]]!r:.60}")
    made = {"role": ROLES[name], "content": content, **{k: v for k, v in turn.items() if k not in keys}}
    if isinstance(content, list):
        made["content"] = "".join(_part(part, where) for part in content)
    elif name in ("function_call", "tool_call") and isinstance(content, str):
        made["content"] = PART_FORMS["tool_call"].format(content)
    if made["role"] == "assistant":
        _complete_(made, where)
    for text in _texts(made):
        checked_text(text, where)
    if not isinstance(made["content"], str) and (made["content"] is not None or not made.get("tool_calls")):
        missing = "role and content" if keys[1] not in turn else "a text as content"
        raise DataError(f"{where} must have {missing}, got {made['content']!r:.60}")
    return made


def _complete_(turn: dict, where: str) -> None:
    """An assistant's turn: its tool calls, its thinking, and whether it is trained, each in one form."""
    if calls := turn.get("tool_calls"):
        calls = loaded(calls, f"{where}, 'tool_calls'")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise DataError(f"{where} must have a list of objects as 'tool_calls', got {calls!r:.60}")
        turn["tool_calls"] = [_call(call, where) for call in calls]
    elif turn["content"] is None:
        turn["content"] = ""
    thought = next((n for n in THOUGHTS if n in turn and isinstance(turn[n], str)), None)
    if thought:
        turn["reasoning_content"] = turn.pop(thought)
    for name in MASKS:
        if turn.get(name) not in (None, 0, 1):
            raise DataError(f"{where} must have {name} 0 or 1, got {turn[name]!r:.60}: a turn is trained or it is not")


def _call(call: dict, where: str) -> dict:
    """A tool call whose arguments are an object, as templates want them; the protocol sends them as JSON text."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], where)}
    if not isinstance(call.get("arguments"), str):
        return call
    return {**call, "arguments": loaded(call["arguments"] or "{}", f"{where}, 'arguments' of a tool call")}


def loaded(value: object, where: str) -> object:
    """JSON text as what it says; anything else as it is.

    Raises:
        DataError: for text that is no JSON.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise DataError(f"{where} must be JSON, got {value!r:.60}") from None


def _part(part: object, where: str) -> str:
    """One piece of a content that is a list: text, reasoning or a tool call."""
    kind = str(part.get("type")) if isinstance(part, dict) else None
    text = (part.get("text") if "text" in part else part.get("value")) if kind in PART_FORMS else None
    if not isinstance(text, str):
        raise DataError(f"{where} must have parts of type {', '.join(PART_FORMS)} that hold text, got {part!r:.60}")
    return PART_FORMS[kind].replace("{}", text)


def _texts(value: object) -> Iterator[str]:
    """Every text in a message, tool calls included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _thinking_aloud(message: Message) -> Message:
    """A message whose thinking stands in its content, for a template that would drop it."""
    thought = message.get("reasoning_content")
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    said = PART_FORMS["reasoning"].replace("{}", thought or "") + (message["content"] or "")
    return {**rest, "content": said} if thought else rest


def _thinking_apart(message: Message) -> Message:
    """A message whose first think block is its reasoning, so that no template has to look for it in the content."""
    said = str(message["content"])
    if message["role"] != "assistant" or message.get("reasoning_content") or "</think>" not in said:
        return message
    found = THINKING.fullmatch(said)
    if found is None:  # the answer speaks of the tag
        return {**message, "reasoning_content": ""}
    thought = (found[1] or found[2] or "").strip("\n")
    if not thought:
        return message
    return {**message, "reasoning_content": thought, "content": found[3].lstrip("\n")}


def _squeezed(text: str) -> str:
    """The text without blanks, which templates set and trim as they like."""
    return "".join(text.split())


class Renderer:
    """One conversation: its template text with typed control tokens hidden, and the way from there to ids."""

    def __init__(self, tokenizer, messages, thinking=None, allowed=ASSISTANT_TOKENS) -> None:
        messages = turns(messages, "messages")
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(f"{name} has no chat template: set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.allowed, self.joins = set(allowed), joins_words(tokenizer)
        self.thinking, self.knows_thinking = thinking, knows_thinking(tokenizer)
        if thinking is not None and not self.knows_thinking:
            raise ValueError(f"thinking must be left alone: the chat template has no enable_thinking, got {thinking}")
        self.options: dict[str, Any] = {}
        tools = [tool for m in messages for tool in m.pop("tools", None) or ()]
        for name, is_used in (("tool_calls", any(m.get("tool_calls") for m in messages)), ("tools", bool(tools))):
            if is_used and name not in str(tokenizer.chat_template):
                owner = tokenizer.name_or_path or "the tokenizer"
                raise ValueError(f"{owner} has a chat template without {name}: write them into a turn's content")
        takes_thoughts = "reasoning_content" in str(tokenizer.chat_template)
        messages = [_thinking_apart(m) if takes_thoughts else _thinking_aloud(m) for m in messages]
        used = set().union(*_texts([*messages, *tools]))
        free = (chr(c) for c in range(0xF0000, 0xFFFFD) if chr(c) not in used)
        self.hidden = dict(zip(self.control, free, strict=False))
        self.typed = {stand_in: token for token, stand_in in self.hidden.items()}
        if len(self.hidden) < len(self.control):
            raise ValueError(f"messages must leave {len(self.control)} of U+F0000-U+FFFFC free, got {len(self.hidden)}")
        self.messages = [self._hide(m) for m in messages]
        if tools:
            self.options["tools"] = self._hide_in(tools, ())
        self.texts: dict[tuple, str] = {}

    def _hide(self, message: Message) -> Message:
        """Puts one private character in the place of each control token that was typed, not meant.

        In what an assistant says the allowed ones are meant; in the arguments of its tool calls none is.
        """
        spared = dict.fromkeys(("content", "reasoning_content") if message["role"] == "assistant" else (), self.allowed)
        return {k: v if k == "role" else self._hide_in(v, spared.get(k, ())) for k, v in message.items()}

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

    def text(self, turns: int, thinking: bool | None = None, *, prompt: bool = False) -> str:
        """The template's text of the first turns."""
        key = turns, thinking, prompt
        if key not in self.texts:
            text = self._written(self.messages[:turns], thinking, prompt)
            self.texts[key] = text if prompt or turns < 2 else self._reopened(text, turns, thinking)
        return self.texts[key]

    def _written(self, messages: Sequence[Message], thinking: bool | None, prompt: bool) -> str:
        options = self.options if thinking is None else {**self.options, "enable_thinking": thinking}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the chat template cannot write these turns: {error or type(error).__name__}") from error

    def _reopened(self, text: str, turns: int, thinking: bool | None) -> str:
        """The text with the last turn's thinking, where the template opens it in the prompt and drops it here (R1)."""
        last = self.messages[turns - 1]
        said = str(last.get("content") or "")
        if last["role"] != "assistant" or not said.startswith(OPEN):
            return text
        prompt, mark = self.text(turns - 1, thinking, prompt=True), "\U000ffffd"
        if text.startswith(prompt) or not _squeezed(prompt).endswith(OPEN):
            return text
        marked = self._written([*self.messages[: turns - 1], {**last, "content": mark}], thinking, False)
        return prompt + said.removeprefix(OPEN).lstrip("\n") + marked.partition(mark)[2]

    def mode(self, turn: int) -> bool | None:
        """The thinking a turn is asked with: what is wanted of all, or else off if it answers that, and on if not."""
        if self.thinking is not None or not self.knows_thinking:
            return self.thinking
        prompt, whole = self.text(turn, False, prompt=True), self.text(turn + 1, False)
        return not (whole.startswith(prompt) and _squeezed(whole[len(prompt) :]).startswith(self._said(turn)))

    def _said(self, turn: int) -> str:
        """All that a turn says, thinking first, without blanks."""
        return _squeezed(_thinking_aloud(self.messages[turn])["content"] or "")

    def span(self, turn: int) -> tuple[int, int]:
        """Where the trained text of an assistant turn begins and ends, in the text rendered up to this turn."""
        mode = self.mode(turn)
        prompt, whole = self.text(turn, mode, prompt=True), self.text(turn + 1, mode)
        if not whole.startswith(prompt):
            raise ValueError(self._difference(turn, prompt, whole))
        start, end = len(prompt), len(whole.rstrip("\n"))
        said = self._said(turn).removeprefix(OPEN if _squeezed(prompt).endswith(OPEN) else "")
        written = _squeezed(whole[start:end])
        after = written.removeprefix(said)
        if not written.startswith(said) or not (self.messages[turn].get("tool_calls") or after in self.control):
            hint = ": it has no thinking, which its prompt asks for" if CLOSE in written and CLOSE not in said else ""
            raise ValueError(
                f"turn {turn + 1} must stand as it is before an end token, but the chat template writes "
                f"{whole[start:end]!r:.200}{hint}"
            )
        return start, end

    def documents(self, train_on: str) -> list[list[Piece]]:
        """What `render_chat` encodes, and for "none" what `render_prompt` does; raises what they raise."""
        if train_on == "none":
            text = self.text(len(self.messages), self.thinking, prompt=True)
            return [self._pieces(text, self._starts(text, len(self.messages)), [])]
        if train_on not in ("all", "last"):
            raise ValueError(f'train_on must be "all" or "last", got {train_on!r}')
        answers = [i for i, m in enumerate(self.messages) if i and m["role"] == "assistant"]
        if not answers:
            roles = [m["role"] for m in self.messages]
            raise ValueError(f"messages must hold an assistant turn after a user turn to be trained, got roles {roles}")
        trained = [i for i in (answers[-1:] if train_on == "last" else answers) if is_trained(self.messages[i])]
        spans = [self.span(i) for i in trained]
        final = self.text(answers[-1] + 1, self.mode(answers[-1]))
        if all(final.startswith(self.text(i + 1, self.mode(i))) for i in trained):
            return [self.whole(answers[-1], spans)]
        return [self.whole(i, [span]) for i, span in zip(trained, spans, strict=True)]

    def whole(self, turn: int, spans: list[tuple[int, int]]) -> list[Piece]:
        """The conversation up to a turn, in pieces.

        The text is cut where a trained span begins: a prompt's ids are then a prefix of the whole's by construction,
        even if the answer starts with white space that the tokenizer would merge with the header's newline.
        """
        mode = self.mode(turn)
        text, head = self.text(turn + 1, mode), len(self.text(turn, mode, prompt=True))
        is_last_cut = any(start >= head for start, _ in spans)
        return self._pieces(text, self._starts(text, turn + (not is_last_cut)), spans)

    def _starts(self, text: str, turns: int) -> list[int]:
        """Where the assistant began to speak in earlier turns."""
        bare = True if self.knows_thinking else None  # earlier turns are shown without thinking
        heads = [self.text(i, bare, prompt=True) for i in range(1, turns) if self.messages[i]["role"] == "assistant"]
        return [len(head) for head in heads if text.startswith(head)]

    def _pieces(self, text: str, starts: list[int], spans: list[tuple[int, int]]) -> list[Piece]:
        """A text that is cut at `starts` and at both ends of the trained `spans`."""
        cuts = sorted({0, len(text), *starts, *(edge for span in spans for edge in span)})
        return [(text[start:end], any(a <= start and end <= b for a, b in spans))
                for start, end in zip(cuts[:-1], cuts[1:], strict=True)]  # fmt: skip

    def example(self, pieces: Sequence[Piece]) -> Example:
        """Ids and mask of a text in pieces, each encoded by itself."""
        encoded = [(self.encode(text, i > 0), kept) for i, (text, kept) in enumerate(pieces)]
        return Example([i for ids, _ in encoded for i in ids], [kept for ids, kept in encoded for _ in ids])

    def shown(self, text: str) -> str:
        """Template text with the typed control tokens that are hidden in it."""
        return re.sub("[\U000f0000-\U000ffffd]", lambda found: self.typed.get(found[0], found[0]), text)

    def encode(self, text: str, is_later: bool = False) -> list[int]:
        """Template text → ids: control tokens where the template or the assistant put them, everything else as text."""
        if self.joins and is_later:  # as it is encoded behind something: a newline, which is taken off again
            return self.encode("\n" + text)[len(self.encode("\n")) :]
        if not any(stand_in in text for stand_in in self.hidden.values()):
            return self.tokenizer(text, add_special_tokens=False).input_ids
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, self.control))})", text):
            if piece in self.hidden:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += encode_plain(self.tokenizer, self.shown(piece))
        return ids

    def _difference(self, turn: int, prompt: str, whole: str) -> str:
        at = len(os.path.commonprefix([prompt, whole]))
        before, asked, written = prompt[max(0, at - 20) : at], prompt[at : at + 20], whole[at : at + 20]
        hint = "give its answer the thinking that the prompt opens" if OPEN in asked else "try thinking=True or False"
        return (
            f"the prompt of turn {turn} must be a prefix of the conversation, but after {before!r} the prompt goes on "
            f"with {asked!r} and the whole with {written!r}: this chat template cannot be trained on as it is ({hint})"
        )


def joins_words(tokenizer) -> bool:
    """Whether a text is encoded with a blank before it that is not there, as SentencePiece does at its beginning."""
    backend = tokenizer.backend_tokenizer
    return "Prepend(" in str(backend.normalizer) or "Metaspace(" in str(backend.pre_tokenizer)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text → ids as if the tokenizer had no added tokens at all: `<|im_end|>` becomes its letters and signs."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return [token.id for word, _ in words for token in backend.model.tokenize(word)]
