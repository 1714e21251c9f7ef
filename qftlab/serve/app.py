"""The server: HTTP in front of the batcher, from a command, or for as long as a `with` block lasts."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import reprlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError('the server needs fastapi and uvicorn: pip install "qftlab[serve]"') from error
from openai.types import Model

from qftlab.decoding.engine import Row, default_stop_ids, encode_prompts, plan_rows
from qftlab.maths.sampling import SamplingParams
from qftlab.model.head import context_length
from qftlab.rows.tokenizer import set_thinking_
from qftlab.serve import ServeConfig
from qftlab.serve.batcher import Batcher, Event, Failed
from qftlab.serve.protocol import REASONS, SETTINGS, Asked, ChatRequest, CompletionRequest, choice, written
from qftlab.settings import ENABLE_THINKING

log = logging.getLogger(__name__)
KEY = "QFTLAB_API_KEY"
LARGEST = 4 << 20  # bytes of a request
LATER = {"Retry-After": "1"}
INLINE = "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
PAGE = {"Content-Security-Policy": f"default-src 'none'; connect-src 'self'; frame-ancestors 'none'; {INLINE}"}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


class Service:
    """A model and what is served of it: an ASGI application.

    Args:
        model, tokenizer: as in `generate`.
        config: name and limits. QFTLAB_API_KEY in the environment, if it is set, is the key that clients must have.

    Raises:
        ValueError: for a model that `Decoder` refuses.
    """

    def __init__(self, model, tokenizer, config: ServeConfig) -> None:
        self.model, self.tokenizer, self.config = model, copy.copy(tokenizer), config
        set_thinking_(self.tokenizer, ENABLE_THINKING[config.thinking])
        self.name, self.key = config.name or Path(config.model).name, os.environ.get(KEY, "").strip()
        self.plain = copy.copy(tokenizer)  # leaves special tokens out of what it decodes
        self.plain.decode = lambda ids, **options: tokenizer.decode(ids, **options | {"skip_special_tokens": True})
        self.special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.batcher = Batcher(model, tokenizer, config)
        self.counts, self.created, self.is_draining = Counter(), int(time.time()), False
        self.app = build(self)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        refused = self.refusal(Request(scope)) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def refusal(self, request: Request) -> JSONResponse | None:
        """Why a request is not even read, if it is not."""
        given, is_open = request.headers.get("authorization", ""), request.url.path in ("/", "/health")
        if self.key and not is_open and not secrets.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return _error(401, f"the key must be the server's {KEY}: send it as Authorization: Bearer KEY")
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not (length.isdecimal() and int(length[:20]) <= LARGEST):
            return _error(413, f"Content-Length must be at most {LARGEST}, got {length[:20] or 'none'}: send less")
        if request.method == "POST" and self.is_draining:
            return _error(503, "the server is stopping: ask again when it is back")
        return None

    def plan(self, asked: ChatRequest | CompletionRequest) -> list[Row]:
        """The rows that answer a request, `n` to a prompt.

        Raises:
            HTTPException: 404 for another model, 400 for what cannot be answered.
        """
        if asked.model != self.name:
            raise HTTPException(404, f"model must be {self.name!r}, which is served here, got {asked.model!r:.60}")
        stop, n = [asked.stop] if isinstance(asked.stop, str) else asked.stop or [], asked.n or 1
        ends = [*default_stop_ids(self.model, self.tokenizer), *(asked.stop_token_ids or [])]
        ends += [self.special[text] for text in stop if text in self.special]  # found though it may not be shown
        shown = self.tokenizer if asked.skip_special_tokens is False else self.plain
        seed, most = secrets.randbits(63) if asked.seed is None else asked.seed, self.config.max_queue
        try:
            if asked.stream_options and not asked.stream:
                raise ValueError("stream_options needs stream to be true, got it without")
            prompts, context = encode_prompts(self.tokenizer, asked.prompts), context_length(self.model) or 2**31
            if not 0 < len(prompts) * n <= most:
                raise ValueError(f"prompts times n must be from 1 to {most}, got {len(prompts)} times {n}")
            rest = [max(1, min(self.config.max_new_tokens, context - len(ids))) for ids in prompts]
            params = SamplingParams(**asked.model_dump(include=SETTINGS, exclude_none=True))
            limits, told = asked.max_tokens or rest, asked.top is not None
            options = (seed, 1, n, None, told, bool(asked.stream))
            return plan_rows(self.model, shown, prompts, limits, params, stop, ends, *options)
        except (ValueError, TypeError, RecursionError) as error:
            folder = str(self.tokenizer.name_or_path)  # is nobody's business
            raise HTTPException(400, str(error).replace(folder, self.name) if folder else str(error)) from None

    async def answer(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        """The response to a request.

        Raises:
            HTTPException: as `plan`.
            Failed: 429 for a full queue, 503 where the model fails.
        """
        start, rows = time.perf_counter(), await asyncio.to_thread(self.plan, asked)
        head = {"id": f"{asked.names[0]}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        read = sum(len(row.prompt_ids) for row in rows[:: asked.n or 1])
        events = self._events(request, rows, asked.top or 0, start)
        first = await anext(events, None)  # what goes wrong before it has a status of its own
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += read
        if asked.stream:
            return StreamingResponse(self._stream(asked, head, read, first, events), media_type="text/event-stream")
        found = sorted([first or (), *[event async for event in events]])
        choices = [choice(self.tokenizer, asked, event) for event in found if event]
        usage = _usage(read, sum(len(event[2]) for event in found if event))
        return Response(written(asked, head, choices, usage=usage), media_type="application/json")

    async def _stream(self, asked: Asked, head: dict, read: int, event: Event | None, events) -> AsyncIterator[str]:
        """An answer as server-sent events; what goes wrong now can only be said in one of them."""
        is_counted, count = bool((asked.stream_options or {}).get("include_usage")), 0
        blank = {"usage": None} if is_counted else {}
        try:
            while event:
                count += len(event[2])
                yield f"data: {written(asked, head, [choice(self.tokenizer, asked, event)], **blank)}\n\n"
                event = await anext(events, None)
        except Failed as failure:
            yield f"data: {json.dumps(_problem(failure.status, str(failure)))}\n\n"
        if is_counted:
            yield f"data: {written(asked, head, [], usage=_usage(read, count))}\n\n"
        yield "data: [DONE]\n\n"

    async def _events(self, request: Request, rows: list[Row], top: int, start: float) -> AsyncIterator[Event]:
        """What the rows write; they leave the batch, and this ends, when the client leaves."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        seats = self.batcher.submit(rows, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event), top)

        def leave(_) -> None:
            queue.put_nowait(None)
            for seat in seats:
                seat.is_over = True

        gone, left = asyncio.ensure_future(request.receive()), len(rows)  # after the body, only a goodbye comes
        gone.add_done_callback(leave)
        try:
            while left and (event := await queue.get()):
                if isinstance(event, Exception):
                    raise event
                left -= bool(event[3])
                self.counts["completion_tokens"] += len(event[2])
                yield event
        finally:
            gone.cancel()
            self.counts["request_seconds"] += time.perf_counter() - start

    def metrics(self) -> str:
        """Counters and gauges in Prometheus' text form."""
        names = ("requests", "prompt_tokens", "completion_tokens", "request_seconds")
        found = [(f"{name}_total", "counter", self.counts[name]) for name in names]
        found += [("running", "gauge", len(self.batcher.seats)), ("waiting", "gauge", len(self.batcher.waiting))]
        return "".join(f"# TYPE qftlab_{name} {kind}\nqftlab_{name} {value}\n" for name, kind, value in found)


