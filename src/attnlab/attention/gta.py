"""Grouped-tied attention: one tied state per group is the value, and half of it is half of the key.

    s[j]  = (W_s x)[j]                        K tied heads of H floats: v[j] = s[j]
    k[j]  = [s[j][: H - r] ; RoPE(W_r x)]     one rotary key of r floats, shared by all heads
    q[n]  = [q[n][: H - r] ; RoPE(q[n][H - r :])]
    o[n]  = softmax(q[n] k[n // (N/K)]^T / sqrt(H)) v[n // (N/K)]

Zadouri, Strauss and Dao 2025 (arXiv 2505.21487), r is d_R and H is d_h there. The two halves of a key are two parts
whose scores add up, so no key is put together. Caches K H + r floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..errors import UserError
from ..layers import Linear
from ..ops import attend, rope
from ..ranges import DERIVED, Size, check_fields
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    rope_dim: Size = DERIVED  # r; left out: half of head_dim with rotary positions, else 0

    formula = "k[j] = [s[j][:H-r]; rope(W_r x)],  v[j] = s[j],  o[n] = softmax(q[n] k[n//(N/K)]^T / sqrt(H)) v"
    source = "Zadouri et al. 2025, arXiv 2505.21487"
    caches = "one tied state of H floats for each group, and one rotary key"
    swatch = (6, 3, 0)
    carries = "o"
    variants = {"wide": {"n_kv_heads": 2, "rope_dim": 2, "bias": True, "cap": 3.0}, "normed": {"qk_norm": 1e-6}}

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_dim is None:
            self.set("rope_dim", 0 if self.rope_theta is None else self.head_dim // 4 * 2)
        super().__post_init__()
        if self.rope_dim is None:  # the base class has made this of all dimensions
            raise UserError(f"rope_dim is {self.head_dim}: give an even number below head_dim, {self.head_dim}")

    @property
    def cache_spec(self) -> CacheSpec:
        turned = {"turned": (1, self.rope_dim)} if self.rope_dim else {}
        return CacheSpec({"tied": (self.n_kv_heads, self.head_dim), **turned})

    def flops(self, queries: int, keys: int) -> int:
        heads = self.n_heads * self.head_dim
        into = heads + self.n_kv_heads * self.head_dim + self.rope_dim
        return 2 * queries * self.d_model * (into + heads) + 4 * queries * keys * heads


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.tied = Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        if config.rope_dim:
            self.turned = Linear(config.d_model, config.rope_dim, bias=config.bias)
        self.q_norm, self.k_norm = gqa.head_norms(config)
        self.o = Linear(config.n_heads * config.head_dim, config.d_model, bias=bool(config.o_bias))

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return heads (B L N r), turned by position."""
        return rope(heads, positions, self.config.rope_theta, (), self.config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        still = c.head_dim - c.rope_dim
        q = self.q_norm(self.q(x).unflatten(-1, (-1, c.head_dim)))
        tied = self.k_norm(self.tied(x).unflatten(-1, (-1, c.head_dim)))
        rows = {"tied": tied}
        if c.rope_dim:
            rows["turned"] = self.turn(self.turned(x)[:, :, None], positions)
        seen, cache = extend(cache, positions, **rows)
        v = seen.rows["tied"]
        q_parts = [q[..., :still]]
        k_parts = [v[..., :still]]
        if c.rope_dim:
            q_parts.append(self.turn(q[..., still:], positions))
            k_parts.append(seen.rows["turned"])
        dropout = c.dropout if self.training else 0.0
        rule = gqa.capped(c.cap)
        y = attend(q_parts, k_parts, v, positions, seen.positions, mask, impl=c.impl, dropout=dropout, score=rule)
        return self.o(y.flatten(2)), cache
