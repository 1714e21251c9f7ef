"""The cached pass: equal to transformers' own, in every layout, adapted or merged, eager or on fixed tensors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_generate import FAMILIES, PROMPTS, make_model, tokenizer  # noqa: F401  (a fixture)
from transformers import GPT2Config, GPT2LMHeadModel

from qftlab.decoding.cache import KVCache, compact
from qftlab.decoding.decoder import Decoder
from qftlab.decoding.engine import generate, stream
from qftlab.decoding.layouts import LAYOUTS
from qftlab.maths.sampling import SamplingParams
from qftlab.model.head import bump_weights_version_

# Other orders of summation, fp32: logits here reach 10, and differences of up to 5e-6 were seen.
ROUNDING = 1e-5
RAGGED = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 41, 42], [9, 8, 7, 6]]
MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.5, top_k=20, repetition_penalty=1.4),
    SamplingParams(temperature=1.0, min_p=0.01, top_p=0.95),
]


def adapted(model):
    """The model with LoRA on every projection, its B drawn so that the adapter does something."""
    torch.manual_seed(3)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=names))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed,tiled,plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_gives_the_logits_of_a_whole_pass(family: str, layout: str) -> None:
    """As near to float64 as transformers' own pass in fp32, within a factor of three, on whatever make of CPU."""
    model = make_model(family)
    exact, decoder = copy.deepcopy(model).double(), Decoder(model, layout=layout)
    cache = decoder.new_cache(len(RAGGED), 20)
    texts = [list(p) for p in RAGGED]
    logits = decoder.prefill(RAGGED, cache)
    ours, theirs = [], []
    for _ in range(8):
        with torch.no_grad():
            found, want = (torch.stack([m(torch.tensor([ids])).logits[0, -1] for ids in texts]) for m in (model, exact))
        ours.append((logits - want).abs().max())
        theirs.append((found - want).abs().max())
        tokens = logits.argmax(-1)
        texts = [[*ids, token] for ids, token in zip(texts, tokens.tolist(), strict=True)]
        logits = decoder.step(tokens, cache)
    assert max(ours) < 3 * max(theirs) < 3e-5
    assert cache.lengths == [len(p) + 8 for p in RAGGED]


def test_even_rows_take_the_short_path_to_the_same_logits() -> None:
    """Rows of one length need no mask and no scattered write; the general path is `step_at`."""
    decoder = Decoder(make_model("qwen3"))
    even, general = decoder.new_cache(3, 12), decoder.new_cache(3, 12)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    tokens = decoder.prefill(prompts, even).argmax(-1)
    decoder.prefill(prompts, general)
    for at in range(3, 9):
        want = decoder.step(tokens, even)
        for width in (at + 1, 12):  # columns past the row are hidden: how many there are changes nothing
            got = decoder.step_at(tokens, torch.full((3,), at), general, width)
            assert (got - want).abs().max() < ROUNDING
        tokens = want.argmax(-1)


@pytest.mark.parametrize("budget, passes", [(14, [2 * 7, 2 * 4]), (5, [7, 1, 3, 4])])
def test_a_long_prefill_is_split_by_its_budget(budget: int, passes: list[int], monkeypatch) -> None:
    model, seen = make_model("qwen2"), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    decoder = Decoder(model)
    want = decoder.prefill(RAGGED, decoder.new_cache(4, 8))
    monkeypatch.setattr("qftlab.decoding.decoder.PREFILL_TOKENS", budget)
    seen.clear()
    cache = decoder.new_cache(4, 8)
    assert (decoder.prefill(RAGGED, cache) - want).abs().max() < ROUNDING
    assert cache.lengths == [7, 1, 3, 4] and seen == passes


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed,tiled,plain"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_adapters_decode_as_their_merged_model(family: str, layout: str, tokenizer) -> None:  # noqa: F811
    wrapped = adapted(make_model(family))
    plain = generate(make_model(family), tokenizer, PROMPTS, max_new_tokens=10, stop_token_ids=())
    got = generate(wrapped, tokenizer, PROMPTS, max_new_tokens=10, stop_token_ids=(),
                   decoder=Decoder(wrapped, layout=layout))  # fmt: skip
    with wrapped.disable_adapter():
        off = generate(wrapped, tokenizer, PROMPTS, max_new_tokens=10, stop_token_ids=(),
                       decoder=Decoder(wrapped, layout=layout))  # fmt: skip
    merged = generate(wrapped.merge_and_unload(), tokenizer, PROMPTS, max_new_tokens=10, stop_token_ids=())
    assert [c.token_ids for c in got] == [c.token_ids for c in merged]
    assert [c.token_ids for c in got] != [c.token_ids for c in plain], "the adapter does something"
    assert [c.token_ids for c in off] == [c.token_ids for c in plain]


