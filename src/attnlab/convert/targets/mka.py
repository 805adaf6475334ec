"""Memory-keyed attention: queries, keys, values and output are copied; the gate starts near the tokens alone."""

from __future__ import annotations

from .gqa import METHODS, weights, widths

__all__ = ["METHODS", "weights", "widths"]
