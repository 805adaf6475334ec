"""Fast memory-keyed attention: as mka, whose queries are a layer of their own here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import pooling
from ..calibration import Statistics
from ..dense import Dense, state
from .gqa import METHODS, widths

__all__ = ["METHODS", "weights", "widths"]


def weights(
    source: Dense, config: Any, method: str, seen: Statistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return no further fields, and the tensors of a layer whose keys and values are pooled by `method`."""
    pooled = pooling.METHODS[method](source, config.n_kv_heads)
    return {}, state(q=pooled.q, kv=pooled.kv, o=pooled.out) | source.norms
