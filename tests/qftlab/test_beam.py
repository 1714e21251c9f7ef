"""Beam search: numbers worked by hand on a Markov chain, transformers' scores, and what may not change a result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import random_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from qftlab.decoding import beam
from qftlab.decoding.beam import BeamHypothesis, BeamStep, beam_search
from qftlab.decoding.decoder import Decoder
from qftlab.decoding.engine import generate
from qftlab.maths.sampling import SamplingParams
from qftlab.rows.tokenizer import load_tokenizer

START, A, B, END, C, END_2 = range(6)
PROMPTS = ["Once upon a time", "7", "def f(x):\n    return", "Tom had a red ball and he"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def chain(size: int = 12, **rows: dict[int, float]) -> Qwen2ForCausalLM:
    """A real model that is a Markov chain: `row_i` holds the probabilities after token i, the rest is shared equally.

    Its one layer adds nothing, its embedding is one-hot, and the norm multiplies a one-hot line by sqrt(size).
    """
    config = Qwen2Config(
        vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-12,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    table = torch.full((size, size), 1 / size)  # (from, to)
    for name, given in rows.items():
        table[int(name[4:])] = (1 - sum(given.values())) / (size - len(given))
        for token, p in given.items():
            table[int(name[4:]), token] = p
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(table.log().T / math.sqrt(size))
    return model


def found(model, tokenizer, **options) -> list[tuple[list[int], float]]:
    done = beam_search(model, tokenizer, [[START]], **{"num_beams": 2, "stop_token_ids": [END]} | options)
    return [(d.token_ids, round(d.score, 4)) for d in done]


def test_two_beams_find_what_greedy_misses(tokenizer) -> None:
    """After START: A .5, B .4. After A the best is C with .3 (.15 in all); after B the end with .9 (.36 in all).

    Scores divide by the two tokens: ln(.36) / 2 = −0.5108, ln(.15) / 2 = −0.9486.
    """
    model = chain(row_0={A: 0.5, B: 0.4}, row_1={C: 0.3, END_2: 0.25}, row_2={END: 0.9})
    wide = found(model, tokenizer, max_new_tokens=2, num_return_sequences=2)
    assert wide == [([B, END], -0.5108), ([A, C], -0.9486)]
    assert found(model, tokenizer, max_new_tokens=2, num_beams=1) == [([A, C], -0.9486)]


@pytest.mark.parametrize(
    ("length_penalty", "wanted"),
    [
        (0.0, [([END], -1.0), ([B, END], -1.5)]),
        (1.0, [([B, END], -0.75), ([END], -1.0)]),
        (2.0, [([B, END], -0.375), ([END], -1.0)]),
        (-1.0, [([END], -1.0), ([B, END], -3.0)]),
    ],
)
def test_the_length_penalty_divides_by_generated_tokens(length_penalty: float, wanted: list, tokenizer) -> None:
    """The end at once: e^−1. B and then the end: .5 · .4463 = e^−1.5. The prompt's length does not count."""
    model = chain(row_0={END: math.exp(-1), B: 0.5}, row_2={END: math.exp(-1.5) / 0.5, A: 0.01})
    options = {"max_new_tokens": 8, "length_penalty": length_penalty, "num_return_sequences": 2}
    assert found(model, tokenizer, **options, early_stopping=True) == wanted
    longer = beam_search(model, tokenizer, [[A, C, START]], num_beams=2, stop_token_ids=[END], early_stopping=True,
                         **options)  # fmt: skip
    assert [(d.token_ids, round(d.score, 4)) for d in longer] == wanted


def test_never_goes_on_where_a_longer_answer_could_still_win(tokenizer) -> None:
    """Both ends come first (.4 and .3). Then B: .2 · .99⁵, which over six tokens is (ln .2 + 5 ln .99) / 6 = −0.2766.

    `False` compares ln(.2) / 1 = −1.61 with the worse of the two, ln(.3) = −1.204, and stops.
    """
    model = chain(row_0={END: 0.4, END_2: 0.3, B: 0.2}, row_2={B: 0.99})
    options = {"max_new_tokens": 6, "stop_token_ids": [END, END_2], "num_return_sequences": 2}
    ends = [([END], -0.9163), ([END_2], -1.204)]
    assert found(model, tokenizer, early_stopping=True, **options) == ends
    assert found(model, tokenizer, early_stopping=False, **options) == ends
    assert found(model, tokenizer, early_stopping="never", **options) == [([B] * 6, -0.2766), ends[0]]
    assert found(model, tokenizer, early_stopping="never", length_penalty=0.0, **options) == ends


