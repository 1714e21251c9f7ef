"""Who answers an evaluation: weights that Tinker keeps, `--model tinker://RUN/sampler_weights/NAME`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from qftlab.rows.schemas import row_to_prompt
from qftlab.settings import ENABLE_THINKING
from qftlab_course.asking import seed_of
from qftlab_course.responses import Prompt


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
        from tinker import types

        from qftlab.decoding.engine import continuation_text, encode_prompts, known_id
        from qftlab.model.loading import END_OF_TURN
        from qftlab.remote.tinker import result_of
        from qftlab_course.measure import UNNAMED

        config, (client, tokenizer) = self.config, self.client()
        sampling, end = config.sampling, known_id(tokenizer, END_OF_TURN)
        encoded = encode_prompts(tokenizer, list(prompts), ENABLE_THINKING[config.thinking])
        waiting = []
        for ids, number in zip(encoded, numbers, strict=True):
            params = types.SamplingParams(max_tokens=config.max_new_tokens or UNNAMED, temperature=sampling.temperature,
                                          top_p=sampling.top_p, top_k=sampling.top_k or -1, stop=end and [end],
                                          seed=seed_of(config.seed, number))  # fmt: skip
            waiting.append(client.sample(types.ModelInput.from_ints(ids), config.num_samples, params))
        found = []
        for ids, future in zip(encoded, waiting, strict=True):
            for one in result_of(future).sequences:
                tokens = list(one.tokens)
                text = continuation_text(tokenizer, ids, tokens[:-1] if tokens[-1:] == [end] else tokens)
                found.append({"response": text, "token_ids": tokens, "finish_reason": one.stop_reason})
        return found
