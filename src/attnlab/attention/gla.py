"""Grouped latent attention: mla with G latents, each rebuilding the keys and values of its own N/G heads.

    c[g] = norm((W_dkv x)[g])                          G latents of R floats; r = RoPE(W_kr x), one for all heads
    k[n] = [W_uk,n c[n // (N/G)] ; r]
    o    = W_o concat_n softmax(q[n] k[n]^T / sqrt(H + rope_dim)) W_uv,n c[n // (N/G)]

Zadouri, Strauss and Dao 2025 (arXiv 2505.21487), where G is h_c and R is d_c = 2 H. A latent need not be copied to
every one of G devices, and the cache is that of mla with a latent of G R. *absorbed* is grouped-query attention to the
latents. Caches G R + rope_dim floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..errors import UserError
from ..layers import Linear
from ..ops import attend
from ..ranges import Count, check_fields
from ..recording import note
from ..spec import CAUSAL, CacheSpec, Mask
from . import mla


@dataclass(frozen=True, kw_only=True)
class Config(mla.Config):
    groups: Count = 2  # G

    formula = "o[n] = softmax([W_q x; rope] [W_uk c[g]; rope]^T / sqrt(H + r)) W_uv c[g],  g = n//(N/G)"
    source = "Zadouri et al. 2025, arXiv 2505.21487"
    caches = "G latents of R floats and one rotary key"
    swatch = (3, 1, 1)
    variants = {**mla.Config.modes, "four": {"groups": 4, "q_rank": 24, "v_dim": 12}, "flat": {"rope_dim": 0}}

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kv_rank is None:
            self.set("kv_rank", 2 * self.head_dim)
        super().__post_init__()
        if self.from_heads:
            raise UserError("from_heads is of mla: leave it out, because gla's latents are made from x")
        if self.n_heads % self.groups:
            raise UserError(f"groups is {self.groups}: it must divide n_heads, {self.n_heads}")

    @property
    def cache_spec(self) -> CacheSpec:
        turned = {"turned": (1, self.rope_dim)} if self.rope_dim else {}
        return CacheSpec({"latent": (self.groups, self.kv_rank), **turned})

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 2 * queries * self.d_model * (self.groups - 1) * self.kv_rank


class Attention(mla.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.down = Linear(config.d_model, config.groups * config.kv_rank + config.rope_dim, bias=config.bias)
        self.norm = nn.ModuleList(mla.NORMS[config.norm](config.kv_rank, eps=1e-6) for _ in range(config.groups))

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q_source = self.q_norm(self.q_down(x)) if c.q_rank else x
        q = list(self.q(q_source).unflatten(-1, (c.n_heads, -1)).split([c.head_dim, c.rope_dim], -1))
        latent, turned = self.down(x).split([c.groups * c.kv_rank, c.rope_dim], -1)
        each = zip(self.norm, latent.unflatten(-1, (c.groups, -1)).unbind(2), strict=True)
        rows = {"latent": note("latent", torch.stack([norm(part) for norm, part in each], 2))}
        if c.rope_dim:
            q[1] = self.turn(q[1], positions)
            rows["turned"] = self.turn(turned[:, :, None], positions)
        seen, cache = extend(cache, positions, **rows)
        latent = seen.rows["latent"]
        absorbed = c.absorbs(x.shape[1], seen.positions.shape[1])
        k_up, v_up = (up.weight.unflatten(0, (c.groups, c.n_heads // c.groups, -1)) for up in (self.k_up, self.v_up))
        if absorbed:
            k = v = latent
            q[0] = torch.einsum("blgmh,gmhr->blgmr", q[0].unflatten(2, (c.groups, -1)), k_up).flatten(2, 3)
        else:
            k, v = (torch.einsum("bsgr,gmhr->bsgmh", latent, up).flatten(2, 3) for up in (k_up, v_up))
        parts = 2 if c.rope_dim else 1
        keys = (k, seen.rows["turned"]) if c.rope_dim else (k,)
        dropout = c.dropout if self.training else 0.0
        y = attend(q[:parts], keys, v, positions, seen.positions, mask, self.scale, impl=c.impl, dropout=dropout)
        if absorbed:
            y = torch.einsum("blgmr,gmvr->blgmv", y.unflatten(2, (c.groups, -1)), v_up).flatten(2, 3)
        return self.o(y.flatten(2)), cache
