"""What may be sent: as many requests at a time as a server bears, within what the user wants to spend."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qftlab.settings import check_at_least


class ServerError(ConnectionError):
    """The server is down, or answers what cannot be used; the same command goes on once it is back."""


class BudgetError(OSError):
    """The next request could pass a cap of the budget; what was answered before is kept."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, by earlier runs with the same journal too; a request is sent only if it cannot pass a cap.

    Args:
        requests: the most that are sent, retries included; null is without a cap.
        tokens: the most that are read and written, together.
        money: the most that they cost, in the currency of the prices.
        price_in: of a million tokens that the server reads.
        price_out: of a million tokens that it writes.

    Raises:
        ValueError: for a value below 0, or a cap on money without prices.
    """

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, requests=self.requests, tokens=self.tokens, money=self.money)
        check_at_least(0, price_in=self.price_in, price_out=self.price_out)
        if self.money is not None and not self.price_in + self.price_out:
            raise ValueError(f"budget.money must come with budget.price_in and price_out, got {self.money:g} without")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def most(self, body: dict, size: int) -> tuple[int, int]:
        """The most tokens that a request may read and write: ids are counted, and text has at most a token a byte.

        Args:
            body: of the request.
            size: of that, in bytes.

        Raises:
            ValueError: if it has no max_tokens and there are caps on tokens or money.
        """
        prompt, longest = body.get("prompt"), body.get("max_completion_tokens") or body.get("max_tokens")
        if longest is None and (self.tokens is not None or self.money is not None):
            raise ValueError("max_tokens must be set where a budget caps tokens or money, got a request without")
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        return len(prompt) if is_ids else size, (longest or 0) * (body.get("n") or 1)

    def passed(self, requests: int, tokens_in: int, tokens_out: int) -> str:
        """The cap that these amounts pass, in words; empty if there is none."""
        found = {"requests": requests, "tokens": tokens_in + tokens_out, "money": self.cost(tokens_in, tokens_out)}
        for name, amount in found.items():
            if (cap := getattr(self, name)) is not None and amount > cap:
                return f"budget.{name} must cover the next request, got {cap:g}: {amount:.4g} may be reached with it"
        return ""


@dataclass
class Totals:
    """What a client has done: counts, tokens and money.

    `requests` were sent, `answers` could be used, `journaled` came from an earlier run; `retries` counts by kind. For a
    request that failed after it was sent, the most tokens that it can have cost are counted. The answers that a journal
    had at the start are among the requests, the tokens and the money.
    """

    requests: int = 0
    answers: int = 0
    journaled: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0
    retries: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        money = f", {self.money:.4f} spent" if self.money else ""
        return f"{self.tokens_in + self.tokens_out} tokens{money}, {sum(self.retries.values())} retries"


class Ticket:
    """One request under way: the most tokens it may cost (read, written), what it did cost, and how it went."""

    def __init__(self, most: tuple[int, int]) -> None:
        self.most, self.spent, self.start, self.future = most, (0, 0), time.monotonic(), None
        self.is_busy = self.is_good = False


class Gate:
    """Who may send: as many at a time as the server bears, within the budget, and nobody once it is shut."""

    def __init__(self, threads: int, budget: Budget) -> None:
        self.threads, self.budget, self.totals, self.changed = threads, budget, Totals(), threading.Condition()
        self.limit, self.cut, self.is_shut, self.flying = float(threads), 0.0, False, []

    def remember(self, requests: int, tokens_in: int, tokens_out: int) -> None:
        """Counts what earlier runs have spent."""
        totals = self.totals
        totals.requests, totals.tokens_in, totals.tokens_out = requests, tokens_in, tokens_out
        totals.money = self.budget.cost(tokens_in, tokens_out)

    @contextmanager
    def passing(self, most: tuple[int, int]) -> Iterator[Ticket]:
        """Waits for a place, and for the budget as long as others may give back what they have set aside."""
        ticket, totals = Ticket(most), self.totals
        with self.changed:
            while self.is_shut or len(self.flying) >= int(self.limit) or (cap := self._passed(most)):
                if self.is_shut:
                    raise ServerError("the client was stopped, or not opened by `with`: the request was not sent")
                if not self.flying:
                    raise BudgetError(
                        f"{cap} (a request counts at the most it can cost: a token a byte, and all of "
                        "max_tokens). With a larger one, or fewer max_tokens, the same command goes on"
                    )
                self.changed.wait()
            ticket.start = time.monotonic()
            self.flying.append(ticket)
            totals.requests += 1
        try:
            yield ticket
        finally:
            with self.changed:
                self.flying.remove(ticket)
                totals.tokens_in += ticket.spent[0]
                totals.tokens_out += ticket.spent[1]
                totals.money = self.budget.cost(totals.tokens_in, totals.tokens_out)
                totals.answers += ticket.is_good
                if ticket.is_busy and ticket.start > self.cut:  # once for a burst
                    self.limit, self.cut = max(1.0, self.limit / 2), time.monotonic()
                elif ticket.is_good:  # a round of them adds one
                    self.limit = min(float(self.threads), self.limit + 1 / self.limit)
                self.changed.notify_all()

    def _passed(self, most: tuple[int, int]) -> str:
        reserved = [sum(amounts) for amounts in zip(most, *(ticket.most for ticket in self.flying), strict=True)]
        totals = self.totals
        return self.budget.passed(totals.requests + 1, totals.tokens_in + reserved[0], totals.tokens_out + reserved[1])

    def shut(self) -> None:
        """Lets nobody pass any more, and ends all pauses."""
        with self.changed:
            self.is_shut = True
            self.changed.notify_all()

    def wait(self, seconds: float) -> None:
        """A pause that ends when the gate is shut."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_shut, seconds)
