"""C1, C2, C3, C7 on the CPU and G3, G4, G5 on one GPU: generation against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import rivals
from benchmarks.harness import Benchmark, MismatchError, Options, Side, compare, judge
from benchmarks.models import (
    END,
    bench_config,
    ceilings,
    half_billion_config,
    random_model,
    random_prompts,
    word_tokenizer,
)
from qftlab.decoding.beam import beam_search
from qftlab.decoding.decoder import Decoder
from qftlab.decoding.engine import generate
from qftlab.decoding.layouts import choose_layout
from qftlab.maths.sampling import SamplingParams, sample, uniform

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams()
FILTERED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95)
OURS, PLAIN_LAYOUT, ALONE = "qftlab", "qftlab, plain layout", "qftlab, decoder made anew"
DIFFERENT = "answers differ"
CACHE_BYTES = 12_288  # of one token of Qwen2.5-0.5B in bf16: keys and values, 24 layers, 2 heads of 64


def ours(model, tokenizer, prompts, new_tokens, params, **settings) -> list[list[int]]:
    """The library's new ids for all prompts, as one batch; nothing stops a row unless the settings say so."""
    settings = {"stop_token_ids": [], "batch_size": len(prompts) * settings.get("num_generations", 1), **settings}
    found = generate(model, tokenizer, prompts, max_new_tokens=new_tokens, params=params, **settings)
    return [completion.token_ids for completion in found]


def bench() -> tuple:
    """The `bench` model, its tokenizer, and two decoders that are kept from call to call, as RLOO keeps one.

    The first has the layout that is fastest here, by the library's own measurement; the other the plain one.
    """
    model = random_model(bench_config())
    return model, word_tokenizer(2048), Decoder(model, layout=choose_layout(model)), Decoder(model)


def count_tokens(rows: list[list[int]]) -> int:
    """New tokens of all rows, padding left out."""
    return sum(map(len, rows))


def c1(options: Options) -> Iterator[dict]:
    """Greedy, plain and filtered sampling; prompt 32 + 128 new; batch 1, 8 and 64."""
    model, tokenizer, decoder, plain = bench()
    new = options.sized(128, 6)
    goals = {1: (1.6, 1.8), 8: (1.4, 1.6), 64: (1.15, 1.3)}
    for label, params in {"greedy": GREEDY, "sampled": PLAIN, "top-k 50, top-p 0.95": FILTERED}.items():
        for batch, goal in goals.items():
            prompts = random_prompts([32] * options.sized(batch, min(batch, 2)), 2048)
            mine = partial(ours, model, tokenizer, prompts, new, params)
            sides = [
                Side(OURS, partial(mine, decoder=decoder)),
                Side("transformers generate", partial(rivals.generate, model, prompts, new, params), *goal),
                Side(PLAIN_LAYOUT, partial(mine, decoder=plain), 0.98, 0.98),
                Side(ALONE, mine),
            ]
            facts = {"layout": str(decoder.layout)}
            if params != GREEDY:
                logits = model(torch.tensor(prompts)).logits.flatten(0, 1)
                facts["distribution"] = rivals.same_distribution(logits, params)
            greedy = partial(rivals.same_tokens, is_tie=rivals.Ties(model, prompts))
            same = greedy if params == GREEDY else rivals.same_lengths
            yield compare(f"{label}, batch {batch}", sides, options, count=count_tokens, same=same, facts=facts)


