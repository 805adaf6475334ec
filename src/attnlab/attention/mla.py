"""Multi-head latent attention: keys and values of all heads are rebuilt from one small latent per token.

    c[s]    = norm(W_dkv x[s])                      one latent of R floats
    k[s, n] = [W_uk,n c[s] ; r[s]]                  r[s] = RoPE(W_kr x[s]), one rotary key shared by all heads
    q[t, n] = [W_q,n x[t] ; RoPE(W_qr,n x[t])]      or from a latent of its own, norm(W_dq x[t])
    o[t]    = W_o concat_n sum_{s <= t} softmax_s(q[t, n] . k[s, n] / sqrt(H + rope_dim)) W_uv,n c[s]

DeepSeek-V2 (arXiv 2405.04434); our R is its d_c, rope_dim its d_h^R. Caches c and r: R + rope_dim floats per token.
*expanded* rebuilds keys and values, *absorbed* folds W_uk into q and W_uv into o: equal, and `auto` takes the cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError, choose
from ..layers import Linear, RMSNorm
from ..ops import attend, rope
from ..recording import note
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask

NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm, "none": nn.Identity}


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    kv_rank: int = 0  # R; 0: 4 head_dim
    rope_dim: int = -1  # -1: head_dim / 2 with rotary positions, 0 without
    rope_places: tuple[float, ...] = ()  # pair i turns by position / theta^place[i]; (): evenly spread from 0 to 1
    v_dim: int = 0  # 0: head_dim
    q_rank: int = 0  # 0: queries straight from x
    norm: Literal["rms", "layer", "none"] = "rms"  # of the latents
    mode: Literal["auto", "expanded", "absorbed"] = "auto"

    formula = "o[n] = softmax([W_q x; rope] [W_uk c; rope]^T / sqrt(H + r)) W_uv c,  c = norm(W_dkv x)"
    source = "DeepSeek-V2 2024, arXiv 2405.04434"
    caches, carries = "one latent of R floats and one rotary key", "o"
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    modes = {"expanded": {"mode": "expanded"}, "absorbed": {"mode": "absorbed"}}
    cache_width, from_latent = "kv_rank", ("k_up", "v_up")
    variants = {**modes, "q": {"q_rank": 24, "norm": "layer", "v_dim": 12}, "flat": {"rope_dim": 0, "norm": "none"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("kv_rank", self.kv_rank or 4 * self.head_dim)
        self.set("v_dim", self.v_dim or self.head_dim)
        self.set("rope_places", tuple(self.rope_places))  # in JSON it is a list
        dim = self.rope_dim if self.rope_dim >= 0 else self.head_dim // 4 * 2 * (self.rope_theta is not None)
        self.set("rope_dim", 2 * len(self.rope_places) or dim)
        if min(self.kv_rank, self.v_dim, self.q_rank + 1) < 1:
            raise UserError(f"kv_rank {self.kv_rank}, v_dim {self.v_dim} and q_rank {self.q_rank} must be positive")
        if self.rope_dim % 2 or (self.rope_dim and self.rope_theta is None):
            raise UserError(f"rope_dim is {self.rope_dim}: give an even number, and 0 where positions are learned")
        choose("norm", self.norm, NORMS)
        choose("mode", self.mode, ("auto", *self.modes))

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({"latent": (self.kv_rank + self.rope_dim,)})  # one tensor: absorbed keys need no copy

    def flops(self, queries: int, keys: int) -> int:
        D, Q, NH = self.d_model, self.q_rank, self.n_heads * (self.head_dim + self.rope_dim)
        shared = ((D + NH) * Q or D * NH) + D * (self.kv_rank + self.rope_dim + self.n_heads * self.v_dim)
        return 2 * queries * shared + self.core_flops(queries, keys, self.absorbs(queries, keys))

    def core_flops(self, queries: int, keys: int, absorbed: bool) -> int:
        """What the two ways do not share: rebuilding or folding, scores, and the weighted sum."""
        H, V, R, r = self.head_dim, self.v_dim, self.kv_rank, self.rope_dim
        if absorbed:
            return 2 * self.n_heads * (queries * R * (H + V) + queries * keys * (2 * R + r))
        return 2 * self.n_heads * (keys * R * (H + V) + queries * keys * (H + r + V))

    def absorbs(self, queries: int, keys: int) -> bool:
        cheaper = self.core_flops(queries, keys, True) < self.core_flops(queries, keys, False)
        return cheaper if self.mode == "auto" else self.mode == "absorbed"


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.scale = (c.head_dim + c.rope_dim) ** -0.5 * c.rope_scaling.sharpness
        if c.q_rank:
            self.q_down, self.q_norm = Linear(c.d_model, c.q_rank, bias=c.bias), NORMS[c.norm](c.q_rank, eps=1e-6)
        self.q = Linear(c.q_rank or c.d_model, c.n_heads * (c.head_dim + c.rope_dim), bias=c.bias)
        self.down, self.norm = Linear(c.d_model, c.kv_rank + c.rope_dim, c.bias), NORMS[c.norm](c.kv_rank, eps=1e-6)
        self.k_up = Linear(c.kv_rank, c.n_heads * c.head_dim, bias=False)
        self.v_up = Linear(c.kv_rank, c.n_heads * c.v_dim, bias=False)
        self.o = Linear(c.n_heads * c.v_dim, c.d_model, bias=c.bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x: B L D -> queries B L N (H + rope_dim), and what to remember: B L (R + rope_dim)."""
        c = self.config
        q = self.q(self.q_norm(self.q_down(x)) if c.q_rank else x).unflatten(-1, (c.n_heads, -1))
        latent, k_rope = self.down(x).split([c.kv_rank, c.rope_dim], -1)
        latent = note("latent", self.norm(latent))
        if c.rope_dim:
            turns = c.rope_theta, c.rope_places, c.rope_scaling
            q = torch.cat([q[..., : c.head_dim], rope(q[..., c.head_dim :], positions, *turns)], -1)
            latent = torch.cat([latent, rope(k_rope[:, :, None], positions, *turns)[:, :, 0]], -1)
        return q, latent

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, latent = self.project(x, positions)
        seen, cache = extend(cache, positions, latent=latent)
        return self.o(self.mix(q, seen, positions, mask).flatten(2)), cache

    def mix(self, q: Tensor, seen: Seen, positions: Tensor, mask: Mask, keep: Tensor | None = None) -> Tensor:
        """Queries B L N (H + rope_dim) over what is stored -> B L N V."""
        c, dropout = self.config, self.config.dropout if self.training else 0.0
        absorbed = c.absorbs(q.shape[1], seen.positions.shape[1])
        q, k, v = (self.absorb if absorbed else self.expand)(q, seen.rows["latent"])
        y = attend(q, k, v, positions, seen.positions, mask, self.scale, impl=c.impl, dropout=dropout, keep=keep)
        return torch.einsum("blnr,nvr->blnv", y, self.v_up.weight.unflatten(0, (c.n_heads, -1))) if absorbed else y

    def expand(self, q: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuild every head's keys and values from what is stored (B S (R + rope_dim))."""
        latent, k_rope = stored.split([self.config.kv_rank, self.config.rope_dim], -1)
        k, v = (up(latent).unflatten(-1, (self.config.n_heads, -1)) for up in (self.k_up, self.v_up))
        if self.config.rope_dim:
            k = torch.cat([k, k_rope[:, :, None].expand(-1, -1, k.shape[2], -1)], -1)
        return q, k, v

    def absorb(self, q: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the queries into latent space, where what is stored is both key and value of one shared head."""
        c, k = self.config, stored[:, :, None]
        folded = torch.einsum("blnh,nhr->blnr", q[..., : c.head_dim], self.k_up.weight.unflatten(0, (c.n_heads, -1)))
        return torch.cat([folded, q[..., c.head_dim :]], -1), k, k[..., : c.kv_rank]