@pytest.mark.parametrize("layout", ["joined", "transposed", "tiled", "transposed,plain,tiled"])
def test_a_snapshot_knows_that_it_is_old_and_is_refreshed(layout: str) -> None:
    """In place, but for oneDNN's own order: CUDA graphs read these places."""
    model = make_model("qwen2")
    decoder, fresh = Decoder(model, layout=layout), Decoder(model)
    places = [form.data_ptr() for part in decoder._parts for name, form in part.forms.items() if name != "tiled"]
    grouped = sum(p.numel() for n, p in model.named_parameters() if re.search("[qkv]_proj.weight|(gate|up)_proj.w", n))
    alone = sum(p.numel() for n, p in model.named_parameters() if re.search("(o|down)_proj.weight", n)) + 300 * 32
    weights = {"joined": grouped, "transposed,plain,tiled": 2 * (grouped + alone)}.get(layout, grouped + alone)
    biases = sum(4 * 16 for _ in decoder.layers)  # of queries, keys and values
    assert decoder.snapshot_bytes == 4 * (weights + biases), "a module that stands alone is joined already"
    assert fresh.snapshot_bytes == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    bump_weights_version_(model)
    with pytest.raises(RuntimeError, match=r"got version 0 of 1: call refresh_\(\)"):
        decoder.prefill([[1, 2]], decoder.new_cache(1, 4))
    decoder.refresh_()
    for prompt in ([5], [1, 2], list(range(20))):  # one row, few and many
        want = fresh.prefill([prompt], fresh.new_cache(1, 20))
        assert (decoder.prefill([prompt], decoder.new_cache(1, 20)) - want).abs().max() < ROUNDING
    now = [form.data_ptr() for part in decoder._parts for name, form in part.forms.items() if name != "tiled"]
    assert now == places


