"""Who answers an evaluation: a model in this process, or a server that speaks the OpenAI protocol."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache

from qftlab.decoding.decoder import Decoder
from qftlab.rows.examples import place_of
from qftlab.rows.schemas import row_to_prompt
from qftlab.settings import ENABLE_THINKING
from qftlab_course.measure import UNNAMED
from qftlab_course.responses import Prompt

log = logging.getLogger(__name__)
REFUSED = (400, 413, 422)  # of HTTP: this request cannot be answered, the next may be
# What is asked for besides, in words that not all servers know: they are asked again with less.
MORE = ({"skip_special_tokens": False, "return_token_ids": True}, {"skip_special_tokens": False}, {})


def seed_of(*numbers: int) -> int:
    """One seed below 2³¹ of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big") >> 1


class LocalModel:
    """Answers by a model of this process, which is loaded when it is needed.

    Args:
        config: of `evaluate`.
        rows: all that may be asked, converted.
        sources: rows by source, to name them.
    """

    def __init__(self, config, rows: Sequence[Mapping], sources: Mapping[str, int]) -> None:
        self.config, self.rows, self.sources = config, rows, sources
        self.loaded, self._plan = cache(self._load), cache(self._make_plan)

    def _load(self) -> tuple:
        from qftlab.commands import load_for

        return load_for(self.config)

    def _make_plan(self) -> dict:
        from qftlab_course.measure import plan_rows

        config, (model, tokenizer, options) = self.config, self.loaded()
        groups = plan_rows(model, tokenizer, self.rows, few_shot=config.few_shot, seed=options["seed"],
                           max_new_tokens=options["max_new_tokens"], sources=self.sources)  # fmt: skip
        return {i: found for group in groups for i, *found in zip(*group, strict=True)}

    def identity(self) -> dict:
        """What tells this model from others: its name, and a digest of its weights."""
        from qftlab.files import resolve, sha256, weight_files
        from qftlab.train.run import resolve_model

        files = weight_files(resolve(resolve_model(self.config.model)))
        return {"model": self.config.model, "weights": sha256(*files, quick=True), "dtype": self.config.dtype}

    def prompts(self) -> list[Prompt]:
        """What is asked for each row."""
        if not self.config.few_shot:
            return [row_to_prompt(row) for row in self.rows]
        return [self._plan()[i][0] for i in range(len(self.rows))]

    def ask(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[dict]:
        """As `collect` wants it. The draws hang on the seed, the batch's first row, and the place in the batch."""
        from qftlab_course import measure

        model, tokenizer, options = self.loaded()
        # What is kept in a folder must not hang on which layout was faster in this process.
        decoder = Decoder(model) if self.config.is_folder else None
        _, ids, limits = zip(*(self._plan()[number] for number in numbers), strict=True)
        found = measure.generate(model, tokenizer, list(ids), max_new_tokens=list(limits), params=options["params"],
                                 seed=seed_of(options["seed"], numbers[0]), num_generations=self.config.num_samples,
                                 stop=measure.PLAIN_STOP if self.config.few_shot else (),
                                 batch_size=self.config.batch_size, decoder=decoder)  # fmt: skip
        return [{"response": "<think>" * measure.is_thinking(tokenizer, one.prompt_ids) + one.text,
                 "token_ids": list(one.token_ids), "finish_reason": one.finish_reason} for one in found]  # fmt: skip


class ServerModel:
    """Answers by a server, one request for each.

    Args:
        config: of `evaluate`.
        rows: all that may be asked, converted.
        sources: rows by source, to name them.
        client: of the server, with the journal that keeps its answers.
    """

    def __init__(self, config, rows: Sequence[Mapping], sources: Mapping[str, int], client=None) -> None:
        self.config, self.rows, self.sources, self.client = config, rows, sources, client
        self._first = 0
        longest = max((len(row["output"].encode()) for row in rows if row.get("output")), default=UNNAMED)
        # A token is a byte at least, so that the longest reference has room, and half as much again.
        self.longest = config.max_new_tokens or min(UNNAMED, longest + longest // 2 + 32)

    def identity(self) -> dict:
        """What tells this model from others: its name and address."""
        return {"model": self.config.server.model, "server": self.config.server.url}

    def prompts(self) -> list[Prompt]:
        """What is asked for each row."""
        return [row_to_prompt(row) for row in self.rows]

    def ask(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[dict]:
        """As `collect` wants it. A request that the server refuses counts as an empty response, which is said.

        Raises:
            ServerError: if requests fail more often than `server.retries`, or all of a batch are refused.
        """
        asked = [(prompt, number, sample) for prompt, number in zip(prompts, numbers, strict=True)
                 for sample in range(self.config.num_samples)]  # fmt: skip
        found = dict(self.client.map(self._one, asked))
        refused = {i: answer for i, answer in found.items() if isinstance(answer, Exception)}
        if len(refused) == len(asked):
            raise refused[0]
        for i, error in sorted(refused.items()):
            log.warning(
                "%s was refused and counts as an empty response: %s", place_of(asked[i][1] + 1, self.sources), error
            )
        empty = {"response": "", "token_ids": None, "finish_reason": "error"}
        return [empty if i in refused else found[i] for i in range(len(asked))]

    def _one(self, asked: tuple) -> object:
        """The answer to one request, or the refusal."""
        from qftlab.remote.client import Refused

        (first, *others), number, sample = asked
        tools, first = first.get("tools"), {name: value for name, value in first.items() if name != "tools"}
        config, sampling = self.config, self.config.sampling
        body = {"model": config.server.model, "max_tokens": self.longest,
                "temperature": sampling.temperature, "top_p": sampling.top_p,
                "seed": seed_of(config.seed, number, sample), "messages": [first, *others]}  # fmt: skip
        body |= {"tools": tools} if tools else {}
        off = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        body |= {name: getattr(sampling, name) for name, value in off.items() if getattr(sampling, name) != value}
        if (thinking := ENABLE_THINKING[config.thinking]) is not None:
            body["chat_template_kwargs"] = {"enable_thinking": thinking}
        for place in range(self._first, len(MORE)):
            try:
                answer = self.client.ask("chat/completions", {**body, **MORE[place]}, read_answer, sample=sample)
            except Refused as error:
                if error.status not in REFUSED:
                    raise
                refusal = error
                continue
            if place > self._first:
                self._first = place
                missing = "token ids" if MORE[place] else "token ids and tokens such as <|AGENT|> in its texts"
                log.warning("the server refuses to give %s: asked without", missing)
            return answer
        return refusal


def read_answer(answer: Mapping) -> dict:
    """The one response of a chat answer, with its reasoning in think tags where the server gives it apart.

    Raises:
        ValueError: if there is none.
    """
    try:
        [choice] = answer["choices"]
        message, reason = choice["message"], choice["finish_reason"]
        thought, text = message.get("reasoning_content") or message.get("reasoning"), message["content"] or ""
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError("must have one choice with a message and a finish_reason") from None
    if not isinstance(text, str) or not isinstance(thought or "", str):
        raise ValueError("must have a message of text")
    said = f"<think>\n{thought}\n</think>\n\n{text}" if thought else text
    return {"response": said, "token_ids": choice.get("token_ids"),
            "finish_reason": "length" if reason == "length" else "stop"}  # fmt: skip