def c2(options: Options) -> Iterator[dict]:
    """16 prompts of 32 to 96 tokens, 4 rollouts each, cap 256, as RLOO asks for them.

    24 of the 2,048 ids end a rollout, so lengths are about geometric with a quarter of the cap as their mean, and some
    reach the cap. Ours are stopped by those ids; transformers is given the lengths ours came to, by the cheapest
    criterion there is, and so does the same rows with the same real tokens.
    """
    model, tokenizer, decoder, plain = bench()
    num_prompts, cap = options.sized((16, 256), (3, 12))
    draw = random.Random(1)
    prompts = random_prompts([draw.randint(32, 96) for _ in range(num_prompts)], 2048)
    stops = draw.sample(range(2, 2048), options.sized(24, 256))
    found = ours(model, tokenizer, prompts, cap, GREEDY, stop_token_ids=stops)
    theirs = rivals.generate(model, prompts, cap, GREEDY, eos_token_id=stops)
    equal = rivals.same_tokens(found, theirs, rivals.Ties(model, prompts))
    group = {"num_generations": 4, "stop_token_ids": stops}
    lengths = [len(row) for row in ours(model, tokenizer, prompts, cap, PLAIN, **group)]
    repeated = {"num_return_sequences": 4, "lengths": lengths}
    mine = partial(ours, model, tokenizer, prompts, cap, PLAIN, **group)
    sides = [
        Side(OURS, partial(mine, decoder=decoder)),
        Side("transformers generate", lambda: rivals.generate(model, prompts, cap, PLAIN, **repeated), 3.8, 5),
        Side(PLAIN_LAYOUT, partial(mine, decoder=plain)),
        Side(ALONE, mine),
    ]
    facts = {"greedy": equal, "lengths": sorted(lengths), "layout": str(decoder.layout)}
    name = f"{num_prompts} prompts x 4 rollouts, cap {cap}, mean length {sum(lengths) / len(lengths):.0f}"
    yield compare(name, sides, options, count=count_tokens, same=rivals.same_lengths, facts=facts)


def c3(options: Options) -> Iterator[dict]:
    """Beam search: 4 prompts of 4 beams, 1 of 8; prompt 32 + 128 new, and 512 + 64; one id may end a hypothesis.

    transformers reads a prompt once a beam and moves the whole cache every step, so its prompt's length matters.
    """
    model, tokenizer, decoder, plain = bench()
    for length, new in options.sized([(32, 128), (512, 64)], [(5, 6)]):
        for num_prompts, beams, bar in [(4, 4, 2.6), (1, 8, 3.7)]:
            prompts = random_prompts([length] * num_prompts, 2048)
            mine = partial(our_beams, model, tokenizer, prompts, new, beams)
            beam = {"num_beams": beams, "eos_token_id": [END]}
            sides = [
                Side(OURS, partial(mine, decoder)),
                Side("transformers generate", partial(rivals.generate, model, prompts, new, GREEDY, **beam), bar, 4.0),
                Side(PLAIN_LAYOUT, partial(mine, plain)),
                Side(ALONE, mine),
            ]
            name = f"{num_prompts} prompts x {beams} beams, {length} + {new}"
            facts = {"layout": str(decoder.layout)}
            same = partial(rivals.same_tokens, is_tie=rivals.Ties(model, prompts, is_beam=True))
            yield compare(name, sides, options, count=count_tokens, same=same, facts=facts)


def our_beams(model, tokenizer, prompts, new: int, beams: int, decoder: Decoder | None = None) -> list[list[int]]:
    """The library's best hypothesis of each prompt."""
    settings = {"num_beams": beams, "stop_token_ids": [END], "decoder": decoder}
    found = beam_search(model, tokenizer, prompts, max_new_tokens=new, **settings)
    return [hypothesis.token_ids for hypothesis in found]


