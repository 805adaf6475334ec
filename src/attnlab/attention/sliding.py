"""Sliding-window attention: a query sees itself and the `window` - 1 tokens before it.

`gqa` under a narrower mask, with a cache that is a ring of `window` rows: its size does not grow with the context.
Beltagy et al. 2020 (arXiv 2004.05150), whose w counts both sides of a token; Mistral 7B (arXiv 2310.06825), where
`window` is W. Caches 2 K H floats for each of the last `window` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..cache import Cache, Output
from ..ranges import Count
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    window: Count = 32

    formula = "o[t] = softmax over t-w < s <= t of (q[t] k[s]^T / sqrt(H)) v[s]"
    source = "Beltagy et al. 2020, arXiv 2004.05150; Jiang et al. 2023, arXiv 2310.06825"
    caches = "keys and values of the last `window` tokens, in a ring"
    swatch = (7, 7, 3)
    cache_width = "window"
    variants = {"narrow": {"window": 5}, "two": {"window": 2}}

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec, keep=self.window)

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, rows_read(self.window, queries, keys))


def rows_read(window: int, queries: int, keys: int) -> int:
    """Return the stored rows that new tokens read: one reads the ring, a longer chunk what it held, and itself."""
    read = window if queries == 1 else queries + min(keys - queries, window)
    return min(keys, read)


class Attention(gqa.Attention):
    config: Config

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        window = min(self.config.window, mask.window or self.config.window)
        return super().forward(x, positions, cache, replace(mask, window=window))
