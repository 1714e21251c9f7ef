"""Loss masks against TRL's own training templates on real Qwen tokenizers, over conversations nobody would write.

TRL trains a little more than this lab, by design: on Qwen2.5 the newline before the content and the one after
`<|im_end|>`, on Qwen3 the latter and the think block, inserted or not. Everything else must be the same text, and the
same ids wherever both tokenise the same pieces.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab.rows.chat import render_chat, render_prompt
from qftlab.rows.tokenizer import load_tokenizer

trl = pytest.importorskip("trl")
from trl.chat_template_utils import get_training_chat_template, qwen2_5_training_chat_template  # noqa: E402

CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "</tool_call>", "<|im_end|>\n<|im_start|>assistant\n")
NAMES = ("qwen2.5-0.5b", "qwen2.5-0.5b-instruct", "qwen3-0.6b")

plain = st.text(alphabet=st.characters(exclude_categories=("Cs", "Co", "Cn")), max_size=24)
content = st.one_of(plain, st.sampled_from(["", "\n", " 4", "\n\nx", "é̀ 你好 👩‍🚀", "#", *CONTROL]))
call = st.builds(
    lambda name, value: {"type": "function", "function": {"name": name, "arguments": {"x": value}}},
    st.sampled_from(["add", "look_up"]),
    content,
)


def assistant(*, with_tools: bool) -> st.SearchStrategy:
    """An assistant's turn: words, or (content None, empty or words) with one or two tool calls."""
    said = st.builds(lambda text: {"role": "assistant", "content": text}, content)
    called = st.builds(
        lambda text, calls: {"role": "assistant", "content": text, "tool_calls": calls},
        st.one_of(st.none(), content),
        st.lists(call, min_size=1, max_size=2),
    )
    return st.one_of(said, called) if with_tools else said


@st.composite
def chats(draw, *, with_tools: bool = True) -> list[dict]:
    """Perhaps a system turn, then user (or tool) and assistant turns."""
    chat = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 3))):
        after_call = number and chat[-1].get("tool_calls")
        chat.append({"role": "tool" if after_call else "user", "content": draw(content)})
        chat.append(draw(assistant(with_tools=with_tools)))
    return chat


@cache
def loaded(folder):
    """A tokenizer and TRL's training template for it; made once, hypothesis asks often."""
    tokenizer = load_tokenizer(folder)
    if folder.name == "qwen2.5-0.5b":  # TRL refuses the base model's: its default system prompt has one sentence less
        return tokenizer, qwen2_5_training_chat_template.replace("You are Qwen, created by Alibaba Cloud. ", "")
    return tokenizer, get_training_chat_template(tokenizer)


def spans(ids, mask) -> list[list[int]]:
    """The trained stretches of a row."""
    found, inside = [], False
    for token, kept in zip(ids, mask, strict=True):
        if kept:
            found[-1:] = [[*found[-1], token]] if inside else [*found[-1:], [token]]
        inside = bool(kept)
    return found


def theirs(tokenizer, template, chat) -> tuple[list[int], list[int]]:
    """Ids and mask by TRL's template; where the template reads content as text, None is the empty one."""
    chat = [{**m, "content": m["content"] or ""} for m in chat]
    out = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(out["input_ids"]), list(out["assistant_masks"])


def says(message: dict) -> bool:
    """Whether there is something in a turn to be trained; TRL trains the end of an empty one, alone."""
    return bool((message["content"] or "").strip() or message.get("tool_calls"))


def same(text: str) -> str:
    """Text in the one form in which Qwen's tokenizers read it."""
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", NAMES[:2])
@given(chat=chats())
def test_qwen2_5_masks_are_trl_s_but_for_the_two_newlines(real_data, name, chat):
    tokenizer, template = loaded(real_data / name)
    (ours,) = render_chat(tokenizer, chat)
    ids, mask = theirs(tokenizer, template, chat)
    mine = [tokenizer.decode(span) for span in spans(ours.input_ids, ours.loss_mask)]
    trl_s = [tokenizer.decode(span) for span in spans(ids, mask)]
    wanted = [text for text in trl_s if text.strip() != "<|im_end|>"]
    assert [same(f"\n{text}\n") for text in mine] == [same(text) for text in wanted]
    assert len(mine) == sum(m["role"] == "assistant" and says(m) for m in chat)
    assert same(tokenizer.decode(ours.input_ids)) == same(tokenizer.decode(ids))
    texts = [str(m["content"]) + str(m.get("tool_calls", "")) for m in chat]
    if not any(text[:1].isspace() for text in texts) and not any(word in t for t in texts for word in CONTROL):
        assert ours.input_ids == ids
        extra = {tokenizer.decode([i]) for i, a, b in zip(ids, ours.loss_mask, mask, strict=True) if a != bool(b)}
        assert extra == {"\n"} | ({"<|im_end|>"} if len(mine) < len(trl_s) else set())


