"""Texts that are nearly an earlier one, found in time linear in their number."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from zlib import crc32

import numpy as np

from qftlab.evaluate.answers import UNSPACED

PARTS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")  # a word, a sign; of scripts without blanks, a character
SHINGLE = 5  # parts in a row
MOST = 64  # earlier texts that one text is compared with
BUCKETS = 1 << 20


def shingles(text: str) -> np.ndarray:
    """The hashes of a text's runs of five parts (of all its parts where it has fewer): sorted, each once."""
    parts = np.array([crc32(part.encode("utf-8", "surrogatepass")) for part in PARTS.findall(text)], dtype=np.uint64)
    width = min(SHINGLE, max(1, len(parts)))
    runs = np.zeros(max(0, len(parts) - width + 1), dtype=np.uint64)
    for shift in range(width):
        runs = (runs + parts[shift : shift + len(runs)]) * np.uint64(0x9E3779B97F4A7C15)  # odd; the upper half is mixed
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def near_duplicates(texts: Mapping[int, str], similarity: float = 0.95) -> dict[int, tuple[int, float]]:
    """Which texts are nearly an earlier one that is none itself.

    Compared are the sets of their runs of five words or signs, by the Jaccard similarity: common ÷ all. No pair is
    missed, but where a text has more than `MOST` candidates: the first of them are taken, so that the time stays
    linear. The result is a pure function of the texts.

    Args:
        texts: number → text; compared in this order.
        similarity: in (0, 1]; from it on two texts are near-duplicates.

    Returns:
        Number of a text → (number of the earlier one, their similarity).

    Raises:
        ValueError: for a similarity out of range.

    Source: prefix filtering with sizes and positions, Xiao et al. 2008, "Efficient Similarity Joins for Near Duplicate
    Detection" (PPJoin), sections 3 and 4.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be in (0, 1], got {similarity}")
    sets = {number: shingles(text) for number, text in texts.items()}
    counts = np.zeros(BUCKETS, dtype=np.uint64)
    for members in sets.values():
        np.add.at(counts, members % BUCKETS, np.uint64(1))
    places: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    found = {}
    for number, members in sets.items():
        size = len(members)
        # The rarest members come first; two similar sets share one of the first few.
        rarest = np.sort((counts[members % BUCKETS] << np.uint64(32)) | members)
        prefix = rarest[: size - math.ceil(similarity * size - 1e-9) + 1].tolist()
        shared = [(at, member) for at, member in enumerate(prefix) if member >> 32 > 1]  # the others are in one text
        candidates = _candidates(shared, size, places, similarity)
        for earlier, share in zip(candidates, _similarities(members, [sets[c] for c in candidates]), strict=True):
            if share >= similarity:
                found[number] = earlier, share
                break
        else:
            for at, member in shared:
                places[member][at, size].append(number)
    return found


def _candidates(shared: list[tuple[int, int]], size: int, places: Mapping, similarity: float) -> list[int]:
    """Earlier texts that may be similar enough, by their sizes and by where the first common member stands in both."""
    taken: dict[int, None] = {}
    for at, member in shared:
        for (place, other), numbers in places.get(member, {}).items():
            common = min(size - at, other - place)
            if common >= similarity * (size + other - common) - 1e-9:
                taken |= dict.fromkeys(numbers[: MOST - len(taken)])
        if len(taken) >= MOST:
            break
    return sorted(taken)[:MOST]


def _similarities(members: np.ndarray, others: list[np.ndarray]) -> list[float]:
    if not others:
        return []
    ends = np.cumsum([len(other) for other in others])
    everything = np.concatenate(others)
    at = np.minimum(np.searchsorted(members, everything), len(members) - 1)
    common = np.add.reduceat(members[at] == everything, ends - [len(other) for other in others], dtype=np.int64)
    return [n / (len(members) + len(other) - n) for n, other in zip(common.tolist(), others, strict=True)]
