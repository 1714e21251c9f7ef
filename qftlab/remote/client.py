"""One client of servers that speak the OpenAI protocol: many requests at a time, none lost, none paid for twice.

Threads of the caller wait; one event loop in one thread of its own sends and receives. What a request may cost is set
aside before it is sent, and its answer is in the journal before the caller has it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from qftlab.remote.budget import Budget, BudgetError, Gate, ServerError, Ticket, Totals
from qftlab.remote.journal import Journal, fingerprint
from qftlab.settings import ServerConfig

__all__ = ["Budget", "BudgetError", "Client", "Refused", "ServerError", "Totals", "read_chat"]
log = logging.getLogger(__name__)
Item, Result = TypeVar("Item"), TypeVar("Result")
PAUSE, LONGEST = 1.0, 60.0  # seconds: the first pause before a retry is at most so long, and no later one longer
PATIENCE = 600.0  # seconds that a request waits, all in all, for a server that says it is busy (429)
SILENCE = 1.5  # seconds without an answer, after a stop, that end what is in flight
LARGEST = 1 << 26  # bytes of an answer
BUSY, MENDABLE = (429, 503), (408, 409, 425, 429)  # the second: of 4xx, what another request may mend
PLACEHOLDERS = ("not-needed", "lm-studio", "token-abc123", "no-key-required", "sk-no-key-required")  # for a key


class Refused(ServerError):
    """The server refuses the request itself (most of 4xx): asking again does not help. `status` is HTTP's number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Failure(Exception):
    """What a retry may mend: (kind for the counts, one sentence, seconds the server asks to wait or None)."""


