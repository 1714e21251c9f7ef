"""What every pytest here shares, notebooks included: pinned numerics, and pyproject.toml's paths from any folder."""

from __future__ import annotations

import os

# A kernel that nbval starts inherits them.
for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "QFTLAB_LAYOUT": "plain"}.items():
    os.environ.setdefault(name, value)


def pytest_configure(config) -> None:
    """nbval looks for its rules beneath the current folder; pyproject.toml means its own."""
    rules = getattr(config.option, "nbval_sanitize_with", None)
    if rules and (config.rootpath / rules).is_file():
        config.option.nbval_sanitize_with = str(config.rootpath / rules)
