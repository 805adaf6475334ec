"""A sliding window: the same weights; exact for as long as no token is further back than the window."""

from __future__ import annotations

from typing import Any

from ..dense import Dense
from ..width import Budget
from .gqa import METHODS, kept, weights

__all__ = ["METHODS", "weights", "widths"]


def widths(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the window, the number of key/value heads, and what else differs from the model's own fields."""
    heads = budget.given.get("n_kv_heads", source.kv_heads)
    longest = min(budget.context, getattr(source.config, "window", budget.context))
    window = budget.choose("window", range(1, longest + 1), n_kv_heads=heads)
    return kept(source, budget) | {"n_kv_heads": heads, "window": window}
