"""The work of the local Tinker service: runs, samplers, checkpoints, and the one thread that does it all in order."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as wire

from qftlab_course.tinker_runs import Adapters, Checkpoints, Datum, Run, Shell, UserError

log = logging.getLogger(__name__)
KEPT = 200  # answers that have been fetched and may be once more
ENDS = {"stop": wire.STOP_REASON_STOP, "length": wire.STOP_REASON_LENGTH}
NUMBERS = {wire.DTYPE_FLOAT32: np.float32, wire.DTYPE_INT64: np.int64}


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
        self.given: deque[str] = deque()
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
        return {"request_id": name, **({"model_id": run} if run else {})}

    def fetched(self, name: str) -> None:
        """Notes that an answer was fetched: the oldest such are let go, so that memory does not grow."""
        with self.lock:
            self.given.append(name)
            if len(self.given) > KEPT:
                self.futures.pop(self.given.popleft(), None)

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
            made = answer.sequences.add(tokens=np.array(one.token_ids, np.int32).tobytes())
            made.logprobs = np.array(one.logprobs, np.float32).tobytes()
            made.stop_reason = ENDS[one.finish_reason]
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
