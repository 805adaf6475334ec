"""To one head of keys and values for all queries."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ..dense import Dense
from ..width import Wish
from .gqa import METHODS, kept, weights

__all__ = ["METHODS", "weights", "widths"]


def widths(source: Dense, wish: Wish) -> dict[str, Any]:
    if wish.rank is not None:
        raise UserError(f"rank {wish.rank} is given, but mqa has one head of keys and values, no more: leave it out")
    return kept(source, wish)