def test_false_goes_on_where_ending_now_could_win(tokenizer) -> None:
    """END (.01) and END_2 (.98 · .02) fill the two places, while A B B … at .98 · .97 · .99ⁿ is better than both."""
    model = chain(row_0={A: 0.98, END: 0.01}, row_1={B: 0.97, END_2: 0.02}, row_2={B: 0.99})
    options = {"max_new_tokens": 5, "stop_token_ids": [END, END_2]}
    assert found(model, tokenizer, early_stopping=True, **options) == [([A, END_2], round(math.log(0.0196) / 2, 4))]
    wanted = (math.log(0.98 * 0.97) + 3 * math.log(0.99)) / 5
    assert found(model, tokenizer, early_stopping=False, **options) == [([A, B, B, B, B], round(wanted, 4))]


def test_only_the_best_candidates_may_end(tokenizer) -> None:
    """The end is third (.2) after A (.4) and B (.3): of two beams, it is no result, though nothing else ever ends."""
    model = chain(row_0={A: 0.4, B: 0.3, END: 0.2}, row_1={A: 0.9}, row_2={B: 0.9})
    for row in (1, 2):
        model.lm_head.weight.data[END, row] = -50.0
    steps: list[BeamStep] = []
    done = found(model, tokenizer, max_new_tokens=3, length_penalty=0.0, num_return_sequences=2, on_step=steps.append)
    assert [ids for ids, _ in done] == [[A, A, A], [B, B, B]]
    first = steps[0]
    assert first.tokens[:3] == [A, B, END] and first.is_finished == [False] * 4 and first.kept == [0, 1]
    assert [round(s, 4) for s in first.scores[:3]] == [-0.9163, -1.204, -1.6094]
    assert (steps[1].parents[:2], steps[1].tokens[:2], steps[1].kept) == ([0, 1], [A, B], [0, 1])
    assert steps[2].is_finished == [True, True, False, False] and steps[2].kept == []


def test_the_repetition_penalty_multiplies_logprobs_and_follows_the_beams(tokenizer) -> None:
    """START stands in the prompt: its ln(.7) counts twice, ln(.49), and B with .2 stays behind it; then both repeat."""
    model = chain(row_0={START: 0.7, B: 0.2}, row_2={B: 0.6, START: 0.3})
    steps: list[BeamStep] = []
    found(model, tokenizer, max_new_tokens=2, repetition_penalty=2.0, on_step=steps.append)
    assert [round(s, 4) for s in steps[0].scores[:2]] == [round(math.log(0.49), 4), round(math.log(0.2), 4)]
    second = dict(zip(zip(steps[1].parents, steps[1].tokens, strict=True), steps[1].logprobs, strict=True))
    assert second[0, START] == pytest.approx(2 * math.log(0.7), abs=1e-5)
    assert second[0, B] == pytest.approx(math.log(0.2), abs=1e-5), "no B in this beam yet"
    assert second[1, B] == pytest.approx(2 * math.log(0.6), abs=1e-5)


def test_scores_are_transformers_and_those_of_a_whole_pass(tokenizer) -> None:
    """Transformers' `sequences_scores`, and one uncached pass in float64; 1e-5 a nat is fp32's error over 12 tokens."""
    model = random_model("qwen3")
    model.set_attn_implementation("sdpa")
    ids = tokenizer(PROMPTS[0]).input_ids
    for penalty in (0.0, 1.0, -0.5):
        done = beam_search(model, tokenizer, [ids], max_new_tokens=12, num_return_sequences=4, stop_token_ids=(),
                           length_penalty=penalty)  # fmt: skip
        theirs = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), num_beams=4, num_return_sequences=4,
            max_new_tokens=12, length_penalty=penalty, return_dict_in_generate=True, output_scores=True,
            pad_token_id=1000, do_sample=False, suppress_tokens=list(range(1000, 1024)),
        )  # fmt: skip
        assert [d.token_ids for d in done] == theirs.sequences[:, len(ids) :].tolist()
        torch.testing.assert_close(torch.tensor([d.score for d in done]), theirs.sequences_scores, rtol=1e-5, atol=0)
        double = random_model("qwen3").double()
        for d in done:
            with torch.no_grad():
                logits = double(torch.tensor([d.prompt_ids + d.token_ids])).logits[0, len(ids) - 1 : -1]
            total = logits.log_softmax(-1).gather(1, torch.tensor(d.token_ids)[:, None]).sum().item()
            assert d.score == pytest.approx(total / 12**penalty, rel=1e-5)


