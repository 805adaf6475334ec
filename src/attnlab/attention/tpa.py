"""Tensor product attention: queries, keys and values are sums of products of a head factor and a feature factor.

    q[t, n] = 1/R_q sum_r A_q[t, r, n] RoPE(B_q[t, r])      A_q = W_Aq x (R_q N floats), B_q = W_Bq x (R_q H floats)
    k[s, n] = 1/R sum_r A_k[s, r, n] RoPE(B_k[s, r])        v alike, without rotation
    o[t]    = W_o concat_n softmax_s(q[t, n] . k[s, n] / sqrt(H)) v[s, n]

Zhang et al. 2025 (arXiv 2501.06425) and model/T6.py beside it; its names: n_heads is h, R_q is q_rank, R is rank.
The rotation acts on B alone, so it is the factors that are cached: 2 R (N + H) floats per token. Keys and values are
rebuilt from them at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..layers import Linear
from ..ops import attend, rope
from ..ranges import Count
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    rank: Count = 2  # terms of keys and of values: R
    q_rank: Count = 6  # terms of queries: R_q

    formula = "q, k, v = 1/R sum_r A[r] (x) B[r];  o[n] = softmax(q[n] k[n]^T / sqrt(H)) v[n]"
    source = "Zhang et al. 2025, arXiv 2501.06425"
    caches = "head factors and feature factors of keys and values"
    swatch = (2, 5, 3)
    carries = "o"
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    cache_width = "rank"
    variants = {"one": {"rank": 1, "q_rank": 2, "bias": True}, "three": {"rank": 3, "q_rank": 1}}

    @property
    def cache_spec(self) -> CacheSpec:
        heads = (self.rank, self.n_heads)
        features = (self.rank, self.head_dim)
        return CacheSpec({"ak": heads, "bk": features, "av": heads, "bv": features})

    def flops(self, queries: int, keys: int) -> int:
        width = self.n_heads * self.head_dim
        factors = (self.q_rank + 2 * self.rank) * (self.n_heads + self.head_dim)
        rebuilt = 2 * width * (queries * self.q_rank + 2 * keys * self.rank)
        return 2 * queries * self.d_model * (factors + width) + rebuilt + 4 * queries * keys * width


def product(heads: Tensor, features: Tensor) -> Tensor:
    """Return the mean over r of heads (B S R N) times features (B S R H): B S N H."""
    return (heads / heads.shape[2]).transpose(2, 3) @ features


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        rows = config.q_rank + 2 * config.rank
        self.a = Linear(config.d_model, rows * config.n_heads, bias=config.bias)  # head factors of q, k and v
        self.b = Linear(config.d_model, rows * config.head_dim, bias=config.bias)  # feature factors of q, k and v
        self.o = Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        ranks = [c.q_rank, c.rank, c.rank]
        aq, ak, av = self.a(x).unflatten(-1, (-1, c.n_heads)).split(ranks, 2)
        bq, bk, bv = self.b(x).unflatten(-1, (-1, c.head_dim)).split(ranks, 2)
        bq = rope(bq, positions, c.rope_theta, (), c.rope_scaling)
        bk = rope(bk, positions, c.rope_theta, (), c.rope_scaling)
        seen, cache = extend(cache, positions, ak=ak, bk=bk, av=av, bv=bv)
        k = product(seen.rows["ak"], seen.rows["bk"])
        v = product(seen.rows["av"], seen.rows["bv"])
        dropout = c.dropout if self.training else 0.0
        y = attend(product(aq, bq), k, v, positions, seen.positions, mask, impl=c.impl, dropout=dropout)
        return self.o(y.flatten(2)), cache
