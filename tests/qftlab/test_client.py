"""The client against a server that really fails: what is asked, what is kept, what is paid, and that no key leaks."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from qftlab.cli import main
from qftlab.remote import client as module
from qftlab.remote import journal as journal_module
from qftlab.remote.budget import Gate
from qftlab.remote.client import Budget, BudgetError, Client, Refused, ServerError
from qftlab.remote.journal import Journal, fingerprint
from qftlab.settings import ServerConfig
from qftlab_course.flaky import FAULTS, Flaky, parrot

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "sk-Canary/0123456789+abcdef"
FINE = ("type", "echo")  # faults that a good client does not mind
ENDS = ("quota", "redirect")  # and those that no retry mends


class Once(Flaky):
    """Fails at the first attempt of each request."""

    def drawn(self, name: str, attempt: int) -> str:
        return super().drawn(name, attempt) if attempt == 0 else ""


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 5.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(number: object, **other) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": f"row {number}"}], "max_tokens": 20, **other}


def said(answer: dict) -> str:
    try:
        return answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError("must have a choice with a message") from None


def ask(client: Client, number: object = 1, **options) -> str:
    return client.ask("chat/completions", asked(number), said, **options)


def config(server: Flaky, **options) -> ServerConfig:
    return ServerConfig(**{"url": server.url, "retries": 2, "timeout": 5.0, "threads": 8, **options})


@pytest.mark.parametrize("fault", FAULTS)
def test_every_failure_is_mended_by_asking_again_or_said(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1 << 20)
    with Once(parrot, {fault: 1.0}, retry_after=0.01) as server, Client(config(server, timeout=0.5)) as client:
        if fault in ENDS:
            with pytest.raises(Refused):
                ask(client)
            assert client.totals.requests == 1 and not client.totals.retries
            return
        assert ask(client) == "row 1"
        totals, sent = client.totals, 1 if fault in FINE else 2
        kinds = {"429": "429", "429-bare": "429", "503": "503", "500": "500", "echo-error": "500", "hang": "timeout",
                 "slow": "timeout", "reset": "connection", "cut": "connection", "huge": "connection"}  # fmt: skip
        assert (totals.requests, totals.answers, sum(server.requests.values())) == (sent, 1, sent)
        assert totals.retries == ({} if fault in FINE else {kinds.get(fault, "answer"): 1})


@pytest.mark.parametrize("fault", ["500", "reset", "cut", "deep", "html"])
def test_a_server_that_keeps_failing_ends_with_what_is_kept_and_what_to_do(fault: str, tmp_path) -> None:
    path = tmp_path / "kept.jsonl"
    with Flaky(parrot) as server, Client(config(server), path) as client:
        ask(client, 0)
    with Flaky(parrot, {fault: 1.0}) as server, Client(config(server), path) as client:
        with pytest.raises(ServerError, match=r"after 3 requests \(1 answers are kept in .*the same command") as caught:
            ask(client)
        assert not isinstance(caught.value, Refused) and sum(server.requests.values()) == 3
        assert caught.value.__cause__ is None and caught.value.__context__ is None, "it would hold request and key"


def test_nobody_listening_is_said_and_costs_nothing() -> None:
    with Flaky(parrot) as server:
        pass
    with Client(config(server, retries=1), budget=Budget(tokens=10_000)) as client:
        with pytest.raises(ServerError, match="ConnectionRefusedError"):
            ask(client)
        assert client.totals.requests == 2 and client.totals.tokens_in == 0


@pytest.mark.parametrize("fault", ["slow", "hang"])
def test_the_deadline_is_by_the_clock(fault: str) -> None:
    """The slow one sends a byte every 0.05 s: no time-out of a socket would ever come."""
    with Flaky(parrot, {fault: 1.0}) as server, Client(config(server, timeout=0.4, retries=0)) as client:
        start = time.monotonic()
        with pytest.raises(ServerError, match=r"no whole answer in 0.4 s after 1 requests"):
            ask(client)
        assert 0.4 <= time.monotonic() - start < 1.2


@pytest.mark.parametrize(("text", "seconds"), [("3", 3), ("0.25", 0.25), ("-5", 0), ("soon", None), ("", None),
                                               ("inf", float("inf")), ("Thu, 99 Jan", None)])  # fmt: skip
def test_retry_after_is_read(text: str, seconds: float | None) -> None:
    assert module._retry_after({"retry-after": text}) == seconds


def test_retry_after_may_be_a_date() -> None:
    found = module._retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)})
    assert 8.5 < found <= 10
    assert module._retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0


def test_a_busy_server_is_waited_for_and_that_is_no_failure() -> None:
    with Once(parrot, {"429": 1.0}, retry_after=0.4) as server, Client(config(server, retries=0)) as client:
        start = time.monotonic()
        assert ask(client) == "row 1" and time.monotonic() - start >= 0.4


def test_a_server_that_asks_for_too_long_a_pause_ends_the_run_at_once() -> None:
    with Flaky(parrot, {"429": 1.0}, retry_after=3600) as server, Client(config(server)) as client:
        with pytest.raises(ServerError, match=r"asks for a pause of 3600 s\) after 1 requests"):
            ask(client)


def test_requests_at_a_time_are_halved_once_a_burst_and_grow_by_one_a_round() -> None:
    """By hand: 8 → 4, for a refusal of the same burst 4, then 2; then 2 + 1/2 = 2.5, and 2.5 + 1/2.5 = 2.9."""
    gate = Gate(8, Budget())

    def go(early=None, **how) -> None:
        with gate.passing((0, 0)) as ticket:
            ticket.start = early or ticket.start
            for name, value in how.items():
                setattr(ticket, name, value)

    before = time.monotonic()
    limits = []
    for how in ({"is_busy": True}, {"is_busy": True, "early": before}, {"is_busy": True}, {"is_good": True},
                {"is_good": True}, {}):  # fmt: skip
        go(**how)
        limits.append(round(gate.limit, 3))
    assert limits == [4, 4, 2, 2.5, 2.9, 2.9]
    for _ in range(100):
        go(is_good=True)
    assert gate.limit == 8, "never more than there are threads"


def test_bursts_of_refusals_bring_down_what_is_sent_at_once() -> None:
    """The server bears 4 at a time and says 429 to the others; without adapting 7 of 8 would be refused."""

    class Narrow(Flaky):
        def drawn(self, name: str, attempt: int) -> str:
            return "429-bare" if self._now > 4 else ""

    with Narrow(parrot, latency=0.02) as server, Client(config(server, threads=32), budget=None) as client:
        found = dict(client.map(lambda i: ask(client, i), range(200)))
        assert len(found) == 200 and client.totals.retries["429"] < 200
        assert client.gate.limit < 16


def test_all_of_it_at_once_and_nothing_is_lost(tmp_path) -> None:
    """30 % of requests fail, in all ways; each row has its own answer, once."""
    kinds = [name for name in FAULTS if name not in (*ENDS, "huge")]
    path = tmp_path / "kept.jsonl"
    with (
        Flaky(parrot, dict.fromkeys(kinds, 0.3 / len(kinds)), retry_after=0.05, burst=0.05, seed=1) as server,
        Client(config(server, threads=32, retries=8, timeout=0.5), path) as client,
    ):
        found = list(client.map(lambda i: ask(client, i), range(150)))
        assert dict(found) == {i: f"row {i}" for i in range(150)} and len(found) == 150
        assert len(client.journal.places) == 150 and client.totals.answers == 150
        assert sum(server.faults_made.values()) > 30 and server.at_once <= 32


# Journal


def test_what_is_in_the_journal_is_not_asked_again(tmp_path) -> None:
    path = tmp_path / "kept.jsonl"
    with Flaky(parrot) as server, Client(config(server), path) as client:
        first = [ask(client, i, sample=s) for i in range(3) for s in (0, 1)]
        assert client.totals.requests == 6, "another sample is another request"
    with Client(config(server), path) as client:  # nobody listens any more
        assert [ask(client, i, sample=s) for i in range(3) for s in (0, 1)] == first
        assert (client.totals.requests, client.totals.journaled) == (6, 6), "those of the earlier run"
        with pytest.raises(ServerError):
            client.ask("chat/completions", asked(0, temperature=0.5), said)


def test_the_fingerprint_is_of_path_body_and_sample_whatever_the_order_of_keys() -> None:
    body = {"model": "m", "n": 1, "messages": []}
    same = fingerprint("a", dict(reversed(body.items())), 0)
    others = [fingerprint("b", body), fingerprint("a", {**body, "n": 2}), fingerprint("a", body, 1)]
    assert fingerprint("a", body) == same and len({same, *others}) == 4
    with pytest.raises(ValueError, match="JSON"):
        fingerprint("a", {"temperature": float("nan")})


def test_an_answer_that_is_not_wanted_any_more_is_asked_for_again(tmp_path, caplog) -> None:
    path = tmp_path / "kept.jsonl"

    def stricter(answer: dict) -> str:
        if "model" in answer and answer["model"] == "m":
            raise ValueError("must be of another model")
        return said(answer)

    with Flaky(parrot) as server, Client(config(server), path) as client:
        ask(client)
        server.answer = lambda path, body: {**parrot(path, body), "model": "better"}
        assert client.ask("chat/completions", asked(1), stricter) == "row 1"
        assert client.totals.requests == 2 and "cannot be used any more" in caplog.text
    with closing(Journal(path)) as journal:
        assert journal.get(fingerprint("chat/completions", asked(1)))["model"] == "better", "the last one counts"


def written(path: Path, count: int = 3) -> list[str]:
    journal, keys = Journal(path), [fingerprint("p", {}, i) for i in range(count)]
    for i, key in enumerate(keys):
        journal.add(key, {"number": i, "text": "ä\ud800\n"})
    journal.close()
    return keys


def test_a_torn_last_line_is_cut_off_and_said(tmp_path, caplog) -> None:
    path = tmp_path / "kept.jsonl"
    keys = written(path)
    whole = path.read_bytes()
    for size in range(whole.rindex(b"\n", 0, -1) + 2, len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        with closing(Journal(path)) as journal:
            assert journal.get(keys[1]) == {"number": 1, "text": "ä\ud800\n"} and journal.get(keys[2]) is None
            journal.add(keys[2], {"number": 2, "text": "ä\ud800\n"})
        assert "last line was cut off" in caplog.text and path.read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"key": "a"}', '{"key": "a", "answer": 3}', "[" * 100_000])
def test_a_line_that_is_no_answer_is_named(line: str, tmp_path) -> None:
    path = tmp_path / "kept.jsonl"
    written(path)
    lines = path.read_text().splitlines(keepends=True)
    before = "".join([lines[0], line + "\n", *lines[1:]])
    path.write_text(before)
    with pytest.raises(ValueError, match=r"kept.jsonl, line 2, must be an answer"):
        Journal(path)
    assert path.read_text() == before


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"Query": "somebody\'s work, without a line end"}]')
    with pytest.raises(ValueError, match="line 1, must be an answer of a journal"):
        Journal(path)
    assert "somebody" in path.read_text()


def test_two_do_not_write_one_journal(tmp_path) -> None:
    with closing(Journal(tmp_path / "kept.jsonl")), pytest.raises(OSError, match="must have one writer, got two"):
        Journal(tmp_path / "kept.jsonl")
    written(tmp_path / "kept.jsonl")


def test_a_full_disk_ends_the_run_and_leaves_the_journal_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "kept.jsonl"
    keys = written(path)
    with closing(Journal(path)) as journal:

        class Full:
            def __init__(self, file) -> None:
                self.file = file

            def write(self, line: bytes) -> int:
                return self.file.write(line[:7])

            def __getattr__(self, name: str):
                return getattr(self.file, name)

        size = path.stat().st_size
        journal._file = Full(journal._file)
        with pytest.raises(OSError, match="must be written, got"):
            journal.add("x", {})
        assert path.stat().st_size == size and journal.get("x") is None and journal.get(keys[0])["number"] == 0


def test_the_disk_is_forced_in_groups_and_never_by_the_event_loop(tmp_path, monkeypatch) -> None:
    """130 answers at once: after 64, after 128, and at the end; and with no time between two, after each."""
    forced = []

    def fsync(number: int) -> None:
        forced.append(threading.current_thread())

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(journal_module, "SECONDS", 1000.0)
    written(tmp_path / "many.jsonl", 130)
    assert len(forced) == 3
    monkeypatch.setattr(journal_module, "SECONDS", 0.0)
    forced.clear()
    written(tmp_path / "few.jsonl", 5)
    assert len(forced) == 6
    forced.clear()
    with Flaky(parrot) as server, Client(config(server), tmp_path / "loop.jsonl") as client:
        loop = client._loop
        for index, _ in client.map(lambda i: ask(client, i), range(20)):
            assert f"row {index}" in rows_in(tmp_path / "loop.jsonl"), "written before the caller has it"
        assert len(forced) == 20 and loop._thread_id not in {thread.ident for thread in forced}


RUN = """
import sys, time
from qftlab.remote.client import Client
from qftlab.remote import client as module
from qftlab.remote import journal as journal_module
from qftlab.settings import ServerConfig
sys.path.insert(0, "tests/qftlab")
from test_client import asked, said
module.PAUSE = 0.01
url, path, count, progress = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
try:
    with Client(ServerConfig(url=url, threads=8, retries=9, timeout=30), path) as client:
        ask = lambda i: client.ask("chat/completions", asked(i), said)
        for index, text in client.map(ask, range(count), bool(progress)):
            assert text == f"row {index}"
