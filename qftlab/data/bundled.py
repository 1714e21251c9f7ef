"""The bundled data, under the name that notebooks import."""

from qftlab.core.files import bundled

__all__ = ["bundled"]
