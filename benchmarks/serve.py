"""How many answers a second the server gives, beside `transformers serve`, at 32 clients on data/tiny.

`python -m benchmarks.serve`: both servers are processes of their own with one thread for products, both in fp32; rounds
of the same requests go to one and the other in turns, after a check that both say the same. Bar: three times the
requests a second of its default mode. Its continuous batching (`--continuous`) takes 14 GB and is measured by itself,
beside ours; it must have that much memory free.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import local

from qftlab.files import bundled
from qftlab.rows.sources import load_rows

BAR, CLIENTS, TOKENS = 3.0, 32, 16
NEEDED = 15  # GB of free memory for the continuous mode


def free_port() -> int:
    """A port that nobody hears on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """One of the servers, and how it is asked.

    Args:
        name: for the report.
        command: that starts it; its port is added.
        model: the name it knows the model by.
    """

    def __init__(self, name: str, command: list[str], model: str) -> None:
        self.name, self.model, self.port, self.own = name, model, free_port(), local()
        self.command = [*command, "--port", str(self.port)]

    @contextmanager
    def running(self) -> Iterator[Server]:
        """The server as a process, once it has answered a request."""
        kept = {name: value for name, value in os.environ.items() if name != "QFTLAB_LAYOUT"}  # as a user has it
        environment = kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            self.command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                for _ in range(600):
                    try:
                        self.ask("Hello")
                        break
                    except (OSError, http.client.HTTPException):
                        time.sleep(0.5)
                self.process = process
                yield self
            finally:
                process.terminate()

    def ask(self, question: str) -> tuple[str, int]:
        """A greedy answer and its number of tokens, over the calling thread's own connection."""
        if not hasattr(self.own, "wire"):
            self.own.wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS,
                "temperature": 0}  # fmt: skip
        data, kind = json.dumps(body), {"Content-Type": "application/json"}
        for is_last in (False, True):  # a connection that was idle may have been closed
            try:
                self.own.wire.request("POST", "/v1/chat/completions", data, kind)
                answer = json.loads(self.own.wire.getresponse().read())
                break
            except (OSError, http.client.HTTPException):
                self.own.wire.close()
                if is_last:
                    raise
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    def rate(self, questions: list[str]) -> float:
        """Answers a second to the questions of 32 clients."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self.ask, questions[:CLIENTS]))  # connections are made
            start = time.perf_counter()
            list(pool.map(self.ask, questions))
            return len(questions) / (time.perf_counter() - start)

    def resident(self) -> int:
        """MiB of its process, children included."""
        import psutil

        process = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) >> 20


def servers() -> dict[str, Server]:
    """Ours, and both modes of the other."""
    folder, theirs = str(bundled("tiny")), [str(Path(sys.executable).with_name("transformers")), "serve"]
    options = ["--dtype", "float32", "--device", "cpu"]
    ours = [sys.executable, "-m", "qftlab", "serve", "--model", folder, "--name", "tiny"]
    return {
        "ours": Server("qftlab", ours, "tiny"),
        "default": Server("transformers serve", [*theirs, folder, *options], folder),
        "continuous": Server("its --continuous-batching", [*theirs, folder, *options, "--continuous-batching"], folder),
    }


def compare(ours: Server, other: Server, rounds: int, counts: tuple[int, int]) -> dict:
    """Rounds in turns, over questions whose answers are of full length, after a check that both say the same.

    Blanks around an answer do not count: `transformers serve` drops the first one.
    """
    rows = load_rows(bundled("instructions", "heldout.jsonl")) + load_rows(bundled("bugfix", "heldout.jsonl"))
    questions = [row["instruction"] for row in rows if ours.ask(row["instruction"])[1] == TOKENS]
    asked = [(ours.ask(question)[0].strip(), other.ask(question)[0].strip()) for question in questions[:16]]
    differing = sum(one != two for one, two in asked)
    sets = [[questions[i % len(questions)] for i in range(count)] for count in counts]
    found = [(ours.rate(sets[0]), other.rate(sets[1])) for _ in range(rounds)]
    ratios = [a / b for a, b in found]
    rates = {"ours_per_s": [round(a, 1) for a, _ in found], "other_per_s": [round(b, 1) for _, b in found]}
    memory = {"ours_mib": ours.resident(), "other_mib": other.resident()}
    return {"other": other.name, "clients": CLIENTS, "tokens": TOKENS, "answers_that_differ_of_16": differing,
            **rates, "ratio": round(statistics.median(ratios), 2), **memory}  # fmt: skip


def free_gb() -> float:
    """Memory that is free, in GB."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return int(re.search(r"MemAvailable:\s+(\d+)", lines.read())[1]) / 1e6


def main() -> None:
    """Prints a line of JSON for each mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--continuous", action="store_true", help="measure the other's continuous mode as well")
    given = parser.parse_args()
    known = servers()
    for name in ("default", "continuous")[: 1 + given.continuous]:
        if name == "continuous" and free_gb() < NEEDED:
            print(json.dumps({"other": known[name].name, "skipped": f"{free_gb():.0f} GB free, {NEEDED} needed"}))
            continue
        with ExitStack() as stack:
            ours, other = (stack.enter_context(known[one].running()) for one in ("ours", name))
            row = compare(ours, other, given.rounds, (512, 128))
        print(json.dumps(row | ({"bar": BAR, "holds": row["ratio"] >= BAR} if name == "default" else {})), flush=True)


if __name__ == "__main__":
    main()
