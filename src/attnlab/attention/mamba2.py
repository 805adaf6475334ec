"""Mamba-2: a matrix per head that decays at a rate chosen by the token; all heads write along B and read along C.

    S[t] = a[t] S[t-1] + B[t] (d[t] u[t])^T     y[t] = S[t]^T C[t] + w u[t]
    u, B, C = silu(conv(W x))     a = exp(-A d), d = softplus(W_d x + bias)     o[t] = W_o norm(y[t] silu(W_z x[t]))

Dao and Gu 2024 (arXiv 2405.21060), with one group of B and C. Its x is u here, its Delta is d, its D is w; heads of
size P are N heads of `v_dim`, its state size N is `state`. The chunked form is its SSD algorithm. Caches no rows:
N P `state` floats of state, and the inputs of the convolution over the last `conv` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ..cache import Cache, Output, extend
from ..layers import Linear, RMSNorm
from ..ranges import DERIVED, Count
from ..recurrence import check_chunk, recur, recur_flops
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask
from .gated_delta import convolved, rates


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    v_dim: Count = DERIVED  # P, of a head; left out: 2 head_dim, the usual expansion
    state: Count = DERIVED  # width of B and C; left out: head_dim
    conv: Count = 4  # tokens that the short convolution reads
    chunk: Count = 32  # tokens, rounded down to a power of two
    mode: Literal["auto", "chunked", "recurrent"] = "auto"

    formula = "S[t] = a[t] S[t-1] + B[t] (d[t] u[t])^T,  y[t] = S[t]^T C[t] + w u[t]"
    source = "Dao and Gu 2024, arXiv 2405.21060"
    caches = "one state x P matrix per head, and the last inputs of a convolution"
    swatch = (3, 2, 2)
    carries = ""
    signed = True
    impls = ("reference", "sdpa", "fla")
    modes = {"chunked": {"mode": "chunked"}, "recurrent": {"mode": "recurrent"}}
    cache_width = "state"
    variants = {"narrow": {"state": 5, "chunk": 4, "v_dim": 6, "conv": 2}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("v_dim", 2 * self.head_dim if self.v_dim is None else self.v_dim)
        self.set("state", self.head_dim if self.state is None else self.state)
        check_chunk(self.chunk)

    @property
    def inner(self) -> int:
        """Return the width of u, all heads together."""
        return self.n_heads * self.v_dim

    @property
    def cache_spec(self) -> CacheSpec:
        matrix = (self.n_heads, self.state, self.v_dim)
        return CacheSpec({}, state={"matrix": matrix, "conv": (self.conv - 1, self.inner + 2 * self.state)})

    def flops(self, queries: int, keys: int) -> int:
        projections = 2 * queries * self.d_model * (3 * self.inner + 2 * self.state + self.n_heads)
        shape = (self.n_heads, self.state, self.v_dim)
        return projections + recur_flops(queries, *shape, shared=1, mode=self.mode, chunk=self.chunk)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sizes = [config.inner, config.inner + 2 * config.state, config.n_heads]
        mixed = self.sizes[1]
        self.into = Linear(config.d_model, sum(self.sizes), bias=config.bias)
        self.taps = nn.Parameter(torch.randn(config.conv, mixed) * config.conv**-0.5)
        self.taps_bias = nn.Parameter(torch.zeros(mixed))
        self.A_log, self.dt_bias = rates(config.n_heads)
        self.skip = nn.Parameter(torch.ones(config.n_heads))
        self.norm = RMSNorm(config.inner, eps=1e-5)
        self.o = Linear(config.inner, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        z, inputs, d = self.into(x).split(self.sizes, -1)
        mixed, past = convolved(inputs, self.taps, positions, cache, self.taps_bias)
        exact = torch.promote_types(mixed.dtype, torch.float32)
        u, B, C = mixed.split([c.inner, c.state, c.state], -1)
        u = u.to(exact).unflatten(-1, (c.n_heads, -1))
        d = softplus(d.to(exact) + self.dt_bias)
        decay = -self.A_log.to(exact).exp() * d
        v = u * d[..., None]
        mode = "fla" if c.impl == "fla" else c.mode
        start = None if cache is None else cache.state["matrix"]
        q = C[:, :, None]
        k = B[:, :, None]
        y, matrix = recur(q, k, v, decay, positions=positions, start=start, mode=mode, chunk=c.chunk)
        y = y + self.skip[:, None] * u
        _, cache = extend(cache, positions)
        if cache is not None:
            cache = cache.with_state(matrix=matrix, conv=past)
        return self.o(self.norm(y.flatten(2).to(z.dtype) * silu(z))), cache