finally:
    print("left at", time.monotonic(), file=sys.stderr)
"""


def started(server: Flaky, path: Path, count: int, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([sys.executable, "-c", RUN, server.url, str(path), str(count), *more], cwd=ROOT,
                            env=environment, stderr=subprocess.PIPE, text=True)  # fmt: skip


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def rows_in(path: Path) -> set[str]:
    """What the whole lines of a journal are answers to."""
    text = path.read_text() if path.exists() else ""
    return {said(json.loads(line)["answer"]) for line in text.splitlines(keepends=True) if line.endswith("\n")}


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_ends_within_two_seconds_though_the_server_hangs(number: int, code: int, tmp_path) -> None:
    """Half of the requests are never answered; what was answered is kept."""
    path = tmp_path / "kept.jsonl"
    with Flaky(parrot, {"hang": 0.3}) as server:
        process = started(server, path, 1000)
        until(lambda: server.faults_made["hang"] >= 8)
        time.sleep(0.1)
        start = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        seconds, count = time.monotonic() - start, sum(server.answered.values())
    left = float(re.search(r"left at (\S+)", errors)[1]) - start
    assert 1.4 < left < 2 and seconds < 10, "10: Python's own end on a busy machine"
    assert "8 requests are under way" in errors
    assert process.returncode == code and len(rows_in(path)) == count > 0


@pytest.mark.long
def test_a_signal_lets_what_is_under_way_be_answered_and_a_second_does_not(tmp_path) -> None:
    for signals in (1, 2):
        path = tmp_path / f"{signals}.jsonl"
        with Flaky(parrot, latency=1.0) as server:
            process = started(server, path, 1000, "bar")
            until(lambda: server._now >= 8)  # noqa: B023
            start = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            process.communicate(timeout=20)
            seconds, count = time.monotonic() - start, sum(server.requests.values())
        assert count == 8, "nothing was sent any more"
        assert (len(rows_in(path)) == 8) if signals == 1 else (seconds < 1.2 and not rows_in(path))


@pytest.mark.long
def test_killed_three_times_it_asks_for_nothing_that_it_has(tmp_path) -> None:
    path, chance, asks = tmp_path / "kept.jsonl", random.Random(3), []

    def answer(where: str, body: dict) -> dict:
        asks.append(body["messages"][0]["content"])
        return parrot(where, body)

    faults = {"429": 0.05, "500": 0.05, "reset": 0.05, "cut": 0.05, "truncated": 0.05, "empty": 0.05}
    with Flaky(answer, faults, latency=0.05, retry_after=0.05) as server:
        for _ in range(3):
            kept, before = rows_in(path), len(asks)
            process, goal = started(server, path, 300), before + chance.randint(30, 70)
            until(lambda: len(asks) > goal)  # noqa: B023
            process.kill()
            process.wait()
            assert not kept & set(asks[before:]) and kept < rows_in(path)
        kept, before = rows_in(path), len(asks)
        with Client(config(server, retries=9), path) as client:
            found = list(client.map(lambda i: ask(client, i), range(300)))
        assert dict(found) == {i: f"row {i}" for i in range(300)} and len(found) == 300
        assert not kept & set(asks[before:]) and client.totals.journaled == len(kept) > 40


# Budget


@pytest.mark.parametrize("cap", [{"requests": 50}, {"tokens": 9000}, {"money": 0.04}])
@pytest.mark.parametrize("faults", [{}, {"truncated": 0.1, "cut": 0.1, "empty": 0.1, "500": 0.1}])
def test_no_cap_is_passed_by_32_threads(cap: dict, faults: dict) -> None:
    """The server's own meter is the judge; it charges for answers that were lost on the way as well."""
    budget = Budget(**cap, price_in=2.0, price_out=8.0)
    with (
        Flaky(parrot, faults, latency=0.005, prices=(2.0, 8.0)) as server,
        Client(config(server, threads=32, retries=20), budget=budget) as client,
    ):
        with pytest.raises(BudgetError, match=rf"budget.{next(iter(cap))} must cover the next request, got"):
            for _ in client.map(lambda i: ask(client, i), range(10_000)):
                pass
        totals, served = client.totals, sum(server.requests.values())
        assert totals.requests == served > 20 and server.money <= totals.money + 1e-12
        most = budget.most(asked(9999), len(json.dumps(asked(9999))))
        amounts = {"requests": (served, 1), "tokens": (totals.tokens_in + totals.tokens_out, sum(most)),
                   "money": (totals.money, budget.cost(*most))}  # fmt: skip
        spent, one = amounts[next(iter(cap))]
        assert next(iter(cap.values())) - one <= spent <= next(iter(cap.values())), "all of it, and no more"
        if not faults:
            assert totals.money == pytest.approx(server.money, rel=1e-9)