@pytest.mark.parametrize("params", [MIXED, MIXED[1], SamplingParams(0.0), SamplingParams(0.0, repetition_penalty=1.3)])
@pytest.mark.parametrize("layout", ["plain", "joined", "tiled"])
def test_steps_on_fixed_tensors_are_the_eager_ones(params, layout: str, tokenizer) -> None:  # noqa: F811
    """What CUDA graphs record, run as it is: buckets of rows and columns, buffers in place, no branches."""
    model, recorded = make_model("qwen2", max_position_embeddings=512), []

    def recorder(step):
        recorded.append(step)
        return step

    options = {"max_new_tokens": 40, "params": params, "num_generations": 3, "return_logprobs": True, "seed": 5}
    # Tokens that end rows early and one by one, so that they leave the batch in the middle.
    options["stop_token_ids"] = list(range(0, 263, 9))
    want = generate(model, tokenizer, RAGGED, **options)
    decoder = Decoder(model, layout=layout, recorder=recorder)
    for _ in range(2):
        got = generate(model, tokenizer, RAGGED, decoder=decoder, **options)
        assert [c.token_ids for c in got] == [c.token_ids for c in want]
        for ours, theirs in zip(got, want, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert len({c.finish_reason for c in want} | {len(c.token_ids) for c in want}) > 3, "rows left one by one"
    assert 1 < len(recorded) <= 6, "few shapes serve all steps, and the second call records nothing"


def test_a_recorded_step_sees_the_token_that_it_reads(tokenizer, monkeypatch) -> None:  # noqa: F811
    """Also where that one opens a further block of columns, here of four."""
    monkeypatch.setattr("qftlab.decoding.batch.COLUMN_STEP", 4)
    model, options = make_model("qwen2"), {"max_new_tokens": 12, "stop_token_ids": ()}
    decoder = Decoder(model, recorder=lambda step: step)
    want = generate(model, tokenizer, RAGGED, **options)
    assert generate(model, tokenizer, RAGGED, decoder=decoder, **options) == want


def test_a_shared_prompt_gives_what_separate_ones_give(tokenizer) -> None:  # noqa: F811
    model, options = make_model("qwen2"), {"max_new_tokens": 12, "stop_token_ids": (), "return_logprobs": True}
    greedy = generate(model, tokenizer, RAGGED, num_generations=3, **options)
    single = generate(model, tokenizer, RAGGED, **options)
    assert [c.token_ids for c in greedy] == [c.token_ids for c in single for _ in range(3)]
    hot = {"params": SamplingParams(1.3), **options}
    together = generate(model, tokenizer, [RAGGED[0]] * 1, num_generations=4, **hot)
    apart = generate(model, tokenizer, [RAGGED[0]] * 4, **hot)  # row ids 0 to 3, four prefills or one
    assert [c.token_ids for c in together] == [c.token_ids for c in apart]
    assert len({tuple(c.token_ids) for c in together}) > 1


def test_each_prompt_may_have_its_own_settings(tokenizer) -> None:  # noqa: F811
    model = make_model("qwen2")
    options = {"max_new_tokens": 10, "stop_token_ids": (), "seed": 2}
    together = generate(model, tokenizer, RAGGED, params=MIXED, **options)
    for i, params in enumerate(MIXED):
        alone = generate(model, tokenizer, RAGGED, params=params, **options)[i]
        assert together[i].token_ids == alone.token_ids
    with pytest.raises(ValueError, match="one for each of the 4 prompts, got 2"):
        generate(model, tokenizer, RAGGED, params=MIXED[:2], max_new_tokens=9)


def test_each_prompt_may_have_its_own_limit(tokenizer) -> None:  # noqa: F811
    model, limits = make_model("qwen2"), [3, 9, 1, 6]
    whole = generate(model, tokenizer, RAGGED, max_new_tokens=9, stop_token_ids=())
    done = generate(model, tokenizer, RAGGED, max_new_tokens=limits, stop_token_ids=())
    assert [c.token_ids for c in done] == [c.token_ids[:n] for c, n in zip(whole, limits, strict=True)]
    with pytest.raises(ValueError, match="one for each of 4 prompts, got 2"):
        generate(model, tokenizer, RAGGED, max_new_tokens=[1, 2])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, tokenizer, RAGGED, max_new_tokens=[1, 2, 0, 4])


def test_padding_ids_in_a_prompt_are_tokens_like_others(tokenizer) -> None:  # noqa: F811
    """Nothing is masked by id: a prompt of nothing but the padding token (which is also the end) is read as written."""
    model, pad = make_model("qwen2"), tokenizer.pad_token_id
    done = generate(model, tokenizer, [[pad, pad, pad], [pad]], max_new_tokens=5, stop_token_ids=())
    for prompt, completion in zip([[pad] * 3, [pad]], done, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)].argmax().item())
        assert completion.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize("stop", [(), ("q",), ("ab", "\u00e9"), ("\ufffd",)])
def test_streamed_pieces_are_the_text(stop, tokenizer) -> None:  # noqa: F811
    """A byte tokenizer at high temperature writes half characters and broken ones; none is shown before it is whole."""
    model, options = make_model("qwen2"), {"max_new_tokens": 60, "params": SamplingParams(3.0), "stop": stop, "seed": 8}
    pieces: dict[int, list[str]] = {i: [] for i in range(len(RAGGED))}
    want = generate(model, tokenizer, RAGGED, on_text=lambda i, text: pieces[i].append(text), **options)
    assert ["".join(p) for p in pieces.values()] == [c.text for c in want]
    streamed = list(stream(model, tokenizer, RAGGED[0], **options))
    assert "".join(streamed) == want[0].text and len(streamed) > 1


