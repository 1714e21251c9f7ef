"""Rollouts from a server that speaks the OpenAI protocol: vLLM, `transformers serve`, or the lab's own."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qftlab.decoding.engine import Completion, default_stop_ids
from qftlab.model.loading import save_model
from qftlab.model.lora import trained_token_ids
from qftlab.remote.client import Client, Refused
from qftlab.settings import PolicyConfig, ServerConfig

log = logging.getLogger(__name__)
# No filter; in vLLM's words also: ids in the answer, special tokens in the text.
PLAIN = {"top_p": 1.0, "logprobs": 0}
VLLM = {"return_token_ids": True, "skip_special_tokens": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
ROUNDING = 1e-4  # nats that a log-probability may be above 0


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
        self.vocabulary = model.config.get_text_config().vocab_size
        self.name, self._sent, self._is_plain, self._said = server.model, 0, False, set()
        if not server.adapters:
            log.info("the server keeps the weights it was started with: server.adapters sends it new ones")

    def sample(
        self, prompts: Sequence[list[int]], *, seed: int, temperature: float, num_generations: int
    ) -> list[Completion]:
        """As `Sampler` says.

        Raises:
            ServerError: if a request fails more often than `server.retries`, or its answer cannot be used.
        """
        with Client(self.server) as client:
            if self.server.adapters:
                self._send_adapters(client)

            def ask(i: int) -> list[Completion]:
                return self._ask(client, prompts[i], (seed + i) % 2**31, temperature, num_generations)

            groups = dict(client.map(ask, range(len(prompts))))
        return [completion for i in range(len(prompts)) for completion in groups[i]]

    def _ask(self, client: Client, prompt: list[int], seed: int, temperature: float, count: int) -> list[Completion]:
        body = {"model": self.name, "prompt": prompt, "n": count, "max_tokens": self.policy.max_new_tokens, **PLAIN}
        body |= {"temperature": temperature, "seed": seed}
        read = partial(self._read, prompt, count)
        if not self._is_plain:
            try:
                return client.ask("completions", {**body, **VLLM, "stop_token_ids": sorted(self.stop_ids)}, read)
            except Refused as error:
                if error.status not in (400, 422):
                    raise
            self._is_plain = True
            self._say("plain", "the server refuses vLLM's fields (HTTP 400 or 422): asked without them")
        return client.ask("completions", body, read)

    def _read(self, prompt: list[int], count: int, answer: dict) -> list[Completion]:
        """The completions of an answer.

        Raises:
            ValueError: for anything that cannot be trained on.
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or not all(isinstance(c, dict) and _is_whole(c) for c in choices):
            raise ValueError("must have choices of text, with a finish_reason")
        if len(choices) != count:
            raise ValueError(f"must give {count} answers to a prompt, got {len(choices)}")
        if len({choice.get("token_ids") is None for choice in choices}) > 1:
            raise ValueError("must give token ids of every answer or of none")
        return [self._completion(prompt, c) for c in sorted(choices, key=lambda choice: choice.get("index", 0))]

    def _completion(self, prompt: list[int], choice: dict) -> Completion:
        text, is_finished, ids = choice["text"], choice.get("finish_reason") == "stop", choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        longest = self.policy.max_new_tokens
        if ids is None:
            self._say("ids", "the server gives no token ids: its text is encoded again, which may differ from what it "
                      "sampled (vLLM gives them)")  # fmt: skip
            ids, logprobs, longest = self._encoded(text, is_finished), None, 2 * longest  # other tokens, perhaps
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.vocabulary for i in ids):
            raise ValueError(f"token_ids must be a list of ids below {self.vocabulary}")
        if len(ids) > longest or (text and not ids):
            raise ValueError(f"must have from 1 to {self.policy.max_new_tokens} tokens, got {len(ids)}")
        if logprobs is not None and not _are_logprobs(logprobs, len(ids)):
            raise ValueError(f"token_logprobs must be {len(ids)} numbers of at most 0, got something else")
        if ids and ids[-1] in self.stop_ids:
            text = text.removesuffix(self.tokenizer.decode([ids[-1]], skip_special_tokens=False))
        return Completion(prompt, ids, text, "stop" if is_finished else "length", logprobs)

    def _encoded(self, text: str, is_finished: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if is_finished and not (ids and ids[-1] in self.stop_ids):
            end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
            ids = [*ids, end if end in self.stop_ids else min(self.stop_ids)]
        return ids

    def _send_adapters(self, client: Client) -> None:
        """Writes the adapters of now where the server reads them, and has it load them under a new name."""
        self._sent += 1
        parent, name = Path(self.server.adapters), f"{self.server.model}-{os.getpid()}-{self._sent}"
        folder = (parent / name).absolute()
        save_model(self.model, self.tokenizer, folder)
        try:
            client.ask("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self._sent > 1:
                client.ask("unload_lora_adapter", {"lora_name": self.name})
                shutil.rmtree(parent / self.name, ignore_errors=True)
        except Refused as error:
            raise Refused(f"{error} (to load adapters vLLM wants --enable-lora and "
                          "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)", error.status) from None  # fmt: skip
        self.name = name

    def _say(self, what: str, message: str) -> None:
        """One log line of a kind, whatever the number of threads."""
        if what not in self._said:
            self._said.add(what)
            log.warning(message)


def _is_whole(choice: dict) -> bool:
    """Whether a choice has what all servers give, in the right types."""
    is_finish = choice.get("finish_reason") is None or isinstance(choice["finish_reason"], str)
    is_logprobs = isinstance(choice.get("logprobs") or {}, dict)
    return isinstance(choice.get("text"), str) and type(choice.get("index", 0)) is int and is_finish and is_logprobs


def _are_logprobs(values: object, count: int) -> bool:
    is_list = isinstance(values, list) and len(values) == count
    return is_list and all(type(v) in (int, float) and math.isfinite(v) and v <= ROUNDING for v in values)
