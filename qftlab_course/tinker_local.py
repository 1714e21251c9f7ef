"""A Tinker service on this machine: the SDK and its command line cannot tell it from the real one, but by its speed.

Training and sampling are `tinker_runs`, their order `tinker_service`, HTTP `tinker_routes`. For lessons and tests:
it knows no users, and takes any key that begins with tml-.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qftlab.files import resolve
from qftlab.settings import Names


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
        if not all(names) or not names:
            raise ValueError(f"models must name at least one model, got {names}: --models [tiny]")


def sources(models: Sequence[str]) -> dict[str, str]:
    """Name → source, of NAME=SOURCE or a source that is its own name."""
    return {name: source or name for name, _, source in (model.partition("=") for model in models)}


@contextmanager
def opened(config: TinkerLocalConfig, key: str = "") -> Iterator[tuple]:
    """A server, the socket it is to hear on, and its address; `key` as in `serving`.

    Raises:
        OSError: if the address is taken.
        FileNotFoundError: if there is no such model.
    """
    import uvicorn
    from transformers import AutoConfig

    from qftlab_course.tinker_routes import build
    from qftlab_course.tinker_service import Service

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
def serving(
    models: Sequence[str] = ("tiny",), output: str | Path = "", *, key: str = "", port: int = 0
) -> Iterator[str]:
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