def test_a_stream_waits_for_whole_characters_and_stop_strings(tokenizer) -> None:  # noqa: F811
    from qftlab.decoding.engine import TextStream

    ids = tokenizer("né\nUser: x").input_ids
    line = TextStream(tokenizer, [1], stop=("\nUser:",))
    shown = [line.take(ids[: i + 1]) for i in range(len(ids))]
    assert shown[:3] == ["n", "", "é"], "half of é waits for the other half"
    assert shown[3:8] == [""] * 5, "what may become the stop string waits"


def test_a_closed_stream_and_a_cancelled_run_keep_what_is_done(tokenizer) -> None:  # noqa: F811
    model = make_model("qwen2").train()
    pieces = stream(model, tokenizer, "Hi", max_new_tokens=50, stop_token_ids=())
    next(pieces)
    pieces.close()
    assert all(m.training for m in model.modules()), "closing gives the modes back"
    asked = []
    done = generate(model, tokenizer, RAGGED, max_new_tokens=50, stop_token_ids=(), batch_size=2,
                    should_stop=lambda: len(asked) >= 20 or bool(asked.append(0)))  # fmt: skip
    assert [c.finish_reason for c in done] == ["cancelled"] * 4
    assert sum(len(c.token_ids) for c in done) == 21
    whole = generate(model, tokenizer, RAGGED, max_new_tokens=50, stop_token_ids=())
    assert all(w.token_ids[: len(d.token_ids)] == d.token_ids for w, d in zip(whole, done, strict=True))


@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9)])
@pytest.mark.parametrize("recorder", [None, lambda step: step], ids=["eager", "recorded"])
def test_logits_that_are_no_numbers_are_an_error_and_spoil_nothing_later(params, recorder, tokenizer) -> None:  # noqa: F811
    model = make_model("qwen2")
    decoder = Decoder(model, recorder=recorder)
    weight = model.model.layers[0].mlp.down_proj.weight
    want = generate(model, tokenizer, ["Hi"], max_new_tokens=4, params=params, decoder=decoder)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must be finite"):
        generate(model, tokenizer, ["Hi"], max_new_tokens=4, params=params, decoder=decoder)
    with torch.no_grad():
        weight.copy_(kept)
    assert generate(model, tokenizer, ["Hi"], max_new_tokens=4, params=params, decoder=decoder) == want


def test_models_it_cannot_decode_are_refused() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    with pytest.raises(ValueError, match="one of qwen2, qwen3, llama, got 'gpt2': use transformers' own generate"):
        Decoder(GPT2LMHeadModel(config))
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window must be false"):
        Decoder(sliding)
    moving = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type must be fixed"):
        Decoder(moving)
    wrapped = get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="layout must be plain for adapters that are not plain LoRA"):
        Decoder(wrapped, layout="joined")


def test_scaled_ropes_are_the_models_own() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = make_model("qwen2", rope_parameters=yarn)
    decoder = Decoder(model)
    with torch.no_grad():
        want = model(torch.tensor([list(range(60))])).logits[0, -1]
    assert (decoder.prefill([list(range(60))], decoder.new_cache(1, 64))[0] - want).abs().max() < ROUNDING


def test_a_full_cache_is_an_error() -> None:
    decoder = Decoder(make_model("qwen2"))
    cache = decoder.new_cache(1, 2)
    decoder.prefill([[1, 2]], cache)
    with pytest.raises(ValueError, match="room for another token, got 2 columns"):
        decoder.step(torch.tensor([1]), cache)


def numbered(rows: int, columns: int) -> KVCache:
    """A cache whose every row holds its own number."""
    store = torch.arange(rows).float().view(1, 1, rows, 1, 1, 1).expand(1, 2, rows, 1, columns, 1).clone()
    return KVCache(store, list(range(1, rows + 1)))


