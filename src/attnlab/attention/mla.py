"""Multi-head latent attention: keys and values of all heads are rebuilt from one small latent per token.

    c[s]    = norm(W_dkv x[s])                      one latent of R floats
    k[s, n] = [W_uk,n c[s] ; r[s]]                  r[s] = RoPE(W_kr x[s]), one rotary key shared by all heads
    q[t, n] = [W_q,n x[t] ; RoPE(W_qr,n x[t])]      or from a latent of its own, norm(W_dq x[t])
    o[t]    = W_o concat_n sum_{s <= t} softmax_s(q[t, n] . k[s, n] / sqrt(H + rope_dim)) W_uv,n c[s]

DeepSeek-V2 (arXiv 2405.04434). Our R is the paper's d_c, rope_dim its d_h^R, v_dim the size of a value head.
Caches c and r: R + rope_dim floats per token. Two ways to compute it, equal but for rounding: *expanded* rebuilds keys and
values (cheap for many queries); *absorbed* folds W_uk into the query and W_uv into the output and attends in latent
space, as multi-query attention does (cheap for few queries on a long cache). `auto` takes the one with fewer FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..cache import Cache, Seen, extend
from ..ops import attend, rope
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask, UserError, choose


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    kv_rank: int | None = None  # R; None: 4 head_dim
    rope_dim: int | None = None  # None: head_dim / 2 with rotary positions, 0 without
    v_dim: int | None = None  # None: head_dim
    q_rank: int | None = None  # None: queries straight from x
    norm: Literal["rms", "layer", "none"] = "rms"  # of the latents
    mode: Literal["auto", "expanded", "absorbed"] = "auto"

    summary = "keys and values rebuilt from one latent per token"
    formula = "o[n] = softmax(([W_q x; rope] [W_uk c; rope]^T) / sqrt(H + r)) W_uv c,  c = norm(W_dkv x)"
    source = "DeepSeek-V2 2024, arXiv 2405.04434"
    caches = "one latent of R floats and one rotary key"
    impls = ("reference", "sdpa", "flex")
    modes = {"expanded": {"mode": "expanded"}, "absorbed": {"mode": "absorbed"}}
    cache_width = "kv_rank"
    variants = {
        **modes,
        "q_rank": {"q_rank": 24, "norm": "layer", "v_dim": 12},
        "no rope": {"rope_dim": 0, "norm": "none"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        rotary = self.rope_theta is not None
        for name, default in (
            ("kv_rank", 4 * self.head_dim),
            ("rope_dim", self.head_dim // 4 * 2 * rotary),
            ("v_dim", self.head_dim),
        ):
            if getattr(self, name) is None:
                self.set(name, default)
        if min(self.R, self.V, 1 if self.q_rank is None else self.q_rank) < 1:
            raise UserError(f"kv_rank {self.R}, v_dim {self.V} and q_rank {self.q_rank} must each be at least 1")
        if self.r % 2 or self.r < 0 or (self.r and not rotary):
            raise UserError(f"rope_dim is {self.r}: give an even number, and 0 where positions are learned")
        choose("norm", self.norm, ("rms", "layer", "none"))
        choose("mode", self.mode, ("auto", "expanded", "absorbed"))

    @property
    def R(self) -> int:
        return self.kv_rank or 0

    @property
    def r(self) -> int:
        return self.rope_dim or 0

    @property
    def V(self) -> int:
        return self.v_dim or 0

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({"latent": (self.R,), "k_rope": (self.r,)} if self.r else {"latent": (self.R,)})

    def flops(self, queries: int, keys: int) -> int:
        N, D, H, R, r, V = self.n_heads, self.d_model, self.head_dim, self.R, self.r, self.V
        into_q = (D + N * (H + r)) * self.q_rank if self.q_rank else D * N * (H + r)
        return 2 * queries * (into_q + D * (R + r) + N * V * D) + self.core_flops(
            queries, keys, self.absorbs(queries, keys)
        )

    def core_flops(self, queries: int, keys: int, absorbed: bool) -> int:
        """What the two ways do not share: rebuilding or folding, scores, and the weighted sum."""
        N, H, R, r, V = self.n_heads, self.head_dim, self.R, self.r, self.V
        if absorbed:
            return 2 * N * (queries * R * (H + V) + queries * keys * (2 * R + r))
        return 2 * N * (keys * R * (H + V) + queries * keys * (H + r + V))

    def absorbs(self, queries: int, keys: int) -> bool:
        if self.mode == "auto":
            return self.core_flops(queries, keys, True) < self.core_flops(queries, keys, False)
        return self.mode == "absorbed"


def make_norm(kind: str, size: int) -> nn.Module:
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[kind](size, eps=1e-6) if kind != "none" else nn.Identity()


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        heads = c.n_heads * (c.head_dim + c.r)
        if c.q_rank:
            self.q_down, self.q_norm = nn.Linear(c.d_model, c.q_rank, bias=c.bias), make_norm(c.norm, c.q_rank)
        self.q = nn.Linear(c.q_rank or c.d_model, heads, bias=c.bias)
        self.down = nn.Linear(c.d_model, c.R + c.r, bias=c.bias)
        self.norm = make_norm(c.norm, c.R)
        self.k_up = nn.Linear(c.R, c.n_heads * c.head_dim, bias=False)
        self.v_up = nn.Linear(c.R, c.n_heads * c.V, bias=False)
        self.o = nn.Linear(c.n_heads * c.V, c.d_model, bias=c.bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x: B L D -> queries B L N (H + rope_dim), and the rows to remember."""
        c = self.config
        q = self.q(self.q_norm(self.q_down(x)) if c.q_rank else x).unflatten(-1, (c.n_heads, -1))
        latent, k_rope = self.down(x).split([c.R, c.r], -1)
        rows = {"latent": self.norm(latent)}
        if c.r:
            q = torch.cat([q[..., : c.head_dim], rope(q[..., c.head_dim :], positions, c.rope_theta)], -1)
            rows["k_rope"] = rope(k_rope[:, :, None], positions, c.rope_theta)[:, :, 0]
        return q, rows

    def forward(
        self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL
    ) -> tuple[Tensor, Cache | None]:
        q, rows = self.project(x, positions)
        seen, cache = extend(cache, positions, **rows)
        return self.o(self.mix(q, seen, positions, mask).flatten(2)), cache

    def mix(self, q: Tensor, seen: Seen, positions: Tensor, mask: Mask, keep: Tensor | None = None) -> Tensor:
        """Queries B L N (H + rope_dim) over what is stored -> B L N V."""
        c, absorbed = self.config, self.config.absorbs(q.shape[1], seen.positions.shape[1])
        q, k, v = (self.absorb if absorbed else self.expand)(q, seen)
        scale, dropout = (c.head_dim + c.r) ** -0.5, c.dropout if self.training else 0.0
        y = attend(q, k, v, positions, seen.positions, mask, scale, impl=c.impl, dropout=dropout, keep=keep)
        return torch.einsum("blnr,nvr->blnv", y, self.v_up.weight.unflatten(0, (c.n_heads, -1))) if absorbed else y

    def expand(self, q: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuild every head's keys and values from the latents."""
        N = self.config.n_heads
        latent = seen.rows["latent"]
        k, v = self.k_up(latent).unflatten(-1, (N, -1)), self.v_up(latent).unflatten(-1, (N, -1))
        if self.config.r:
            k = torch.cat([k, seen.rows["k_rope"][:, :, None].expand(-1, -1, N, -1)], -1)
        return q, k, v

    def absorb(self, q: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Take the queries into latent space, where the latent is both key and value of one shared head."""
        c, latent = self.config, seen.rows["latent"][:, :, None]
        folded = torch.einsum("blnh,nhr->blnr", q[..., : c.head_dim], self.k_up.weight.unflatten(0, (c.n_heads, -1)))
        if not c.r:
            return folded, latent, latent
        return (
            torch.cat([folded, q[..., c.head_dim :]], -1),
            torch.cat([latent, seen.rows["k_rope"][:, :, None]], -1),
            latent,
        )