def test_a_cap_holds_for_all_runs_with_a_journal(tmp_path) -> None:
    """The same command, given three times, spends no more than given once; a larger budget goes on."""
    spent, budget = [], Budget(money=0.02, price_in=2.0, price_out=8.0)
    with Flaky(parrot, prices=(2.0, 8.0)) as server:
        for cap in (budget, budget, budget, replace(budget, money=0.04)):
            with Client(config(server), tmp_path / "kept.jsonl", cap) as client, pytest.raises(BudgetError):
                for i in range(10_000):
                    ask(client, i)
            assert client.totals.money == pytest.approx(server.money, rel=1e-9)
            spent.append(server.money)
    assert 0.01 < spent[0] == spent[1] == spent[2] <= 0.02 < spent[3] <= 0.04


def test_a_budget_wants_limits_to_what_it_cannot_know() -> None:
    with Flaky(parrot) as server, Client(config(server), budget=Budget(tokens=100)) as client:
        with pytest.raises(ValueError, match="max_tokens must be set where a budget caps"):
            client.ask("chat/completions", {"messages": []}, said)
        assert client.totals.requests == 0
    with pytest.raises(ValueError, match="budget.money must come with budget.price_in and price_out"):
        Budget(money=1.0)
    with pytest.raises(ValueError, match="tokens must be at least 0, got -1"):
        Budget(tokens=-1)


