"""A Tinker service on this machine: the SDK and its command line cannot tell it from the real one, but by its speed.

Training and sampling are `qftlab_course.tinker_runs`. One thread does all work, in the order that the SDK's sequence
numbers ask for; HTTP hands out futures. For lessons and tests: it knows no users, and keeps no secret but its links.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
from asyncio import wait, wrap_future
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from tinker.proto import tinker_public_pb2 as wire
from transformers import AutoConfig

from qftlab.files import resolve
from qftlab.settings import Names
from qftlab_course.tinker_runs import Adapters, Checkpoints, Datum, Run, Shell, UserError

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds that an answer may take before the client is told to ask again
KEPT = 5000  # answers that may still be fetched
LINKS = timedelta(hours=1)  # how long the address of a file is good for
NUMBERS = {wire.DTYPE_FLOAT32: np.float32, wire.DTYPE_INT64: np.int64}


@dataclass(frozen=True)
class TinkerLocalConfig:
    """Answers as the Tinker service does, on this machine; needs `pip install "qftlab[tinker,serve]"`.

    Args:
        models: what it trains: `tiny`, folders and hub names, one or [several]; NAME=FOLDER serves a folder under
            another name, as in Qwen/Qwen3-8B=tiny.
        output: a folder for checkpoints, which a later service finds again.
        host: the address to hear on.
        port: the same; 0 takes a free one.
    """

    models: Names = ("tiny",)
    output: str = "runs/tinker-local"
    host: str = "127.0.0.1"
    port: int = 8765

    def __post_init__(self) -> None:
        names = (self.models,) if isinstance(self.models, str) else tuple(self.models)
        object.__setattr__(self, "models", names)


class Turns:
    """The work of one run, done in the order of its sequence numbers whatever order it comes in; the first is 1."""

    def __init__(self) -> None:
        self.next, self.early = 1, {}

    def ready(self, number: int, job: Callable[[], None]) -> list[Callable[[], None]]:
        """The jobs whose turn it is, now that one more has come."""
        self.early[number], found = job, []
        while self.next in self.early:
            found.append(self.early.pop(self.next))
            self.next += 1
        return found


class Service:
    """Runs, samplers, checkpoints, and the thread that works on them.

    Args:
        models: name → what `load_model` takes.
        folder: for checkpoints.
        key: the only one that is taken; by default any that begins with tml-.
    """

    def __init__(self, models: Mapping[str, str], folder: str | Path, key: str = "") -> None:
        self.models, self.checkpoints, self.key = dict(models), Checkpoints(folder), key
        self.shells: dict[tuple, Shell] = {}
        self.runs: dict[str, Run] = {}
        self.turns: dict[str, Turns] = {}
        self.about: dict[str, dict] = {}  # run → what is known of it before it is there
        self.samplers: dict[str, tuple[str, str | None, dict | None, Adapters | None]] = {}
        self.futures: dict[str, Future] = {}
        self.links: dict[str, tuple[Path, float]] = {}
        self.sessions: dict[str, str] = {}
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="tinker-local", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            job()

    def close(self) -> None:
        """Ends the thread after the job that it is at."""
        self.jobs.put(None)
        self.thread.join()

    def submit(self, name: str, work: Callable[[], object], run: str = "", number: int | None = None) -> dict:
        """Puts work off, and returns the ticket that fetches its result; the same name is the same work."""
        with self.lock:
            if name not in self.futures:
                future = self.futures[name] = Future()
                jobs = [lambda: _do(future, work)]
                if run and number:
                    jobs = self.turns.setdefault(run, Turns()).ready(number, jobs[0])
                for job in jobs:
                    self.jobs.put(job)
                for old in list(self.futures)[:-KEPT]:
                    if self.futures[old].done():
                        del self.futures[old]
        return {"request_id": name, **({"model_id": run} if run else {})}

    def shell(self, base: str, adapters: Adapters | None) -> Shell:
        """The model of a base with adapters of a shape.

        Raises:
            UserError: for a base that is not served.
        """
        if base not in self.models:
            raise UserError(f"base_model must be one of {', '.join(self.models)}, got {base!r}")
        if (base, adapters) not in self.shells:
            self.shells[base, adapters] = Shell(self.models[base], adapters)
        return self.shells[base, adapters]

    def run(self, name: str) -> Run:
        """A run by its id.

        Raises:
            UserError: if there is none.
        """
        if name not in self.runs:
            raise UserError(f"model_id must name a run of this service, got {name!r}: it has none, or was restarted")
        return self.runs[name]

    def create(self, name: str, base: str, adapters: Adapters, seed: int | None) -> dict:
        """A run with fresh adapters."""
        shell = self.shell(base, adapters)
        seed = secrets.randbits(31) if seed is None else seed
        self.runs[name] = Run(name, base, adapters, shell, shell.fresh(seed))
        return {"model_id": name, "type": "create_model"}

    def load(self, name: str, path: str, with_optimizer: bool) -> dict:
        """A run as a checkpoint left it."""
        info, weights = self.checkpoints.load(path)
        if info["checkpoint_type"] != "training":
            raise UserError(f"path must be of save_state, tinker://RUN/weights/NAME, got {path!r}")
        adapters = Adapters(**info["adapters"])
        run = Run(name, info["base_model"], adapters, self.shell(info["base_model"], adapters), weights)
        if with_optimizer:
            run.optimizer.load_state_dict(self.checkpoints.optimizer(path))
        self.runs[name] = run
        return {"path": path, "model_id": name, "type": "load_weights"}

    def sampler(self, base: str | None, path: str | None) -> str:
        """A sampler of a base, or of a checkpoint that was saved for one.

        Raises:
            UserError: if there is no such model.
        """
        weights = adapters = None
        if path:
            info, weights = self.checkpoints.load(path)
            if info["checkpoint_type"] != "sampler":
                raise UserError(f"model_path must be of save_weights_for_sampler, got {path!r}")
            base, adapters = info["base_model"], Adapters(**info["adapters"])
        if base not in self.models:
            raise UserError(f"base_model must be one of {', '.join(self.models)}, got {base!r}")
        return self.remember(base, path, weights, adapters)

    def remember(self, base: str, path: str | None, weights: dict | None, adapters: Adapters | None) -> str:
        """A new sampler's id."""
        name = f"sampler-{secrets.token_hex(8)}"
        self.samplers[name] = base, path, weights, adapters
        return name

    def sample(self, body: Mapping, name: str, tokens: list[int]) -> bytes:
        """Completions of a prompt, and the prompt's own log-probabilities where they are asked for, on the wire."""
        unknown = ("topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k")
        if asked := [field for field in unknown if body.get(field)]:
            raise UserError(f"{asked[0]} is not to be had of the local service")
        base, _, weights, adapters = self.samplers[name]
        shell, params = self.shell(base, adapters), body.get("sampling_params") or {}
        seed = params.get("seed")
        seed = secrets.randbits(31) if seed is None else seed % (2**63 - 1)
        answer = wire.SampleResponse()
        if body.get("prompt_logprobs"):
            answer.prompt_logprobs = _prompt_logprobs(shell, weights or {}, tokens, body.get("prompt_logprobs_last_n"))
        for one in shell.sample(weights or {}, tokens, body.get("num_samples", 1), params, seed):
            answer.sequences.add(
                stop_reason=wire.STOP_REASON_LENGTH if one.finish_reason == "length" else wire.STOP_REASON_STOP,
                tokens=np.array(one.token_ids, np.int32).tobytes(), logprobs=np.array(one.logprobs, np.float32).tobytes()
            )  # fmt: skip
        return answer.SerializeToString()

    def forward(self, asked: wire.ForwardBackwardRequest) -> bytes:
        """Loss and log-probabilities of the data, on the wire."""
        config = {name: value.number for name, value in asked.loss_fn_config_v2.items()} or dict(asked.loss_fn_config)
        run = self.run(asked.model_id)
        total, found = run.forward(list(map(_datum, asked.data)), asked.loss_fn, config, not asked.forward_only)
        answer = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": total})
        record = answer.loss_fn_outputs.add(num_datums=len(found))
        rows = [np.array(row, np.float32) for row in found]
        record.fields["logprobs"].data = np.concatenate(rows).tobytes()
        record.fields["logprobs"].offsets = np.cumsum([0, *[row.nbytes for row in rows]], dtype=np.int64).tobytes()
        record.fields["logprobs"].dtype = wire.DTYPE_FLOAT32
        return answer.SerializeToString()


