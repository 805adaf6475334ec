"""Grouped-query attention: N query heads read K key/value heads.

    q[t, n] = RoPE(W_q x[t])[n]     k[s, j] = RoPE(W_k x[s])[j]     v[s, j] = (W_v x[s])[j]
    o[t]    = W_o concat_n sum_{s <= t} softmax_s(q[t, n] . k[s, n // (N/K)] / sqrt(H)) v[s, n // (N/K)]

Ainslie et al. 2023 (arXiv 2305.13245); n_kv_heads (K) is G there, the number of groups. K = N is multi-head attention,
K = 1 multi-query attention (Shazeer 2019). Caches the rotated keys and the values of K heads: 2 K H floats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError
from ..layers import Linear, RMSNorm
from ..ops import attend, rope
from ..ranges import DERIVED, Count, NotNegative, Size
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask

Score = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    n_kv_heads: Count = DERIVED  # left out: n_heads / 4, at least 1
    qk_norm: NotNegative = 0.0  # epsilon of an RMSNorm over each query and key head (Qwen3); 0: none
    o_bias: bool | None = None  # of the output projection; None: as `bias`
    rope_dim: Size | None = None  # dimensions of each head that turn, the first ones (Qwen3-Next); None: all
    cap: NotNegative = 0.0  # scores z become cap tanh(z / cap) (Gemma 2, arXiv 2408.00118); 0: they stay

    formula = "o[n] = softmax(q[n] k[n//(N/K)]^T / sqrt(H)) v[n//(N/K)]"
    source = "Ainslie et al. 2023, arXiv 2305.13245"
    caches = "keys and values of K heads"
    swatch = (3, 3, 1)
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    cache_width: ClassVar[str | None] = "n_kv_heads"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "normed": {"qk_norm": 1e-5, "bias": True, "o_bias": False, "rope_dim": 4, "cap": 3.0}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("o_bias", self.bias if self.o_bias is None else self.o_bias)
        if self.n_kv_heads is None:
            self.set("n_kv_heads", self.default_kv_heads)
        if self.rope_dim is not None and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
            raise UserError(f"rope_dim is {self.rope_dim}: give an even number up to head_dim, {self.head_dim}")
        if self.rope_dim == self.head_dim:
            self.set("rope_dim", None)
        if self.n_heads % self.n_kv_heads:
            allowed = ", ".join(str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0)
            raise UserError(
                f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}: give one of {allowed}"
            )

    @property
    def default_kv_heads(self) -> int:
        """Return the largest divisor of n_heads up to a quarter of it."""
        return max(k for k in range(1, max(self.n_heads // 4, 1) + 1) if self.n_heads % k == 0)

    @property
    def cache_spec(self) -> CacheSpec:
        row = (self.n_kv_heads, self.head_dim)
        return CacheSpec({"k": row, "v": row})

    def flops(self, queries: int, keys: int) -> int:
        projections = 2 * queries * self.d_model * 2 * (self.n_heads + self.n_kv_heads) * self.head_dim
        return projections + 4 * queries * keys * self.n_heads * self.head_dim


def head_norms(config: Config) -> list[nn.Module]:
    """Return the norm of query heads and the norm of key heads; they do nothing where `qk_norm` is 0."""
    if not config.qk_norm:
        return [nn.Identity(), nn.Identity()]
    return [RMSNorm(config.head_dim, eps=config.qk_norm) for _ in range(2)]


def turned(heads: Tensor, positions: Tensor, config: Config) -> Tensor:
    """Return heads (B L N H), their first `rope_dim` dimensions turned by position."""
    if config.rope_dim is None:
        return rope(heads, positions, config.rope_theta, (), config.rope_scaling)
    if not config.rope_dim:
        return heads
    part = rope(heads[..., : config.rope_dim], positions, config.rope_theta, (), config.rope_scaling)
    return torch.cat([part, heads[..., config.rope_dim :]], -1)


def capped(cap: float, score: Score | None = None) -> Score | None:
    """Return the function that caps scores and hands them on to `score`; None where there is neither."""
    if not cap:
        return score

    def change(z: Tensor, *data: Tensor) -> Tensor:
        z = cap * torch.tanh(z / cap)
        return z if score is None else score(z, *data)

    return change


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        qkv_heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = Linear(config.d_model, qkv_heads * config.head_dim, bias=config.bias)
        self.q_norm, self.k_norm = head_norms(config)
        self.o = Linear(config.n_heads * config.head_dim, config.d_model, bias=bool(config.o_bias))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: B L D -> queries B L N H, keys B L K H, values B L K H, not yet rotated."""
        c = self.config
        q, k, v = self.qkv(x).unflatten(-1, (-1, c.head_dim)).split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 2)
        return self.q_norm(q), self.k_norm(k), v

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return heads (B L N H), turned by position."""
        return turned(heads, positions, self.config)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: B L D -> rotated queries B L N H, rotated keys B L K H, values B L K H."""
        q, k, v = self.heads(x)
        return self.turn(q, positions), self.turn(k, positions), v

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        return self.o(self.ask(q, seen, positions, mask).flatten(2)), cache

    def ask(
        self, q: Tensor, seen: Seen, positions: Tensor, mask: Mask, score: Score | None = None, **more: Any
    ) -> Tensor:
        """Return what queries B L N H read from the stored rows: B L N H. `score` and `more` are those of `attend`."""
        c = self.config
        dropout = c.dropout if self.training else 0.0
        rows = seen.rows["k"], seen.rows["v"]
        rule = capped(c.cap, score)
        return attend(q, *rows, positions, seen.positions, mask, impl=c.impl, dropout=dropout, score=rule, **more)
