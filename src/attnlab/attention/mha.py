"""Multi-head attention: every query head has a key/value head of its own.

The baseline of every comparison: `gqa` with K = N. Vaswani et al. 2017 (arXiv 1706.03762), where N is h and H is d_k.
Caches 2 N H floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import gqa
from .gqa import Attention

__all__ = ["Attention", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    formula = "o[n] = softmax(q[n] k[n]^T / sqrt(H)) v[n]"
    source = "Vaswani et al. 2017, arXiv 1706.03762"
    caches = "keys and values of all N heads"
    swatch = (0, 0, 0)
    cache_width = None

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads
