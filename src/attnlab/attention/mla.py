"""Multi-head latent attention: keys and values of all heads are rebuilt from one small latent per token.

    c[s]    = norm(W_dkv x[s])                      one latent of R floats
    k[s, n] = [W_uk,n c[s] ; r[s]]                  r[s] = RoPE(W_kr x[s]), one rotary key shared by all heads
    q[t, n] = [W_q,n x[t] ; RoPE(W_qr,n x[t])]      or from a latent of its own, norm(W_dq x[t])
    o[t]    = W_o concat_n sum_{s <= t} softmax_s(q[t, n] . k[s, n] / sqrt(H + rope_dim)) W_uv,n c[s]

DeepSeek-V2 (arXiv 2405.04434); our R is its d_c, rope_dim its d_h^R. Caches c and r: R + rope_dim floats per token.
Two ways to compute it, equal but for rounding: *expanded* rebuilds keys and values (cheap for many queries); *absorbed*
folds W_uk into the query and W_uv into the output and attends in latent space, as multi-query attention does (cheap for
few queries on a long cache). `auto` takes the one with fewer FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..ops import attend, rope
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask, UserError, choose

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "none": nn.Identity}


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    kv_rank: int = 0  # R; 0: 4 head_dim
    rope_dim: int = -1  # -1: head_dim / 2 with rotary positions, 0 without
    v_dim: int = 0  # 0: head_dim
    q_rank: int = 0  # 0: queries straight from x
    norm: Literal["rms", "layer", "none"] = "rms"  # of the latents
    mode: Literal["auto", "expanded", "absorbed"] = "auto"

    formula = "o[n] = softmax([W_q x; rope] [W_uk c; rope]^T / sqrt(H + r)) W_uv c,  c = norm(W_dkv x)"
    source = "DeepSeek-V2 2024, arXiv 2405.04434"
    caches = "one latent of R floats and one rotary key"
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "flex")
    modes = {"expanded": {"mode": "expanded"}, "absorbed": {"mode": "absorbed"}}
    cache_width = "kv_rank"
    variants = {**modes, "q": {"q_rank": 24, "norm": "layer", "v_dim": 12}, "flat": {"rope_dim": 0, "norm": "none"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        rotary = self.rope_theta is not None
        self.set("kv_rank", self.kv_rank or 4 * self.head_dim)
        self.set("v_dim", self.v_dim or self.head_dim)
        self.set("rope_dim", self.rope_dim if self.rope_dim >= 0 else self.head_dim // 4 * 2 * rotary)
        if min(self.kv_rank, self.v_dim, self.q_rank + 1) < 1:
            raise UserError(f"kv_rank {self.kv_rank}, v_dim {self.v_dim} and q_rank {self.q_rank} must be positive")
        if self.rope_dim % 2 or (self.rope_dim and not rotary):
            raise UserError(f"rope_dim is {self.rope_dim}: give an even number, and 0 where positions are learned")
        choose("norm", self.norm, NORMS)
        choose("mode", self.mode, ("auto", *self.modes))

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({"latent": (self.kv_rank + self.rope_dim,)})  # one tensor: absorbed keys need no copy
