"""To grouped queries: heads of keys and values are pooled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import pooling
from ..calibration import Statistics
from ..dense import Dense, state
from ..width import Wish

METHODS = dict.fromkeys(pooling.METHODS, False)


def widths(source: Dense, wish: Wish) -> dict[str, Any]:
    N = len(source.q)
    heads = [k for k in range(1, source.kv_heads + 1) if N % k == 0]
    return kept(source, wish) | {"n_kv_heads": wish.choose("n_kv_heads", heads)}


def kept(source: Dense, wish: Wish) -> dict[str, Any]:
    """Fields of the source that the target must share, where they are not what it has in this model anyway."""
    usual = wish.build(wish.given)
    fields = {name: getattr(source.config, name) for name in ("head_dim", "rope_theta", "bias", "o_bias", "qk_norm")}
    return {name: value for name, value in fields.items() if getattr(usual, name) != value}


def weights(
    source: Dense, config: Any, method: str, seen: Statistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pooled = pooling.METHODS[method](source, config.n_kv_heads)
    return {}, state(qkv=pooled.qkv, o=pooled.out) | source.norms