def _do(future: Future, work: Callable[[], object]) -> None:
    """Work and its result, or what the service says of its failure; the thread outlives both."""
    try:
        future.set_result(work())
    except UserError as error:
        future.set_result({"error": str(error), "category": "user"})
    except Exception as error:
        log.exception("a request failed")
        future.set_result({"error": f"{type(error).__name__}: {error}", "category": "server"})


def _datum(sent: wire.Datum) -> Datum:
    tokens = [np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist() for chunk in sent.model_input]
    found = {}
    for name, tensor in sent.loss_fn_inputs.items():
        if tensor.HasField("sparse_csr") or len(tensor.shape) > 1 or tensor.dtype not in NUMBERS:
            raise UserError(f"{name} must be a dense list of numbers, got shape {list(tensor.shape)}")
        found[name] = np.frombuffer(tensor.dense, NUMBERS[tensor.dtype]).tolist()
    targets = found.pop("target_tokens", [])
    return Datum(sum(tokens, []), targets, {name: list(map(float, values)) for name, values in found.items()})


@torch.no_grad()
def _prompt_logprobs(shell: Shell, weights: dict, tokens: list[int], last: int | None) -> bytes:
    """fp32 nats of each prompt token, nan for the first and for those that are not asked for."""
    shell.check(tokens)
    values = np.full(len(tokens), np.nan, np.float32)
    if len(tokens) > 1:
        values[1:] = shell.logprobs(weights, [Datum(tokens[:-1], tokens[1:], {})])[0].numpy()
    if last is not None:
        values[:-last] = np.nan
    return values.tobytes()