def c7(options: Options) -> Iterator[dict]:
    """One draw for each of 8 rows of 151,936 logits: top-p, top-k and both.

    Three shapes: a power law of rank as in a trained model (a nucleus of tens of tokens), normal with standard
    deviation 4 (hundreds), and with 1 (100,000), the worst case of a sampler that hopes not to sort all.
    """
    vocabulary, inner = options.sized((151_936, 5), (4_000, 1))
    torch.manual_seed(0)
    kinds = {"top-p 0.9": {"top_p": 0.9}, "top-k 50": {"top_k": 50}, "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9}}
    ranks = torch.stack([torch.randperm(vocabulary) + 1 for _ in range(8)])
    shapes = {"power-law": -1.5 * ranks.log() + 0.5 * torch.randn(8, vocabulary)}
    shapes |= {f"normal({scale})": scale * torch.randn(8, vocabulary) for scale in (4, 1)}
    for shape, logits in shapes.items():
        for label, settings in kinds.items():
            yield sampler_row(f"{label}, {shape} logits", logits, SamplingParams(**settings), inner, options)


def sampler_row(name: str, logits, params: SamplingParams, inner: int, options: Options) -> dict:
    """`inner` draws for every row of logits (B, V), after the processed distributions were compared."""
    u = uniform(0, torch.arange(len(logits)), 0)
    sides = [
        Side("qftlab", lambda: [sample(logits, params, u) for _ in range(inner)]),
        Side("transformers", lambda: [rivals.draw(logits, params) for _ in range(inner)], 10.0, 15.0),
    ]
    return compare(
        name, sides, options, unit="draws", count=lambda drawn: len(drawn) * len(logits),
        same=lambda a, b: rivals.same_distribution(logits, params),
    )  # fmt: skip


def gpu_model(options: Options, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """Random weights in the shape of Qwen2.5-0.5B, and as `bench`; in a quick run `bench` itself, in fp32.

    The kept decoder also keeps its CUDA graphs, which are recorded in the untimed round.
    """
    config = options.sized(half_billion_config(), bench_config())
    model = random_model(config, dtype=options.sized(dtype, torch.float32), device=options.device)
    return model, word_tokenizer(config.vocab_size), Decoder(model, layout=choose_layout(model))


def compare_in_fp32(options: Options) -> str:
    """Greedy tokens of both sides in fp32, where they may part at ties only: 4 ragged prompts, 32 new tokens.

    Returns:
        What was found, also where they differ: the caller keeps what a lent machine measured, and fails in the end.
    """
    model, tokenizer, decoder = gpu_model(options, torch.float32)
    prompts = random_prompts([5, 40, 17, 64], model.config.vocab_size)
    found = ours(model, tokenizer, prompts, 32, GREEDY, decoder=decoder)
    try:
        theirs = rivals.generate(model, prompts, 32, GREEDY)
        return "fp32: " + rivals.same_tokens(found, theirs, rivals.Ties(model, prompts))
    except MismatchError as error:
        return f"fp32: {DIFFERENT}: {error}"


def weight_bytes(model) -> int:
    """Bytes of weights that one decoding step must read; a tied head counts once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def rivals_of(model, prompts, new: int, options: Options) -> list[Side]:
    """transformers' three ways to decode a batch greedily, each for a row of its own; the slowest to set up is last."""
    static = {"cache_implementation": "static"}  # on CUDA transformers then compiles the step, in CUDA graphs
    server = rivals.Continuous(model, GREEDY, options)
    dynamic = partial(rivals.generate, model, prompts, new, GREEDY)
    return [
        Side("generate, dynamic cache", dynamic, rounds=2),
        Side("generate_batch", lambda: server.run(prompts, [new] * len(prompts)), rounds=2, server=server),
        Side("generate, static and compiled", partial(dynamic, **static), rounds=3),
    ]


def g3(options: Options) -> Iterator[dict]:
    """Decoding one sequence, prompt 128 + 512 new, greedy; against weights / copy bandwidth as the bound."""
    limits, equal = ceilings(options), compare_in_fp32(options)
    model, tokenizer, decoder = gpu_model(options)
    length, new = options.sized((128, 512), (8, 6))
    prompts = random_prompts([length], model.config.vocab_size)
    bound = limits["copy_gb_per_s"] * 1e9 / weight_bytes(model)
    mine = Side("qftlab", lambda: ours(model, tokenizer, prompts, new, GREEDY, decoder=decoder))
    facts = {"ceilings": limits, "greedy": equal, "bound_tokens_per_s": bound}
    name = f"batch 1, {length} + {new}"
    row = compare(name, [mine], options, count=count_tokens, same=rivals.agreement, facts=facts)
    rates = [new / s for s in row["sides"][0]["rounds"]]
    row["judged"] += [
        judge("tokens/s", rates, 1_700, None, is_judged=not options.quick),
        judge("of weights / copy bandwidth", [r / bound for r in rates], 0.39, 0.6, is_judged=not options.quick),
    ]
    yield row
    for rival in rivals_of(model, prompts, new, options):
        yield compare(f"{name}, {rival.name}", [mine, rival], options, count=count_tokens, same=rivals.agreement)
    if DIFFERENT in equal:
        raise MismatchError(equal)


def g4(options: Options) -> Iterator[dict]:
    """Decoding batches of 64 and 256 at a mean context of 256 (prompt 128 + 256 new), greedy.

    The bound is of one step: weights and the mean of the cache over copy bandwidth. The step's time is that of the
    whole less that of one new token.
    """
    limits = ceilings(options)
    model, tokenizer, decoder = gpu_model(options)
    length, new = options.sized((128, 256), (8, 6))
    later = []
    for batch in options.sized((64, 256), (2, 3)):
        prompts = random_prompts([length] * batch, model.config.vocab_size)
        bound = (weight_bytes(model) + batch * (length + new / 2) * CACHE_BYTES) / (limits["copy_gb_per_s"] * 1e9)
        run = partial(ours, model, tokenizer, prompts, params=GREEDY, decoder=decoder)
        mine = Side("qftlab", partial(run, new_tokens=new))
        first = Side("qftlab, one new token", partial(run, new_tokens=1))
        facts = {"ceilings": limits, "bound_seconds_per_step": bound}
        name = f"batch {batch}, context {length + new // 2}"
        row = compare(name, [mine, first], options, count=count_tokens, same=lambda a, b: "prefill", facts=facts)
        pairs = zip(*(side["rounds"] for side in row["sides"]), strict=True)
        steps = [max(whole - one, 1e-9) / (new - 1) for whole, one in pairs]
        share = judge("of the byte bound of a step", [bound / s for s in steps], 0.5, 0.65, is_judged=not options.quick)
        rate = judge("tokens/s after the first token", [batch / s for s in steps], None, None)
        row["judged"] = [share, rate]
        yield row
        later += [(f"{name}, {rival.name}", [mine, rival]) for rival in rivals_of(model, prompts, new, options)]
    for name, sides in later:
        yield compare(name, sides, options, count=count_tokens, same=rivals.agreement)


def g5(options: Options) -> Iterator[dict]:
    """nano-vllm's benchmark: 256 requests, prompts and outputs of 100 to 1,024 tokens, temperature 0.6, no stop."""
    model, tokenizer, decoder = gpu_model(options)
    draw = random.Random(0)
    number, low, high = options.sized((256, 100, 1024), (4, 3, 12))
    sizes, lengths = ([draw.randint(low, high) for _ in range(number)] for _ in range(2))
    prompts = random_prompts(sizes, min(10_000, model.config.vocab_size))
    params = SamplingParams(temperature=0.6)
    mine = Side("qftlab", lambda: ours(model, tokenizer, prompts, lengths, params, decoder=decoder))
    name = f"{number} requests, {sum(sizes)} + {sum(lengths)} tokens"
    facts = {"ceilings": ceilings(options)}
    row = compare(name, [mine], options, count=count_tokens, same=rivals.same_lengths, facts=facts)
    rates = [sum(lengths) / s for s in row["sides"][0]["rounds"]]
    row["judged"].append(judge("tokens/s", rates, 60_000, 100_000, is_judged=not options.quick))
    yield row
    padded = partial(rivals.generate, model, prompts, max(lengths), params, lengths=lengths)
    server = rivals.Continuous(model, params, options)
    for rival in [
        Side("generate_batch", lambda: server.run(prompts, lengths), rounds=2, server=server),
        Side("generate, dynamic cache", padded, rounds=1),
    ]:
        yield compare(f"{name}, {rival.name}", [mine, rival], options, count=count_tokens, same=rivals.same_lengths)


BENCHMARKS = {
    "C1": Benchmark("greedy and sampling, prompt 32 + 128 new", "transformers generate", c1),
    "C2": Benchmark("16 prompts x 4 ragged rollouts, cap 256", "generate, num_return_sequences", c2),
    "C3": Benchmark("beam search, prompt 32 + 128 new", "generate, num_beams", c3),
    "C7": Benchmark("samplers on 8 x 151,936 logits", "transformers warpers + multinomial", c7),
    "G3": Benchmark("Qwen2.5-0.5B shape, bf16, batch 1", "transformers generate", g3, "cuda"),
    "G4": Benchmark("Qwen2.5-0.5B shape, bf16, batch 64 and 256", "transformers generate", g4, "cuda"),
    "G5": Benchmark("256 ragged requests", "transformers generate, continuous batching", g5, "cuda"),
}
