"""Rollouts from a server that speaks the OpenAI protocol: vLLM, `transformers serve`, or the lab's own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qftlab.decoding.engine import Completion, default_stop_ids
from qftlab.model.loading import save_model
from qftlab.model.lora import trained_token_ids
from qftlab.settings import PolicyConfig, ServerConfig

log = logging.getLogger(__name__)
PAUSE = 1.0  # seconds before the first retry, twice as many before each next


class ServerError(ConnectionError):
    """The server is down, or answers what cannot be used; the run can be resumed once it is back."""


class ServerSampler:
    """Samples by requests, one for each prompt with its ids, several at a time.

    Args:
        server: address, name of the model, limits.
        model: the policy. Its weights reach the server as adapters where `server.adapters` is set; a server without
            them keeps what it was started with, and the logged sampler_gap shows how far the policy has moved from it.
        tokenizer: of both.
        policy: limits and temperature.

    Raises:
        ValueError: for `server.adapters` without adapters on the model, or with rows of tokens that they train: vLLM
            takes no adapters with such rows.
    """

    def __init__(self, server: ServerConfig, model, tokenizer, policy: PolicyConfig) -> None:
        self.server, self.model, self.tokenizer, self.policy = server, model, tokenizer, policy
        if server.adapters and not hasattr(model, "peft_config"):
            raise ValueError("server.adapters must go with adapters on the model, got none: --lora.rank 16")
        if server.adapters and (rows := trained_token_ids(model)):
            names = ", ".join(tokenizer.convert_ids_to_tokens(rows))
            raise ValueError(f"server.adapters must go without rows of tokens, which vLLM refuses, got {names}: "
                             "leave out lora.tokens and new_tokens, or export the model for the server and take "
                             "--lora.from merge")  # fmt: skip
        self.stop_ids = set(default_stop_ids(model, tokenizer))
        self.name, self._sent, self._is_plain = server.model, 0, False
        self._lock, self._said = threading.Lock(), set()
        if not server.adapters:
            log.info("the server keeps the weights it was started with: server.adapters sends it new ones")

    def sample(
        self, prompts: Sequence[list[int]], *, seed: int, temperature: float, num_generations: int
    ) -> list[Completion]:
        """As `Sampler` says.

        Raises:
            ServerError: if a request fails more often than `server.retries`, or its answer cannot be used.
        """
        if self.server.adapters:
            self._send_adapters()

        def ask(i: int) -> list[Completion]:
            return self._ask(prompts[i], (seed + i) % 2**31, temperature, num_generations)

        with ThreadPoolExecutor(self.server.threads) as pool:
            return [c for group in pool.map(ask, range(len(prompts))) for c in group]

    def _ask(self, prompt: list[int], seed: int, temperature: float, count: int) -> list[Completion]:
        body = {"model": self.name, "prompt": prompt, "n": count, "max_tokens": self.policy.max_new_tokens,
                "temperature": temperature, "top_p": 1.0, "seed": seed, "logprobs": 0}  # fmt: skip
        # vLLM's words: ids in the answer, special tokens in the text, our stop tokens, no filter.
        extra = {"return_token_ids": True, "skip_special_tokens": False, "stop_token_ids": sorted(self.stop_ids),
                 "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # fmt: skip
        if not self._is_plain:
            try:
                return self._read(prompt, self._post("completions", {**body, **extra}), count)
            except urllib.error.HTTPError as error:
                self._is_plain = True
                self._say("plain", "the server refuses vLLM's fields (HTTP %d): asked without them", error.code)
        try:
            return self._read(prompt, self._post("completions", body), count)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.server.url} must answer, got HTTP {error.code}: {_detail(error)}") from error

    def _read(self, prompt: list[int], answer: dict, count: int) -> list[Completion]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
            found = [self._completion(prompt, choice) for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.server.url} must answer with choices of text, got {answer!r:.200}") from error
        if len(found) != count:
            raise ServerError(f"{self.server.url} must give {count} answers to a prompt, got {len(found)}")
        return found

    def _completion(self, prompt: list[int], choice: dict) -> Completion:
        text, is_finished, ids = choice["text"], choice["finish_reason"] == "stop", choice.get("token_ids")
        if ids is None:
            self._say("ids", "the server gives no token ids: its text is encoded again, which may differ from what it "
                      "sampled (vLLM gives them)")  # fmt: skip
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
            if is_finished and not (ids and ids[-1] in self.stop_ids):
                ids = [*ids, end if end in self.stop_ids else min(self.stop_ids)]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        logprobs = logprobs if logprobs and len(logprobs) == len(ids) and None not in logprobs else None
        if ids and ids[-1] in self.stop_ids:
            shown = self.tokenizer.decode([ids[-1]], skip_special_tokens=False)
            text = text.removesuffix(shown)
        return Completion(prompt, list(ids), text, "stop" if is_finished else "length", logprobs)

    def _send_adapters(self) -> None:
        """Writes the adapters of now where the server reads them, and has it load them under a new name."""
        self._sent += 1
        parent, name = Path(self.server.adapters), f"{self.server.model}-{os.getpid()}-{self._sent}"
        folder = (parent / name).absolute()
        save_model(self.model, self.tokenizer, folder)
        try:
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self._sent > 1:
                self._post("unload_lora_adapter", {"lora_name": self.name})
                shutil.rmtree(parent / self.name, ignore_errors=True)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.server.url} must load adapters, got HTTP {error.code}: {_detail(error)} (vLLM "
                              "wants --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)") from error  # fmt: skip
        self.name = name

    def _post(self, path: str, body: dict) -> dict:
        """The JSON of an answer; `HTTPError` for a request that is refused.

        Raises:
            ServerError: if the server cannot be reached or fails, after all retries.
        """
        key = os.environ.get(self.server.key, "")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        url = f"{self.server.url.rstrip('/')}/{path}"
        for attempt in range(self.server.retries + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.server.timeout) as response:
                    text = response.read().decode()
                return json.loads(text) if path == "completions" else {}
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise
                problem: Exception = error
            except (OSError, ValueError) as error:
                problem = error
            self._say(f"{path} {attempt}", "request %d of %d to %s failed: %s", attempt + 1, self.server.retries + 1,
                      url, problem)  # fmt: skip
        raise ServerError(
            f"{self.server.url} must answer, got {problem} after {self.server.retries + 1} requests: start the server "
            "again and resume the run"
        ) from problem

    def _say(self, what: str, message: str, *values) -> None:
        """One log line of a kind, whatever the number of threads."""
        with self._lock:
            if what not in self._said:
                self._said.add(what)
                log.warning(message, *values)


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")[:200]
    except OSError:
        return error.reason
