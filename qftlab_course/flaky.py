"""A server that speaks the OpenAI protocol and fails as real ones do: to test a client, and to play against.

What fails is drawn from (seed, request, number of the attempt), so that a run can be told again. As a program:
`python -m qftlab_course.flaky --answer module:function --faults '{"429": 0.1, "reset": 0.05}'`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import logging
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from email.utils import formatdate

log = logging.getLogger(__name__)
Answer = Callable[[str, dict], dict]
RESET = struct.pack("ii", 1, 0)  # close at once, and throw away what was not sent


class Flaky:
    """The server, as a context manager: `with Flaky(answer, {"429": 0.2}) as server: ... server.url`.

    Args:
        answer: from (path, body) to the answer of a request, quick. With `usage` in it the meter runs.
        faults: name of a fault (see `FAULTS`) to its share of the requests.
        seed: of the draw of faults.
        latency: seconds until an answer.
        key: refuses requests without it, where given.
        prices: of a million tokens read, and of a million written.
        retry_after: seconds that a busy server asks to wait.
        burst: seconds for which everybody is refused after a 429.
        port: to listen on; 0 takes a free one.

    Attributes:
        url: what a client is given.
        requests: of each fingerprint, all of them.
        answered: of each fingerprint, those that were answered well.
        faults_made: of each kind.
        headers: of the last ten requests.
        elsewhere: where redirects lead.
        at_once: the most requests that were under way together.
        money: what the answers cost, those included that were lost on the way.
    """

    def __init__(self, answer: Answer, faults: Mapping[str, float] | None = None, *, seed: int = 0,
                 latency: float = 0.0, key: str = "", prices: tuple[float, float] = (0.0, 0.0),
                 retry_after: float = 1.0, burst: float = 0.0, port: int = 0) -> None:  # fmt: skip
        self.answer, self.faults, self.seed, self.latency, self.key = answer, dict(faults or {}), seed, latency, key
        if unknown := set(self.faults) - set(FAULTS):
            raise ValueError(f"faults must be among {', '.join(FAULTS)}, got {', '.join(sorted(unknown))}")
        if not 0 <= sum(self.faults.values()) <= 1:
            raise ValueError(f"shares of faults must add up to at most 1, got {sum(self.faults.values()):g}")
        self.prices, self.retry_after, self.burst, self.port = prices, retry_after, burst, port
        self.requests, self.answered, self.faults_made, self.draws = Counter(), Counter(), Counter(), Counter()
        self.money, self.at_once, self._now, self._busy_until = 0.0, 0, 0, 0.0
        self.headers, self._is_up, self.elsewhere = [], threading.Event(), "http://elsewhere.example"

    def __enter__(self) -> Flaky:
        listening = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listening),), daemon=True)
        self._thread.start()
        self._is_up.wait()
        return self

    def __exit__(self, *failure) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self, listening: socket.socket) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, sock=listening, backlog=1024)
        self._is_up.set()
        await self._end.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Request after request of one client."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self._now += 1
                self.at_once = max(self.at_once, self._now)
                try:
                    await self._reply(head[0].split()[1], headers, body, writer)
                finally:
                    self._now -= 1
        except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        self.headers = [*self.headers[-9:], headers]
        if path.endswith("/meter"):
            return await _write(writer, 200, self.meter())
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return await _write(writer, 401, {"error": {"message": f"no such key: {headers.get('authorization')}"}})
        request = json.loads(body)
        name = hashlib.sha256(json.dumps([path, request], sort_keys=True).encode()).hexdigest()
        self.requests[name] += 1
        if time.monotonic() < self._busy_until:
            self.faults_made["burst"] += 1
            return await FAULTS["429"](self, writer, {}, headers)
        fault = self.drawn(name, self.draws[name])
        self.draws[name] += 1
        if fault in ("429", "429-bare"):
            self._busy_until = time.monotonic() + self.burst
        if fault:
            self.faults_made[fault] += 1
        if fault in UNPAID:
            return await FAULTS[fault](self, writer, {}, headers)
        await asyncio.sleep(self.latency)
        answer = self.answer(path, request)
        usage = answer.get("usage") or {}
        self.money += (usage.get("prompt_tokens", 0) * self.prices[0]
                       + usage.get("completion_tokens", 0) * self.prices[1]) / 1e6  # fmt: skip
        if fault:
            return await FAULTS[fault](self, writer, answer, headers)
        self.answered[name] += 1
        await _write(writer, 200, answer)

    def drawn(self, name: str, attempt: int) -> str:
        """The fault of an attempt, by chance that is always the same; empty for none."""
        digest = hashlib.sha256(f"{self.seed} {name} {attempt}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for fault, share in self.faults.items():
            place -= share
            if place < 0:
                return fault
        return ""

    def meter(self) -> dict:
        """Counts and money so far; also at /v1/meter."""
        return {"requests": sum(self.requests.values()), "answered": sum(self.answered.values()),
                "different": len(self.requests), "money": self.money, "faults": dict(self.faults_made),
                "at_once": self.at_once}  # fmt: skip


async def _write(
    writer: asyncio.StreamWriter,
    status: int,
    content: object,
    *,
    kind: str = "application/json",
    extra: Mapping[str, str] | None = None,
    length: int | None = None,
    reason: str = "So",
) -> None:
    """An answer; with `length` its header is a lie."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} {reason}", f"Content-Type: {kind}", f"Content-Length: {length or len(body)}"]
    lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await writer.drain()