def test_the_most_a_request_costs_by_hand() -> None:
    budget = Budget(money=1.0, price_in=2.0, price_out=8.0)
    assert budget.most({"prompt": [5, 6, 7], "max_tokens": 10, "n": 4}, 90) == (3, 40)
    assert budget.most({"prompt": "abc", "max_completion_tokens": 7}, 90) == (90, 7)
    assert budget.cost(500_000, 250_000) == 3.0


def test_usage_that_is_missing_is_estimated_and_said_once(caplog) -> None:
    def without(path: str, body: dict) -> dict:
        return {**parrot(path, body), "usage": {"prompt_tokens": 0, "completion_tokens": -1}}

    with Flaky(without) as server, Client(config(server), budget=Budget(price_in=1.0)) as client:
        ask(client, 1)
        ask(client, 2)
        size = len(json.dumps(asked(1)))
        assert (client.totals.tokens_in, client.totals.tokens_out) == (2 * size, 2 * 20)
    assert caplog.text.count("gives no usage") == 1


# Map


def test_results_come_as_they_are_done_and_items_are_taken_as_needed() -> None:
    """10,000 items: never more than two a thread are taken from the iterator ahead of what was given back."""
    taken, ahead = [0], 0

    def items():
        for i in range(10_000):
            taken[0] += 1
            yield i

    with Flaky(parrot) as server, Client(config(server, threads=4)) as client:
        found = Counter()
        for given, (index, result) in enumerate(client.map(lambda i: i * i, items())):
            ahead = max(ahead, taken[0] - given)
            found[index, result] += 1
        assert found == Counter((i, i * i) for i in range(10_000)) and ahead <= 8
        order = [i for i, _ in client.map(lambda s: time.sleep(s), [0.3, 0.0, 0.1])]
    assert order == [1, 2, 0]


