"""`qftlab tasks`: the course's second task, questions answered in the two modes by a model that is only prompted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qftlab.settings import AnswerConfig, Names, SamplingConfig, ServerConfig, check_at_least
from qftlab_course.agent_edit.prompts import SYSTEM, TOOLS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TasksConfig(AnswerConfig):
    """Answers questions in the two modes by system prompt and tools, and writes `hw3_2.json`: Query and Output.

    With --url a server answers, else a local model, whatever OPENAI_BASE_URL says. The questions of
    `query_and_output.json` may be answered as well; their own Output is not shown to the model.

    Args:
        data: files of rows with a Query.
        output: where the answers go.
        url: of a server that speaks the OpenAI protocol; without one the model is loaded here.
        key: the environment variable with the server's key.
        threads: requests at a time.
        system: a file with another system prompt.
        max_new_tokens: the most tokens an answer may have.
        sampling: how tokens are chosen; by default as the course did. A server is given temperature and top_p.
        batch_size: questions answered at once by a local model.

    Raises:
        ValueError: for a value out of range.
    """

    data: Names = ("query_only.json",)
    output: str = "outputs/tasks/hw3_2.json"
    url: str = ""
    key: str = "OPENAI_API_KEY"
    threads: int = 32
    system: str = ""
    max_new_tokens: int = 2048
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.8))
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, threads=self.threads, batch_size=self.batch_size)


def questions(sources: Sequence[str]) -> list[str]:
    """The texts under `Query` of some files.

    Raises:
        DataError: for a row without one, naming file and row.
    """
    from qftlab.rows.chat import DataError
    from qftlab.rows.sources import read_file

    found = []
    for source in sources:
        for place, row in read_file(Path(source)):
            if isinstance(row, DataError):
                raise row
            query = row.get("Query") if isinstance(row, dict) else None
            if not isinstance(query, str) or not query.strip():
                raise DataError(f"{source}, {place} must have a text as 'Query', got {row!r:.80}")
            found.append(query)
    if not found:
        raise ValueError(f"data must have at least one Query, got none in {', '.join(sources)}")
    return found


def answer_tasks(config: TasksConfig, *, progress: bool = False) -> Path:
    """Answers all questions and writes them in their order.

    Returns:
        The file that was written.
    """
    from qftlab_course.report import write_json

    asked = questions(config.data)
    system = Path(config.system).read_text(encoding="utf-8") if config.system else SYSTEM
    talks = [[{"role": "system", "content": system}, {"role": "user", "content": query}] for query in asked]
    said = (_from_server if config.url else _from_model)(config, talks, progress)
    rows = [{"Query": query, "Output": text} for query, text in zip(asked, said, strict=True)]
    return write_json(config.output, rows)


def _from_model(config: TasksConfig, talks: Sequence[list[dict]], progress: bool) -> list[str]:
    """Texts of a local model, from the ids, so that mode tokens show; thinking that the prompt opened is opened."""
    from qftlab.commands import load_for
    from qftlab.decoding.engine import generate

    model, tokenizer, options = load_for(config)
    has_place = "tools" in str(tokenizer.chat_template)
    if not has_place:
        log.warning("the chat template has no place for tools: the system prompt alone says what they are")
    prompts = [[{**turns[0], **({"tools": TOOLS} if has_place else {})}, *turns[1:]] for turns in talks]
    answers = generate(model, tokenizer, prompts, batch_size=config.batch_size, progress=progress, **options)
    opened = [tokenizer.decode(a.prompt_ids[-16:]).rstrip().endswith("<think>") for a in answers]
    return [f"{'<think>' if is_open else ''}{a.text}" for a, is_open in zip(answers, opened, strict=True)]


def _from_server(config: TasksConfig, talks: Sequence[list[dict]], progress: bool) -> list[str]:
    from qftlab.remote.client import Client, read_chat

    server = ServerConfig(url=config.url, model=config.model, key=config.key, threads=config.threads)
    settings = {"model": config.model, "temperature": config.sampling.temperature, "top_p": config.sampling.top_p,
                "max_tokens": config.max_new_tokens, "seed": config.seed, "tools": TOOLS}  # fmt: skip
    journal = Path(config.output).with_suffix(".journal.jsonl")
    with Client(server, journal) as client:

        def ask(turns: list[dict]) -> str:
            return client.ask("chat/completions", {**settings, "messages": turns}, read_chat)

        found = dict(client.map(ask, talks, progress=progress))
    return [found[i] for i in range(len(talks))]