def _plain(value: object) -> Response:
    """A result as the client fetches it."""
    if isinstance(value, bytes):
        return Response(value, media_type="application/x-protobuf")
    return JSONResponse(value)


def build(service: Service) -> FastAPI:
    """The application of a service."""
    app = FastAPI(title="tinker-local", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def door(request: Request, call_next):
        key = request.headers.get("x-api-key", "") or request.headers.get("authorization", "").removeprefix("Bearer ")
        is_known = secrets.compare_digest(key, service.key) if service.key else key.startswith("tml-")
        if not is_known and request.url.path.startswith("/api/"):
            return JSONResponse({"detail": "Invalid API key"}, 401)
        return await call_next(request)

    app.add_exception_handler(UserError, lambda _, error: JSONResponse({"detail": str(error)}, 400))
    app.add_exception_handler(
        KeyError, lambda _, error: JSONResponse({"detail": f"the request must have a field {error}"}, 422)
    )
    for add in (_session_routes, _training_routes, _weights_routes, _sampling_routes, _listing_routes):
        add(app, service)
    return app


def _session_routes(app: FastAPI, service: Service) -> None:
    @app.post("/api/v1/client/config")
    @app.post("/api/v1/client/dynamic_config")
    def config() -> dict:
        return {}

    @app.get("/api/v1/healthz")
    def health() -> dict:
        return {"status": "ok"}

    @app.post("/api/v1/create_session")
    def session() -> dict:
        name = secrets.token_hex(8)
        service.sessions[name] = datetime.now(timezone.utc).isoformat()
        return {"type": "create_session", "session_id": name}

    @app.post("/api/v1/session_heartbeat")
    def heartbeat() -> dict:
        return {"type": "session_heartbeat"}

    @app.post("/api/v1/sessions/{name}/finish")
    def finish(name: str) -> dict:
        return {"session_id": name}

    @app.post("/api/v1/telemetry")
    def telemetry() -> dict:
        return {"status": "accepted"}

    @app.get("/api/v1/get_server_capabilities")
    def capabilities() -> dict:
        limits = {name: AutoConfig.from_pretrained(resolve(source)).max_position_embeddings
                  for name, source in service.models.items()}  # fmt: skip
        return {"supported_models": [{"model_name": name, "max_context_length": limit, "trainable": True,
                                      "sampleable": True} for name, limit in limits.items()]}  # fmt: skip

    @app.post("/api/v1/retrieve_future")
    async def retrieve(request: Request) -> Response:
        name = (await request.json())["request_id"]
        if name not in service.futures:
            raise HTTPException(404, f"request_id must be of a request that was made here, got {name!r}")
        future = wrap_future(service.futures[name])
        await wait([future], timeout=PATIENCE)
        if not future.done():
            return JSONResponse({"type": "try_again", "request_id": name, "queue_state": "active"})
        return _plain(future.result())


def _training_routes(app: FastAPI, service: Service) -> None:
    @app.post("/api/v1/create_model")
    async def create(request: Request) -> dict:
        body = await request.json()
        name, lora = f"{body['session_id']}:train:{body['model_seq_id']}", dict(body.get("lora_config") or {"rank": 32})
        if body["base_model"] not in service.models:
            raise UserError(f"base_model must be one of {', '.join(service.models)}, got {body['base_model']!r}")
        seed, adapters = lora.pop("seed", None), Adapters(**lora)
        service.about[name] = {"base_model": body["base_model"], "rank": adapters.rank,
                               "user_metadata": body.get("user_metadata")}  # fmt: skip
        return service.submit(name, lambda: service.create(name, body["base_model"], adapters, seed), name)

    @app.post("/api/v1/get_info")
    async def info(request: Request) -> dict:
        run = service.run((await request.json())["model_id"])
        data = {"arch": "lora", "model_name": run.base, "tokenizer_id": resolve(service.models[run.base])}
        return {"type": "get_info", "model_data": data, "model_id": run.name, "is_lora": True,
                "lora_rank": run.adapters.rank, "model_name": run.base}  # fmt: skip

    @app.post("/api/v1/forward_backward")
    async def forward_backward(request: Request) -> dict:
        if "protobuf" not in request.headers.get("content-type", ""):
            raise UserError("forward_backward must be sent as application/x-protobuf: use tinker 0.38 or newer")
        asked = wire.ForwardBackwardRequest.FromString(await request.body())
        name = f"{asked.model_id}:{asked.seq_id}"
        return service.submit(name, lambda: service.forward(asked), asked.model_id, asked.seq_id)

    @app.post("/api/v1/optim_step")
    async def optim_step(request: Request) -> dict:
        body = await request.json()

        def work() -> dict:
            if "adam_params" not in body:
                raise UserError("optimizer must be AdamW on the local service, got another")
            return {"metrics": service.run(body["model_id"]).update(body["adam_params"])}

        return service.submit(f"{body['model_id']}:{body['seq_id']}", work, body["model_id"], body["seq_id"])


def _weights_routes(app: FastAPI, service: Service) -> None:
    def saver(kind: str, answer: str) -> Callable:
        async def save(request: Request) -> dict:
            body = await request.json()

            def work() -> dict:
                run, path = service.run(body["model_id"]), body.get("path")
                if path is None and kind == "sampler":  # kept by nobody but the sampler
                    name = service.remember(run.base, None, run.snapshot(), run.adapters)
                    return {"type": answer, "sampling_session_id": name}
                saved = service.checkpoints.save(run, kind, path, bool(body.get("overwrite")), body.get("ttl_seconds"))
                return {"type": answer, "path": saved}

            name, number = body["model_id"], body.get("seq_id")
            return service.submit(f"{name}:{number or secrets.token_hex(8)}", work, name, number)

        return save

    for route, kind in (("save_weights", "training"), ("save_weights_for_sampler", "sampler"),
                        ("save_weights_external", "external")):  # fmt: skip
        app.post(f"/api/v1/{route}")(saver(kind, route))

    @app.post("/api/v1/load_weights")
    async def load(request: Request) -> dict:
        body = await request.json()
        number, name = body.get("seq_id"), body.get("model_id") or f"{body['session_id']}:train:{body['model_seq_id']}"
        service.checkpoints.place(body["path"])  # said at once
        return service.submit(f"{name}:{number or 'load'}", lambda: service.load(name, body["path"], body["optimizer"]),
                              name, number)  # fmt: skip

    @app.post("/api/v1/weights_info")
    async def weights_info(request: Request) -> dict:
        found, _ = service.checkpoints.load((await request.json())["tinker_path"])
        shape = dict(found["adapters"])
        return {"base_model": found["base_model"], "is_lora": True, "lora_rank": shape.pop("rank"), **shape}


def _sampling_routes(app: FastAPI, service: Service) -> None:
    @app.post("/api/v1/create_sampling_session")
    async def session(request: Request) -> dict:
        body = await request.json()
        name = service.sampler(body.get("base_model"), body.get("model_path"))
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @app.get("/api/v1/samplers/{name}")
    def sampler(name: str) -> dict:
        if name not in service.samplers:
            raise HTTPException(404, f"sampler must be one of this service, got {name!r}")
        base, path, *_ = service.samplers[name]
        return {"sampler_id": name, "base_model": base, "model_path": path}

    @app.post("/api/v1/asample")
    async def asample(request: Request) -> dict:
        body = await request.json()
        name = body.get("sampling_session_id") or service.sampler(body.get("base_model"), body.get("model_path"))
        if name not in service.samplers:
            raise HTTPException(404, f"sampling_session_id must be one of this service, got {name!r}")
        tokens = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
        number = body.get("seq_id")
        title = f"{name}:{secrets.token_hex(8) if number is None else number}"
        ticket = service.submit(title, lambda: service.sample(body, name, tokens))
        return ticket | {"sample_sequence_ids": [f"{title}:{i}" for i in range(body.get("num_samples", 1))]}


def _listing_routes(app: FastAPI, service: Service) -> None:
    def listed(info: dict) -> dict:
        names = ("checkpoint_id", "checkpoint_type", "time", "tinker_path", "size_bytes", "expires_at")
        return {name: info[name] for name in names}

    def training_run(name: str, infos: Sequence[dict]) -> dict:
        own = [info for info in infos if info["run"] == name]
        about = service.about.get(name) or {"base_model": own[0]["base_model"], "rank": own[0]["adapters"]["rank"]}
        newest = {kind: next((listed(i) for i in own if i["checkpoint_type"] == kind), None)
                  for kind in ("training", "sampler")}  # fmt: skip
        now = datetime.now(timezone.utc).isoformat()
        return {"training_run_id": name, "base_model": about["base_model"], "model_owner": "local", "is_lora": True,
                "lora_rank": about["rank"], "last_request_time": own[0]["time"] if own else now,
                "last_checkpoint": newest["training"], "last_sampler_checkpoint": newest["sampler"],
                "user_metadata": about.get("user_metadata")}  # fmt: skip

    def page(name: str, found: list[dict], limit: int, offset: int) -> dict:
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {name: found[offset : offset + limit] if limit else found[offset:], "cursor": cursor}

    def names_of_runs(infos: Sequence[dict]) -> list[str]:
        return list(dict.fromkeys([*reversed(service.about), *[info["run"] for info in infos]]))

    @app.get("/api/v1/training_runs")
    def runs(limit: int = 20, offset: int = 0) -> dict:
        infos = service.checkpoints.infos()
        return page("training_runs", [training_run(name, infos) for name in names_of_runs(infos)], limit, offset)

    @app.get("/api/v1/training_runs/{name}")
    def run(name: str) -> dict:
        infos = service.checkpoints.infos()
        if name not in names_of_runs(infos):
            raise HTTPException(404, f"training run must be one of this service, got {name!r}")
        return training_run(name, infos)

    @app.get("/api/v1/training_runs/{name}/checkpoints")
    def of_run(name: str) -> dict:
        return {"checkpoints": [listed(info) for info in service.checkpoints.infos() if info["run"] == name]}

    @app.get("/api/v1/checkpoints")
    def checkpoints(limit: int = 100, offset: int = 0) -> dict:
        return page("checkpoints", [listed(info) for info in service.checkpoints.infos()], limit, offset)

    @app.get("/api/v1/training_runs/{name}/checkpoints/{kind}/{title}/external_weights_urls")
    def links(request: Request, name: str, kind: str, title: str) -> dict:
        place, end = service.checkpoints.place(f"tinker://{name}/{kind}/{title}"), datetime.now(timezone.utc) + LINKS
        if kind != "external_weights":
            raise UserError(f"only external_weights can be downloaded, got {kind}: save_weights_external first")
        token = secrets.token_urlsafe(24)
        service.links[token] = place, end.timestamp()
        files = [p.name for p in place.iterdir() if p.name != "info.json"]
        return {"urls": {f: f"{request.base_url}files/{token}/{f}" for f in files}, "expires": end.isoformat()}

    @app.get("/files/{token}/{name}")
    def file(token: str, name: str) -> FileResponse:
        place, end = service.links.get(token, (None, 0.0))
        if time.time() > end or name not in [p.name for p in place.iterdir()]:
            raise HTTPException(403, "this link is not known, or no longer good: ask for another")
        return FileResponse(place / name)

    @app.delete("/api/v1/training_runs/{name}/checkpoints/{kind}/{title}")
    def delete(name: str, kind: str, title: str) -> Response:
        service.checkpoints.delete(f"tinker://{name}/{kind}/{title}")
        return Response(status_code=204)

    @app.put("/api/v1/training_runs/{name}/checkpoints/{kind}/{title}/ttl")
    async def ttl(request: Request, name: str, kind: str, title: str) -> Response:
        seconds = (await request.json()).get("ttl_seconds")
        service.checkpoints.expire(f"tinker://{name}/{kind}/{title}", seconds)
        return Response(status_code=204)


def sources(models: Sequence[str]) -> dict[str, str]:
    """Name → source, of NAME=SOURCE or a source that is its own name."""
    return {name: source or name for name, _, source in (model.partition("=") for model in models)}


@contextmanager
def opened(config: TinkerLocalConfig, key: str = "") -> Iterator[tuple[uvicorn.Server, socket.socket, str]]:
    """A server, the socket it is to hear on, and its address.

    Raises:
        OSError: if the address is taken.
        FileNotFoundError: if there is no such model.
    """
    models = sources(config.models)
    for source in models.values():
        AutoConfig.from_pretrained(resolve(source))
    with socket.create_server((config.host, config.port), backlog=2048) as listener:
        service = Service(models, config.output, key)
        options = {"log_config": None, "log_level": "warning", "access_log": False, "lifespan": "off"}
        try:
            server = uvicorn.Server(uvicorn.Config(build(service), timeout_keep_alive=75, **options))
            yield server, listener, f"http://{config.host}:{listener.getsockname()[1]}"
        finally:
            service.close()


@contextmanager
def serving(models: Sequence[str] = ("tiny",), output: str | Path = "", *, key: str = "", port: int = 0) -> Iterator[str]:
    """A service in a thread, for as long as the block lasts: `with serving(["tiny"]) as url:`.

    Args:
        models: as in `TinkerLocalConfig`.
        output: a folder for checkpoints; by default one that is removed afterwards.
        key: the only one that is taken; by default any that begins with tml-.
        port: 0 takes a free one.

    Yields:
        The address, for TINKER_BASE_URL.
    """
    with TemporaryDirectory() as folder:
        config = TinkerLocalConfig(tuple(models), str(output or folder), port=port)
        with opened(config, key) as (server, listener, url):
            thread = threading.Thread(target=server.run, args=([listener],), name="tinker-http", daemon=True)
            thread.start()
            try:
                while thread.is_alive() and not server.started:
                    time.sleep(0.01)
                yield url
            finally:
                server.should_exit = server.force_exit = True
                thread.join()
