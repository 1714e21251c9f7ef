"""`qftlab tokens`: the first homework, a tokenizer with the two special tokens and the tasks as it encodes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qftlab.files import aside
from qftlab.rows.sources import DataError, read_file
from qftlab.settings import AGENT, EDIT, Names, check_fields
from qftlab_course.report import write_json

PARTS = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")  # files of a tokenizer


@dataclass(frozen=True)
class TokensConfig:
    """Adds special tokens to a model's tokenizer, saves it, and writes the ids of each task (hw3_1.json).

    Args:
        data: rows of Query and Output (query_and_output.json).
        model: the model whose tokenizer is taken: `tiny`, a folder, a run, or a name on the hub.
        output: the .json file to write; one that is there is replaced.
        tokenizer: the folder to save the tokenizer in; one that holds a tokenizer only is replaced.
        new_tokens: their texts.

    Raises:
        ValueError: without data, or for an output of another ending.
    """

    data: str = ""
    model: str = "tiny"
    output: str = "outputs/tasks/hw3_1.json"
    tokenizer: str = "outputs/tokenizer_with_special_tokens"
    new_tokens: Names = (AGENT, EDIT)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.data:
            raise ValueError("data must name a file of Query and Output, got none: --data query_and_output.json")
        if not self.output.endswith(".json") or Path(self.output).resolve() == Path(self.data).resolve():
            raise ValueError(f"output must be another file than data and end in .json, got {self.output!r}")


def token_tasks(tokenizer, rows: Iterable[object], new_tokens: Names = (AGENT, EDIT), source: str = "rows") -> dict:
    """What hw3_1.json holds: the special tokens with their ids, and each row's text with its ids.

    Args:
        tokenizer: with the special tokens.
        rows: of Query and Output.
        new_tokens: the special tokens to list.
        source: where the rows are from, for messages.

    Raises:
        DataError: naming source and row (from 1), for one without both texts.
    """
    tasks = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, DataError):
            raise row
        texts = [row.get(name) for name in ("Query", "Output")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{source}, row {number} must have the texts Query and Output, got {got:.80}")
        text = "\n".join(map(str.strip, texts))
        ids = tokenizer.encode(text, add_special_tokens=True)
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        tasks.append({"text": text, "token_ids": ids, "decoded_text": decoded})
    if not tasks:
        raise DataError(f"{source} must have at least one row of Query and Output, got none")
    special = [{"token": token, "id": tokenizer.convert_tokens_to_ids(token)} for token in new_tokens]
    return {"special_tokens": special, "tasks": tasks}


def write_tokens(config: TokensConfig) -> str:
    """Writes the file and the tokenizer's folder, and says what is in them.

    Raises:
        FileNotFoundError, DataError, ValueError: for a tokenizer or rows that cannot be read.
        FileExistsError: for a folder in the tokenizer's place that holds something else.
    """
    from qftlab.rows.tokenizer import extend_tokenizer, load_tokenizer
    from qftlab.train.run import resolve_model

    folder = Path(config.tokenizer)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(PARTS)] if folder.exists() else []
    if others or folder.resolve() == Path(config.model).resolve():
        raise FileExistsError(f"{folder} holds more than a saved tokenizer, or is the model's own folder "
                              f"({', '.join(others) or config.model:.60}): choose another --tokenizer")  # fmt: skip
    tokenizer = load_tokenizer(resolve_model(config.model))
    changes = extend_tokenizer(tokenizer, config.new_tokens)
    rows = (row for _, row in read_file(Path(config.data)))
    content = token_tasks(tokenizer, rows, config.new_tokens, config.data)
    with aside(folder) as place:
        tokenizer.save_pretrained(place)
    write_json(config.output, content)
    said = [f"{t.text}: id {t.id}, {'new' if t.is_new else 'known already'}, before {len(t.pieces_before)} pieces"
            for t in changes.tokens]  # fmt: skip
    return "\n".join([*said, f"tokenizer: {folder}", f"{len(content['tasks'])} tasks: {config.output}"])
