"""What all tests share: one thread, repeatable property tests, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No deadline: the cores of a shared machine stall for longer than any sensible one. Derandomised: a red run repeats.
settings.register_profile("qftlab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qftlab")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real tokenizers and data that QFTLAB_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("QFTLAB_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QFTLAB_REAL_DATA does not name the folder of real tokenizers and data sets")
    return Path(folder)
