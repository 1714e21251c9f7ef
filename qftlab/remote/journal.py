"""The answers of a server, kept as they come, so that a run that was killed asks only for what is missing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from qftlab.files import not_written

log = logging.getLogger(__name__)
GROUP, SECONDS = 64, 1.0  # answers, and seconds, after which what is written is forced to the disk
BEGIN = b'{"key": "'  # of every line


def fingerprint(path: str, body: dict, sample: int = 0) -> str:
    """What a request is known by: the sha256 of its path, its body and the number of the sample.

    Args:
        path: such as chat/completions.
        body: JSON: model, prompt, settings. The order of its keys does not matter.
        sample: tells requests apart that are equal otherwise.

    Raises:
        ValueError, TypeError: for a body that is no JSON.
    """
    text = json.dumps({"path": path, "body": body, "sample": sample}, sort_keys=True, separators=(",", ":"),
                      allow_nan=False)  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """Answers by fingerprint in a file of JSON lines that only grows; one process at a time has it.

    Memory holds where an answer stands, not the answer. A last line that a kill has cut off is taken away.

    Args:
        path: of the file, which is made if it is missing; a lock lies beside it.

    Attributes:
        places: of each fingerprint, where its answer begins in the file and its length in bytes.
        used: tokens read and written, of the answers that were there when it was opened.

    Raises:
        OSError: if another process has it, or it cannot be written.
        ValueError: for a line that is no answer, naming file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.places, self.used, self._lock = Path(path), {}, [0, 0], threading.Lock()
        self._owner, self._waiting, self._forced = FileLock(f"{path}.lock", thread_local=False), 0, time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._owner.acquire(timeout=0)
            self._file = open(self.path, "a+b", buffering=0)
        except Timeout:
            raise OSError(f"{self.path} must have one writer, got two: another process has it open") from None
        except OSError as error:
            raise not_written(self.path, error) from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and (not line.strip(b"\0") or BEGIN.startswith(line[: len(BEGIN)])):
                    log.warning("%s: its last line was cut off, by a kill: that one answer is asked for again",
                                self.path)  # fmt: skip
                    self._file.truncate(start)
                    return
                try:
                    record = json.loads(line)
                    self.places[record["key"]] = start, len(line)
                    record["answer"].keys()
                    self.used = [sum(pair) for pair in zip(self.used, record.get("used", (0, 0)), strict=True)]
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                    raise ValueError(f"{self.path}, line {number}, must be an answer of a journal, got something "
                                     "else: take it out, and it is asked for again") from error  # fmt: skip
                start += len(line)

    def get(self, key: str) -> dict | None:
        """The answer of an earlier request, or None."""
        if key not in self.places:
            return None
        with self._lock:
            start, size = self.places[key]
            self._file.seek(start)
            return json.loads(self._file.read(size))["answer"]

    def add(self, key: str, answer: dict, used: tuple[int, int] = (0, 0)) -> None:
        """Writes an answer and what it used: it outlives a kill at once, and a fall of the machine within a second.

        Raises:
            OSError: in one sentence, if it cannot be written; then the file is as it was.
        """
        line = json.dumps({"key": key, "used": used, "answer": answer}).encode() + b"\n"
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) != len(line):
                    raise OSError("the disk is full")
                self._waiting += 1
                if self._waiting >= GROUP or time.monotonic() - self._forced > SECONDS:
                    self._force()
            except OSError as error:
                self._file.truncate(start)
                raise not_written(self.path, error) from error
            self.places[key] = start, len(line)

    def _force(self) -> None:
        os.fsync(self._file.fileno())
        self._waiting, self._forced = 0, time.monotonic()

    def close(self) -> None:
        """Forces what is written to the disk and gives the file back; twice does no harm."""
        with self._lock:
            if not self._file.closed:
                self._force()
                self._file.close()
        self._owner.release()
