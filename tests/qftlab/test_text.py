"""Tokenizers and chats on real Qwen files: ids, masks, prefixes, and text that is only text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab.rows.chat import encode_plain, render_chat, render_prompt
from qftlab.rows.schemas import row_to_messages
from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer

REAL = ("qwen2.5-0.5b", "qwen2.5-0.5b-instruct", "qwen3-0.6b")
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"},
]  # fmt: skip


@pytest.fixture(scope="module", params=("tiny", *REAL))
def tokenizer(request):
    if request.param == "tiny":
        return load_tokenizer("tiny")
    return load_tokenizer(request.getfixturevalue("real_data") / request.param)


def shown(tokenizer, rendered) -> list[str]:
    pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    return [tokenizer.decode([token]) for token, kept in pairs if kept]


@pytest.mark.parametrize("name", REAL)
def test_real_qwen_ids(real_data, name):
    tokenizer = load_tokenizer(real_data / name)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [151643, 151644, 151645] and tokenizer("\n").input_ids == [198]
    extra = set(tokenizer.get_added_vocab())
    report = extend_tokenizer(tokenizer)
    assert [t.id for t in report.tokens] == [report.len_before, report.len_before + 1]
    assert report.len_before == (151669 if name.startswith("qwen3") else 151665)
    assert extra < set(tokenizer.get_added_vocab())
    assert [len(t.pieces_before) for t in report.tokens] == [5, 5]
    assert not extend_tokenizer(tokenizer).new
    assert tokenizer("<|AGENT|>x").input_ids[0] == report.tokens[0].id


def test_extending_tiny_is_idempotent_and_survives_saving(tmp_path):
    tokenizer = load_tokenizer("tiny")
    report = extend_tokenizer(tokenizer)
    assert (report.len_before, report.len_after) == (1000, 1002) and all(t.is_new for t in report.tokens)
    assert len(report.tokens[0].pieces_before) > 4
    assert extend_tokenizer(tokenizer).len_after == 1002
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("<|EDIT|> 12").input_ids == tokenizer("<|EDIT|> 12").input_ids
    assert again.chat_template == tokenizer.chat_template


def test_tokenizer_errors_name_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_tokenizer("./nowhere/at/all")
    for bad in (("",), ("a b",), ("<x>", "<x>")):
        with pytest.raises(ValueError, match="tokens must"):
            extend_tokenizer(load_tokenizer("tiny"), bad)


def test_only_the_answers_and_their_end_are_trained(tokenizer):
    rendered = render_chat(tokenizer, CHAT)
    if len(rendered) == 2:  # Qwen3 rewrites history: one row a turn
        assert [shown(tokenizer, r) for r in rendered] == [["4", "<|im_end|>"], ["6", "<|im_end|>"]]
    else:
        assert shown(tokenizer, rendered[0]) == ["4", "<|im_end|>", "6", "<|im_end|>"]
    last = render_chat(tokenizer, CHAT, train_on="last")
    assert [shown(tokenizer, r) for r in last] == [["6", "<|im_end|>"]]


def test_ids_are_the_template_s_own(tokenizer):
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert render_chat(tokenizer, CHAT, train_on="last")[0].input_ids == tokenizer(whole).input_ids
    prompt = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert render_prompt(tokenizer, CHAT[:3]) == tokenizer(prompt).input_ids


@pytest.mark.parametrize("name", REAL)
def test_masks_equal_trl_s_but_for_newlines_and_the_inserted_think_block(real_data, name):
    """TRL's training templates also train the newlines around an answer and the think block the template puts in.

    Answers that begin with white space are left out: there TRL lets the tokenizer merge it with the header's newline,
    and its prompt is then no prefix.
    """
    trl = pytest.importorskip("trl")
    tokenizer, is_qwen3 = load_tokenizer(real_data / name), name.startswith("qwen3")
    file = "qwen3_training.jinja" if is_qwen3 else "qwen2_5_training.jinja"
    template = (Path(trl.__file__).parent / "chat_templates" / file).read_text(encoding="utf-8")
    said = ["hi", "a <b> c", "你好 é", "def f():\n    return 1\n", "line\n", "x " * 9, "#", "1 + 1 = 2", ""]
    rng, differing = random.Random(0), set()
    for _ in range(100):
        chat = [{"role": "system", "content": rng.choice(said)}]
        for _ in range(1 if is_qwen3 else rng.randint(1, 3)):
            chat += [{"role": "user", "content": rng.choice(said)}, {"role": "assistant", "content": rng.choice(said)}]
        theirs = tokenizer.apply_chat_template(
            chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = render_chat(tokenizer, chat)[-1]
        assert ours.input_ids == list(theirs["input_ids"])
        for token, kept, their in zip(ours.input_ids, ours.loss_mask, theirs["assistant_masks"], strict=True):
            if kept != bool(their):
                differing.add((tokenizer.decode([token]), kept))
    inserted = {("<think>", False), ("</think>", False), ("\n\n", False)} if is_qwen3 else set()
    assert differing == {("\n", False), ("<|im_end|>", False)} | inserted  # the end of an answer that says nothing


@pytest.mark.parametrize("thinking", [None, True, False])
def test_qwen3_thinking_block_of_the_template_is_not_trained(real_data, thinking):
    tokenizer = load_tokenizer(real_data / "qwen3-0.6b")
    if thinking:
        with pytest.raises(ValueError, match="turn 2 .*it has no thinking, which its prompt asks for"):
            render_chat(tokenizer, CHAT[:2], thinking=True)
    else:
        rendered = render_chat(tokenizer, CHAT[:2], thinking=thinking)[0]
        assert "<think>" in tokenizer.decode(rendered.input_ids)
        assert shown(tokenizer, rendered) == ["4", "<|im_end|>"]
        asked = render_prompt(tokenizer, CHAT[:1], thinking=False)
        assert rendered.input_ids[: rendered.loss_mask.index(True)] == asked
    own = [CHAT[0], {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}]
    if thinking is not False:
        assert "".join(shown(tokenizer, render_chat(tokenizer, own, thinking=thinking)[0])).startswith("<think>\neasy")
        empty = [CHAT[0], {"role": "assistant", "content": "<think>\n\n</think>\n\n4"}]
        assert shown(tokenizer, render_chat(tokenizer, empty, thinking=thinking)[0])[0] == "<think>", "its own words"


def test_base_qwen_adds_its_default_system_prompt_untrained(real_data):
    tokenizer = load_tokenizer(real_data / "qwen2.5-0.5b")
    rendered = render_chat(tokenizer, CHAT[:2])[0]
    assert "You are a helpful assistant" in tokenizer.decode(rendered.input_ids)
    assert shown(tokenizer, rendered) == ["4", "<|im_end|>"]


def test_typed_control_tokens_stay_text(tokenizer):
    extend_tokenizer(tokenizer)
    typed = "a <|im_end|> b <|AGENT|> <|endoftext|>"
    chat = [{"role": "user", "content": typed}, {"role": "assistant", "content": "<|AGENT|>look <|im_end|>"}]
    rendered = render_chat(tokenizer, chat)[0]
    end, agent = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|AGENT|>"])
    turns = 3 if "system" in tokenizer.decode(rendered.input_ids[:5]) else 2
    assert rendered.input_ids.count(end) == turns and rendered.input_ids.count(agent) == 1
    assert rendered.input_ids[rendered.loss_mask.index(True)] == agent
    whole = tokenizer.decode(rendered.input_ids)
    assert typed in whole and "look <|im_end|><|im_end|>" in whole
    assert tokenizer.decode(encode_plain(tokenizer, typed)) == typed


def test_typed_control_tokens_stay_text_beside_private_characters():
    """Those stand in for them; as many as there are tokens are enough, and with fewer a chat is refused."""
    tokenizer = load_tokenizer("tiny")
    control = list(tokenizer.get_added_vocab())
    private = "".join(map(chr, range(0xF0000, 0xFFFFD)))
    found, plain = (render_prompt(tokenizer, [{"role": "user", "content": content}])
                    for content in (private[: -len(control)] + "".join(control), "x"))  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids(control)
    assert list(map(found.count, ids)) == list(map(plain.count, ids))
    with pytest.raises(ValueError, match=r"messages must leave 3 of U\+F0000-U\+FFFFC free, got 2"):
        render_prompt(tokenizer, [{"role": "user", "content": private[:-2]}])


text = st.text(alphabet=st.characters(exclude_categories=("Cs", "Co")), max_size=30)
awkward = ["", "\n", "\n\n x", " <|im_end|>", "<|im_start|>user\n", "<think>", "é̀ 你好 👩‍🚀"]
typed_text = st.one_of(text, st.sampled_from(awkward))


@given(st.lists(st.tuples(typed_text, typed_text), min_size=1, max_size=3))
def test_any_conversation_round_trips_and_prompts_are_prefixes(pairs):
    tokenizer = load_tokenizer("tiny")
    chat = [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    rendered = render_chat(tokenizer, chat)
    assert len(rendered) == 1
    ids = rendered[0].input_ids
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert normal(tokenizer.decode(ids)) == normal(tokenizer.apply_chat_template(chat, tokenize=False))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == len(chat)
    for turn in range(1, len(chat), 2):
        prompt = render_prompt(tokenizer, chat[:turn])
        assert ids[: len(prompt)] == prompt and not rendered[0].loss_mask[len(prompt) - 1]
        assert rendered[0].loss_mask[len(prompt)] == bool(chat[turn]["content"].strip())


def test_naughty_strings_round_trip(real_data, tokenizer):
    for line in json.loads((real_data / "naughty_strings" / "blns.json").read_text(encoding="utf-8")):
        chat = [{"role": "user", "content": line}, {"role": "assistant", "content": "ok"}]
        rendered = render_chat(tokenizer, chat)[-1]
        assert shown(tokenizer, rendered)[-1] == "<|im_end|>" and "".join(shown(tokenizer, rendered)) == "ok<|im_end|>"


def test_chats_that_cannot_be_trained_are_refused():
    tokenizer = load_tokenizer("tiny")
    with pytest.raises(ValueError, match="assistant turn after a user turn"):
        render_chat(tokenizer, CHAT[:1])
    with pytest.raises(ValueError, match='train_on must be "all" or "last"'):
        render_chat(tokenizer, CHAT, train_on="first")
    for bad, message in (
        (
            {"role": "sytem", "content": "x"},
            "turn 1 must have a role among system, user, assistant, tool, or another name of one, got 'sytem'",
        ),
        ({"content": "x"}, "turn 1 must have role and content"),
        ({"role": "user", "content": 5}, "turn 1 must have a text as content, got 5"),
        ({"role": "user", "content": None}, "turn 1 must have a text as content, got None"),
        ({"role": "user", "content": "\ud800"}, "turn 1 holds half a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            render_chat(tokenizer, [bad, CHAT[1]])
        with pytest.raises(ValueError, match=message):
            render_prompt(tokenizer, [bad])
    with pytest.raises(ValueError, match=r"must be a list of turns, got \[\]"):
        render_prompt(tokenizer, [])
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="the prompt goes on with '1What is .*' and the whole with '2What is"):
        render_chat(tokenizer, CHAT[:2])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(tokenizer, CHAT)


def test_rows_become_messages():
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert row_to_messages(row) == [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
    assert row_to_messages({"messages": CHAT}) == CHAT
    with pytest.raises(ValueError, match="row must have a text 'instruction', or fit another schema"):
        row_to_messages({"text": "x"})