def test_what_a_call_raises_is_what_the_caller_gets_and_stops_the_rest(monkeypatch) -> None:
    def call(i: int) -> str:
        if i == 20:
            raise ZeroDivisionError("mine")
        return ask(client, i)

    with Flaky(parrot, latency=0.02) as server, Client(config(server)) as client:
        shut = client.gate.shut
        monkeypatch.setattr(client.gate, "shut", lambda: (shut(), time.sleep(0.2)))  # the others say they were stopped
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(client.map(call, range(1000)))
        sent = sum(server.requests.values())
        assert sent < 60
        time.sleep(0.1)
        assert sum(server.requests.values()) == sent
        assert len(list(client.map(lambda i: ask(client, i), range(5)))) == 5, "the client can be used again"


def test_a_failure_stops_the_others_though_the_caller_is_busy() -> None:
    def call(i: int) -> None:
        if i == 1:
            time.sleep(0.1)
            raise ZeroDivisionError
        for j in range(100 if i > 1 else 0):
            ask(client, (i, j))

    with Flaky(parrot, latency=0.02) as server, Client(config(server)) as client:
        with pytest.raises(ZeroDivisionError):
            for _ in client.map(call, range(8)):
                time.sleep(0.2)
                sent = sum(server.requests.values())
                time.sleep(0.2)
                assert sum(server.requests.values()) == sent > 0


