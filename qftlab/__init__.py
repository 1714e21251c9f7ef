"""qftlab: the tested and fast version of what the notebooks teach; import from its rooms, as `qftlab.text.chat`."""

from __future__ import annotations

__version__ = "0.1.0"
