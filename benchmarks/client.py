"""How close the client of servers comes to the most that threads and latency allow, and whether its memory is flat.

`python -m benchmarks.client`: the server (qftlab_course.flaky) is another process, the journal is on. The most that a
number of threads can have is threads ÷ latency answers a second; bars: 95 % of it at 1 and 8 threads and 200 ms, 85 %
at 32 threads and 200 ms and at 128 threads and 1 s.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qftlab.remote.client import Client
from qftlab.settings import ServerConfig

CASES = {(1, 0.2): 0.95, (8, 0.2): 0.95, (32, 0.2): 0.85, (128, 1.0): 0.85}  # (threads, seconds) to the bar
SECONDS = 20  # of each case


@contextmanager
def serving(latency: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "qftlab_course.flaky", "--latency", str(latency)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http\S+", process.stderr.readline())[0]
        finally:
            process.kill()


def said(answer: dict) -> str:
    """The text of an answer."""
    return answer["choices"][0]["message"]["content"]


def speed(threads: int, latency: float, count: int) -> dict:
    """One case: answers a second as a share of threads ÷ latency, and the client's CPU time a request."""
    message = "What is wrong with this program? " * 20
    with serving(latency) as url, tempfile.TemporaryDirectory() as folder:
        with Client(ServerConfig(url=url, threads=threads), Path(folder) / "kept.jsonl") as client:

            def ask(i: int) -> str:
                body = {"model": "m", "messages": [{"role": "user", "content": f"{i} {message}"}], "max_tokens": 99}
                return client.ask("chat/completions", body, said)

            list(client.map(ask, range(-threads, 0)))  # connections are made
            cpu, start = time.process_time(), time.perf_counter()
            done = sum(1 for _ in client.map(ask, range(count)))
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"threads": threads, "latency_s": latency, "requests": done, "answers_per_s": round(done / seconds, 2),
            "share": round(done / seconds * latency / threads, 3), "cpu_ms": round(1000 * cpu / done, 2)}  # fmt: skip


def memory(count: int) -> dict:
    """MiB of Python's objects after a tenth of the requests and after all, and the process's peak."""
    with serving(0.0) as url, tempfile.TemporaryDirectory() as folder:
        with Client(ServerConfig(url=url, threads=32), Path(folder) / "kept.jsonl") as client:

            def ask(i: int) -> str:
                body = {"model": "m", "messages": [{"role": "user", "content": f"{i} " + "x" * 2000}], "max_tokens": 9}
                return client.ask("chat/completions", body, said)

            tracemalloc.start()
            found, peaks = [], []
            for number, _ in enumerate(client.map(ask, range(count)), 1):
                if number in (count // 10, count):
                    found.append(round(tracemalloc.get_traced_memory()[0] / 2**20, 2))
                    peaks.append(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            tracemalloc.stop()
    return {"requests": count, "python_mib": found, "resident_peak_mib": peaks}


def main() -> None:
    """Prints a line of JSON for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each case")
    parser.add_argument("--requests", type=int, default=10_000, help="of the case of memory")
    given = parser.parse_args()
    for (threads, latency), bar in CASES.items():
        found = speed(threads, latency, max(threads, int(given.seconds * threads / latency)))
        print(json.dumps({**found, "bar": bar, "holds": found["share"] >= bar}), flush=True)
    print(json.dumps(memory(given.requests)), flush=True)


if __name__ == "__main__":
    main()