def test_rows_move_within_the_cache() -> None:
    cache = numbered(5, 6)
    smaller, order = cache.keep([0, 3, 4])
    assert order == [0, 4, 3] and smaller.lengths == [1, 5, 4]
    assert smaller.store[0, 0, :, 0, 0, 0].tolist() == [0, 4, 3]
    assert smaller.store.data_ptr() == cache.store.data_ptr(), "the same memory"
    cache = numbered(4, 6)
    cache.reorder_([1, 1, 0, 3], since=2)
    assert cache.lengths == [2, 2, 1, 4]
    assert cache.store[0, 1, :, 0, 1, 0].tolist() == [0, 1, 2, 3], "columns before `since` stay"
    assert cache.store[0, 1, :, 0, 2, 0].tolist() == [1, 1, 0, 3]
    copies = numbered(3, 6).expand([2, 2, 0], capacity=9)
    assert copies.lengths == [3, 3, 1] and copies.capacity == 9
    assert copies.store[0, 0, :, 0, 0, 0].tolist() == [2, 2, 0] and copies.store[..., 3:, :].abs().sum() == 0


@pytest.mark.parametrize("rows, order", [([0, 1], [0, 1]), ([2], [2]), ([1, 3], [3, 1]), ([0, 3, 4], [0, 4, 3])])
def test_compact_moves_as_little_as_possible(rows, order) -> None:
    assert compact(rows) == order


def test_prompts_held_once_give_what_copied_ones_give() -> None:
    """Ragged prompts, unequal groups, rows that move and leave: against a cache into which the prompts are copied."""
    decoder = Decoder(make_model("qwen3"))
    read = decoder.new_cache(4, 7)
    logits = decoder.prefill(RAGGED, read)
    owners = [0, 0, 0, 2, 2, 3]
    shared, copied = read.share(owners, 8), read.expand(owners, capacity=20)
    tokens = logits[torch.tensor(owners)].topk(6).indices[torch.arange(6), torch.arange(6)]  # a different one each
    for rows in ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [3, 2], [0]):
        if len(rows) < shared.batch_size:
            (shared, order), (copied, other) = shared.keep(rows), copied.keep(rows)
            assert order == other
            tokens = tokens[torch.tensor(order)]
        want = decoder.step(tokens, copied)
        assert (decoder.step(tokens, shared) - want).abs().max() < ROUNDING
        assert shared.positions == copied.lengths
        tokens = want.argmax(-1)
    shared.lengths = [3]
    with pytest.raises(ValueError, match="rows with a shared prefix must be equally long"):
        two = read.share([0, 1], 4)
        two.lengths = [0, 1]
        decoder.step(torch.tensor([1, 1]), two)


@pytest.mark.parametrize("mask", [False, True])
def test_the_two_softmaxes_join_as_one(mask: bool, monkeypatch) -> None:
    """Against one softmax over both parts, by the CPU's kernel and by the form other devices take."""
    from qftlab.decoding import cache
    from qftlab.decoding.cache import Prefix

    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8) for n in (4, 5, 5))
    prompt = torch.randn(1, 2, 2, 2, 6, 8)  # (layers, 2, P, H_kv, L, d)
    prefix = Prefix(prompt, [6, 4] if mask else [6, 6], [0, 1, 0])
    own = [torch.cat([prompt[0, i, [0, 1, 0]], x], dim=2) for i, x in ((0, k), (1, v))]
    past = torch.zeros(3, 1, 1, 11)
    past[1, ..., 4:6] = -torch.inf if mask else 0
    want = torch.nn.functional.scaled_dot_product_attention(q, *own, attn_mask=past, scale=0.3)
    got = cache.attend_shared(q, k, v, *prefix.store[0], prefix, 0.3)
    assert (got - want).abs().max() < 1e-6

    monkeypatch.setattr(cache, "_attend", cache._attend_plainly)
    assert (cache.attend_shared(q, k, v, *prefix.store[0], prefix, 0.3) - want).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "rest"),
    [
        ("xabc", ("abd",), ["x", "", "", "abc"], ""),  # shown as soon as it cannot become the stop string
        ("xab", ("abd",), ["x", "", ""], "ab"),  # what is held at the end is given back
        ("ab", ("ab!",), ["", ""], "ab"),  # the whole text is the beginning of one
        ("aaac", ("aab",), ["", "", "a", "aac"], ""),  # the last two of three may be its beginning
        ("abx", ("bz", "abc"), ["", "", "abx"], ""),  # the longer beginning counts, whichever stop string it is of
        ("xyy", ("z", "y!"), ["x", "", "y"], "y"),  # one character never waits for a stop string of one
        ("né", (), ["n", "", "é"], ""),
        ("né", ("é!",), ["n", "", ""], "é"),
    ],
)
def test_held_text_by_hand(text, stop, pieces, rest, tokenizer) -> None:  # noqa: F811
    from qftlab.decoding.engine import TextStream

    ids, line = tokenizer(text).input_ids, TextStream(tokenizer, [1], stop)
    assert [line.take(ids[: i + 1]) for i in range(len(ids))] == pieces
    assert line.finish(text) == rest and line.finish(text) == ""


