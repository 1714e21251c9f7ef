"""Judges of two answers: a model behind the OpenAI protocol that says which is better, or numbers that are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from qftlab.evaluate.answers import answer_of
from qftlab.remote.client import Client
from qftlab_course.winrate import Judge, by_score

ASKED = """Two assistants were asked the same. Judge which answer is better: whether it is right, and does what was \
asked. Longer is not better, and the order in which they stand means nothing.

[Asked]
{asked}

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

End with your verdict: [[A]] if A is better, [[B]] if B is better, [[C]] if they are equally good."""
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}


def verdict_of(said: str) -> float | None:
    """1, 0 or 0.5 for the one verdict of a text, thinking aside; None if it has none, or two that differ.

    Source: the form is MT-bench's, Zheng et al. 2023, "Judging LLM-as-a-Judge", fig. 5.
    """
    found = set(re.findall(r"\[\[([ABC])\]\]", answer_of(said)))
    return VERDICTS[found.pop()] if len(found) == 1 else None


def reward_of(said: str) -> float | None:
    """The number of "reward:-18.73", as NVIDIA's reward models answer; None if it is none."""
    found = re.fullmatch(r"\s*reward:\s*(-?\d+(?:\.\d+)?)\s*", said)
    return float(found[1]) if found else None


def conversation(prompt: str | Sequence[Mapping]) -> list[dict]:
    """A prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def asked_of(prompt: str | Sequence[Mapping]) -> str:
    """A prompt as a judge reads it: the text, or the turns one under the other with their roles."""
    turns = conversation(prompt)
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


def model_judge(client: Client, model: str, max_tokens: int = 1024) -> Judge:
    """A judge that asks a model once for each order, greedily.

    Args:
        client: of the server.
        model: the name the server knows it by.
        max_tokens: of a verdict, with the thinking before it.

    Raises:
        ServerError: from the judge, if the server fails.
    """

    def judge(prompt: object, first: str, second: str) -> float | None:
        text = ASKED.format(asked=asked_of(prompt), first=first, second=second)
        return verdict_of(_say(client, model, [{"role": "user", "content": text}], max_tokens))

    return judge


def score_judge(scores: Mapping[str, float | None]) -> Judge:
    """A judge by scores that are known: of `score_key(prompt, answer)`."""
    return by_score(lambda prompt, text: scores[score_key(prompt, text)])


def score_key(prompt: object, text: str) -> str:
    """What an answer to a prompt is known by."""
    return json.dumps([prompt, text])


def endpoint_scores(client: Client, model: str, answers: Sequence[tuple]) -> dict[str, float | None]:
    """What a reward model behind the OpenAI protocol gives each of (prompt, answer), asked once each.

    Raises:
        ServerError: if the server fails.
    """
    asked = list({score_key(*answer): answer for answer in answers}.items())

    def one(item: tuple) -> float | None:
        prompt, text = item[1]
        return reward_of(_say(client, model, [*conversation(prompt), {"role": "assistant", "content": text}], 16))

    return {asked[i][0]: value for i, value in client.map(one, asked)}


def in_threads(client: Client) -> Callable[[Callable, Sequence], list]:
    """What `win_rate` takes as `run`: many requests at a time."""
    return lambda function, items: [result for _, result in sorted(client.map(function, items), key=lambda x: x[0])]


def _say(client: Client, model: str, messages: list[dict], max_tokens: int) -> str:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    return client.ask("chat/completions", body, _text)


def _text(answer: Mapping) -> str:
    """The text of the first choice.

    Raises:
        ValueError: if there is none, so that it is asked for again.
    """
    try:
        message = answer["choices"][0]["message"]
        thought, text = message.get("reasoning_content"), message["content"]
    except (LookupError, TypeError, AttributeError):
        raise ValueError("must have a choice with a message") from None
    if not isinstance(text, str) and not thought:
        raise ValueError("must have a message of text")
    return text or ""
