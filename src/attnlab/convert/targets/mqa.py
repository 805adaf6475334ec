"""One head of keys and values for all queries."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ..dense import Dense
from ..width import Budget
from .gqa import METHODS, kept, weights

__all__ = ["METHODS", "weights", "widths"]


def widths(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the fields that differ from the model's own. Raises `UserError` where a rank is given."""
    if budget.rank is not None:
        raise UserError(f"rank {budget.rank} is given, but mqa has one head of keys and values, no more: leave it out")
    return kept(source, budget)
