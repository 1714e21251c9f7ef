"""One rule for what is never trained on: a hash of the problem, the same in the corpus, in SFT and in the tests."""

from __future__ import annotations

import hashlib


def is_held_out(key: str, *, one_in: int = 10) -> bool:
    """True for one key in `one_in`, decided by SHA-256 of the key, so that it never depends on order or seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % one_in == 0
