"""Who answers an evaluation: weights that Tinker keeps, `--model tinker://RUN/sampler_weights/NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from qftlab.rows.schemas import row_to_prompt
from qftlab.settings import ENABLE_THINKING
from qftlab_course.asking import seed_of
from qftlab_course.responses import Prompt


def sampled(
    client, tokenizer, prompts: Sequence[list[int]], seeds: Sequence[int], count: int, **settings
) -> Iterator[tuple[list[int], Any, str]]:
    """Answers of a sampler of Tinker, which is asked for all of them at once.

    Args:
        client: the SDK's sampling client.
        tokenizer: of its model; a turn ends with its `<|im_end|>`.
        prompts: ids.
        seeds: one a prompt.
        count: answers to each prompt.
        settings: of the SDK's SamplingParams: max_tokens, temperature, top_p, top_k.

    Yields:
        The prompt's ids, the SDK's sequence, and its text without the end of the turn.

    Raises:
        ServerError: as `result_of`.
    """
    from tinker import types

    from qftlab.decoding.engine import continuation_text, known_id
    from qftlab.model.loading import END_OF_TURN
    from qftlab.remote.tinker import result_of

    end = known_id(tokenizer, END_OF_TURN)
    settings["stop"] = None if end is None else [end]
    waiting = [client.sample(types.ModelInput.from_ints(ids), count, types.SamplingParams(seed=seed, **settings))
               for ids, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
    for ids, future in zip(prompts, waiting, strict=True):
        for one in result_of(future).sequences:
            said = one.tokens[:-1] if one.tokens[-1:] == [end] else one.tokens
            yield ids, one, continuation_text(tokenizer, ids, list(said))


class TinkerModel:
    """Answers by a sampler of Tinker, all requests of a batch at once.

    Args:
        config: of `evaluate`; its model is a tinker:// path.
        rows: all that may be asked, converted.
        sources: rows by source, to name them.

    Raises:
        ValueError: for `few_shot`, which asks without the chat format, and for settings that Tinker does not have.
    """

    def __init__(self, config, rows: Sequence[Mapping], sources: Mapping[str, int]) -> None:
        if config.few_shot:
            raise ValueError(f"few_shot must be 0 on Tinker, which is asked in the chat format, got {config.few_shot}")
        for name, off in {"min_p": 0.0, "repetition_penalty": 1.0}.items():
            if (value := getattr(config.sampling, name)) != off:
                raise ValueError(f"sampling.{name} must be {off:g} on Tinker, which does not have it, got {value:g}")
        self.config, self.rows, self.sources = config, rows, sources
        self.client = cache(self._connect)

    def _connect(self) -> tuple:
        import tinker

        from qftlab.remote.tinker import result_of, supported_models

        supported_models()  # a wrong address or key is said at once
        client = result_of(tinker.ServiceClient().create_sampling_client(model_path=self.config.model))
        return client, client.get_tokenizer()

    def identity(self) -> dict:
        """What tells this model from others: its path."""
        return {"model": self.config.model}

    def prompts(self) -> list[Prompt]:
        """What is asked for each row."""
        return [row_to_prompt(row) for row in self.rows]

    def ask(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[dict]:
        """As `collect` wants it.

        Raises:
            ServerError: if the service is gone, or refuses a request.
        """
        from qftlab.decoding.engine import encode_prompts
        from qftlab_course.measure import UNNAMED

        config, (client, tokenizer) = self.config, self.client()
        sampling, seeds = config.sampling, [seed_of(config.seed, number) for number in numbers]
        encoded = encode_prompts(tokenizer, list(prompts), ENABLE_THINKING[config.thinking])
        settings = {"max_tokens": config.max_new_tokens or UNNAMED, "temperature": sampling.temperature,
                    "top_p": sampling.top_p, "top_k": sampling.top_k or -1}  # fmt: skip
        found = sampled(client, tokenizer, encoded, seeds, config.num_samples, **settings)
        return [{"response": text, "token_ids": list(one.tokens), "finish_reason": one.stop_reason}
                for _, one, text in found]  # fmt: skip