def _usage(read: int, count: int) -> dict:
    return {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}


def _problem(status: int, message: str, param: str | None = None) -> dict:
    """An error in the protocol's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": CODES.get(status)}}


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(_problem(status, message, param), status, LATER if status in (429, 503) else None)


def _invalid(error: RequestValidationError) -> JSONResponse:
    """What a request says that it may not, the first of it."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    name = ".".join(takewhile(lambda part: part.isidentifier() or part.isdigit(), where))
    if not where or first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _error(400, f"the body must be a JSON object, sent as Content-Type: application/json: {reason}")
    if first["type"] == "extra_forbidden":
        return _error(400, f"unknown field {where[-1]!r}: {REASONS.get(name, 'it would be left out in silence')}", name)
    given = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
    return _error(400, f"{name}: {first['msg']}{given}", name)


def build(service: Service) -> FastAPI:
    """The application of a service."""
    app = FastAPI(title="qftlab", docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, lambda _, problem: _error(problem.status_code, problem.detail))
    app.add_exception_handler(RequestValidationError, lambda _, problem: _invalid(problem))
    app.add_exception_handler(Failed, lambda _, problem: _error(problem.status, str(problem)))
    app.add_exception_handler(Exception, lambda _, problem: _error(500, f"{type(problem).__name__}: see the log"))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("chat.html"), headers=PAGE)

    @app.get("/health")
    def health() -> JSONResponse:
        is_well = service.batcher.thread.is_alive() and not service.is_draining
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> JSONResponse:
        model = Model(id=service.name, created=service.created, object="model", owned_by="qftlab")
        return JSONResponse({"object": "list", "data": [model.model_dump(exclude_unset=True)]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        return await service.answer(request, asked)

    @app.post("/v1/completions")
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        return await service.answer(request, asked)

    return app


class _Server(uvicorn.Server):
    """uvicorn, but after a signal it hears on, answers 503, and stops when all running answers are out."""

    def __init__(self, service: Service) -> None:
        self.service = service
        options = {"log_config": None, "log_level": "warning", "access_log": False, "lifespan": "off"}
        options |= {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 30}  # the latter for who does not fetch
        super().__init__(uvicorn.Config(service, **options))

    def handle_exit(self, sig, frame) -> None:
        self.should_exit = self.force_exit = self.service.is_draining  # a second signal does not wait
        self.service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        is_idle = not (self.service.batcher.seats or self.service.batcher.waiting)
        return await super().on_tick(counter) or (self.service.is_draining and is_idle)


@contextmanager
def _opened(model, tokenizer, config: ServeConfig) -> Iterator[tuple[_Server, socket.socket, str]]:
    """A server, the socket it is to hear on, and its address."""
    with socket.create_server((config.host, config.port), backlog=2048) as listener:
        service = Service(model, tokenizer, config)
        if not (config.host == "localhost" or config.host.startswith("127.") or service.key):
            log.warning("%s is heard by other machines, and no key is asked for: set %s", config.host, KEY)
        try:
            yield _Server(service), listener, f"http://{config.host}:{listener.getsockname()[1]}"
        finally:
            service.batcher.close()


def serve(model, tokenizer, config: ServeConfig) -> None:
    """Answers until SIGTERM or Ctrl-C; then no new requests, and the running ones are finished.

    Args:
        model, tokenizer: as in `generate`.
        config: name, address and limits.

    Raises:
        OSError: if the address is taken.
        ValueError: for a model that `Decoder` refuses.
    """
    with _opened(model, tokenizer, config) as (server, listener, url):
        log.info("%s answers at %s/v1, with a chat page at %s (Ctrl-C stops)", server.service.name, url, url)
        server.run([listener])


@contextmanager
def serving(model, tokenizer, *, name: str = "tiny", port: int = 0, **options) -> Iterator[str]:
    """A server in a thread, for as long as the block lasts: `with serving(model, tokenizer) as url:`.

    Args:
        model, tokenizer: as in `generate`.
        name: what clients call the model.
        port: 0 takes a free one.
        options: the other fields of `ServeConfig`, but those that load a model.

    Yields:
        The address for clients, which ends in /v1.

    Raises:
        TypeError: for an option that would change nothing, because the model is there.
        What `serve` raises.
    """
    if unfit := options.keys() & {"model", "base", "dtype", "device"}:
        raise TypeError(f"options of a model that is loaded already must not be given, got {sorted(unfit)}")
    with _opened(model, tokenizer, ServeConfig(name=name, port=port, **options)) as (server, listener, url):
        thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                time.sleep(0.01)
            yield f"{url}/v1"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
