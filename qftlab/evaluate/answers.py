"""Numbers about answers: matches by script, pass@k, the interval of a rate, and a paired test."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from qftlab.rows.chat import THINKING

# Characters of Chinese, Japanese, Thai, Lao, Khmer and Burmese, which set no blanks between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORDS = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")  # a word; of these scripts, a character
BLANKS = re.compile(rf"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])")
SIGNS = str.maketrans("。、「」『』", '.,""""')  # what NFKC leaves as it is; it makes , of ， and 5 of ５
QUOTES = "\"'`“”‘’ "


def normalise(text: str) -> str:
    """Unicode NFKC, lower case, single blanks and none beside scripts that set none; no quotes around, no stop behind.

    Ideographic full stops, commas and quotes are what they are in Latin script.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).translate(SIGNS).casefold().split())
    return BLANKS.sub("", text).strip(QUOTES).rstrip(f".,;:!?{QUOTES}")


def normalised_match(prediction: str, answer: str) -> bool:
    """Whether the two strings agree after `normalise`; two empty ones do not."""
    return bool(normalise(answer)) and normalise(prediction) == normalise(answer)


def contained(answer: str, text: str) -> bool:
    """Whether an answer stands in a text, both after `normalise`; an empty one stands in none.

    It must be a run of whole words and numbers: "5" is not in "15", "5.2" or "-5", nor "cat" in "concatenate". Of a
    script that sets no blanks it is a run of characters.
    """
    wanted, text = normalise(answer), normalise(text)
    found = re.finditer(f"(?={re.escape(wanted)})", text) if wanted else ()
    return any(_is_whole(text[: at.start()], wanted, text[at.start() + len(wanted) :]) for at in found)


def _is_whole(before: str, wanted: str, after: str) -> bool:
    first, last = wanted.lstrip("-")[:1], wanted[-1]
    is_cut = first.isdigit() and re.search(r"\d[.,]$|(^|\W)-$", before)  # the end of a number, or its sign is missing
    is_cut = is_cut or last.isdigit() and re.match(r"[.,]\d", after)
    return not (is_cut or _joined(before[-1:], first) or _joined(last, after[:1]))


def _joined(a: str, b: str) -> bool:
    """Whether two neighbours belong to one word: letters, digits and marks, where blanks are set around words alone."""
    apart = f"[{UNSPACED}\uac00-\ud7a3]"  # Korean sets its particles right behind a word
    return all(c and (c == "_" or unicodedata.category(c)[0] in "LMN") and not re.match(apart, c) for c in (a, b))


def answer_of(said: str) -> str:
    """What an assistant says without its thinking; "" where the thinking was cut off before there was an answer."""
    found = THINKING.fullmatch(said)
    return found[3].strip() if found else "" if said.lstrip().startswith("<think>") else said.strip()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which c were: 1 − C(n−c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true rate in about 95 % of experiments (z = 1.96); (0, 1) where nothing was tried.

    The n tries must be independent; several answers to one prompt are not (`clustered_interval`).

    Source: Wilson 1927; Agresti and Coull 1998, eq. 2. Unlike p ± z·√(p(1−p)/n) it stays inside [0, 1] and has
    width at 0 and n.

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n an end is p itself; rounding may put it on the wrong side.
    return max(0.0, min(p, (centre - reach) / scale)), min(1.0, max(p, (centre + reach) / scale))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of "a and b are equally often right", asked on the same rows.

    Only rows where they disagree count; under the hypothesis each is a fair coin: p = 2·Σ_{i <= min} C(m, i) / 2^m, at
    most 1. Source: McNemar 1947, in its exact binomial form.

    Args:
        a: whether the first model was right on each row.
        b: the same for the second model, rows in the same order.

    Raises:
        ValueError: if they are not equally long.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same rows on both sides, got {len(a)} and {len(b)}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    m = only_a + only_b
    tail = sum(math.comb(m, i) for i in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**m))
