"""The server: a served answer is `generate`'s, alone and under load; what cannot be answered gets 4xx and a reason."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from random_models import random_model

from qftlab.decoding.engine import generate, plan_rows
from qftlab.files import bundled
from qftlab.maths.sampling import SamplingParams
from qftlab.model.loading import load_model
from qftlab.rows.sources import load_rows
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.serve import ServeConfig, app
from qftlab.serve.app import KEY, LARGEST, serving
from qftlab.serve.batcher import Batcher, Failed

ROOT = Path(__file__).resolve().parents[2]
BUGS = [row["instruction"] for row in load_rows(bundled("bugfix", "heldout.jsonl"))[:48]]
SHOWN = {"extra_body": {"skip_special_tokens": False}}


@pytest.fixture(scope="module")
def course():
    """The course's model with mode tokens, fp32, and its tokenizer."""
    folder = bundled("stages", "sft")
    return load_model(folder, dtype="float32"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def url(course):
    """A server of it."""
    with serving(*course, name="sft") as address:
        yield address


@pytest.fixture(scope="module")
def endless():
    """A random model of a long context, which in these tests never ends by itself, and a tokenizer of its size."""
    return random_model(max_position_embeddings=4096), load_tokenizer("tiny")


def client(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=url, api_key=key, max_retries=0)


def turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def post(url: str, body: bytes | dict, path: str = "chat/completions", **headers: str) -> tuple[int, dict, dict]:
    """Status, JSON and headers of an answer."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


def figure(url: str, name: str) -> float:
    """One of the server's metrics."""
    text = urllib.request.urlopen(url.removesuffix("v1") + "metrics").read().decode()
    return float(re.search(rf"^qftlab_{name} (\S+)$", text, re.M)[1])


def until(is_so, seconds: float = 30) -> None:
    """Waits for something to be so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never was so"
        time.sleep(0.01)


def joined(chunks) -> str:
    """The text of a streamed chat answer."""
    return "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)


# What a served answer is


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 7},
                                     {"temperature": 0.8, "seed": 3, "stop": [" after", "line 3"]}])  # fmt: skip
def test_openai_client_and_curl_get_the_text_of_generate(course, url, options) -> None:
    """Streamed and whole, special tokens included."""
    params = SamplingParams(options["temperature"], top_p=options.get("top_p", 1.0))
    stop, seed = options.get("stop", ()), options.get("seed", 0)
    expected = generate(*course, [turn(BUGS[0])], max_new_tokens=40, params=params, seed=seed, stop=stop)[0]
    asked = {"model": "sft", "messages": turn(BUGS[0]), "max_tokens": 40, **options}
    whole = client(url).chat.completions.create(**asked, **SHOWN)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        len(expected.prompt_ids), len(expected.token_ids),
    )  # fmt: skip
    assert joined(client(url).chat.completions.create(**asked, **SHOWN, stream=True)) == expected.text
    if shutil.which("curl"):
        body = asked | {"skip_special_tokens": False, "stream": True}
        command = ["curl", "-sN", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
        lines = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True).stdout.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [ChatCompletionChunk.model_validate_json(line.removeprefix("data: ")) for line in lines[:-2]]
        assert joined(chunks) == expected.text
        command.remove("-sN")
        done = subprocess.run(
            [*command, "-s"], input=json.dumps(body | {"stream": False}), capture_output=True, text=True
        )
        assert ChatCompletion.model_validate_json(done.stdout).choices[0].message.content == expected.text


def test_greedy_answers_are_those_of_plain_transformers(course, url) -> None:
    """The oracle shares no line with us: its own template, its own loop."""
    model, tokenizer = course
    ids = tokenizer.apply_chat_template(
        turn(BUGS[1]), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).split("<|im_end|>")[0]
    asked = {"model": "sft", "messages": turn(BUGS[1]), "max_tokens": 40, "temperature": 0}
    assert client(url).chat.completions.create(**asked, **SHOWN).choices[0].message.content == text


def test_special_tokens_are_hidden_unless_asked_for_and_stop_either_way(url) -> None:
    asked = {"model": "sft", "messages": turn(BUGS[0]), "max_tokens": 40, "temperature": 0}
    shown = client(url).chat.completions.create(**asked, **SHOWN).choices[0].message.content
    assert shown.startswith("<|AGENT|>")
    for options in ({}, {"extra_body": {"skip_special_tokens": True}}):
        hidden = client(url).chat.completions.create(**asked, **options).choices[0].message.content
        assert hidden == shown.removeprefix("<|AGENT|>")
        assert joined(client(url).chat.completions.create(**asked, **options, stream=True)) == hidden
    for options in ({}, SHOWN):
        stopped = client(url).chat.completions.create(**asked, **options, stop="<|AGENT|>")
        assert (stopped.choices[0].message.content, stopped.usage.completion_tokens) == ("", 1)


def test_each_choice_of_each_prompt_is_the_row_of_generate(course, url) -> None:
    """Texts and lists of ids, eight choices each, from one seed: the numbers of the rows are `generate`'s."""
    tokenizer, texts = course[1], ["Use the numbers 4, 6", "def last(xs):"]
    options = {"max_tokens": 12, "seed": 11, "n": 8, "extra_body": {"skip_special_tokens": False, "top_k": 20}}
    expected = generate(*course, texts, max_new_tokens=12, params=SamplingParams(top_k=20), seed=11, num_generations=8)
    for prompt in (texts, [tokenizer(text).input_ids for text in texts]):
        answer = client(url).completions.create(model="sft", prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == [row.text for row in expected]
        assert [choice.index for choice in answer.choices] == list(range(16))
        assert answer.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    pieces = [""] * 16
    for chunk in client(url).completions.create(model="sft", prompt=texts, stream=True, **options):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [row.text for row in expected]
    alone = client(url).completions.create(model="sft", prompt=texts[0], **options)
    assert [choice.text for choice in alone.choices] == [row.text for row in expected[:8]]


def test_logprobs_are_those_of_generate(course, url) -> None:
    """1e-5: the products of another batch size round otherwise. Greedy takes the likeliest of those told."""
    for temperature in (0.0, 0.7):
        params = SamplingParams(temperature)
        [row] = generate(*course, [turn(BUGS[2])], max_new_tokens=20, params=params, seed=1, return_logprobs=True)
        asked = {"model": "sft", "messages": turn(BUGS[2]), "max_tokens": 20, "temperature": temperature, "seed": 1}
        asked |= {"logprobs": True, "top_logprobs": 4}
        [choice] = client(url).chat.completions.create(**asked).choices
        told = choice.logprobs.content
        assert [entry.logprob for entry in told] == pytest.approx(row.logprobs, abs=1e-5)
        assert [entry.token for entry in told] == [course[1].decode([token]) for token in row.token_ids]
        assert all(bytes(entry.bytes).decode() == entry.token for entry in told)
        for entry in told:
            best = [other.logprob for other in entry.top_logprobs]
            assert len(best) == 4 and best == sorted(best, reverse=True) and sum(map(math.exp, best)) < 1.0001
            assert temperature or (entry.token, entry.logprob) == (entry.top_logprobs[0].token, best[0])
        chunks = list(client(url).chat.completions.create(**asked, stream=True))
        streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
        assert [(entry.token, entry.logprob) for entry in streamed] == [(entry.token, entry.logprob) for entry in told]
    [choice] = (
        client(url).completions.create(model="sft", prompt="2 + 3 =", max_tokens=3, temperature=0, logprobs=2).choices
    )
    [row] = generate(*course, ["2 + 3 ="], max_new_tokens=3, return_logprobs=True)
    assert choice.logprobs.token_logprobs == pytest.approx(row.logprobs, abs=1e-5)
    assert [max(best.values()) for best in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs
    assert client(url).completions.create(model="sft", prompt="2", max_tokens=1).choices[0].logprobs is None


def test_answers_are_what_openai_declares(url) -> None:
    """Its own models validate them; the client would take anything."""
    body = {"model": "sft", "messages": turn("2 + 3"), "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    assert ChatCompletion.model_validate(post(url, body)[1]).object == "chat.completion"
    body = {"model": "sft", "prompt": "2 + 3", "max_tokens": 3, "logprobs": 1}
    assert Completion.model_validate(post(url, body, "completions")[1]).object == "text_completion"
    chunks = list(client(url).chat.completions.create(model="sft", messages=turn("2 + 3"), max_tokens=2, stream=True,
                                                      stream_options={"include_usage": True}))  # fmt: skip
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[-2].choices[0].finish_reason == "length"


@pytest.fixture(scope="module")
def qwen(real_data: Path):
    """A random model with the tokenizer of Qwen3, whose tokens may be half a character; its template has tools."""
    return random_model("qwen3", vocab_size=151_936), load_tokenizer(real_data / "qwen3-0.6b")


@pytest.mark.long
def test_half_characters_wait_for_their_other_bytes(qwen) -> None:
    """A random model writes many; streamed pieces joined are the whole, and a token that is no text has no bytes."""
    params = SamplingParams(1.0)
    expected = generate(*qwen, ["Hello"], max_new_tokens=40, params=params, seed=4, num_generations=3)
    with serving(*qwen) as url:
        asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "seed": 4, "n": 3, **SHOWN}
        whole = client(url).completions.create(**asked)
        assert [choice.text for choice in whole.choices] == [row.text for row in expected]
        pieces = [""] * 3
        for chunk in client(url).completions.create(**asked, stream=True):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
        assert pieces == [row.text for row in expected] and "\N{REPLACEMENT CHARACTER}" in "".join(pieces)
        chat = {"model": "tiny", "messages": turn("hi"), "max_tokens": 150, "seed": 1, "logprobs": True}
        told = client(url).chat.completions.create(**chat).choices[0].logprobs.content
        chunks = list(client(url).chat.completions.create(**chat, stream=True))
        one_each = [entry for chunk in chunks for [entry] in [chunk.choices[0].logprobs.content]]
        assert one_each == told and joined(chunks).count("\N{REPLACEMENT CHARACTER}") < len(chunks)
        halves = [entry for entry in told if entry.bytes is None]
        assert halves and all("\N{REPLACEMENT CHARACTER}" in entry.token for entry in halves)


@pytest.mark.long
def test_tools_and_turns_go_through_the_chat_template(qwen) -> None:
    """As transformers renders them; a call that was made before, and what it gave, are turns as well."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [{"role": "system", "content": "Be brief."}, *turn("2 + 3?"),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "5", "tool_call_id": "1"}]  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    with serving(*qwen) as url:
        for said, given in ((messages, tools), (messages, None), (parts, None)):
            options = {"tools": given} if given else {}
            answer = client(url).chat.completions.create(model="tiny", messages=said, max_tokens=1, **options)
            plain = turn("ab") if said is parts else json.loads(json.dumps(said).replace(r'"{\"a\": 2}"', '{"a": 2}'))
            ids = qwen[1].apply_chat_template(plain, tools=given, add_generation_prompt=True, return_dict=True)
            assert answer.usage.prompt_tokens == len(ids["input_ids"])
    asked = {"add_generation_prompt": True, "return_dict": True}
    for thinking in (True, False):  # as the server is told; the tokenizer that was handed in stays as it is
        with serving(*qwen, thinking="on" if thinking else "off") as url:
            answer = client(url).chat.completions.create(model="tiny", messages=turn("hi"), max_tokens=1)
            ids = qwen[1].apply_chat_template(turn("hi"), enable_thinking=thinking, **asked)["input_ids"]
            assert answer.usage.prompt_tokens == len(ids)
    assert len(ids) > len(qwen[1].apply_chat_template(turn("hi"), **asked)["input_ids"])


# Rows together


def test_texts_under_load_are_those_alone(course, url) -> None:
    """48 requests of 16 clients, no two with the same prompt, settings, seed and stop: no text differs in fp32.

    Every third tells its log-probabilities, which are those of `generate` to 1e-5.
    """

    def case(i: int) -> dict:
        settings = {"temperature": (0.0, 0.7, 1.0, 1.3)[i % 4], "top_p": (1.0, 0.9, 0.5)[i % 3],
                    "top_k": (0, 5, 40)[i % 3 - 1], "min_p": (0.0, 0.05)[i % 2],
                    "repetition_penalty": (1.0, 1.2)[i // 2 % 2]}  # fmt: skip
        return {"params": settings, "seed": i, "stop": [] if i % 5 else [" the", "("], "max_tokens": 8 + i}

    def ask(i: int) -> tuple[str, list | None]:
        extra = {k: case(i)["params"][k] for k in ("top_k", "min_p", "repetition_penalty")}
        answer = client(url).chat.completions.create(
            model="sft", messages=turn(BUGS[i]), seed=i, stop=case(i)["stop"], max_tokens=case(i)["max_tokens"],
            temperature=case(i)["params"]["temperature"], top_p=case(i)["params"]["top_p"], logprobs=i % 3 == 0,
            extra_body={**extra, "skip_special_tokens": False})  # fmt: skip
        told = answer.choices[0].logprobs
        return answer.choices[0].message.content, told and [entry.logprob for entry in told.content]

    def alone(i: int) -> tuple[str, list | None]:
        params = SamplingParams(**case(i)["params"])
        [row] = generate(*course, [turn(BUGS[i])], max_new_tokens=case(i)["max_tokens"], params=params, seed=i,
                         stop=case(i)["stop"], return_logprobs=i % 3 == 0)  # fmt: skip
        return row.text, row.logprobs and pytest.approx(row.logprobs, abs=1e-5)

    with ThreadPoolExecutor(16) as pool:
        served = list(pool.map(ask, range(48)))
    assert [i for i in range(48) if served[i] != alone(i)] == []


def heard(batcher: Batcher, rows, top: int = 0) -> tuple[list, list]:
    """Seats of some rows, and the list that their events go to."""
    events: list = []
    return batcher.submit(rows, events.append, top), events


def test_a_row_joins_while_another_runs_and_leaves_before_it(endless) -> None:
    """No clock: the short row is over while the long one still has more than half of its tokens to come."""
    batcher = Batcher(*endless, ServeConfig())
    try:
        long = plan_rows(*endless, [[5, 6, 7]], 3000)
        [seat], events = heard(batcher, long)
        until(lambda: len(long[0].token_ids) > 20)
        short = plan_rows(*endless, [[9, 8]], 16)
        _, others = heard(batcher, short)
        until(lambda: others)
        assert len(long[0].token_ids) < 1500 and not events
        assert others[0][0] == 0 and others[0][2:] == ([(token, None, []) for token in short[0].token_ids], "length")
        assert short[0].token_ids == generate(*endless, [[9, 8]], max_new_tokens=16)[0].token_ids
        seat.is_over = True
        until(lambda: not batcher.seats)
        assert batcher.store is None and len(long[0].token_ids) < 3000
    finally:
        batcher.close()


def test_the_cache_grows_by_need_and_within_its_bounds(endless) -> None:
    """12 rows of 64 + 100 tokens under a bound of 500: three at a time; a longer one than the bound goes alone."""
    batcher = Batcher(*endless, ServeConfig(max_batch=8, cache_tokens=500))
    sizes, most, new_cache = [], [], batcher.decoder.new_cache

    def watched(rows: int, columns: int):
        sizes.append((rows, columns))
        return new_cache(rows, columns)

    step = batcher.decoder.step
    batcher.decoder.new_cache = watched
    batcher.decoder.step = lambda tokens, cache: (most.append(len(tokens)), step(tokens, cache))[1]
    try:
        prompts = [[i + 1] * 64 for i in range(12)] + [[7] * 600]
        rows = plan_rows(*endless, prompts, [100] * 12 + [30], num_generations=1)
        _, events = heard(batcher, rows)
        until(lambda: len(events) == 13)
        expected = generate(*endless, prompts, max_new_tokens=[100] * 12 + [30])
        assert [row.token_ids for row in rows] == [row.token_ids for row in expected]
        assert max(most) == 3 and sizes[0] == (3, 128)
        assert max(r * c for r, c in sizes) == 630 and all(r * c <= 500 for r, c in sizes[:-1])
        until(lambda: batcher.store is None)
    finally:
        batcher.close()


def test_rows_of_one_prompt_share_its_prefill(endless) -> None:
    batcher, read = Batcher(*endless, ServeConfig()), []
    prefill = batcher.decoder.prefill
    batcher.decoder.prefill = lambda prompts, cache: (read.append(len(prompts)), prefill(prompts, cache))[1]
    try:
        rows = plan_rows(*endless, [[4, 5], [6, 7, 8]], 5, SamplingParams(), seed=2, num_generations=6)
        _, events = heard(batcher, rows)
        until(lambda: len(events) == 12)
        expected = generate(*endless, [[4, 5], [6, 7, 8]], max_new_tokens=5, params=SamplingParams(), seed=2,
                            num_generations=6)  # fmt: skip
        assert [row.token_ids for row in rows] == [row.token_ids for row in expected] and read == [2]
    finally:
        batcher.close()


def test_a_queue_that_is_full_says_429_and_when_to_come_back(endless) -> None:
    with serving(*endless, max_batch=1, max_queue=2) as url:
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4000, "temperature": 0, "stream": True}
        first = client(url).completions.create(**body)
        next(first)
        waiting = ThreadPoolExecutor(1).submit(
            post, url, {**body, "stream": False, "max_tokens": 2, "n": 2}, "completions"
        )
        until(lambda: figure(url, "waiting") == 2)
        status, problem, headers = post(url, {**body, "stream": False}, "completions")
        assert (status, problem["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert problem["error"]["message"] == "2 answers wait, and 2 may: ask for 1 later"
        status, problem, _ = post(url, {**body, "stream": False, "n": 3}, "completions")
        assert status == 400 and "from 1 to 2, got 1 times 3" in problem["error"]["message"]
        first.close()
        assert waiting.result(timeout=30)[0] == 200


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_leaves_frees_its_row(endless, monkeypatch, is_streaming: bool) -> None:
    """The row is gone although it was not finished."""
    made: list[Batcher] = []
    monkeypatch.setattr(app, "Batcher", lambda *given: made.append(Batcher(*given)) or made[0])
    with serving(*endless) as url:
        body = json.dumps(
            {"model": "tiny", "prompt": [5, 6], "max_tokens": 4000, "temperature": 0, "stream": is_streaming}
        ).encode()
        with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)", url)[1]))) as wire:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            wire.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            until(lambda: made[0].seats)
            row = made[0].seats[0].row
        until(lambda: not made[0].seats)
        assert 0 < len(row.token_ids) < 4000 and row.finish_reason == ""


# What goes wrong in the model


def test_logits_that_are_no_numbers_end_their_own_row_only(endless) -> None:
    """The damage is in the cache too: the next owner of the row must not inherit it, nor the one that moves up."""
    batcher = Batcher(*endless, ServeConfig())
    prefill = batcher.decoder.prefill

    def damaged(prompts, cache):
        logits = prefill(prompts, cache)
        for row, prompt in enumerate(prompts):
            if 13 in prompt:
                logits[row] = torch.nan
                cache.store[:, :, row] = torch.nan
        return logits

    batcher.decoder.prefill = damaged
    try:
        prompts = [[5, 6, 7], [13, 4], [9, 8]]
        good = generate(*endless, [prompts[0], prompts[2]], max_new_tokens=40)
        for _ in range(2):
            rows = plan_rows(*endless, prompts, 40)
            _, events = heard(batcher, rows)
            until(lambda events=events: len(events) == 3)
            [failed] = [event for event in events if isinstance(event, Exception)]
            assert isinstance(failed, Failed) and failed.status == 503 and "no numbers" in str(failed)
            assert [rows[0].token_ids, rows[2].token_ids] == [row.token_ids for row in good]
    finally:
        batcher.close()


def test_memory_that_runs_out_fails_only_what_must(endless) -> None:
    """While newcomers are read: the large one. In a step: the one that joined last; the others go on unharmed."""
    batcher = Batcher(*endless, ServeConfig())
    prefill, step, is_short = batcher.decoder.prefill, batcher.decoder.step, []

    def scarce(prompts, cache):
        if sum(map(len, prompts)) > 100:
            raise torch.OutOfMemoryError("no room")
        return prefill(prompts, cache)

    def scarce_step(tokens, cache):
        if len(tokens) > 2 and max(cache.lengths) > 10:
            is_short.append(len(tokens))
            raise torch.OutOfMemoryError("no room")
        return step(tokens, cache)

    batcher.decoder.prefill, batcher.decoder.step = scarce, scarce_step
    try:
        prompts = [[5, 6, 7], [4] * 200, [9, 8], [3, 2]]
        rows = plan_rows(*endless, prompts, 30)
        _, events = heard(batcher, rows)
        until(lambda: len(events) == 4)
        assert [str(e)[:14] for e in events if isinstance(e, Exception)] == ["memory ran out"] * 2 and is_short == [3]
        good = generate(*endless, [prompts[0], prompts[2]], max_new_tokens=30)
        assert [rows[0].token_ids, rows[2].token_ids] == [row.token_ids for row in good]
        assert rows[1].token_ids == [] and 0 < len(rows[3].token_ids) < 30
    finally:
        batcher.close()


def test_a_failing_model_is_503_and_in_a_stream_an_event(endless) -> None:
    model = endless[0]
    with serving(*endless) as url:
        layer = model.model.layers[0].mlp.down_proj
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3000, "temperature": 0}
        stream = client(url).completions.create(**body, stream=True)
        next(stream)
        with torch.no_grad():
            kept = layer.weight.clone()
            layer.weight.fill_(torch.nan)
        try:
            with pytest.raises(Exception, match="the logits are no numbers"):
                list(stream)
            status, problem, headers = post(url, body, "completions")
            assert status == 503 and "no numbers" in problem["error"]["message"] and headers["retry-after"]
        finally:
            with torch.no_grad():
                layer.weight.copy_(kept)
        assert post(url, body | {"max_tokens": 2}, "completions")[0] == 200, "the server lives on"


# What is refused

CHAT = {"model": "sft", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "sft", "prompt": "hi", "max_tokens": 2}
DEEP = b"[" * 100_000
REFUSED = [
    *[("chat/completions", CHAT | change, why) for change, why in [
        ({"model": "other"}, "model must be 'sft'"), ({"model": None}, "model"), ({"model": 3}, "model"),
        ({"messages": []}, "at least 1"), ({"messages": [], "tools": [{}]}, "at least 1"),
        ({"messages": "hi"}, "messages"), ({"messages": None}, "messages"),
        ({"messages": [{}]}, "role and content"), ({"messages": [{"role": "user"}]}, "role and content"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "robot"), ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "text as content"),
        ({"messages": [{"role": "user", "content": None}]}, "text as content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "hi " * 2000}]}, "context of 512 tokens, got 4009"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "got -1"), ({"max_tokens": 1.5}, "1.5"),
        ({"max_tokens": "2"}, "max_tokens"), ({"max_tokens": 10**30}, "context of 512"),
        ({"max_completion_tokens": 3}, "give one of them"), ({"n": 0}, "n:"), ({"n": 129}, "129"), ({"n": True}, "n:"),
        ({"temperature": "hot"}, "'hot'"), ({"temperature": -1}, "temperature"), ({"temperature": 1e-9}, "1e-09"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"), ({"top_p": 1.3}, "got 1.3"), ({"top_k": -1}, "top_k"),
        ({"top_k": 10**30}, "top_k"), ({"min_p": 2}, "min_p must be in [0, 1], got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"stop": ""}, "must not be empty"), ({"stop": [*"abcde"]}, "stop"), ({"stop": [3]}, "stop: Input"),
        ({"stop": "\ud800"}, "surrogate"), ({"stop_token_ids": [99999]}, "got 99999"), ({"seed": 2**63}, "seed"),
        ({"seed": "a"}, "seed"), ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options"), ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "needs logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "chat template without tools"),
        ({"tool_choice": "auto"}, "calls come back as text"), ({"response_format": {}}, "response_format"),
        ({"prompt": "hi"}, "unknown field 'prompt'"), ({"no such!": 1}, "unknown field 'no such!'"),
        ({"\ud800": 1}, "unicode"),
    ]],
    *[("completions", TEXT | change, why) for change, why in [
        ({"prompt": ""}, "at least one token"), ({"prompt": []}, "got 0 times 1"), ({"prompt": [[]]}, "one token"),
        ({"prompt": [-1]}, "got -1"), ({"prompt": [10**30]}, "rows of the model"), ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"), ({"prompt": ["a", 3]}, "prompt"), ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": [5] * 512}, "got 512 in prompts[0] + 2 new"), ({"echo": True}, "not sent back"),
        ({"logprobs": True}, "logprobs"), ({"suffix": "x"}, "suffix"), ({"prompt": ["a"] * 300}, "from 1 to 256"),
    ]],
    *[("chat/completions", body, why) for body, why in [
        (b"", "JSON object"), (b"{", "JSON object"), (b"[]", "JSON object"), (b"3", "JSON object"), (b"\xff", "body"),
        (b'{"model": "sft", "messages": [], "temperature": 1e400}', "temperature"), (DEEP, "body"),
        (b'{"model": "sft", "seed": ' + b"9" * 5000 + b"}", "body"),
    ]],
]  # fmt: skip


def test_what_cannot_be_answered_gets_4xx_and_a_reason(url) -> None:
    """More than 60 ways; the JSON of Python spells NaN, infinity and half a surrogate pair."""
    assert len(REFUSED) > 60
    found = [(path, body, why, post(url, body, path)) for path, body, why in REFUSED]
    wrong = [(path, str(body)[:200], why, status, problem) for path, body, why, (status, problem, _) in found
             if not 400 <= status < 500 or why not in problem["error"]["message"]
             or problem["error"].keys() != {"message", "type", "param", "code"}]  # fmt: skip
    assert wrong == []
    assert not [problem for *_, (_, problem, _) in found if str(ROOT) in problem["error"]["message"]], "a path is told"
    assert post(url, CHAT)[0] == 200 and post(url, TEXT, "completions")[0] == 200


def test_other_doors_are_closed_with_a_reason(url) -> None:
    plain = {"Content-Type": "text/plain"}
    assert post(url, CHAT, **plain)[0] == 400 and "application/json" in post(url, CHAT, **plain)[1]["error"]["message"]
    assert post(url, {}, "nowhere")[0] == 404 and post(url, {}, "models")[0] == 405
    for size in (f"Content-Length: {LARGEST + 1}", "Transfer-Encoding: chunked"):  # before any of it is read
        with socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)", url)[1]))) as wire:
            wire.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{size}\r\n\r\n".encode())
            answer = ""
            while "error" not in answer:
                answer += wire.recv(1000).decode()
            assert " 413 " in answer and f"at most {LARGEST}" in answer


def test_the_context_may_be_filled_to_its_last_token(url) -> None:
    """512 tokens: 511 leave room for one, 512 for none; a chat that names no number gets what is left."""
    body = {"model": "sft", "prompt": [5] * 511, "temperature": 0}
    status, answer, _ = post(url, body, "completions")
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1)
    status, problem, _ = post(url, body | {"prompt": [5] * 512}, "completions")
    assert status == 400 and "512 in prompts[0] + 1 new" in problem["error"]["message"]


def test_a_key_is_asked_for_where_there_is_one(course, monkeypatch, caplog) -> None:
    monkeypatch.setenv(KEY, "sesame-4711")
    with serving(*course, name="sft") as url:
        for path in ("models", "../metrics", "../openapi.json"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/{path}".replace("v1/../", ""))
        for key in ("", "Bearer ", "Bearer sesame-471", "Bearer sesame-4711x", "sesame-4711", "Bearer s\u00e9same"):
            status, problem, _ = post(url, CHAT, Authorization=key)
            assert status == 401 and problem["error"]["code"] == "invalid_api_key" and "sesame" not in str(problem), key
        assert post(url, CHAT, Authorization="Bearer sesame-4711")[0] == 200
        assert client(url, "sesame-4711").models.list().data[0].id == "sft"
        for path in ("", "health"):
            assert urllib.request.urlopen(url.removesuffix("v1") + path).status == 200
    assert "sesame" not in caplog.text


def test_an_open_host_without_a_key_is_warned_of(course, monkeypatch, caplog) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with serving(*course, host="0.0.0.0"):
        assert f"no key is asked for: set {KEY}" in caplog.text
    caplog.clear()
    with serving(*course):
        assert not caplog.text


def test_health_metrics_and_the_page(course) -> None:
    with serving(*course, name="sft") as url:
        base = url.removesuffix("v1")
        assert json.loads(urllib.request.urlopen(base + "health").read()) == {"status": "ok"}
        post(url, {"model": "sft", "prompt": [[5, 6], [7]], "max_tokens": 1, "n": 2}, "completions")
        assert [figure(url, name) for name in ("requests_total", "prompt_tokens_total", "completion_tokens_total")] == [
            1,
            3,
            4,
        ]
        assert figure(url, "request_seconds_total") > 0 and figure(url, "running") == figure(url, "waiting") == 0
        with urllib.request.urlopen(base) as page:
            text, rules = page.read().decode(), page.headers["content-security-policy"]
        assert "default-src 'none'" in rules and not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", text)
        assert "innerHTML" not in text and "insertAdjacent" not in text, "what a model says is never markup"


def test_an_option_that_would_change_nothing_is_refused(course) -> None:
    with pytest.raises(TypeError, match=r"loaded already.*\['dtype'\]"):
        with serving(*course, dtype="bfloat16"):
            raise AssertionError("not reached")


def test_fastapi_is_asked_for_by_the_name_of_the_extra() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom qftlab.cli import main\nsys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "qftlab[serve]"' in done.stderr and "Traceback" not in done.stderr


# A process of its own


@contextmanager
def process(*options: str):
    """The command, and its address."""
    command = [
        sys.executable,
        "-m",
        "qftlab",
        "serve",
        "--model",
        str(bundled("stages", "sft")),
        "--port",
        "0",
        *options,
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server, re.search(r"http\S+/v1", server.stderr.readline())[0]
        finally:
            server.kill()


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_lets_running_answers_finish(course, name: str) -> None:
    """New requests are told 503 and when to come back; the streamed text is whole; then the process ends with 0."""
    with process("--max_batch", "2") as (server, url):
        body = {"model": "sft", "prompt": "a", "max_tokens": 505, "seed": 5, "temperature": 1.2}
        stream = client(url).completions.create(**body, stream=True, n=6)
        texts = [""] * 6
        first = next(stream)
        texts[first.choices[0].index] += first.choices[0].text
        server.send_signal(getattr(signal, name))
        until(lambda: post(url, body, "completions")[0] == 503)
        status, problem, headers = post(url, body, "completions")
        assert (status, headers["retry-after"]) == (503, "1") and "stopping" in problem["error"]["message"]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(url.removesuffix("v1") + "health")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert server.wait(20) == 0
        expected = generate(*course, ["a"], max_new_tokens=505, seed=5, params=SamplingParams(1.2), num_generations=6)
        plain = [course[1].decode(row.token_ids, skip_special_tokens=True) for row in expected]
        assert texts == plain


@pytest.mark.slow
def test_a_client_that_does_not_fetch_its_answer_holds_the_stop_up_for_half_a_minute() -> None:
    with process() as (server, url), socket.socket() as wire:
        asked = {"model": "sft", "prompt": "a", "max_tokens": 505, "temperature": 1.9, "n": 100, "logprobs": 20}
        body = json.dumps(asked | {"stream": True}).encode()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", int(re.search(r":(\d+)", url)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        wire.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        until(lambda: figure(url, "running") > 0)
        until(lambda: figure(url, "running") == 0, 100)
        server.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(10)
        assert server.wait(40) == 0


@pytest.mark.long
def test_two_hundred_clients_that_leave_leave_nothing_behind(endless) -> None:
    with serving(*endless) as url, client(url) as own:

        def leave(i: int) -> None:
            body = {"model": "tiny", "prompt": [5, i + 1], "max_tokens": 4000, "temperature": 0, "n": 1 + i % 3}
            stream = own.completions.create(**body, stream=True)
            for _ in range(i % 4):
                next(stream)
            stream.close()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(leave, range(200)))
        until(lambda: figure(url, "running") == figure(url, "waiting") == 0)
        expected = generate(*endless, [[5, 6]], max_new_tokens=9)[0].text
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 9, "temperature": 0}
        assert post(url, body, "completions")[1]["choices"][0]["text"] == expected


@pytest.mark.slow
def test_sixty_seconds_of_64_clients_lose_nothing_and_need_no_more_memory() -> None:
    """The server is a process of its own; its memory after 15 s and after 60 s, within 5 %."""
    import psutil

    with process() as (server, url):
        end, lost, done, sizes = time.monotonic() + 60, [], [], []

        def ask(number: int) -> None:
            own, count = client(url), 0
            while time.monotonic() < end:
                count += 1
                try:
                    question, size = turn(BUGS[(number + count) % 48]), 4 + count % 40
                    asked = {"messages": question, "max_tokens": size, "seed": count, "n": 1 + count % 2}
                    answer = own.chat.completions.create(model="sft", **asked)
                    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
                    done.append(number)
                except Exception as error:
                    lost.append(repr(error))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for wait in (15, 40):
            time.sleep(wait)
            sizes.append(psutil.Process(server.pid).memory_info().rss >> 20)
        for thread in threads:
            thread.join()
        print(f"\n{len(done)} answers, {len(lost)} lost; {sizes} MiB resident after 15 s and 55 s")
        assert lost == [] and set(done) == set(range(64)) and sizes[1] < 1.05 * sizes[0] + 8


@pytest.mark.slow
def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    """16 tokens alone and during an answer of 1,000, medians of 15: at most three times as long."""
    shape = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    with serving(random_model(**shape), load_tokenizer("tiny")) as url:
        own = client(url)

        def seconds() -> float:
            start = time.perf_counter()
            own.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=16, temperature=0)
            return time.perf_counter() - start

        alone, beside = [seconds() for _ in range(20)][5:], []
        while len(beside) < 15:
            stream = own.completions.create(model="tiny", prompt=[9, 8], max_tokens=1000, temperature=0, stream=True)
            chunks = iter(stream)
            pump = threading.Thread(target=lambda chunks=chunks: [None for _ in chunks])
            next(chunks)
            pump.start()
            for _ in range(3):
                took = seconds()
                beside += [took] if pump.is_alive() else []
            pump.join()
        alone, beside = sorted(alone)[7], sorted(beside)[len(beside) // 2]
        print(f"\n16 tokens: {1000 * alone:.1f} ms alone, {1000 * beside:.1f} ms beside: {beside / alone:.2f} times")
        assert beside <= 3 * alone


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(course, url) -> None:
    """Requests made from our own OpenAPI description, fit and unfit ones; most ask for the model that is there."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error

    schema, found = schemathesis.openapi.from_url(url.removesuffix("/v1") + "/openapi.json"), Counter()
    for path in ("/v1/chat/completions", "/v1/completions"):
        for mode in schemathesis.GenerationMode:
            strategy = schema[path]["POST"].as_strategy(generation_mode=mode)

            @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=strategy)
            def run(case) -> None:
                if (
                    isinstance(case.body, dict)
                    and isinstance(case.body.get("model"), str)
                    and len(case.body["model"]) % 4
                ):
                    case.body["model"] = "sft"
                    if not {"max_tokens", "max_completion_tokens"} & case.body.keys():
                        case.body["max_tokens"] = 3
                response = case.call()
                case.validate_response(response, checks=[not_a_server_error])
                assert response.status_code == 200 or response.json()["error"]["message"]
                found[response.status_code] += 1

            run()
    print(f"\n{dict(found)}")
    assert found[200] > 10 and found[400] > 200 and found[404] > 20
