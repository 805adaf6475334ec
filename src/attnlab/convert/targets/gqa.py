"""Grouped queries: heads of keys and values are pooled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import pooling
from ..calibration import Statistics
from ..dense import Dense, state
from ..width import Budget

METHODS = dict.fromkeys(pooling.METHODS, False)


def widths(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the number of key/value heads, and what else differs from the model's own fields."""
    N = len(source.q)
    heads = [k for k in range(1, source.kv_heads + 1) if N % k == 0]
    return kept(source, budget) | {"n_kv_heads": budget.choose("n_kv_heads", heads)}


def kept(source: Dense, budget: Budget) -> dict[str, Any]:
    """Return the fields that the target must share with the source, where its own differ in this model."""
    usual = budget.build(budget.given)
    names = ("head_dim", "rope_theta", "bias", "o_bias", "qk_norm", "cap")
    fields = {name: getattr(source.config, name) for name in names}
    return {name: value for name, value in fields.items() if getattr(usual, name) != value}


def weights(
    source: Dense, config: Any, method: str, seen: Statistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return no further fields, and the tensors of a layer whose keys and values are pooled by `method`."""
    pooled = pooling.METHODS[method](source, config.n_kv_heads)
    return {}, state(qkv=pooled.qkv, o=pooled.out) | source.norms
