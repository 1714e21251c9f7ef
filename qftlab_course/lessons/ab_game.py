"""Real or noise: twenty comparisons of two models whose truth is known, and a game that asks the reader for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from qftlab.evaluate.statistics import paired_test
from qftlab_course.decoding_lab import require_ipywidgets

WORDS = {"r": "real", "n": "noise"}
SIZES = (50, 100, 400, 2000)
GAINS = (0.03, 0.04, 0.05, 0.06, 0.1)  # what B is really better by, where it is
ALIKE = 0.5  # latent correlation of what the two models can do


@dataclass(frozen=True)
class ABResult:
    """What two models did on the same prompts: marks (0 or 1) of A and of B, and by how much B is better in truth."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    gain: float

    @property
    def truth(self) -> str:
        """ "real" or "noise"."""
        return "real" if self.gain else "noise"

    @property
    def gap(self) -> float:
        """The rate of B minus that of A, as measured."""
        return (sum(self.b) - sum(self.a)) / len(self.a)

    @property
    def p_value(self) -> float:
        """p of "no difference" by the exact paired test."""
        return paired_test(self.a, self.b, range(len(self.a))).p_value


def alike_marks(rng: np.random.Generator, n: int, p: float, q: float, correlation: float) -> tuple[np.ndarray, ...]:
    """Marks (2 times n) of two models with rates p and q, right where a normal variable is small.

    The two variables of a prompt correlate: what is hard for one model is mostly hard for the other.
    """
    from scipy.stats import norm

    shared, own = rng.standard_normal(n), rng.standard_normal((2, n))
    latent = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    return tuple((latent < norm.ppf([[p], [q]])).astype(int))


def planted_results(count: int = 20, seed: int = 0) -> list[ABResult]:
    """Comparisons in which B looks better; in half of them it is, and in the others the two models are equally good.

    Args:
        count: of the results, even.
        seed: another seed, another game.
    """
    rng = np.random.default_rng(seed)
    gains = [0.0] * (count // 2) + [GAINS[i % len(GAINS)] for i in range(count // 2)]
    results = []
    for gain in rng.permutation(gains):
        n, rate = int(rng.choice(SIZES)), float(rng.uniform(0.3, 0.75))
        while True:  # nobody reports a B that looks worse
            a, b = alike_marks(rng, n, rate, rate + gain, ALIKE)
            if b.sum() > a.sum():
                break
        results.append(ABResult(tuple(a.tolist()), tuple(b.tolist()), float(gain)))
    return results


def count_right(results: Sequence[ABResult], calls: Sequence[str]) -> int:
    """How many calls ("real" or "noise") are true.

    Raises:
        ValueError: for another word, or another number of calls than results.
    """
    if len(calls) != len(results) or set(calls) - {*WORDS.values()}:
        raise ValueError(f"calls must be {len(results)} times real or noise, got {len(calls)}: {list(calls)!r:.80}")
    return sum(call == result.truth for call, result in zip(calls, results, strict=True))


class ABGame:
    """The twenty results one by one, two buttons, and a score. Tab moves to a button, space presses it.

    Attributes:
        results: what is judged.
        calls: the words said so far, "real" or "noise".
        real, noise, back: the buttons; `back` takes the last call back.
        output: where the result is shown (an HTML widget).
        box: all of them.
    """

    def __init__(self, results: Sequence[ABResult], typed: str = ""):
        """Starts with no call, or with those that were typed.

        Args:
            results: what is judged.
            typed: calls as letters, r for real and n for noise, such as "rnnr"; blanks do not count.

        Raises:
            ImportError: if ipywidgets is missing.
            ValueError: for another letter, or more calls than results.
        """
        widgets = require_ipywidgets("ABGame", 'ABGame(results, typed="rn…")')
        letters = "".join(typed.split()).lower()
        if set(letters) - set(WORDS) or len(letters) > len(results):
            raise ValueError(f"typed must be at most {len(results)} letters r or n, got {typed!r}")
        self.results, self.calls = list(results), [WORDS[letter] for letter in letters]
        self.real, self.noise, self.back = (
            widgets.Button(description=word, layout={"width": "110px"}) for word in ("Real", "Noise", "Take back")
        )
        self.real.on_click(lambda _: self.call("real"))
        self.noise.on_click(lambda _: self.call("noise"))
        self.back.on_click(lambda _: self.call(""))
        self.output = widgets.HTML(value=self._html())
        self.box = widgets.VBox([self.output, widgets.HBox([self.real, self.noise, self.back])])

    def call(self, word: str) -> None:
        """Says "real" or "noise" of the result that is shown; an empty word takes the last call back."""
        if word and len(self.calls) < len(self.results):
            self.calls.append(word)
        elif not word and self.calls:
            self.calls.pop()
        self.output.value = self._html()

    @property
    def score(self) -> int | None:
        """How many calls are true; None until all are made."""
        return count_right(self.results, self.calls) if len(self.calls) == len(self.results) else None

    def table(self) -> pd.DataFrame:
        """Every result with the call, what the paired test says, and the truth."""
        calls = self.calls + ["–"] * (len(self.results) - len(self.calls))
        p_values = [f"{r.p_value:.3f}" if r.p_value >= 0.001 else "< 0.001" for r in self.results]
        rows = [
            {"prompts": len(r.a), "A": f"{np.mean(r.a):.1%}", "B": f"{np.mean(r.b):.1%}", "your call": call,
             "gained": sum(y > x for x, y in zip(r.a, r.b, strict=True)),
             "lost": sum(y < x for x, y in zip(r.a, r.b, strict=True)), "p": p, "truth": r.truth}
            for r, call, p in zip(self.results, calls, p_values, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows, index=range(1, len(rows) + 1))

    def _lines(self) -> list[str]:
        at, total = len(self.calls), len(self.results)
        if at == total:
            return [f"All {total} calls made: {self.score} are true. A coin gets {total // 2}."]
        shown = self.results[at]
        a, b = np.mean(shown.a), np.mean(shown.b)
        return [
            f"Result {at + 1} of {total}",
            f"{len(shown.a)} prompts, one answer each. Model A: {a:.1%} right. Model B: {b:.1%} right.",
            "B looks better. Is it real, or noise?",
        ]

    def _html(self) -> str:
        first, *others = (escape(line) for line in self._lines())
        return f"<p><b>{first}</b></p>" + "".join(f"<p>{line}</p>" for line in others)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        live = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        drawn = {"text/html": self._html(), "text/plain": str(self)}
        return {"application/vnd.jupyter.widget-view+json": live, **drawn}

    def __repr__(self) -> str:
        return "\n".join(self._lines())
