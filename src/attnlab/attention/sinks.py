"""Attention sinks: each head has one learned logit that takes its part of the weight and adds nothing.

    o[n] = sum_{s <= t} exp z[s, n] v[s, n//(N/K)] / (exp b[n] + sum_{s <= t} exp z[s, n])      z = q . k / sqrt(H)

gpt-oss (OpenAI 2025, arXiv 2508.10925), where b is `sinks`, every other layer has a window, and heads are grouped. A
head that finds nothing can so read nothing, and need not put its weight on the first token. Caches what gqa does, or
with a `window` what sliding does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache, Output
from ..ranges import Count
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa
from .sliding import rows_read


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    window: Count | None = None  # tokens that a query sees, itself among them; None: all

    formula = "o[n] = softmax([q[n] k[n//(N/K)]^T / sqrt(H), b[n]]) [v[n//(N/K)]; 0]"
    source = "OpenAI 2025, arXiv 2508.10925"
    caches = "keys and values of K heads, with a window those of the last tokens"
    swatch = (2, 7, 0)
    variants = {"window": {"window": 5, "n_kv_heads": 2}, "capped": {"cap": 2.0, "qk_norm": 1e-6}}

    @property
    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec, keep=self.window)

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys if self.window is None else rows_read(self.window, queries, keys))


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sink = nn.Parameter(torch.zeros(config.n_heads))

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        windows = [w for w in (self.config.window, mask.window) if w is not None]
        return super().forward(x, positions, cache, replace(mask, window=min(windows, default=None)))

    def ask(self, *args: Any, **more: Any) -> Tensor:
        """Return what `gqa` reads, less what the sinks take."""
        return super().ask(*args, **more, rest=self.sink)
