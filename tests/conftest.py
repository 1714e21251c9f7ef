"""What all tests share: repeatable property tests, small models, and the folder of real data where there is one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# What a shell starts in the background ignores Ctrl-C; some tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# No deadline: the cores of a shared machine stall for longer than any sensible one. Derandomised: a red run repeats.
settings.register_profile("qftlab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qftlab")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Where .ci/run has installed a browser (QFTLAB_BROWSER=required), a browser test that is skipped has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("QFTLAB_BROWSER") == "required":
        report.outcome, report.longrepr = "failed", f"QFTLAB_BROWSER=required, but it was skipped: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real tokenizers and data that QFTLAB_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("QFTLAB_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QFTLAB_REAL_DATA does not name the folder of real tokenizers and data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def cases(real_data: Path) -> Path:
    """Small inputs that once went wrong, with the right answers."""
    folder = real_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the case files lie beside the real data")
    return folder
