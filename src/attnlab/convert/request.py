"""Settings of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..ranges import Seed, Size, check_fields


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of a conversion: the keywords of `convert` that are not text or progress."""

    rank: Size | float | None = None  # int: a width; float: a share of the source's cache; None: the widest
    method: str | None = None  # one of the target's METHODS; None: one that uses the calibration text if there is some
    per_layer: bool = False  # spread the same total of ranks over the layers by singular-value energy
    options: Mapping[str, Any] | None = None  # further fields of the mechanism's Config
    drop_window: bool = False  # whether a layer that sees all tokens may replace one that sees a window
    seed: Seed = 0  # of what has no counterpart in the source (gates, an indexer)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.rank, float) and not 0 < self.rank <= 1:
            raise UserError(
                f"rank {self.rank} is no share of the cache: give one above 0, up to 1.0, or a whole number"
            )
