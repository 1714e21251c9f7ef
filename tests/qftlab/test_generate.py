"""The engine: a batch gives what its rows give alone, greedy is what transformers says, stops are found and trimmed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qftlab.decoding import engine
from qftlab.decoding.engine import Completion, continuation_text, default_stop_ids, find_stop, generate
from qftlab.maths.sampling import SamplingParams
from qftlab.model.attention import register_packed_attention

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}
MODES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AGENT|>", "<|EDIT|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer: id = place of the byte, two merges, and five special tokens; 263 entries, under 300 rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"th": 256, "the": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=MODES[0], pad_token=MODES[0])
    fast.add_special_tokens({"extra_special_tokens": list(MODES[1:])}, replace_extra_special_tokens=False)
    fast.chat_template = TEMPLATE
    assert len(fast) == 263
    return fast


def make_model(family: str, seed: int = 0, attention: str = "sdpa", **changes):
    kind, config, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = kind(config(**SHAPE | extra | {"initializer_range": 0.3} | changes)).eval()
    model.set_attn_implementation(register_packed_attention() if attention == "packed" else attention)
    return model


PROMPTS = [[5], [40, 41, 42, 43, 44, 45, 46], [7, 8], [100] * 30, [60, 61, 62], [9, 1, 200, 31, 77]]


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_batch_is_one_by_one_is_transformers(family: str, attention: str, tied: bool, tokenizer) -> None:
    for seed in range(3):
        model = make_model(family, seed, attention, tie_word_embeddings=tied)
        # Two ids that a greedy run meets by chance end rows early, so that rows leave the batch.
        free = generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_token_ids=())
        stop_ids = [free[0].token_ids[6], free[3].token_ids[11]]
        batched = generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_token_ids=stop_ids)
        assert len({len(c.token_ids) for c in batched}) > 1, "the test needs rows of different lengths"
        for prompt, completion in zip(PROMPTS, batched, strict=True):
            alone = generate(model, tokenizer, [prompt], max_new_tokens=20, stop_token_ids=stop_ids)[0]
            assert alone == completion
            assert theirs(model, tokenizer, prompt, 20, eos_token_id=stop_ids) == completion.token_ids


def theirs(model, tokenizer, prompt: list[int], count: int, **options) -> list[int]:
    ids = torch.tensor([prompt])
    past = list(range(len(tokenizer), model.config.vocab_size)) or None
    options = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": past} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)[
        0, len(prompt) :
    ].tolist()


def test_repetition_penalty_is_transformers_over_the_prompt_and_not_the_padding(tokenizer) -> None:
    model = make_model("qwen2")
    params = SamplingParams(temperature=0.0, repetition_penalty=1.4)
    prompts = [*PROMPTS, [0, 0, 3]]  # id 0 fills the padding, and is penalised only where a prompt holds it
    completions = generate(model, tokenizer, prompts, max_new_tokens=20, params=params, stop_token_ids=())
    for prompt, completion in zip(prompts, completions, strict=True):
        assert theirs(model, tokenizer, prompt, 20, repetition_penalty=1.4) == completion.token_ids


def test_logprobs_are_those_of_a_whole_pass(tokenizer) -> None:
    """Against one uncached, unpadded pass in float64; 2e-5 nats is the fp32 error of a 37-token pass."""
    model = make_model("qwen3")
    for temperature in (0.0, 0.7, 1.3):
        done = generate(model, tokenizer, PROMPTS, max_new_tokens=16, params=SamplingParams(temperature=temperature),
                        stop_token_ids=(), return_logprobs=True, num_generations=2)  # fmt: skip
        double = make_model("qwen3").double()
        for c in done:
            with torch.no_grad():
                logits = double(torch.tensor([c.prompt_ids + c.token_ids])).logits[0, len(c.prompt_ids) - 1 : -1]
            want = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(c.logprobs, dtype=torch.float64), want, atol=2e-5, rtol=0)


def test_a_rows_sample_does_not_depend_on_its_batch(tokenizer) -> None:
    model = make_model("llama")
    options = {"max_new_tokens": 12, "params": SamplingParams(temperature=1.0), "num_generations": 4, "seed": 3}
    whole = generate(model, tokenizer, PROMPTS, batch_size=64, **options)
    assert generate(model, tokenizer, PROMPTS, batch_size=1, **options) == whole
    assert generate(model, tokenizer, PROMPTS, batch_size=5, **options) == whole
    assert generate(model, tokenizer, PROMPTS[:2], **options) == whole[:8]
    assert generate(model, tokenizer, PROMPTS, **options | {"seed": 4}) != whole
    assert len({tuple(c.token_ids) for c in whole[:4]}) == 4, "generations of one prompt differ"
    assert [c.prompt_ids for c in whole] == [p for p in PROMPTS for _ in range(4)], "in the order of the prompts"


def test_samples_follow_the_distribution(tokenizer) -> None:
    """4,000 first tokens against the softmax: total variation under 0.05 (expected about 0.03 for 20 likely tokens)."""
    model = make_model("qwen2", initializer_range=0.6)
    params = SamplingParams(temperature=1.0, top_k=20)
    done = generate(model, tokenizer, [[5, 6]], max_new_tokens=1, params=params, num_generations=4000, batch_size=4000)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in done]), minlength=300) / 4000
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    logits[len(tokenizer) :] = -torch.inf
    logits[logits < logits.topk(20).values[-1]] = -torch.inf
    assert (counts - logits.softmax(-1)).abs().sum() / 2 < 0.05


def test_ids_past_the_tokenizer_are_never_produced(tokenizer) -> None:
    model = make_model("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
        model.lm_head.weight[263:] = 5 * hidden  # the padded rows shout
    for temperature in (0.0, 2.0):
        done = generate(
            model,
            tokenizer,
            PROMPTS,
            params=SamplingParams(temperature=temperature),
            max_new_tokens=20,
            num_generations=3,
        )
        assert max(max(c.token_ids) for c in done) < 263


class Script:
    """Forces a model to say given tokens, whatever the prompt: a forward hook on its head that rewrites the logits."""

    def __init__(self, model, token_ids: list[int]) -> None:
        self.token_ids, self.step = token_ids, 0
        self.handle = model.get_output_embeddings().register_forward_hook(self.hook)

    def hook(self, module, args, logits):
        wanted = self.token_ids[min(self.step, len(self.token_ids) - 1)]
        logits = torch.zeros_like(logits)
        logits[:, wanted] = 50.0
        self.step += 1
        return logits


def say(tokenizer, text: str, prompt: str | list = "Hi", **options) -> Completion:
    model = make_model("qwen2", max_position_embeddings=512)
    Script(model, tokenizer(text).input_ids)
    return generate(model, tokenizer, [prompt], **{"max_new_tokens": 60} | options)[0]


def test_stop_tokens_end_the_text_but_stay_in_the_ids(tokenizer) -> None:
    done = say(tokenizer, "<|AGENT|>run it<|im_end|>\n<|im_start|>user")
    assert (done.text, done.finish_reason) == ("<|AGENT|>run it", "stop")
    assert tokenizer.decode(done.token_ids) == "<|AGENT|>run it<|im_end|>"
    done = say(tokenizer, "<|im_end|>")
    assert (done.text, len(done.token_ids)) == ("", 1)
    done = say(tokenizer, "abc<|im_end|>", stop_token_ids=(), max_new_tokens=4)
    assert (done.text, done.finish_reason) == ("abc<|im_end|>", "length"), "not a stop token, so part of the text"
    done = say(tokenizer, "ab" * 9, max_new_tokens=5)
    assert (done.text, done.finish_reason, len(done.token_ids)) == ("ababa", "length", 5)


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("One.\nUser: two", "\nUser:", "One."),  # spans seven tokens
        ("Say the end", "e e", "Say th"),  # ends inside what follows the token "the"
        ("at the end", ["he"], "at t"),  # begins inside the token "the"
        ("at the end", ["zz", "end", "the"], "at "),  # the earliest
        ("at the end", ["he", "the"], "at "),  # one token ends both: the earlier beginning counts
        ("the", ("the",), ""),
        ("naïve café", ["é"], "naïve caf"),  # two bytes, two tokens
        ("日本語", ["本語"], "日"),
        ("🙂🙃", ["🙃"], "🙂"),
        ("a<|EDIT|>b", ["<|EDIT|>"], "a"),
        ("a\n\nb", ["\n\n"], "a"),
        ("aXXb", ["XX"], "a"),
    ],
)
def test_stop_strings_across_token_borders(tokenizer, text: str, stop, want: str) -> None:
    done = say(tokenizer, text + " and more" * 3, stop=stop)
    assert (done.text, done.finish_reason) == (want, "stop")
    assert len(tokenizer.decode(done.token_ids)) <= len(text), "stopped as soon as it could"


def test_a_stop_string_in_the_prompt_does_not_count(tokenizer) -> None:
    assert say(tokenizer, "nd of it. END", "the E", stop="END").text == "nd of it. "
    assert find_stop(tokenizer, tokenizer("ab").input_ids, tokenizer("cd").input_ids, ("bc",)) is None
    assert find_stop(tokenizer, [5], [6], ()) is None


def test_rows_stop_one_by_one(tokenizer) -> None:
    """Stop strings and rows that leave the batch, together, against each row alone."""
    model = make_model("qwen3", 1)
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=24, stop_token_ids=())
    stops = sorted(
        {c.text[k : k + 2] for c, k in zip(free, (2, 5, 9, 14, 3, 6), strict=True) if "\ufffd" not in c.text[k : k + 2]}
    )
    batched = generate(model, tokenizer, PROMPTS, max_new_tokens=24, stop_token_ids=(), stop=stops)
    for whole, done in zip(free, batched, strict=True):
        assert (
            done == generate(model, tokenizer, [done.prompt_ids], max_new_tokens=24, stop_token_ids=(), stop=stops)[0]
        )
        assert whole.token_ids[: len(done.token_ids)] == done.token_ids
        assert done.finish_reason == "length" or not any(s in done.text for s in stops)


def test_prompts_of_three_kinds(tokenizer) -> None:
    model = make_model("qwen2")
    messages = [{"role": "user", "content": "Hi"}]
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    done = generate(model, tokenizer, ["Hi", messages, [1, 2]], max_new_tokens=2)
    assert [c.prompt_ids for c in done] == [tokenizer("Hi").input_ids, tokenizer(chat).input_ids, [1, 2]]
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("Hi", {}, TypeError, r"prompts must be a list of prompts, got str: write \[prompt\]"),
        ([1, 2], {}, TypeError, r"write \[prompt\]"),
        ([{"role": "user", "content": "Hi"}], {}, TypeError, r"write \[prompt\]"),
        (["Hi", 3.5], {}, TypeError, r"prompts\[1\] must be a str, a list of messages or a list of ids, got 3.5"),
        (["Hi", ""], {}, ValueError, r"prompts\[1\] must have at least one token"),
        ([[]], {}, ValueError, "at least one token"),
        ([[1, 300]], {}, ValueError, r"prompts\[0\] must hold ids from 0 to 299.*got 300"),
        ([[1, -1]], {}, ValueError, "got -1"),
        ([[1] * 100], {"max_new_tokens": 29}, ValueError, r"context of 128 tokens, got 100 in prompts\[0\] \+ 29 new"),
        (["Hi"], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (["Hi"], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (["Hi"], {"num_generations": 0}, ValueError, "num_generations must be at least 1, got 0"),
        (["Hi"], {"stop": ("a", "")}, ValueError, "stop strings must not be empty"),
        (["Hi"], {"stop_words": ("a",)}, TypeError, "stop_words"),
    ],
)
def test_errors_say_what_is_wrong(tokenizer, prompts, options, error, message) -> None:
    with pytest.raises(error, match=message):
        generate(make_model("qwen2"), tokenizer, prompts, **options)


def test_the_context_can_be_filled(tokenizer) -> None:
    done = generate(make_model("qwen2"), tokenizer, [[1] * 100], max_new_tokens=28, stop_token_ids=())
    assert len(done[0].token_ids) == 28


def test_training_flags_and_gradients_are_left_alone(tokenizer) -> None:
    model = make_model("qwen2")
    model.train()
    model.model.layers[0].eval()
    found = [m.training for m in model.modules()]
    generate(model, tokenizer, ["Hi"], max_new_tokens=2)
    assert [m.training for m in model.modules()] == found
    with pytest.raises(ValueError):
        generate(model, tokenizer, ["x" * 500])
    assert [m.training for m in model.modules()] == found
    assert torch.is_grad_enabled()
    model(torch.tensor([[1, 2]])).logits.sum().backward()  # nothing kept from decoding stands in the way


def test_out_of_memory_halves_the_batch(tokenizer, monkeypatch, caplog) -> None:
    model, decode, sizes = make_model("qwen2"), engine._decode, []

    def small(decoder, batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("too many rows")
        return decode(decoder, batch)

    want = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr(engine, "_decode", small)
    with caplog.at_level(logging.WARNING):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == want
    assert sizes == [6, 3, 3]
    assert [r.getMessage() for r in caplog.records] == ["out of memory with 6 rows a batch: going on with 3"]
    monkeypatch.setattr(engine, "_decode", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, tokenizer, PROMPTS, max_new_tokens=8)


def test_default_stop_ids(tokenizer) -> None:
    model = make_model("qwen2")
    assert default_stop_ids(model, tokenizer) == [258, 260]  # <|endoftext|> and <|im_end|>
    model.generation_config.eos_token_id = [7, 260]
    assert default_stop_ids(model, tokenizer) == [7, 258, 260]


def test_text_continues_the_prompt(tokenizer) -> None:
    ids = tokenizer("é").input_ids
    assert len(ids) == 2
    assert continuation_text(tokenizer, [1], ids) == "é"
    assert continuation_text(tokenizer, [1], []) == ""
    assert continuation_text(tokenizer, ids[:1], ids[1:]) == "\ufffd", "a prompt that ends inside a character"


def test_the_real_llama_matches_transformers(real_data: Path) -> None:
    folder = real_data / "tinylm" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [
        "Once upon a time",
        "Lily",
        "The big dog was very sad because",
        "One day, Tom and his mom went to the park.",
    ]
    batched = generate(model, tokenizer, prompts, max_new_tokens=60)
    for prompt, completion in zip(prompts, batched, strict=True):
        assert generate(model, tokenizer, [prompt], max_new_tokens=60)[0] == completion
        assert theirs(model, tokenizer, completion.prompt_ids, 60) == completion.token_ids
        whole = tokenizer.decode(completion.prompt_ids + completion.token_ids, skip_special_tokens=True)
        assert whole.startswith(prompt) and whole == prompt + completion.text
    stopped = generate(model, tokenizer, prompts, max_new_tokens=60, stop=".")
    for whole, done in zip(batched, stopped, strict=True):
        assert done.text == whole.text.split(".")[0]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"params": {"temperature": 1.0}}, TypeError, "params must be SamplingParams"),
        ({"stop": [5]}, TypeError, r"stop must be texts, got \(5,\): ids go to stop_token_ids"),
        ({"stop_token_ids": ["<|im_end|>"]}, ValueError, "stop_token_ids must be ids from 0 to 299, got '<|im_end|>'"),
        ({"stop_token_ids": [10**7]}, ValueError, "stop_token_ids must be ids from 0 to 299, got 10000000"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be a whole number, or one for each prompt, got 2.5"),
    ],
)
def test_options_of_another_kind_are_refused(tokenizer, options, error, message) -> None:
    with pytest.raises(error, match=message.replace("|", "[|]")):
        generate(make_model("qwen2"), tokenizer, ["Hi"], **{"max_new_tokens": 4} | options)


def test_the_blank_before_a_word_is_kept_where_decoding_drops_it() -> None:
    """Llama's tokenizers decode the first word of a text without the blank that its token holds.

    Nor is a blank before a full stop cleaned away, which transformers does where it is asked to.
    """
    words = ["\u2581so", "\u2581it", "\u2581is", "\u2581a .", "\u2581world", "!", "\u2581."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="!"))
    backend.decoder = decoders.Metaspace()
    llama = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert llama.decode([4]) == "world" and llama.decode([0, 4]) == "so world"
    assert llama.decode([0, 6], clean_up_tokenization_spaces=True) == "so."
    for prompt in ([0], [0, 1], [2, 1, 0], [0, 1, 2, 3]):
        assert continuation_text(llama, prompt, [4, 5, 6, 4]) == " world! . world"
    assert continuation_text(llama, [], [4, 5]) == "world!"
    assert find_stop(llama, [2, 1, 0], [4, 5, 4], ("world",)) == 1 and find_stop(llama, [0], [4], (" world",)) == 0
