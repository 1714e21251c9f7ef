"""Rollouts through a real HTTP server that speaks the OpenAI protocol: with and without vLLM's fields, up and down."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from random_models import random_model

from qftlab.decoding.engine import generate
from qftlab.maths.sampling import SamplingParams
from qftlab.model.lora import add_adapters
from qftlab.remote import client
from qftlab.remote.client import Refused, ServerError
from qftlab.remote.sampler import ServerSampler
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import LoRAConfig, PolicyConfig, RLOOConfig, ServerConfig, TrainConfig
from qftlab.train.rloo import fit_policy, rloo
from qftlab.train.rollouts import encode_prompts
from qftlab_course.flaky import Flaky, parrot

ROOT = Path(__file__).resolve().parent.parent.parent
CONSTANT = {"warmup_ratio": 0, "schedule": "constant", "weight_decay": 0.0}
POLICY = PolicyConfig(num_generations=4, max_new_tokens=6, temperature=0.8)
ROWS = [{"prompt": f"Say {w}."} for w in "one two three four five six".split()]


class Server:
    """The engine behind /v1/completions and /v1/load_lora_adapter.

    Args:
        model: answers.
        is_vllm: gives token ids and knows vLLM's fields; else such a field is refused with 400.
        left: completions it gives before every request fails with 500; None is without end.
    """

    def __init__(self, model, tokenizer, *, is_vllm: bool = True, left: int | None = None) -> None:
        self.model, self.tokenizer, self.is_vllm, self.left = model, tokenizer, is_vllm, left
        self.adapters: dict[str, object] = {}
        self.asked: list[dict] = []
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict) -> tuple[int, object]:
        with self.lock:
            if path.endswith("lora_adapter"):
                return self.change_adapter(path, body)
            self.asked.append(body)
            if not self.is_vllm and "return_token_ids" in body:
                return 400, {"error": "unknown field return_token_ids"}
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    return 500, {"error": "out of order"}
            model = self.adapters.get(body["model"], self.model)
            answers = generate(model, self.tokenizer, [body["prompt"]], num_generations=body["n"], seed=body["seed"],
                               max_new_tokens=body["max_tokens"], return_logprobs=True,
                               params=SamplingParams(temperature=body["temperature"]))  # fmt: skip
            return 200, {"choices": [self.choice(i, a) for i, a in enumerate(answers)]}

    def choice(self, index: int, answer) -> dict:
        made = {"index": index, "text": answer.text, "finish_reason": answer.finish_reason}
        if self.is_vllm:
            made |= {"token_ids": answer.token_ids, "logprobs": {"token_logprobs": answer.logprobs}}
            made["text"] = self.tokenizer.decode(answer.token_ids, skip_special_tokens=False)
        return made

    def change_adapter(self, path: str, body: dict) -> tuple[int, object]:
        if path.endswith("unload_lora_adapter"):
            del self.adapters[body["lora_name"]]
        else:
            from peft import PeftModel

            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(random_model(), body["lora_path"])
        return 200, "Success"


@contextmanager
def serving(server: Server):
    """The address while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, found = server.answer(self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode() if self.path.endswith("completions") else found.encode())

        def log_message(self, *_) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)


def good(prompt: list[dict], ids: list[int], text: str, row: dict) -> float:
    return len(set(ids)) / 12


def ids_of(tokenizer) -> list[list[int]]:
    return [p.ids for p in encode_prompts(tokenizer, ROWS)]


def test_a_server_with_ids_gives_what_the_engine_gives(tokenizer) -> None:
    model, prompts = random_model(), ids_of(tokenizer)
    server = Server(model, tokenizer)
    with serving(server) as url:
        sampler = ServerSampler(ServerConfig(url=url, threads=3), model, tokenizer, POLICY)
        found = sampler.sample(prompts, seed=5, temperature=0.8, num_generations=4)
        again = sampler.sample(prompts, seed=5, temperature=0.8, num_generations=4)
    assert found == again and len(found) == 24
    for i, ids in enumerate(prompts):
        wanted = generate(model, tokenizer, [ids], num_generations=4, seed=5 + i, max_new_tokens=6,
                          return_logprobs=True, params=SamplingParams(temperature=0.8))  # fmt: skip
        for mine, theirs in zip(found[4 * i : 4 * i + 4], wanted, strict=True):
            assert (mine.prompt_ids, mine.token_ids, mine.text) == (ids, theirs.token_ids, theirs.text)
            assert mine.logprobs == pytest.approx(theirs.logprobs) and mine.finish_reason == theirs.finish_reason
    assert all(body["top_p"] == 1 and body["top_k"] == -1 for body in server.asked), "no filter"