def test_a_batch_is_its_prompts_one_by_one(tokenizer) -> None:
    model = random_model("qwen2")
    free = beam_search(model, tokenizer, PROMPTS[:1], max_new_tokens=10, stop_token_ids=(), num_return_sequences=4)
    options = {"max_new_tokens": 24, "num_return_sequences": 2, "early_stopping": True,
               "stop_token_ids": sorted({token for d in free for token in d.token_ids[3:6]})}  # fmt: skip
    steps: list[BeamStep] = []
    whole = beam_search(model, tokenizer, PROMPTS, on_step=steps.append, **options)
    assert len({sum(s.prompt == i for s in steps) for i in range(4)}) > 1, "the test needs prompts that leave early"
    for batch_size in (1, 8):
        assert_same(beam_search(model, tokenizer, PROMPTS, batch_size=batch_size, **options), whole)
    assert_same([d for prompt in PROMPTS for d in beam_search(model, tokenizer, [prompt], **options)], whole)
    assert_same(beam_search(model, tokenizer, PROMPTS, **options | {"num_return_sequences": 1}), whole[::2])
    assert [d.prompt_ids for d in whole] == [tokenizer(p).input_ids for p in PROMPTS for _ in range(2)]


def assert_same(ours: list[BeamHypothesis], others: list[BeamHypothesis]) -> None:
    """Equal but for fp32 rounding of the scores, which differs with the shape of a batch: 1e-5 of a nat."""
    for one, other in zip(ours, others, strict=True):
        assert replace(one, score=0.0) == replace(other, score=0.0)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_one_beam_is_greedy_decoding(tokenizer) -> None:
    model = random_model("qwen3")
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=10, stop_token_ids=())
    stop_ids = [free[1].token_ids[4]]
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_token_ids=stop_ids)
    assert {d.finish_reason for d in greedy} == {"stop", "length"}
    for mode in (False, True, "never"):
        done = beam_search(model, tokenizer, PROMPTS, num_beams=1, max_new_tokens=20, stop_token_ids=stop_ids,
                           early_stopping=mode)  # fmt: skip
        for ours, theirs in zip(done, greedy, strict=True):
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            assert ours.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_one_beam_is_greedy_decoding_under_a_penalty(penalty: float, tokenizer) -> None:
    """The penalty acts on logits, as in `generate` and in transformers' greedy decoding, not on log-probabilities."""
    model = random_model("qwen3")
    params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=24, params=params, stop_token_ids=())
    done = beam_search(model, tokenizer, PROMPTS, num_beams=1, max_new_tokens=24, repetition_penalty=penalty,
                       stop_token_ids=())  # fmt: skip
    assert [d.token_ids for d in done] == [g.token_ids for g in greedy]
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=1, do_sample=False, max_new_tokens=24,
                            repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
                            suppress_tokens=list(range(len(tokenizer), 1024)))  # fmt: skip
    assert done[0].token_ids == theirs[0, ids.shape[1] :].tolist()


def test_one_beam_sees_what_a_long_sum_rounds_away(tokenizer) -> None:
    """Logits 1e-5 apart after 2,000 nats, where fp32 numbers are 1.2e-4 apart: the larger is taken."""
    plan = beam._BeamOptions(1, 8, 1.0, False, 1, 1.0, frozenset(), 4, 4, None)
    search = beam._Search(0, [1], plan)
    search.scores = [-2000.0]
    beam._select(torch.tensor([[0.1, 0.5, 0.50001, 0.2]]), None, [search], plan, 1)
    assert search.beams[0] == [2]


