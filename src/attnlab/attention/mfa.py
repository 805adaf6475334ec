"""Multi-matrix factorization attention: many query heads from one shared rank, one key and one value for all.

    q[t, n] = RoPE(W_q,n norm(S_q x[t]))        S_q: D -> R_q, shared by all heads
    k[s]    = RoPE(S_k x[s])                    v[s] = S_v x[s], or with `key_reuse` u[s] + a * (W_n u[s]), u = S_k x
    o[t]    = W_o concat_n softmax_s(q[t, n] . k[s] / sqrt(H)) v[s]

Hu et al. 2024 (arXiv 2412.19255), with the norm of queries that Step-3 has (arXiv 2507.19427). Its names: head_dim (H)
is C, W_q,n is Q_n, W_n is N, a is alpha. Caches 2 H floats per token, or H with `key_reuse` (MFA-KR), where the key is
stored before it turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..layers import Linear, RMSNorm
from ..ops import attend, rope
from ..ranges import DERIVED, Count
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    q_rank: Count = DERIVED  # R_q; left out: head_dim, as published
    key_reuse: bool = False  # the value is made from the key

    formula = "o[n] = softmax(W_q[n] norm(S_q x) (S_k x)^T / sqrt(H)) S_v x"
    source = "Hu et al. 2024, arXiv 2412.19255"
    caches = "one key and one value, or one key alone"
    swatch = (3, 6, 2)
    carries = "o"
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    cache_width = "head_dim"
    variants = {"key reuse": {"key_reuse": True, "q_rank": 12}, "biased": {"bias": True}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("q_rank", self.head_dim if self.q_rank is None else self.q_rank)

    @property
    def cache_spec(self) -> CacheSpec:
        row = (1, self.head_dim)
        return CacheSpec({"k": row} if self.key_reuse else {"k": row, "v": row})

    def flops(self, queries: int, keys: int) -> int:
        width = self.n_heads * self.head_dim
        projections = self.d_model * (self.q_rank + self.head_dim + width) + self.q_rank * width
        value = keys * self.head_dim**2 if self.key_reuse else queries * self.d_model * self.head_dim
        return 2 * queries * projections + 2 * value + 4 * queries * keys * width


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q_down = Linear(config.d_model, config.q_rank, bias=False)
        self.q_norm = RMSNorm(config.q_rank, eps=1e-6)
        self.q_up = Linear(config.q_rank, config.n_heads * config.head_dim, bias=False)
        self.k = Linear(config.d_model, config.head_dim, bias=config.bias)
        self.v = Linear(config.head_dim if config.key_reuse else config.d_model, config.head_dim, bias=config.bias)
        if config.key_reuse:
            self.alpha = nn.Parameter(torch.zeros(config.head_dim))  # at first the value is the key
        self.o = Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return heads (B L N H), turned by position."""
        return rope(heads, positions, self.config.rope_theta, (), self.config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (c.n_heads, -1))
        q = self.turn(q, positions)
        k = self.k(x)[:, :, None]
        if c.key_reuse:
            seen, cache = extend(cache, positions, k=k)
            stored = seen.rows["k"].to(x.dtype)
            k = self.turn(stored, seen.positions)
            v = stored + self.alpha * self.v(stored)
        else:
            seen, cache = extend(cache, positions, k=self.turn(k, positions), v=self.v(x)[:, :, None])
            k = seen.rows["k"]
            v = seen.rows["v"]
        dropout = c.dropout if self.training else 0.0
        y = attend(q, k, v, positions, seen.positions, mask, impl=c.impl, dropout=dropout)
        return self.o(y.flatten(2)), cache
