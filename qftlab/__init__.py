"""qftlab: fine-tuning Qwen models, from new tokens and masks through SFT to DPO and RLOO, and their generation.

What a notebook or script needs is here, `from qftlab import load_model, generate`, and is loaded when first asked
for: `__init__.pyi` has the names and their files. README.md says in which order to read those.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

__version__ = "0.1.0"


def _doors() -> dict[str, str]:
    """Public names and the modules that hold them, from the stub beside this file."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {name.name: f"{__name__}.{line.module}" for line in lines for name in line.names}


_HOLDERS = _doors()
__all__ = sorted(_HOLDERS)


def __getattr__(name: str) -> object:
    if name not in _HOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOLDERS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