def test_a_caller_that_has_enough_stops_the_rest(tmp_path) -> None:
    with Flaky(parrot, latency=0.02) as server, Client(config(server), tmp_path / "kept.jsonl") as client:
        for index, _ in client.map(lambda i: ask(client, i), range(1000)):
            if index >= 20:
                break
        sent = sum(server.requests.values())
        assert sent < 60 and len(client.journal.places) == sent, "what was under way is kept"
        assert ask(client, 2000) == "row 2000"


def test_the_bar_shows_what_was_spent(capfd) -> None:
    """parrot counts letters: ten rows of 5 read and 5 written, at 1,000 and 3,000 a million: 0.05 and 0.15."""
    prices = Budget(price_in=1000.0, price_out=3000.0)
    with Flaky(parrot) as server, Client(config(server), budget=prices) as client:
        assert len(list(client.map(lambda i: ask(client, i), range(10), progress=True))) == 10
        assert str(client.totals) == "100 tokens, 0.2000 spent, 0 retries" and client.totals.money == 0.2
        list(client.map(lambda i: ask(client, i), iter(range(3)), progress=True))
    errors = capfd.readouterr().err
    assert "10/10" in errors and "it/s" in errors and "spent" in errors and "3it" in errors


def test_an_empty_map_and_a_client_that_was_left() -> None:
    with Flaky(parrot) as server, Client(config(server)) as client:
        assert list(client.map(ask, [])) == []
    for closed in (client, Client(config(server))):
        with pytest.raises(ServerError, match="was stopped, or not opened by `with`"):
            ask(closed)


def test_clients_leave_no_files_open_and_no_threads() -> None:
    """Each rollout opens one."""

    def count() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0, threading.active_count()

    with Flaky(parrot) as server:
        before = None
        for _ in range(5):
            with Client(config(server)) as client:
                assert len(list(client.map(lambda i: ask(client, i), range(20)))) == 20  # noqa: B023
            time.sleep(0.1)
            before = before or count()
        assert count() <= before


# Keys and addresses


