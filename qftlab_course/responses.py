"""Responses in a folder: what was asked, every response as it comes, what each is worth, and what all are.

The folder has settings.json, rows.jsonl (the rows asked), responses.jsonl and scores.jsonl. A killed evaluation goes on
where it was: batches are cut by row number, whatever is there already, and only whole ones are kept, so that two runs
of which one was killed leave the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qftlab.evaluate.answers import pass_at_k
from qftlab.evaluate.data import to_json
from qftlab.evaluate.scorers import Scorer
from qftlab.evaluate.statistics import clustered_interval, smallest_difference
from qftlab.files import aside, flush, not_written, read_json
from qftlab.settings import check_at_least

log = logging.getLogger(__name__)
SETTINGS, ROWS, RESPONSES, SCORES = "settings.json", "rows.jsonl", "responses.jsonl", "scores.jsonl"
JOURNAL = "journal.jsonl"  # of a server's answers
BATCH = 256  # responses written at a time
ENDS = ("mean", "low", "high")
Prompt = str | Sequence[Mapping]
Ask = Callable[[Sequence[Prompt], Sequence[int]], Sequence[Mapping]]


def to_lines(records: Sequence[Mapping]) -> bytes:
    """Records as JSON lines in UTF-8; half a surrogate pair is written as JSON spells it."""
    return "".join(to_json(record) + "\n" for record in records).encode("utf-8", "backslashreplace")


@contextmanager
def response_folder(
    output: str | Path, settings: Mapping, rows: Sequence[Mapping], free: Collection[str] = ()
) -> Iterator[Path]:
    """Makes or reopens a folder of responses for this process alone, with its settings and rows in it.

    Args:
        output: of the folder.
        settings: JSON; all that decides the responses, and what was done with them. No keys of servers.
        rows: those that are asked.
        free: settings that may be others than before, because they do not decide the responses.

    Raises:
        ValueError: naming the setting, if the folder holds responses to other rows or settings, or a server's answers.
        OSError: if another process has the folder, or it cannot be written.
    """
    folder, lines, given = Path(output), to_lines(rows), json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise OSError(f"{folder} must have one writer, got two: another process has it open") from None
    with lock:
        is_begun = any((folder / name).exists() and (folder / name).stat().st_size for name in (RESPONSES, JOURNAL))
        if (folder / SETTINGS).exists() and is_begun:
            before = read_json(folder / SETTINGS)
            for name in {**before, **given}:
                if name not in free and before.get(name) != given.get(name):
                    raise ValueError(f"{name} must be {before.get(name)!r:.100}, with which the responses in {folder} "
                                     f"were asked, got {given.get(name)!r:.100}: choose another output")  # fmt: skip
        if is_begun and (folder / ROWS).exists() and (folder / ROWS).read_bytes() != lines:
            raise ValueError(f"data must hold the rows of {folder / ROWS}, got others: choose another output")
        for name, content in ((SETTINGS, (json.dumps(given, indent=1) + "\n").encode()), (ROWS, lines)):
            with aside(folder / name) as place:
                place.write_bytes(content)
        yield folder


def collect(prompts: Sequence[Prompt], ask: Ask, num_samples: int = 1, path: Path | None = None) -> list[dict]:
    """Responses to every prompt, asked batch by batch and written to `path` as they come; what is there is not asked.

    Args:
        prompts: a text or a list of messages for each row.
        ask: gets the prompts of a batch and the numbers of their rows, from 0, and gives `num_samples` responses to
            each, those of one prompt side by side, as {"response": text, "token_ids": list or None, "finish_reason":
            "stop", "length" or "error"}. What it draws must hang on its arguments alone.
        num_samples: responses to each prompt.
        path: a file of JSON lines; without one nothing is kept.

    Returns:
        For each prompt and sample {"row", "sample", "prompt", "response", "token_ids", "finish_reason"}.

    Raises:
        ValueError: if a line there is none of these, or `ask` gives more or fewer responses.
        OSError: if the file cannot be written.
    """
    check_at_least(1, num_samples=num_samples)
    size = max(1, BATCH // num_samples)
    found = _kept(path, len(prompts) * num_samples, num_samples, size) if path and path.exists() else []
    for start in range(len(found) // num_samples, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        made = ask([prompts[number] for number in numbers], numbers)
        if len(made) != len(numbers) * num_samples:
            raise ValueError(f"ask must give {len(numbers)} x {num_samples} responses, got {len(made)}")
        batch = []
        for i, response in enumerate(made):
            row, sample = start + i // num_samples, i % num_samples
            batch.append({"row": row, "sample": sample, "prompt": prompts[row], **response})
        if path:
            _append(path, to_lines(batch))
            log.info("%d of %d responses", numbers[-1] * num_samples + num_samples, len(prompts) * num_samples)
        found += batch
    return found


def _kept(path: Path, total: int, num_samples: int, size: int) -> list[dict]:
    """The responses of whole batches; what stands behind them is cut off."""
    lines = path.read_bytes().split(b"\n")[:-1]
    lines = lines[: len(lines) if len(lines) == total else len(lines) // (size * num_samples) * size * num_samples]
    found = []
    for place, line in enumerate(lines):
        try:
            found.append(json.loads(line))
            row, sample = found[-1]["row"], found[-1]["sample"]
        except (ValueError, TypeError, KeyError):
            row = sample = None
        if (row, sample) != divmod(place, num_samples):
            raise ValueError(f"{path}, line {place + 1} must be response {place % num_samples} to row "
                             f"{place // num_samples}, got {line!r:.60}: remove the file, or choose another "
                             "output")  # fmt: skip
    os.truncate(path, sum(len(line) + 1 for line in lines))
    return found


def _append(path: Path, content: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(content)
        flush(path)
    except OSError as error:
        raise not_written(path, error) from error


def score(responses: Sequence[Mapping], rows: Sequence[Mapping], scorers: Mapping[str, Scorer]) -> list[dict]:
    """What each response is worth: {"row", "sample", and a value for each scorer}.

    Raises:
        ValueError: naming scorer and row, where a scorer fails or gives neither a finite number, True, False nor None.
    """
    found = [{"row": one["row"], "sample": one["sample"]} for one in responses]
    for response, values in zip(responses, found, strict=True):
        for name, scorer in scorers.items():
            try:
                values[name] = value = scorer(rows[response["row"]], response["response"])
                is_fit = value is None or math.isfinite(value)
            except Exception as error:  # of any kind, because a scorer is anybody's
                raise ValueError(f"scorer {name} must score row {response['row'] + 1}, got {error!r:.200}") from error
            if not is_fit:
                raise ValueError(f"scorer {name} must give a finite number, got {value} for row {response['row'] + 1}")
    return found


def summarise(scores: Sequence[Mapping], name: str, prompts: Sequence, pass_k: Sequence[int] = (1,)) -> dict:
    """What all responses are worth by one scorer: means over them, with 95 % intervals that count prompts.

    Args:
        scores: of `score`.
        name: of the scorer; responses that it has as None do not count.
        prompts: of each row, what its prompt is known by: the intervals take rows with one prompt as one draw.
        pass_k: of values in [0, 1], the k for which `pass_at_k` is wanted; a response is right if its value is 1.

    Returns:
        {"mean", "low", "high", "rows", "answers", "prompts", "pass_at_k": {k: {"mean", "low", "high"}},
        "smallest_difference"}: the last as `smallest_difference` says, it and pass_at_k for values in [0, 1] only. What
        is not known is None, such as the ends of an interval from one prompt.

    Raises:
        ValueError: if a row has fewer than k responses.
    """
    scored = [(one["row"], float(one[name])) for one in scores if one[name] is not None]
    values, keys = [value for _, value in scored], [prompts[row] for row, _ in scored]
    sizes, right = Counter(row for row, _ in scored), Counter(row for row, value in scored if value == 1)
    found = {**dict.fromkeys(ENDS), "rows": len(sizes), "answers": len(scored), "prompts": len(set(keys))}
    found |= {"pass_at_k": {}, "smallest_difference": None}
    if not scored or not 0 <= min(values) <= max(values) <= 1:
        return found | (_named(interval_of(values, keys)) if scored else {})
    for k in pass_k:
        passes = [pass_at_k(size, right[row], k) for row, size in sizes.items()]
        found["pass_at_k"][str(k)] = _named(interval_of(passes, [prompts[row] for row in sizes]))
    if found["prompts"] > 1:
        found["smallest_difference"] = _known(smallest_difference([value == 1 for value in values], keys))
    return found | _named(interval_of(values, keys))


def interval_of(values: Sequence[float], prompts: Sequence) -> tuple[float, float, float]:
    """The plain mean of answers, with the ends of the 95 % `clustered_interval`: Wilson's for values in [0, 1], else t.

    Args:
        values: one an answer, not empty.
        prompts: what the prompt of each is known by.
    """
    method = "wilson" if 0 <= min(values) <= max(values) <= 1 else "t"
    return clustered_interval(values, prompts, method=method, weights=[1] * len(values))


def _named(ends: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(ENDS, map(_known, ends), strict=True))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
