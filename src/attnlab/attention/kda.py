"""Kimi Delta Attention: a gated delta rule in which every channel of a key has a forgetting rate of its own.

    S[t] = (I - b[t] k[t] k[t]^T) diag(a[t]) S[t-1] + b[t] k[t] v[t]^T          o[t] = S[t]^T q[t] / sqrt(H)
    a = exp(-A softplus(W_f2 W_f1 x + d))     b = sigmoid(W_b x)     q, k, v = silu(conv(W x)), q and k of length 1
    y[t] = W_o concat_n norm(o[t, n]) sigmoid(W_g2 W_g1 x[t])[n]

Kimi Linear, Kimi Team 2025 (arXiv 2510.26692): alpha and beta there are a and b, d_k and d_v are both H. A is one
number per head, d one per channel; `rank` is the width between W_f1 and W_f2 and between W_g1 and W_g2. Caches no rows:
N H H floats of state, and the inputs of the convolution over the last `conv` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..cache import Cache, Output, extend
from ..layers import Linear, RMSNorm
from ..ranges import DERIVED, Count
from ..recurrence import check_chunk, recur, recur_flops
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask
from .gated_delta import convolved, rates, unit


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    rank: Count = DERIVED  # of the forget gate and the output gate; left out: head_dim
    conv: Count = 4  # tokens that the short convolution reads
    chunk: Count = 16  # tokens, rounded down to a power of two
    mode: Literal["auto", "chunked", "recurrent"] = "auto"

    formula = "S[t] = (I - b[t] k[t] k[t]^T) diag(a[t]) S[t-1] + b[t] k[t] v[t]^T,  o[t] = S[t]^T q[t]"
    source = "Kimi Team 2025, arXiv 2510.26692"
    caches = "one H x H matrix per head, and the last inputs of a convolution"
    swatch = (4, 4, 3)
    carries = ""
    signed = True
    impls = ("reference", "sdpa", "fla")
    modes = {"chunked": {"mode": "chunked"}, "recurrent": {"mode": "recurrent"}}
    cache_width = "head_dim"
    variants = {"narrow": {"rank": 3, "chunk": 4, "conv": 2}}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("rank", self.head_dim if self.rank is None else self.rank)
        check_chunk(self.chunk)

    @property
    def width(self) -> int:
        """Return the width of q, of k and of v, all heads together."""
        return self.n_heads * self.head_dim

    @property
    def cache_spec(self) -> CacheSpec:
        matrix = (self.n_heads, self.head_dim, self.head_dim)
        return CacheSpec({}, state={"matrix": matrix, "conv": (self.conv - 1, 3 * self.width)})

    def flops(self, queries: int, keys: int) -> int:
        gates = 2 * self.rank * (self.d_model + self.width) + self.d_model * self.n_heads
        projections = 2 * queries * (4 * self.d_model * self.width + gates)
        shape = (self.n_heads, self.head_dim, self.head_dim)
        return projections + recur_flops(queries, *shape, delta=True, by_channel=True, mode=self.mode, chunk=self.chunk)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        D, N = config.d_model, config.n_heads
        W = config.width
        self.qkv = Linear(D, 3 * W, bias=config.bias)
        self.taps = nn.Parameter(torch.randn(config.conv, 3 * W) * config.conv**-0.5)
        self.f = nn.Sequential(Linear(D, config.rank, bias=False), Linear(config.rank, W, bias=False))
        self.A_log = rates(N)[0]
        self.dt_bias = rates(W)[1]
        self.b = Linear(D, N, bias=False)
        self.g = nn.Sequential(Linear(D, config.rank, bias=False), Linear(config.rank, W, bias=False))
        self.norm = RMSNorm(config.head_dim, eps=1e-6)
        self.o = Linear(W, D, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        heads, past = convolved(self.qkv(x), self.taps, positions, cache)
        q, k, v = heads.unflatten(-1, (3, c.n_heads, -1)).unbind(2)
        q = unit(q) * c.head_dim**-0.5
        k = unit(k)
        rate = softplus(self.f(x).to(q.dtype) + self.dt_bias).unflatten(-1, (c.n_heads, -1))
        decay = -self.A_log.to(q.dtype).exp()[:, None] * rate
        b = self.b(x).to(q.dtype).sigmoid()
        mode = "fla" if c.impl == "fla" else c.mode
        start = None if cache is None else cache.state["matrix"]
        y, matrix = recur(q, k, v, decay, b, positions=positions, start=start, mode=mode, chunk=c.chunk)
        y = self.norm(y) * self.g(x).unflatten(-1, (c.n_heads, -1)).sigmoid()
        _, cache = extend(cache, positions)
        if cache is not None:
            cache = cache.with_state(matrix=matrix, conv=past)
        return self.o(y.flatten(2)), cache
