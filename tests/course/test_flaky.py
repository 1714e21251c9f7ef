"""The server that fails: its faults are drawn by chance that can be told again, and its meter can be trusted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qftlab_course.flaky import FAULTS, Flaky, parrot

ROOT = Path(__file__).resolve().parent.parent.parent


def post(url: str, body: dict) -> tuple[int, dict]:
    """By another client than ours."""
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def asked(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def test_the_same_seed_draws_the_same_faults_in_their_shares() -> None:
    shares = {"429": 0.1, "500": 0.2}
    ours, again, other = (Flaky(parrot, shares, seed=seed) for seed in (1, 1, 2))
    draws = [
        [server.drawn(str(i), attempt) for i in range(1000) for attempt in (0, 1)] for server in (ours, again, other)
    ]
    assert draws[0] == draws[1] != draws[2]
    for fault, share in shares.items():  # within four deviations of a binomial of 2,000
        assert abs(draws[0].count(fault) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert draws[0][::2] != draws[0][1::2], "another attempt is another draw"


def test_the_meter_by_hand() -> None:
    """parrot counts letters: 4 read and 4 written at 1,000 and 2,000 a million are 0.012, also if lost on the way."""
    with Flaky(parrot, prices=(1000.0, 2000.0)) as server:
        assert post(server.url, asked("four"))[1]["choices"][0]["message"]["content"] == "four"
        server.faults = {"truncated": 1.0}
        with pytest.raises(json.JSONDecodeError):
            post(server.url, asked("four"))
        server.faults = {"500": 1.0}
        assert post(server.url, asked("five"))[0] == 500
        meter = server.meter()
        assert meter["money"] == pytest.approx(0.024) and server.money == meter["money"]
        assert (meter["requests"], meter["answered"], meter["different"]) == (3, 1, 2)
        assert meter["faults"] == {"truncated": 1, "500": 1}


def test_a_burst_refuses_everybody_and_does_not_move_the_draws() -> None:
    with Flaky(parrot, {"429": 1.0}, burst=30.0) as server:
        assert [post(server.url, asked(text))[0] for text in "abc"] == [429, 429, 429]
        assert server.faults_made == {"429": 1, "burst": 2} and sum(server.draws.values()) == 1


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="faults must be among .*429.*, got thunder"):
        Flaky(parrot, {"thunder": 0.1})
    with pytest.raises(ValueError, match="must add up to at most 1, got 1.2"):
        Flaky(parrot, {"500": 0.6, "429": 0.6})
    with Flaky(parrot) as server, pytest.raises(OSError):
        Flaky(parrot, port=server.port).__enter__()


def test_as_a_program_it_takes_any_function() -> None:
    command = [sys.executable, "-m", "qftlab_course.flaky", "--answer", "qftlab_course.flaky:parrot",
               "--faults", json.dumps({name: 0.0 for name in FAULTS})]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http\S+", process.stderr.readline())[0]
        assert post(url, asked("hello"))[1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 5}
        with urllib.request.urlopen(f"{url}/meter", timeout=10) as response:
            assert json.loads(response.read())["answered"] == 1
        process.kill()