def test_a_plain_server_is_encoded_again_with_one_log_line(tokenizer, caplog) -> None:
    """An answer that ended gets its end token back, and one that was cut does not."""
    model = random_model()
    with serving(Server(model, tokenizer, is_vllm=False)) as url:
        sampler = ServerSampler(ServerConfig(url=url), model, tokenizer, POLICY)
        for _ in range(2):
            found = sampler.sample(ids_of(tokenizer), seed=0, temperature=0.8, num_generations=4)
    assert caplog.text.count("asked without them") == 1 and caplog.text.count("encoded again") == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for answer in found:
        body = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        assert (answer.token_ids[-1:] == [end]) == (answer.finish_reason == "stop")
        assert body == tokenizer(answer.text, add_special_tokens=False).input_ids and answer.logprobs is None


def test_a_server_that_goes_down_stops_the_run_and_nothing_is_lost(tokenizer, tmp_path) -> None:
    """It answers two rollouts; resumed with a new server, the run ends as one that was never disturbed."""
    config = TrainConfig(lr=1e-3, max_steps=4, batch_size=3, **CONSTANT)

    def run(model, server: Server, **options):
        with serving(server) as url:
            sampler = ServerSampler(ServerConfig(url=url, retries=1), model, tokenizer, POLICY)
            return fit_policy(model, tokenizer, ROWS, good, config, POLICY, sampler=sampler, **options)

    with pytest.raises(ServerError, match="must answer, got .*500.* after 2 requests: start the server again"):
        run(random_model(), Server(random_model(), tokenizer, left=6), checkpoints=tmp_path)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000002"]
    model, undisturbed = random_model(), random_model()
    resumed = run(model, Server(random_model(), tokenizer), checkpoints=tmp_path, resume=True)
    assert resumed.losses == run(undisturbed, Server(random_model(), tokenizer)).losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))


def test_nobody_listening_and_nonsense_are_said_clearly(tokenizer) -> None:
    model = random_model()
    with serving(Server(model, tokenizer)) as url:
        pass
    sampler = ServerSampler(ServerConfig(url=url, retries=0), model, tokenizer, POLICY)
    with pytest.raises(ServerError, match="must answer, got .*Refused.* after 1 requests"):
        sampler.sample(ids_of(tokenizer), seed=0, temperature=1, num_generations=2)
    server = Server(model, tokenizer)
    server.choice = lambda index, answer: {"index": index}
    with serving(server) as url, pytest.raises(ServerError, match="must have choices of text"):
        ServerSampler(ServerConfig(url=url), model, tokenizer, POLICY).sample(
            ids_of(tokenizer), seed=0, temperature=1, num_generations=2
        )
    with pytest.raises(ValueError, match="server.url must begin with"):
        ServerConfig(url="localhost:8000")
    with pytest.raises(ValueError, match="server.adapters must go with adapters"):
        ServerSampler(ServerConfig(url="http://localhost:1", adapters="x"), model, tokenizer, POLICY)


