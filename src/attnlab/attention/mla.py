"""Multi-head latent attention: keys and values of all heads are rebuilt from one small latent per token.

    c[s]    = norm(W_dkv x[s])                      one latent of R floats
    k[s, n] = [W_uk,n c[s] ; r[s]]                  r[s] = RoPE(W_kr x[s]), one rotary key shared by all heads
    q[t, n] = [W_q,n x[t] ; RoPE(W_qr,n x[t])]      or from a latent of its own, norm(W_dq x[t])
    o[t]    = W_o concat_n sum_{s <= t} softmax_s(q[t, n] . k[s, n] / sqrt(H + rope_dim)) W_uv,n c[s]

DeepSeek-V2 (arXiv 2405.04434). Caches c and r: R + rope_dim floats per token. Its names: kv_rank (R) is d_c, q_rank is
d_c', head_dim (H) is d_h, rope_dim is d_h^R; `down` is W_DKV and W_KR, `q` is W_UQ and W_QR, `k_up` is W_UK.
Two modes give the same result: *expanded* rebuilds keys and values; *absorbed* multiplies W_uk into the queries and
W_uv into the output, and attends to the latents themselves. `auto` takes the one with fewer FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError
from ..layers import Linear, RMSNorm
from ..normed_heads import NormedHeads, absorbing_is_less, check_heads, core_flops, kv_width, query_map, source_flops
from ..ops import attend, rope
from ..ranges import DERIVED, Count, NotNegative, Positive, Size
from ..recording import note
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask

NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm, "none": nn.Identity}


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    kv_rank: Count = DERIVED  # R; left out: 4 head_dim
    rope_dim: Size = DERIVED  # left out: head_dim / 2 with rotary positions, 0 without
    rope_places: tuple[NotNegative, ...] = ()  # pair i turns by position / theta^place[i]; (): evenly from 0 to 1
    v_dim: Count = DERIVED  # left out: head_dim
    q_rank: Size = 0  # 0: queries straight from x
    norm: Literal["rms", "layer", "none"] = "rms"  # of the latents
    from_heads: Size = 0  # key/value heads that are normed, and made into the latent (Qwen3); 0: it is made from x
    head_eps: Positive = 1e-6  # epsilon of these norms
    mode: Literal["auto", "expanded", "absorbed"] = "auto"

    formula = "o[n] = softmax([W_q x; rope] [W_uk c; rope]^T / sqrt(H + r)) W_uv c,  c = norm(W_dkv x)"
    source = "DeepSeek-V2 2024, arXiv 2405.04434"
    caches = "one latent of R floats and one rotary key"
    swatch = (1, 1, 0)
    carries = "o"
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    modes = {"expanded": {"mode": "expanded"}, "absorbed": {"mode": "absorbed"}}
    cache_width = "kv_rank"
    from_latent = ("k_up", "v_up")
    variants = {**modes, "q": {"q_rank": 24, "norm": "layer", "v_dim": 12}, "flat": {"rope_dim": 0, "norm": "none"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("kv_rank", 4 * self.head_dim if self.kv_rank is None else self.kv_rank)
        self.set("v_dim", self.head_dim if self.v_dim is None else self.v_dim)
        if self.rope_places:
            self.set("rope_dim", 2 * len(self.rope_places))
        elif self.rope_dim is None:
            self.set("rope_dim", 0 if self.rope_theta is None else self.head_dim // 4 * 2)
        check_heads(self)
        if self.rope_dim % 2 or (self.rope_dim and self.rope_theta is None):
            raise UserError(f"rope_dim is {self.rope_dim}: give an even number, and 0 where positions are learned")

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({"latent": (self.kv_rank + self.rope_dim,)})  # one tensor: absorbed keys need no copy

    def flops(self, queries: int, keys: int) -> int:
        return queries * source_flops(self) + core_flops(self, queries, keys, self.absorbs(queries, keys))

    def absorbs(self, queries: int, keys: int) -> bool:
        """Return whether `queries` new tokens that read `keys` stored ones are computed in the absorbed mode."""
        return self.mode == "absorbed" if self.mode != "auto" else absorbing_is_less(self, queries, keys)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, N = config.d_model, config.n_heads
        self.scale = (config.head_dim + config.rope_dim) ** -0.5 * config.rope_scaling.sharpness
        if config.q_rank:
            self.q_down = Linear(D, config.q_rank, bias=config.bias)
            self.q_norm = NORMS[config.norm](config.q_rank, eps=1e-6)
        if config.from_heads:
            self.heads = NormedHeads(config)
        self.q = query_map(config)
        self.down = Linear(kv_width(config), config.kv_rank + config.rope_dim, config.bias)
        self.norm = NORMS[config.norm](config.kv_rank, eps=1e-6)
        self.k_up = Linear(config.kv_rank, N * config.head_dim, bias=False)
        self.v_up = Linear(config.kv_rank, N * config.v_dim, bias=False)
        self.o = Linear(N * config.v_dim, D, bias=config.bias)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x: B L D -> queries B L N (H + rope_dim), and the row to store, c and r: B L (R + rope_dim)."""
        c = self.config
        q_source, kv_source = self.heads(x) if c.from_heads else (x, x)
        q = self.q(self.q_norm(self.q_down(x)) if c.q_rank else q_source).unflatten(-1, (c.n_heads, -1))
        latent, k_rope = self.down(kv_source).split([c.kv_rank, c.rope_dim], -1)
        latent = note("latent", self.norm(latent))
        if c.rope_dim:
            q = torch.cat([q[..., : c.head_dim], self.turn(q[..., c.head_dim :], positions)], -1)
            k_rope = self.turn(k_rope[:, :, None], positions)[:, :, 0]
            latent = torch.cat([latent, k_rope], -1)
        return q, latent

    def turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return the rotary part of heads (B L N rope_dim), turned by position."""
        return rope(heads, positions, self.config.rope_theta, self.config.rope_places, self.config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, latent = self.project(x, positions)
        seen, cache = extend(cache, positions, latent=latent)
        return self.o(self.mix(q, seen, positions, mask).flatten(2)), cache

    def mix(self, q: Tensor, seen: Seen, positions: Tensor, mask: Mask, keep: Tensor | None = None) -> Tensor:
        """Attend with queries B L N (H + rope_dim) to the stored rows -> B L N V."""
        c = self.config
        dropout = c.dropout if self.training else 0.0
        absorbed = c.absorbs(q.shape[1], seen.positions.shape[1])
        heads: tuple[Any, Any, Tensor] = (self.absorb if absorbed else self.expand)(q, seen.rows["latent"])
        y = attend(*heads, positions, seen.positions, mask, self.scale, impl=c.impl, dropout=dropout, keep=keep)
        if not absorbed:
            return y
        v_up = self.v_up.weight.unflatten(0, (c.n_heads, -1))  # N V R
        return torch.einsum("blnr,nvr->blnv", y, v_up)

    def expand(self, q: Tensor, stored: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Return q, and every head's keys and values, rebuilt from the stored rows (B S (R + rope_dim)).

        Queries and keys are in two parts, because the rotary key is one for all heads.
        """
        c = self.config
        latent, k_rope = stored.split([c.kv_rank, c.rope_dim], -1)
        k, v = (up(latent).unflatten(-1, (c.n_heads, -1)) for up in (self.k_up, self.v_up))
        if not c.rope_dim:
            return (q,), (k,), v
        return q.split([c.head_dim, c.rope_dim], -1), (k, k_rope[:, :, None]), v

    def absorb(self, q: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries in latent space, and the stored rows as keys and values of one shared head."""
        c = self.config
        k_up = self.k_up.weight.unflatten(0, (c.n_heads, -1))  # N H R
        q_latent = torch.einsum("blnh,nhr->blnr", q[..., : c.head_dim], k_up)
        return torch.cat([q_latent, q[..., c.head_dim :]], -1), stored[:, :, None], stored[:, :, None, : c.kv_rank]