def test_a_row_that_begins_again_shows_nothing_twice(tokenizer) -> None:  # noqa: F811
    from qftlab.decoding.engine import TextStream

    ids, line = tokenizer("abcd").input_ids, TextStream(tokenizer, [1])
    assert [line.take(ids[:n]) for n in (1, 2, 1, 2, 3, 4)] == ["a", "b", "", "", "c", "d"]
    assert line.take(ids) == "" and line.finish("abcd") == ""


def test_rows_that_nobody_reads_stay_inside_the_cache(tokenizer) -> None:  # noqa: F811
    """A recorded step has rows to spare (four for three), whose positions go on counting from batch to batch."""
    model = make_model("qwen2")
    decoder = Decoder(model, recorder=lambda step: step)
    options = {"max_new_tokens": 12, "stop_token_ids": ()}
    for prompts in (RAGGED, RAGGED[:3], RAGGED[1:], RAGGED[:3]):
        found = generate(model, tokenizer, prompts, decoder=decoder, **options)
        assert found == generate(model, tokenizer, prompts, **options)
    assert decoder.spare.positions.max() < decoder.spare.cache.capacity


# --- what somebody puts around a model --------------------------------------------------------------------------------

PASSED = ["", "model", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.rotary_emb",
          "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_norm", "model.norm"]  # fmt: skip
CALLED = ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head",
          "model.layers.1.mlp.act_fn"]  # fmt: skip


def steered(module, args, output):
    """A forward hook that adds to what a module gives."""
    return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5


def patch(module) -> None:
    module.forward = type(module).forward.__get__(module)


@pytest.mark.parametrize("put", [lambda m: m.register_forward_hook(steered), patch,
                                 lambda m: m.register_forward_pre_hook(lambda *_, **__: None, with_kwargs=True)],
                         ids=["hook", "patched", "pre-hook"])  # fmt: skip
@pytest.mark.parametrize("place", PASSED)
def test_what_decoding_would_pass_by_is_refused_by_name(place: str, put, tokenizer) -> None:  # noqa: F811
    """Also where it comes after a decoder that is kept."""
    model = make_model("qwen3")
    kept = Decoder(model)
    put(model.get_submodule(place))
    with pytest.raises(ValueError, match=f"^{place or type(model).__name__} must be as transformers made it, got "):
        generate(model, tokenizer, ["Hi"], max_new_tokens=2)
    with pytest.raises(ValueError, match="decoder must be of the model as it is"):
        generate(model, tokenizer, ["Hi"], max_new_tokens=2, decoder=kept)


@pytest.mark.parametrize("layout", ["plain", "joined"])
@pytest.mark.parametrize("place", CALLED)
def test_hooks_on_what_decoding_calls_are_run(place: str, layout: str) -> None:
    """With a layout only on what is no matrix of it, and then at every step, recorded or not."""
    model = make_model("qwen3")
    kept = Decoder(model, layout=layout, recorder=lambda step: step)
    hook = model.get_submodule(place).register_forward_hook(steered)
    with pytest.raises(ValueError, match="decoder must be of the model as it is"):
        kept.prefill([[1, 2, 3]], kept.new_cache(1, 4))
    if layout == "joined" and "_proj" in place:
        with pytest.raises(ValueError, match="layout must be plain for modules with hooks"):
            Decoder(model, layout=layout)
        return
    decoder, ids = Decoder(model, layout=layout, recorder=lambda step: step), [5, 6, 7, 8]
    cache = decoder.new_cache(1, 8)
    logits = [decoder.prefill([ids[:3]], cache)[0], decoder.step(torch.tensor([ids[3]]), cache)[0]]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, 2:]
    assert (torch.stack(logits) - want).abs().max() < ROUNDING and decoder.recorder is None
    hook.remove()
    with torch.no_grad():
        assert (model(torch.tensor([ids])).logits[0, 2:] - want).abs().max() > 0.01, "the hook does something"