@given(chat=chats())
def test_qwen3_masks_are_trl_s_but_for_the_newline_and_the_think_block(real_data, chat):
    """Turn by turn, each as the last: TRL keeps the think blocks of earlier turns, Qwen3's own template drops them."""
    tokenizer, template = loaded(real_data / "qwen3-0.6b")
    rows = render_chat(tokenizer, chat)
    turns = [i for i, m in enumerate(chat) if m["role"] == "assistant" and says(m)]
    if not turns:
        assert [sum(row.loss_mask) for row in rows] == [0]
        return
    last = rows[-1]
    mine = tokenizer.decode(spans(last.input_ids, last.loss_mask)[-1])
    trl_s = tokenizer.decode(spans(*theirs(tokenizer, template, chat[: turns[-1] + 1]))[-1])
    assert same("<think>\n\n</think>\n\n" + mine + "\n") == same(trl_s)
    assert all(len(spans(row.input_ids, row.loss_mask)) == 1 for row in rows) or len(rows) == 1


@pytest.mark.parametrize("name", NAMES)
@given(chat=chats())
def test_typed_control_tokens_stay_text_in_every_role_and_in_tool_calls(real_data, name, chat):
    tokenizer, _ = loaded(real_data / name)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for row in render_chat(tokenizer, chat):
        assert row.input_ids.count(start) == row.input_ids.count(end)
        bounds = [i for i in row.input_ids if i in (start, end)]
        assert bounds == [start, end] * (len(bounds) // 2)  # a turn opens, a turn closes, and nothing in between
        assert tokenizer.convert_tokens_to_ids("<|endoftext|>") not in row.input_ids
        assert all(span[-1] == end for span in spans(row.input_ids, row.loss_mask))


@pytest.mark.parametrize("name", NAMES)
@given(chat=chats())
def test_every_prompt_is_a_prefix_of_what_is_trained(real_data, name, chat):
    tokenizer, _ = loaded(real_data / name)
    turns = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    rows = render_chat(tokenizer, chat)
    if tokenizer.decode(rows[0].input_ids).count(
        "<think>"
    ):  # Qwen3 rewrites earlier turns: a row for each that is trained
        turns = [i for i in turns if says(chat[i])] or turns[-1:]
    prompts = [render_prompt(tokenizer, chat[:i]) for i in turns]
    if len(rows) == 1:
        rows = rows * len(turns)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.input_ids[: len(prompt)] == prompt and not row.loss_mask[len(prompt) - 1]


def test_a_tool_call_is_trained_as_the_template_writes_it(real_data):
    """By hand: content None, a typed control token in an argument, a tool's answer that tries to end the turn."""
    tokenizer, _ = loaded(real_data / "qwen2.5-0.5b")
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>", "b": 2}}}]
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3<|im_end|>"},
        {"role": "assistant", "content": "three"},
    ]
    (row,) = render_chat(tokenizer, chat)
    said = '<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>", "b": 2}}\n</tool_call><|im_end|>'
    found = spans(row.input_ids, row.loss_mask)
    assert [tokenizer.decode(span) for span in found] == [said, "three<|im_end|>"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [span.count(end) for span in found] == [1, 1]
    assert row.input_ids.count(end) == 5  # system, user, call, tool, answer
    assert chat[1]["tool_calls"] is calls and calls[0]["function"]["arguments"]["a"] == "<|im_end|>"


def test_a_template_that_would_drop_tool_calls_is_refused():
    tokenizer = load_tokenizer("tiny")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match="chat template without tool_calls"):
        render_chat(tokenizer, [{"role": "user", "content": "q"}, call])


def test_half_a_surrogate_pair_in_a_tool_call_is_refused(real_data):
    tokenizer, _ = loaded(real_data / "qwen2.5-0.5b")
    calls = [{"function": {"name": "f", "arguments": {"x": "\ud800"}}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    with pytest.raises(ValueError, match="turn 2 holds half a surrogate pair"):
        render_chat(tokenizer, [{"role": "user", "content": "q"}, call])