class Client:
    """A server, asked by many threads: `with Client(server) as client:`.

    Args:
        server: address, key, number of threads, retries, seconds a request may take.
        journal: a file of answers; what an earlier run has asked is not asked again.
        budget: caps and prices; what the journal's answers have used counts as spent.

    Attributes:
        totals: what was done so far.

    Raises:
        ValueError: for a bad address, a bad key (which is not quoted) or a file that is no journal.
        OSError: if another process has the journal, or it cannot be written.
    """

    def __init__(self, server: ServerConfig, journal: str | Path | None = None, budget: Budget | None = None) -> None:
        self.server, self.gate, self.redact = server, Gate(server.threads, budget or Budget()), _redactor(server.key)
        self._openai, self._headers = _connect(server)
        self._said, self._sigterm, self.totals = set(), None, self.gate.totals
        self.journal = Journal(journal) if journal else None
        if self.journal:
            self.gate.remember(len(self.journal.places), *self.journal.used)
        self.gate.is_shut = self._is_closed = True

    def __enter__(self) -> Client:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._turn, daemon=True).start()
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else somebody else sees to it
            self._sigterm = signal.signal(signal.SIGTERM, _terminate)
        self.gate.is_shut = self._is_closed = False
        return self

    def __exit__(self, *failure) -> None:
        self._is_closed = True
        try:
            self._land()
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._openai.close(), self._loop).result(1)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self.journal:
                self.journal.close()
            if self._sigterm is not None:
                signal.signal(signal.SIGTERM, self._sigterm)

    def _turn(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def ask(self, path: str, body: dict, read: Callable[[dict], Result] | None = None, sample: int = 0) -> Result:
        """The answer to one request; waits for it, and may be called by many threads.

        Args:
            path: behind the server's address, such as chat/completions.
            body: JSON; with caps on tokens or money it must name max_tokens.
            read: takes what is needed from an answer, and raises ValueError for one that cannot be used, which then
                is asked for again. Without it only the status counts, and nothing is journaled.
            sample: tells requests apart that are equal otherwise.

        Raises:
            Refused: if the server refuses the request itself.
            ServerError: if requests fail more often than `server.retries`, or the client was stopped.
            BudgetError: if the request could pass a cap.
            ValueError, TypeError: for a body that is no JSON, or names no max_tokens where it must.
            OSError: if the journal cannot be written.
        """
        key = fingerprint(path, body, sample) if self.journal and read else ""
        if key and (kept := self.journal.get(key)) is not None:
            try:
                found = read(kept)
                with self.gate.changed:
                    self.totals.journaled += 1
                return found
            except ValueError as error:
                self._say("kept", "an answer in %s cannot be used any more: %s", self.journal.path, error)
        return self._persist(path, body, read, key)

    def _persist(self, path: str, body: dict, read: Callable | None, key: str = "") -> object:
        """Tries until an answer can be used: 429 is waited out, and all else tried again `server.retries` times."""
        payload = json.dumps(body, allow_nan=False).encode()
        most, failures, busy, waited = self.gate.budget.most(body, len(payload)), 0, 0, 0.0
        while True:
            try:
                return self._attempt(path, payload, most, read, key)
            except _Failure as failure:
                kind, problem, asked = failure.args
            busy, failures = (busy + 1, failures) if kind == "429" else (busy, failures + 1)
            jitter = random.uniform(0, min(LONGEST, PAUSE * 2 ** (busy + failures - 1)))
            pause = jitter if asked is None else asked + min(jitter, PAUSE)
            if failures > self.server.retries or waited + pause > PATIENCE:
                break
            waited += pause if kind == "429" else 0
            with self.gate.changed:
                self.totals.retries[kind] += 1
            self._say(kind, "%s failed and is asked again: %s", self.server.url, problem)
            self.gate.wait(pause)
        kept = f" ({len(self.journal.places)} answers are kept in {self.journal.path})" if self.journal else ""
        raise ServerError(
            f"{self.server.url} must answer, got {problem} after {busy + failures} requests{kept}: start the server "
            "again and resume the run, by the same command"
        )

    def _attempt(self, path: str, payload: bytes, most: tuple[int, int], read: Callable | None, key: str) -> object:
        """One request: sent, received, paid for, read and journaled."""
        with self.gate.passing(most) as ticket:
            status, headers, received = self._exchange(path, payload, ticket)
            if status >= 300:
                ticket.spent, ticket.is_busy = (0, 0), status in BUSY
                self._refuse(status, headers, received)
            if read is None:
                return None
            try:
                answer = self._parsed(received)
                ticket.spent = self._used(answer, ticket, len(received))
                found = read(answer)
            except (ValueError, RecursionError) as error:
                raise _Failure("answer", self.redact(f"an answer that cannot be used: {error}"), None) from None
            if key:
                self.journal.add(key, answer, ticket.spent)
            ticket.is_good = True
            return found

    def _exchange(self, path: str, payload: bytes, ticket: Ticket) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of an answer, within `server.timeout` by the clock."""
        ticket.spent = ticket.most  # whoever hangs up may have worked all the same
        sending = asyncio.wait_for(self._send(path, payload), self.server.timeout)
        future = ticket.future = asyncio.run_coroutine_threadsafe(sending, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ServerError("the client was stopped: the request was given up") from None
        except (asyncio.TimeoutError, TimeoutError):
            raise _Failure("timeout", f"no whole answer in {self.server.timeout:g} s", None) from None
        except Exception as error:  # whatever a server does to the libraries below is its failure
            if type(error.__cause__).__name__ == "ConnectError":  # nothing was sent
                ticket.spent = (0, 0)
            raise _Failure("connection", self.redact(_reason(error)), None) from None
        finally:
            future.cancel()

    async def _send(self, path: str, payload: bytes) -> tuple[int, Mapping[str, str], bytes]:
        import httpx2

        response = await self._openai.post(path, cast_to=httpx2.Response, content=payload, stream=True,
                                           options={"headers": self._headers})  # fmt: skip
        async with aclosing(response):
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > LARGEST:
                    raise ValueError(f"an answer of more than {LARGEST >> 20} MiB")
        return response.extensions["status"], response.headers, bytes(received)

    def _refuse(self, status: int, headers: Mapping[str, str], received: bytes) -> None:
        text = " ".join(self.redact(received.decode(errors="replace")).split())[:200]
        if status < 400:
            target = re.search(r"//(?:[^/?#]*@)?([\w.-]+)", headers.get("location", ""))
            text = f"a redirect to {self.redact(target[1]) if target else 'another path'}, which is not followed"
        if status in (401, 403):
            text += f" (the key is read from the environment variable {self.server.key})"
        if status < 500 and (status not in MENDABLE or "insufficient_quota" in text):
            raise Refused(f"{self.server.url} must take the request, got HTTP {status}: {text}", status)
        asked = _retry_after(headers)
        pause = "" if asked is None else f" (it asks for a pause of {round(asked, 1):g} s)"
        raise _Failure(str(status), f"HTTP {status}: {text}{pause}", asked)

    def _parsed(self, received: bytes) -> dict:
        """The JSON object of an answer, without the key: written anew, so that no escape hides it."""
        answer = json.loads(received.decode(), parse_constant=_no_number)
        if not isinstance(answer, dict):
            raise ValueError(f"must be a JSON object, got {type(answer).__name__}")
        plain = json.dumps(answer)
        clean = self.redact(plain)
        return answer if clean == plain else json.loads(clean)

    def _used(self, answer: dict, ticket: Ticket, size: int) -> tuple[int, int]:
        """Tokens read and written, as the server says or else at most; (..., bytes of the answer)."""
        usage = answer.get("usage")
        found = [usage.get(f"{name}_tokens") for name in ("prompt", "completion")] if isinstance(usage, dict) else [""]
        if all(type(number) is int and number >= 0 for number in found):
            return tuple(found)
        self._say("usage", "%s gives no usage: its tokens are estimated from lengths, which is too many",
                  self.server.url)  # fmt: skip
        return ticket.most[0], min(ticket.most[1] or size, size)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], progress: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """Calls `function` on each item in `server.threads` threads; gives (index, result), the first done first.

        Where the caller stops (Ctrl-C, SIGTERM, an error of its own, enough results) or a call fails, nothing more is
        sent, and what is in flight is finished as long as answers come; a second Ctrl-C ends at once.

        Args:
            function: asks as often as it likes; what it raises ends the whole.
            items: taken as threads become free, so that a long iterator costs no memory.
            progress: whether to draw a `tqdm.auto` bar.

        Raises:
            Exception: as `function`.
        """
        from tqdm.auto import tqdm

        todo, done, source, waiting = SimpleQueue(), SimpleQueue(), enumerate(items), 0
        workers = [threading.Thread(target=self._work, args=(function, todo, done), daemon=True)
                   for _ in range(self.server.threads)]  # fmt: skip
        for worker in workers:
            worker.start()
        total = len(items) if hasattr(items, "__len__") else None
        try:
            with tqdm(total=total, disable=not progress) as bar:
                while True:
                    for task in islice(source, 2 * len(workers) - waiting):
                        todo.put(task)
                        waiting += 1
                    if not waiting:
                        break
                    index, result, error = _next(done)
                    if error is not None:
                        raise error
                    waiting -= 1
                    bar.set_postfix_str(str(self.totals), refresh=False)
                    bar.update()
                    yield index, result
        finally:
            with suppress(Empty):
                while waiting:
                    todo.get_nowait()
            for _ in workers:
                todo.put(None)
            if waiting:
                self._land()
                end = time.monotonic() + 0.3
                for worker in workers:
                    worker.join(max(0.0, end - time.monotonic()))
                self.gate.is_shut = self._is_closed or any(worker.is_alive() for worker in workers)

    def _work(self, function: Callable, todo: SimpleQueue, done: SimpleQueue) -> None:
        while (task := todo.get()) is not None:
            try:
                done.put((task[0], function(task[1]), None))
            except BaseException as error:
                done.put((task[0], None, error))  # before the others say that they were stopped
                self.gate.shut()

    def _land(self) -> None:
        """Sends nothing more; what is in flight goes on while answers come, and the rest is cancelled."""
        gate = self.gate
        gate.shut()
        with gate.changed:
            try:
                if gate.flying:
                    log.warning("stopping: %d requests are under way (Ctrl-C again stops at once)", len(gate.flying))
                while gate.flying and gate.changed.wait_for(lambda n=len(gate.flying): len(gate.flying) < n, SILENCE):  # noqa: B008
                    pass  # one more has come
            finally:
                end = time.monotonic() + 0.4
                while gate.flying and time.monotonic() < end:
                    for ticket in gate.flying:
                        ticket.future and ticket.future.cancel()
                    gate.changed.wait(0.02)

    def _say(self, what: str, message: str, *values) -> None:
        """One warning of a kind, and the rest for those who want more."""
        log.log(logging.DEBUG if what in self._said else logging.WARNING, message, *values)
        self._said.add(what)


def read_chat(answer: Mapping) -> str:
    """The text of a chat answer, with the thinking and the calls that a server has taken out of it put back.

    Raises:
        ValueError: if it has no message of texts; the client asks again.
    """
    try:
        message = answer["choices"][0]["message"]
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        text = text if not thinking or "<think>" in text else f"<think>{thinking.strip()}</think>\n{text.lstrip()}"
        return text + "".join(f'{{"name": {json.dumps(name)}, "arguments": {given}}}' for name, given in calls)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer must have choices with a message of text, got {answer!r:.120}") from error


def _next(done: SimpleQueue) -> tuple:
    while True:
        with suppress(Empty):  # a wait without end could not be interrupted on Windows
            return done.get(timeout=0.5)


def _terminate(*_) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _redactor(name: str) -> Callable[[str], str]:
    """Takes the key of the environment variable `name` out of a text; the key is checked, and never quoted.

    Raises:
        ValueError: for a key that no header may hold, or that JSON would write in another way.
    """
    if not re.fullmatch(r"[!#-&(-\[\]-~]*", _key(name)):
        raise ValueError(f"the key in the environment variable {name} must be printable ASCII without blanks, quotes "
                         "or backslashes, got something else (which is not shown)")  # fmt: skip
    if len(_key(name)) < 8 or _key(name) in PLACEHOLDERS:
        return lambda text: text
    pattern = re.compile(re.escape(_key(name)), re.IGNORECASE)  # hosts are written in lower case
    return lambda text: pattern.sub("[key]", text)


def _key(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError("key must be the name of an environment variable, got something else (which is not shown)")
    return os.environ.get(name, "").strip()


def _connect(server: ServerConfig) -> tuple:
    """The library's client, and the headers of each request: with a key, or without any authorization at all.

    Raises:
        ValueError: for an address that is none.
    """
    import httpx2
    import openai

    async def keep_status(response: httpx2.Response) -> None:
        # The library would read the body of an error whatever its size, and follow what it says.
        response.extensions["status"], response.status_code = response.status_code, 200

    for name in ("openai", "httpx2", "httpcore2"):  # they log what a server says, which may be the key
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        url = httpx2.URL(server.url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"server.url must be an address, got {server.url!r}: {error}") from None
    if not url.host:
        raise ValueError(f"server.url must name a host, got {server.url!r}")
    limits = httpx2.Limits(max_connections=server.threads, max_keepalive_connections=server.threads)
    http = httpx2.AsyncClient(limits=limits, timeout=None, event_hooks={"response": [keep_status]})
    client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0, timeout=None, http_client=http)
    # Named in each request: the library would take other keys from the environment too.
    return client, {"Authorization": f"Bearer {_key(server.key)}" if _key(server.key) else openai.Omit()}


def _reason(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a header that gives seconds or a date."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(text))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _no_number(text: str) -> None:
    raise ValueError(f"must hold numbers, got {text}")