def test_hooks_that_change_nothing_are_let_be(tokenizer) -> None:  # noqa: F811
    """transformers' recording of hidden states leaves its hooks in place; accelerate patches the forward."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = make_model("qwen2")
    want = generate(model, tokenizer, ["Hi"], max_new_tokens=4)
    kept = Decoder(model)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(m._forward_hooks for m in model.modules())
    assert generate(model, tokenizer, ["Hi"], max_new_tokens=4, decoder=kept) == want
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    assert generate(model, tokenizer, ["Hi"], max_new_tokens=4) == want


def test_hooks_on_all_modules_are_seen(tokenizer) -> None:  # noqa: F811
    model = make_model("qwen2")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="must be as transformers made it, got hooks"):
            generate(model, tokenizer, ["Hi"], max_new_tokens=2)
    finally:
        hook.remove()


class Wrapper(torch.nn.Module):
    """Steers, as libraries for it do, in the place of what it wraps."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return steered(self, args, self.inner(*args, **kwargs))


@pytest.mark.parametrize("place", ["model.layers.1", "model.layers.1.mlp", "model.norm"])
def test_modules_in_the_place_of_others_are_refused_by_name(place: str) -> None:
    model = make_model("qwen2")
    kept = Decoder(model)
    model.set_submodule(place, Wrapper(model.get_submodule(place)))
    with pytest.raises(ValueError, match=f"{place} must be as transformers made it, got Wrapper"):
        Decoder(model)
    with pytest.raises(ValueError, match="decoder must be of the model as it is"):
        kept.prefill([[1]], kept.new_cache(1, 2))


@pytest.mark.parametrize("layout", ["plain", "joined"])
def test_a_kept_decoder_of_a_model_that_was_changed_is_refused(layout: str, tokenizer) -> None:  # noqa: F811
    model = make_model("qwen2")
    kept = Decoder(model, layout=layout)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)  # in place: the same tensors
    generate(model, tokenizer, ["Hi"], max_new_tokens=2, decoder=kept)
    with pytest.raises(ValueError, match="decoder must be of the model that it is given with"):
        generate(make_model("qwen2"), tokenizer, ["Hi"], max_new_tokens=2, decoder=kept)
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="decoder must be of the model as it is"):
        generate(model, tokenizer, ["Hi"], max_new_tokens=2, decoder=kept)
    kept = Decoder(model, layout=layout)
    wrapped = adapted(model)
    for each in (wrapped, model):
        with pytest.raises(ValueError, match="decoder must be of the model as it is"):
            generate(each, tokenizer, ["Hi"], max_new_tokens=2, decoder=kept)


def test_adapters_that_act_elsewhere_are_refused_by_name(tokenizer) -> None:  # noqa: F811
    """In training as well: what the wrapper does around the model would be left out."""
    from peft import LNTuningConfig, PromptTuningConfig

    from qftlab.train.step import Step

    alora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for settings, kind in ((alora, "aLoRA"), (prompt, "PROMPT_TUNING")):
        model = get_peft_model(make_model("qwen2"), settings)
        for use in (Decoder, Step, lambda m: generate(m, tokenizer, ["Hi"], max_new_tokens=2)):
            with pytest.raises(ValueError, match=f"adapters must act in modules alone, got 'default', {kind}"):
                use(model)
    norms = get_peft_model(make_model("qwen2"), LNTuningConfig(target_modules=["input_layernorm"]))
    with pytest.raises(ValueError, match="input_layernorm must be as transformers made it, got LNTuningLayer"):
        Decoder(norms)
    bare = make_model("qwen2").model
    with pytest.raises(ValueError, match="model must have a head for logits, got a Qwen2Model"):
        generate(bare, tokenizer, ["Hi"], max_new_tokens=2)
