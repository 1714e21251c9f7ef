"""qftlab: the tested and fast version of what the notebooks teach; import from its rooms, as `qftlab.rows.chat`."""

from __future__ import annotations

__version__ = "0.1.0"