def _says(status: int, message: str, **error: str):
    """A fault that is an honest error."""

    async def made(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
        await _write(writer, status, {"error": {"message": message, **error}})

    return made


async def _busy(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 429, {"error": {"message": "slow down"}}, extra={"Retry-After": f"{flaky.retry_after:g}"})


async def _busy_date(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    date = formatdate(time.time() + flaky.retry_after, usegmt=True)
    await _write(writer, 503, {"error": {"message": "back soon"}}, extra={"Retry-After": date})


async def _reset(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
    raise EOFError


async def _slow(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    """A byte now and then, so that no time-out of the socket ever comes."""
    body = json.dumps(answer).encode()
    await _write(writer, 200, body[:1], length=len(body))
    for place in range(1, len(body)):
        await asyncio.sleep(0.05)
        writer.write(body[place : place + 1])
        await writer.drain()


async def _cut(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    body = json.dumps(answer).encode()
    await _write(writer, 200, body[: len(body) // 2], length=len(body))
    raise EOFError


async def _truncated(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    body = json.dumps(answer).encode()
    await _write(writer, 200, body[: len(body) // 2])


async def _html(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 200, b"<html><h1>502 Bad Gateway</h1></html>", kind="text/html")


async def _wrong_type(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 200, answer, kind="text/html")


async def _empty(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 200, {**answer, "choices": []})


async def _huge(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 200, b'{"choices": "', length=1 << 40)
    while True:
        writer.write(b"x" * (1 << 20))
        await writer.drain()


async def _hang(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await asyncio.sleep(86_400)


async def _deep(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    await _write(writer, 200, b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


async def _echo(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    """A good answer that quotes the request's headers, escaped and not, in its body and in its own headers."""
    said = headers.get("authorization", "")
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in said)
    body = json.dumps({**answer, "you_said": said})[:-1] + f', "or": "{escaped}"}}'
    await _write(writer, 200, body.encode(), extra={"X-Request-Id": said})


async def _echo_error(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    said = headers.get("authorization", "")
    await _write(writer, 500, {"error": {"message": f"cannot log {said}"}}, extra={"X-Request-Id": said}, reason=said)


async def _redirect(flaky: Flaky, writer, answer: dict, headers: dict) -> None:
    key = headers.get("authorization", "").removeprefix("Bearer ")
    await _write(writer, 307, b"", extra={"Location": f"{flaky.elsewhere}/{key}?key={key}"})


FAULTS = {
    "429": _busy, "429-bare": _says(429, "slow down"), "503": _busy_date, "500": _says(500, "out of order"),
    "quota": _says(429, "You exceeded your quota", code="insufficient_quota"), "reset": _reset, "redirect": _redirect,
    "echo-error": _echo_error, "hang": _hang, "slow": _slow, "cut": _cut, "truncated": _truncated, "html": _html,
    "type": _wrong_type, "empty": _empty, "huge": _huge, "deep": _deep, "echo": _echo,
}  # fmt: skip
UNPAID = ("429", "429-bare", "503", "500", "quota", "reset", "redirect", "echo-error", "hang")  # before any work


def parrot(path: str, body: dict) -> dict:
    """The answer of a server that says what it was told, as chat or as text, with usage."""
    last = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
    said = {"message": {"role": "assistant", "content": last}} if "messages" in body else {"text": str(last)}
    usage = {"prompt_tokens": len(str(last)), "completion_tokens": len(str(last))}
    choices = [{"index": i, "finish_reason": "stop", **said} for i in range(body.get("n") or 1)]
    return {"object": "answer", "model": body.get("model"), "choices": choices, "usage": usage}


def main() -> None:
    """Serves until Ctrl-C, and logs the address."""
    parser = argparse.ArgumentParser(description="a server that fails as real ones do")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--answer", default="qftlab_course.flaky:parrot", help="module:function of (path, body)")
    parser.add_argument("--faults", type=json.loads, default={}, help=f"JSON: shares of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--burst", type=float, default=0.0, help="seconds")
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds")
    given = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    module, _, name = given.pop("answer").partition(":")
    with Flaky(getattr(importlib.import_module(module), name), **given) as server:
        log.info("listening on %s", server.url)
        threading.Event().wait()


if __name__ == "__main__":
    main()
