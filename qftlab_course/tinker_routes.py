"""The routes of the local Tinker service: JSON and protobuf in, futures out, as the SDK 0.38 speaks."""

from __future__ import annotations

import secrets
import time
from asyncio import wait, wrap_future
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from tinker.proto import tinker_public_pb2 as wire
from transformers import AutoConfig

from qftlab.files import resolve
from qftlab_course.tinker_runs import Adapters, UserError
from qftlab_course.tinker_service import Service

PATIENCE = 10.0  # seconds that an answer may take before the client is told to ask again
LINKS = timedelta(hours=1)  # how long the address of a file is good for


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
    for add in (_session_routes, _training_routes, _weights_routes, _sampling_routes, _listing_routes, _file_routes):
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
        service.fetched(name)
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


def _listed(info: dict) -> dict:
    names = ("checkpoint_id", "checkpoint_type", "time", "tinker_path", "size_bytes", "expires_at")
    return {name: info[name] for name in names}


def _training_run(service: Service, name: str, infos: Sequence[dict]) -> dict:
    own = [info for info in infos if info["run"] == name]
    about = service.about.get(name) or {"base_model": own[0]["base_model"], "rank": own[0]["adapters"]["rank"]}
    newest = {kind: next((_listed(i) for i in own if i["checkpoint_type"] == kind), None)
              for kind in ("training", "sampler")}  # fmt: skip
    now = datetime.now(timezone.utc).isoformat()
    return {"training_run_id": name, "base_model": about["base_model"], "model_owner": "local", "is_lora": True,
            "lora_rank": about["rank"], "last_request_time": own[0]["time"] if own else now,
            "last_checkpoint": newest["training"], "last_sampler_checkpoint": newest["sampler"],
            "user_metadata": about.get("user_metadata")}  # fmt: skip


def _page(name: str, found: list[dict], limit: int, offset: int) -> dict:
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return {name: found[offset : offset + limit] if limit else found[offset:], "cursor": cursor}


def _listing_routes(app: FastAPI, service: Service) -> None:
    def names_of_runs(infos: Sequence[dict]) -> list[str]:
        return list(dict.fromkeys([*reversed(service.about), *[info["run"] for info in infos]]))

    @app.get("/api/v1/training_runs")
    def runs(limit: int = 20, offset: int = 0) -> dict:
        infos = service.checkpoints.infos()
        found = [_training_run(service, name, infos) for name in names_of_runs(infos)]
        return _page("training_runs", found, limit, offset)

    @app.get("/api/v1/training_runs/{name}")
    def run(name: str) -> dict:
        infos = service.checkpoints.infos()
        if name not in names_of_runs(infos):
            raise HTTPException(404, f"training run must be one of this service, got {name!r}")
        return _training_run(service, name, infos)

    @app.get("/api/v1/training_runs/{name}/checkpoints")
    def of_run(name: str) -> dict:
        return {"checkpoints": [_listed(info) for info in service.checkpoints.infos() if info["run"] == name]}

    @app.get("/api/v1/checkpoints")
    def checkpoints(limit: int = 100, offset: int = 0) -> dict:
        return _page("checkpoints", [_listed(info) for info in service.checkpoints.infos()], limit, offset)


def _file_routes(app: FastAPI, service: Service) -> None:
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