@pytest.mark.parametrize(("change", "message"), [
    ({"token_ids": "5 6"}, "token_ids must be a list of ids below"),
    ({"token_ids": [5, True]}, "token_ids must be a list of ids below"),
    ({"token_ids": [5, 1.0]}, "token_ids must be a list of ids below"),
    ({"token_ids": [5, -1]}, "token_ids must be a list of ids below"),
    ({"token_ids": [5, 10**9]}, "token_ids must be a list of ids below"),
    ({"token_ids": [5] * 7}, "must have from 1 to 6 tokens, got 7"),
    ({"token_ids": [], "logprobs": None, "text": "said"}, "must have from 1 to 6 tokens, got 0"),
    ({"token_ids": None}, "token ids of every answer or of none"),
    ({"logprobs": {"token_logprobs": [float("nan")] * 2}}, "must hold numbers, got NaN"),
    ({"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "token_logprobs must be 2 numbers of at most 0"),
    ({"logprobs": {"token_logprobs": [-1.0, -1e999]}}, "must hold numbers, got -Infinity"),
    ({"logprobs": {"token_logprobs": [-1.0]}}, "token_logprobs must be 2 numbers"),
    ({"logprobs": {"token_logprobs": [-1.0, "-1"]}}, "token_logprobs must be 2 numbers"),
    ({"logprobs": {"token_logprobs": [-1.0, None]}}, "token_logprobs must be 2 numbers"),
    ({"logprobs": [-1.0, -1.0]}, "must have choices of text"),
    ({"text": None}, "must have choices of text"),
    ({"finish_reason": 3}, "must have choices of text"),
    ({"index": "0"}, "must have choices of text"),
])  # fmt: skip
def test_an_answer_that_cannot_be_trained_on_is_asked_for_again(change: dict, message: str, tokenizer, caplog) -> None:
    """The first answer is bad in one of its two completions, the second is good: 2 tokens, by hand."""
    model, prompts = random_model(), ids_of(tokenizer)[:1]
    good = {"text": "ab", "token_ids": [5, 6], "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0, -0.0]}}
    asked = []

    def answer(path: str, body: dict) -> dict:
        asked.append(body)
        bad = good | (change if len(asked) % 2 else {})
        return {"choices": [{"index": 1} | bad, {"index": 0} | good | {"token_ids": [9, 8]}]}

    with Flaky(answer) as server:
        sampler = ServerSampler(ServerConfig(url=server.url, retries=1), model, tokenizer, POLICY)
        found = sampler.sample(prompts, seed=0, temperature=1, num_generations=2)
        assert [c.token_ids for c in found] == [[9, 8], [5, 6]] and [c.logprobs for c in found] == [[-1.0, 0.0]] * 2
        assert len(asked) == 2 and message in caplog.text
        sampler.server = ServerConfig(url=server.url, retries=0)
        with pytest.raises(ServerError, match=re.escape(message)):
            sampler.sample(prompts, seed=0, temperature=1, num_generations=2)


@pytest.mark.parametrize("choices", [None, {}, "text", [], [3, 4], [{}] * 2])
def test_answers_without_two_choices_are_refused(choices: object, tokenizer) -> None:
    with Flaky(lambda path, body: {"choices": choices}) as server:
        sampler = ServerSampler(ServerConfig(url=server.url, retries=0), random_model(), tokenizer, POLICY)
        with pytest.raises(ServerError, match="must have choices of text|must give 2 answers"):
            sampler.sample(ids_of(tokenizer)[:1], seed=0, temperature=1, num_generations=2)


def test_a_key_that_is_refused_is_not_taken_for_a_plain_server(tokenizer) -> None:
    with Flaky(lambda path, body: {}, key="right") as server:
        sampler = ServerSampler(ServerConfig(url=server.url, retries=0), random_model(), tokenizer, POLICY)
        with pytest.raises(Refused, match="got HTTP 401: .*environment variable OPENAI_API_KEY"):
            sampler.sample(ids_of(tokenizer)[:1], seed=0, temperature=1, num_generations=2)
        assert not sampler._is_plain and sum(server.requests.values()) == 0


@pytest.mark.long
def test_ctrl_c_twice_ends_a_run_within_two_seconds_though_the_server_hangs(tmp_path) -> None:
    """The first is for the step under way, which would wait for ten minutes; the second is not."""
    with Flaky(parrot, {"hang": 1.0}) as server:
        options = {"server.url": server.url, "output": tmp_path, "problems": 4, "policy.max_new_tokens": 4}
        command = [sys.executable, "-m", "qftlab", "rloo", *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not server.requests:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        for line in process.stderr:
            if "interrupted after 0 of 1 steps" in line:
                break
        assert time.monotonic() - start < 3, "1.5 s without an answer, and the rest on a busy machine"
        errors = process.stderr.read()  # communicate() would miss what the loop has read ahead
        assert process.wait(60) == 130 and "to go on: --resume" in errors


def test_rows_that_vllm_takes_no_adapters_with_are_refused_before_there_is_a_run(tokenizer, tmp_path) -> None:
    """vLLM knows lora_A and lora_B only: `trainable_tokens_delta` made it refuse the first rollout."""
    model = add_adapters(random_model(), LoRAConfig(rank=4), token_ids=[5, 7])
    named = ", ".join(tokenizer.convert_ids_to_tokens([5, 7]))
    server = ServerConfig(url="http://localhost:1", adapters=str(tmp_path))
    with pytest.raises(ValueError, match=f"must go without rows of tokens, .* got {re.escape(named)}: leave"):
        ServerSampler(server, model, tokenizer, POLICY)
    assert ServerSampler(ServerConfig(url="http://localhost:1"), model, tokenizer, POLICY)
    config = RLOOConfig(
        problems=4, lora=LoRAConfig(2, tokens="<|im_end|>"), server=server, output=str(tmp_path / "runs")
    )
    with pytest.raises(ValueError, match=r"vLLM refuses, got <\|im_end\|>: leave out"):
        rloo(config)
    assert not (tmp_path / "runs").exists()


def test_adapters_reach_the_server_before_each_rollout(tokenizer, tmp_path) -> None:
    """The sampler's log-probabilities stay those of the policy, to 1e-4, while without sending they drift away."""
    gaps = []
    for folder in (str(tmp_path), ""):
        model, logs, server = add_adapters(random_model(), LoRAConfig(rank=4)), [], Server(random_model(), tokenizer)
        with serving(server) as url:
            sampler = ServerSampler(ServerConfig(url=url, adapters=folder), model, tokenizer, POLICY)
            config = TrainConfig(lr=3e-2, max_steps=4, batch_size=6, **CONSTANT)
            fit_policy(model, tokenizer, ROWS, good, config, POLICY, sampler=sampler, on_log=logs.append)
        gaps.append([record["sampler_gap_max"] for record in logs])
        assert len(server.adapters) == (1 if folder else 0), "old ones are unloaded"
    assert max(gaps[0]) < 1e-4 and max(gaps[1]) > 1e-2
    assert len(list(tmp_path.iterdir())) == 1
