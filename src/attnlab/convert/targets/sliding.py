"""To a sliding window: the same weights; exact for as long as no token is further back than the window."""

from __future__ import annotations

from typing import Any

from ..dense import Dense
from ..width import Wish
from .gqa import METHODS, kept, weights

__all__ = ["METHODS", "weights", "widths"]


def widths(source: Dense, wish: Wish) -> dict[str, Any]:
    heads = wish.given.get("n_kv_heads", source.kv_heads)
    window = wish.choose("window", range(1, wish.context + 1), n_kv_heads=heads)
    return kept(source, wish) | {"n_kv_heads": heads, "window": window}
