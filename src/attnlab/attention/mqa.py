"""Multi-query attention: all query heads share one key/value head.

`gqa` with K = 1. Shazeer 2019 (arXiv 1911.02150), where N is h and H is k and v. Caches 2 H floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import gqa
from .gqa import Attention

__all__ = ["Attention", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    formula = "o[n] = softmax(q[n] k^T / sqrt(H)) v"
    source = "Shazeer 2019, arXiv 1911.02150"
    caches = "keys and values of one head"
    swatch = (6, 4, 2)
    cache_width = None

    @property
    def default_kv_heads(self) -> int:
        return 1