def test_the_common_history_may_be_known_or_not(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that all beams share are not copied: looking for them at every step, or never, changes no bit."""
    model = random_model("qwen2")
    results = []
    for every in (1, beam.ANCESTOR_STEPS, 10**9):
        monkeypatch.setattr(beam, "ANCESTOR_STEPS", every)
        results.append(beam_search(model, tokenizer, PROMPTS, max_new_tokens=40, num_beams=5, stop_token_ids=()))
    assert results[0] == results[1] == results[2]


def test_a_fused_decoder_finds_the_same(tokenizer) -> None:
    model = random_model("qwen2", tie_word_embeddings=False)
    plain = beam_search(model, tokenizer, PROMPTS, max_new_tokens=16, stop_token_ids=())
    decoder = Decoder(model, layout="transposed,tiled,tiled")
    assert_same(beam_search(model, tokenizer, PROMPTS, max_new_tokens=16, stop_token_ids=(), decoder=decoder), plain)


def test_adapters_count_and_their_dropout_does_not(tokenizer) -> None:
    model = random_model("qwen2")
    plain = beam_search(model, tokenizer, PROMPTS, max_new_tokens=8, stop_token_ids=())
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).train()
    done = beam_search(adapted, tokenizer, PROMPTS, max_new_tokens=8, stop_token_ids=())
    assert adapted.training and done != plain
    merged = adapted.merge_and_unload()
    assert_same(beam_search(merged, tokenizer, PROMPTS, max_new_tokens=8, stop_token_ids=()), done)


def test_records_of_the_steps_lead_to_the_result(tokenizer) -> None:
    model, steps = random_model("qwen2"), []
    options = {"max_new_tokens": 9, "num_beams": 3, "stop_token_ids": (), "length_penalty": 0.0}
    done = beam_search(model, tokenizer, PROMPTS, on_step=steps.append, **options)
    assert done == beam_search(model, tokenizer, PROMPTS, **options), "watching changes nothing"
    for i, hypothesis in enumerate(done):
        mine = [s for s in steps if s.prompt == i]
        assert [s.step for s in mine] == list(range(9)) and all(len(s.tokens) == 6 for s in mine)
        at, ids, total = 0, [], 0.0  # the best candidate of the last step, followed back
        for k in range(8, -1, -1):
            ids.insert(0, mine[k].tokens[at])
            total += mine[k].logprobs[at]
            at = mine[k - 1].kept[mine[k].parents[at]] if k else 0
        assert ids == hypothesis.token_ids
        assert total == pytest.approx(hypothesis.score, abs=1e-4)


def test_ids_past_the_tokenizer_are_impossible(tokenizer) -> None:
    model = random_model("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 20  # the likeliest ids by far, up or down
    logits = model(torch.tensor([tokenizer(PROMPTS[0]).input_ids])).logits[0, -1]
    assert logits.argmax() >= len(tokenizer), "the test needs a model that would take one"
    done = beam_search(model, tokenizer, PROMPTS, max_new_tokens=8, num_return_sequences=4, stop_token_ids=())
    assert max(max(d.token_ids) for d in done) < len(tokenizer)


def test_text_ends_before_the_stop_token(tokenizer) -> None:
    model = random_model("qwen2")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = beam_search(model, tokenizer, PROMPTS[:1], max_new_tokens=6, stop_token_ids=())[0].token_ids
    done = beam_search(model, tokenizer, PROMPTS[:1], max_new_tokens=6, stop_token_ids=[ids[5], stop])[0]
    assert done.token_ids == ids and done.finish_reason == "stop"
    assert done.text == tokenizer.decode(ids[:5])
    cut = beam_search(model, tokenizer, PROMPTS[:1], max_new_tokens=5, stop_token_ids=())[0]
    assert cut.finish_reason == "length" and cut.text == tokenizer.decode(cut.token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 501}, r"num_beams must be at most 500, .* vocabulary of 1000 tokens, got 501"),
        ({"num_beams": 334, "stop_token_ids": [1, 2]}, r"num_beams must be at most 333, .* of 1000 tokens, got 334"),
        ({"num_return_sequences": 5}, "num_return_sequences must be at most num_beams, got 5 with 4 beams"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"early_stopping": "always"}, "early_stopping must be False, True or \"never\", got 'always'"),
        ({"early_stopping": None}, 'early_stopping must be False, True or "never", got None'),
        ({"length_penalty": math.nan}, "length_penalty must be from -20 to 20, got nan"),
        ({"length_penalty": 1e4}, "length_penalty must be from -20 to 20, got 10000.0"),
        ({"length_penalty": -math.inf}, "length_penalty must be from -20 to 20, got -inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be at least 1, got -3"),
        ({"max_new_tokens": 508}, r"context of 512 tokens, got \d+ in prompts\[0\] \+ 508 new"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(random_model("qwen2"), tokenizer, PROMPTS[:1], **{"stop_token_ids": [1]} | options)


def test_prompts_are_checked_as_the_engine_checks_them(tokenizer) -> None:
    model = random_model("qwen2")
    assert beam_search(model, tokenizer, []) == []
    with pytest.raises(ValueError, match=r"prompts\[1\] must have at least one token"):
        beam_search(model, tokenizer, ["a", ""])
    with pytest.raises(TypeError, match="must be a list of prompts, got str"):
        beam_search(model, tokenizer, "one prompt")


def test_logits_that_are_no_numbers_are_refused(tokenizer) -> None:
    model = random_model("qwen2", tie_word_embeddings=False)
    bad = tokenizer(PROMPTS[1]).input_ids[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan
    with pytest.raises(ValueError, match=r"logits must be numbers, got nan after prompts \[1\]"):
        beam_search(model, tokenizer, PROMPTS[:2], max_new_tokens=4)
