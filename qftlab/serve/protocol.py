"""The OpenAI protocol: what a request may say, and how an answer is written down."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field

from qftlab.rows.chat import checked_text
from qftlab.serve.batcher import Event

Text = Annotated[str, AfterValidator(lambda text: checked_text(text, "it"))]
Count = Annotated[int, Field(ge=1)]
Top = Annotated[int, Field(ge=0, le=20)]
Off = Annotated[float, Field(ge=0, le=0)]  # clients send it with its default
SETTINGS = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}  # those of `SamplingParams`
REASONS = {  # for fields that clients know
    "echo": "the prompt is not sent back: put its text before the answer's",
    "tool_choice": "the model chooses by itself, and its calls come back as text",
    "response_format": "nothing here holds a model to a format",
    "max_tokens": "max_completion_tokens is there, its other name: give one of them",
}


class Asked(BaseModel):
    """What both kinds of request may say; null is the same as nothing, and temperature is 1 by default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    frequency_penalty: Off | None = None
    presence_penalty: Off | None = None
    max_tokens: Count | None = Field(None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stop_token_ids: list[int] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    skip_special_tokens: bool | None = None


class ChatRequest(Asked):
    """The body of /v1/chat/completions; `turns` of the rows checks its messages."""

    names: ClassVar = ("chatcmpl", (ChatCompletion, "chat.completion"), (ChatCompletionChunk, "chat.completion.chunk"))
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None

    @property
    def prompts(self) -> list:
        """The one conversation; its first turn holds the tools."""
        return [[{**self.messages[0], "tools": self.tools}, *self.messages[1:]] if self.tools else self.messages]

    @property
    def top(self) -> int | None:
        """Likeliest tokens to tell at each place; None for no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs needs logprobs to be true, got {self.top_logprobs} without it")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    names: ClassVar = ("cmpl", (Completion, "text_completion"), (Completion, "text_completion"))
    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: Top | None = None

    @property
    def prompts(self) -> list:
        """Texts, or lists of ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else self.prompt

    @property
    def top(self) -> int | None:
        """As `ChatRequest.top`."""
        return self.logprobs


def choice(tokenizer, asked: ChatRequest | CompletionRequest, event: Event) -> dict:
    """What a row says, in the form of a whole answer or, where it streams, of a chunk.

    Args:
        tokenizer: spells single tokens.
        asked: the request.
        event: of one of its rows.
    """
    index, text, tokens, reason = event

    def spelled(token: int, logprob: float) -> dict:
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_whole = "\N{REPLACEMENT CHARACTER}" not in text  # otherwise bytes of a larger character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

    told = None
    if asked.top is not None:
        entries = [{**spelled(*token[:2]), "top_logprobs": [spelled(*one) for one in token[2]]} for token in tokens]
        told = {"content": entries}
        if isinstance(asked, CompletionRequest):
            texts, logprobs = [entry["token"] for entry in entries], [entry["logprob"] for entry in entries]
            best = [{one["token"]: one["logprob"] for one in reversed(entry["top_logprobs"])} for entry in entries]
            told = {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": best}
    said = {"text": text}
    if isinstance(asked, ChatRequest):
        said = {"delta" if asked.stream else "message": {"role": "assistant", "content": text}}
    return {"index": index, **said, "logprobs": told, "finish_reason": reason or None}


def written(asked: ChatRequest | CompletionRequest, head: dict, choices: list[dict], **usage: dict | None) -> str:
    """The JSON of a whole answer or, where it streams, of a chunk, with id, time and model from `head`."""
    kind, name = asked.names[2 if asked.stream else 1]
    made = kind.construct(**head, object=name, choices=choices, **usage)
    return made.model_dump_json(exclude_unset=True, warnings=False)