def loud(caplog) -> None:
    """Everything that any library says, down to the last byte."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "asyncio"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize("fault", ["", *FAULTS, "401"])
def test_the_key_is_nowhere(fault: str, caplog, capfd, tmp_path, monkeypatch) -> None:
    """A canary, echoed by the server in bodies, in headers and in addresses, and shown to no one."""
    monkeypatch.setenv("MY_KEY", f"  {KEY}\n")
    monkeypatch.setattr(module, "LARGEST", 1 << 20)
    loud(caplog)
    made = {fault: 1.0} if fault in FAULTS else {}
    wanted, texts, answers = "another" if fault == "401" else KEY, [], []

    def read(answer: dict) -> str:
        answers.append(answer)
        return said(answer)

    with (
        Flaky(parrot, made, retry_after=0.01, key=wanted) as server,
        Client(config(server, key="MY_KEY", timeout=0.3, retries=1), tmp_path / "kept.jsonl") as client,
    ):
        monkeypatch.setattr(module, "PATIENCE", 0.1)
        try:
            for _ in client.map(lambda i: client.ask("chat/completions", asked(KEY), read), [1], progress=True):
                pass
        except ServerError as error:
            texts += [repr(error), str(error), "".join(traceback.format_exception(error))]
            assert error.__cause__ is None and error.__context__ is None
        texts += [repr(client), str(client.totals), repr(client.totals)]
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
    texts += [caplog.text, *capfd.readouterr(), (tmp_path / "kept.jsonl").read_text(), json.dumps(answers)]
    texts += [repr(record.__dict__) for record in caplog.records]
    assert len(texts) > 6 and not [text for text in texts if KEY.lower() in text.lower()]
    if fault == "echo":
        assert (answers[0]["you_said"], answers[0]["or"]) == ("Bearer [key]", "Bearer [key]")


@pytest.mark.parametrize("host", ["", "sk-Canary-0123456789.example:1"])
def test_a_redirect_is_not_followed_and_only_its_host_is_named(host: str, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Canary-0123456789")
    with Flaky(parrot) as other, Flaky(parrot, {"redirect": 1.0}) as server, Client(config(server)) as client:
        server.elsewhere = f"http://user:hunter2@{host or other.url.removeprefix('http://')}"
        with pytest.raises(Refused, match=r"a redirect to (127.0.0.1|\[key\].example), which is not") as caught:
            ask(client)
        assert caught.value.status == 307 and not other.headers
        assert "hunter2" not in str(caught.value) and "sk-" not in str(caught.value)


def test_without_a_key_there_is_no_authorization_whatever_else_is_set(monkeypatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, KEY)
    with Flaky(parrot) as server:
        with Client(config(server, key="UNSET_KEY")) as client:
            ask(client)
            assert "authorization" not in server.headers[-1] and KEY not in str(server.headers)
        monkeypatch.setenv("UNSET_KEY", "EMPTY")
        with Client(config(server, key="UNSET_KEY")) as client:
            assert ask(client, "EMPTY") == "row EMPTY", "a placeholder is no secret"
            assert server.headers[-1]["authorization"] == "Bearer EMPTY"


@pytest.mark.parametrize("key", ["sk-one two", 'sk-"quoted"', "sk-'quoted'", "sk-back\\slash", "sk-ümlaut", "sk-\x7f",
                                 "sk-a\nX-Other: b"])  # fmt: skip
def test_a_bad_key_is_refused_and_not_quoted(key: str, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="the key in the environment variable OPENAI_API_KEY must be") as caught:
        Client(ServerConfig(url="http://localhost:1"))
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack[1:]
    assert frames and "sk-" not in str(caught.value) and not [f for f in frames if "sk-" in str(f.locals)]


@pytest.mark.parametrize("url", ["http://user:hunter2@host/v1", "http://host/v1?key=hunter2",
                                 "http://host/v1#hunter2", "user:hunter2@host"])  # fmt: skip
def test_an_address_with_a_secret_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="server.url must be without") as caught:
        ServerConfig(url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://host:port/v1", "http://[::1/v1", ""])
def test_a_bad_address_is_said_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ValueError, match="server.url must"):
        Client(ServerConfig(url=url))


@pytest.mark.long
def test_no_command_leaks_the_key(tmp_path, monkeypatch, capfd, caplog) -> None:
    """A run of RLOO against a server that echoes: exit code 2, and no key in its folder or in what --verbose says."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    loud(caplog)
    with Flaky(parrot, {"echo-error": 1.0}) as server:
        options = {"server.url": server.url, "server.retries": 1, "output": tmp_path, "problems": 4,
                   "train.max_steps": 1, "policy.max_new_tokens": 4}  # fmt: skip
        code = main(["rloo", "--verbose", *(f"--{name}={value}" for name, value in options.items())])
        assert code == 2 and server.headers[-1]["authorization"] == f"Bearer {KEY}"
    out, errors = capfd.readouterr()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert "HTTP 500" in errors and files
    assert not [text for text in (out, errors, caplog.text) if KEY in text]
    assert not [content for content in files if KEY.encode() in content]
