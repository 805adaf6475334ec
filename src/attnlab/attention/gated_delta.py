"""Gated DeltaNet: a matrix per head, corrected where a key comes again, that forgets at a rate chosen by the token.

    S[t] = a[t] S[t-1] + b[t] k[t] (v[t] - a[t] S[t-1]^T k[t])^T          o[t] = S[t]^T q[t] / sqrt(H)
    a = exp(-A softplus(W_a x + d))     b = sigmoid(W_b x)     q, k, v = silu(conv(W x)), q and k of length 1
    y[t] = W_o concat_n norm(o[t, n]) silu(W_g x[t])[n]

Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), as Qwen3-Next has it: alpha and beta there are a and b, `key_heads` K
is linear_num_key_heads, n_heads N is linear_num_value_heads; head n reads key head n // (N/K). The convolution is over
the last `conv` tokens. Caches no rows: N H V floats of state, and the inputs of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ..cache import Cache, Output, extend
from ..errors import UserError
from ..layers import Linear, RMSNorm
from ..ranges import DERIVED, Count
from ..recurrence import check_chunk, recur, recur_flops, short_conv
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    key_heads: Count = DERIVED  # K; left out: n_heads
    v_dim: Count = DERIVED  # V; left out: head_dim
    conv: Count = 4  # tokens that the short convolution reads
    chunk: Count = 32  # tokens, rounded down to a power of two
    mode: Literal["auto", "chunked", "recurrent"] = "auto"

    formula = "S[t] = a[t] (I - b[t] k[t] k[t]^T) S[t-1] + b[t] k[t] v[t]^T,  o[t] = S[t]^T q[t]"
    source = "Yang et al. 2024, arXiv 2412.06464"
    caches = "one H x V matrix per head, and the last inputs of a convolution"
    swatch = (2, 3, 2)
    carries = ""
    signed = True
    impls: ClassVar[tuple[str, ...]] = ("reference", "sdpa", "fla")
    modes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "chunked": {"mode": "chunked"},
        "recurrent": {"mode": "recurrent"},
    }
    cache_width: ClassVar[str | None] = "v_dim"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "shared keys": {"key_heads": 2, "chunk": 4, "v_dim": 6, "conv": 2}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set("key_heads", self.n_heads if self.key_heads is None else self.key_heads)
        self.set("v_dim", self.head_dim if self.v_dim is None else self.v_dim)
        check_chunk(self.chunk)
        if self.n_heads % self.key_heads:
            allowed = ", ".join(str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0)
            raise UserError(f"key_heads {self.key_heads} does not divide n_heads {self.n_heads}: give one of {allowed}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the widths of q, k and v, all heads together."""
        keys = self.key_heads * self.head_dim
        return keys, keys, self.n_heads * self.v_dim

    @property
    def cache_spec(self) -> CacheSpec:
        matrix = (self.n_heads, self.head_dim, self.v_dim)
        return CacheSpec({}, state={"matrix": matrix, "conv": (self.conv - 1, sum(self.sizes))})

    def flops(self, queries: int, keys: int) -> int:
        width = self.n_heads * self.v_dim
        projections = 2 * queries * self.d_model * (sum(self.sizes) + 2 * self.n_heads + 2 * width)
        shape = (self.n_heads, self.head_dim, self.v_dim)
        how: dict[str, Any] = {"shared": self.key_heads, "mode": self.mode, "chunk": self.chunk}
        return projections + recur_flops(queries, *shape, delta=True, **how)


def rates(count: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the initial log A, A from 1 to 16, and d, which makes softplus(d) 0.001 to 0.1: `count` of each."""
    step = torch.exp(torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)))
    return nn.Parameter(torch.empty(count).uniform_(1, 16).log()), nn.Parameter(step + torch.log(-torch.expm1(-step)))


def unit(x: Tensor) -> Tensor:
    """Return x scaled to length 1 along its last dimension, in float32 at least; zeros stay."""
    return _Unit.apply(x.to(torch.promote_types(x.dtype, torch.float32)))


class _Unit(torch.autograd.Function):
    """With autograd's backward it took as long as the projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grads[0] * y).sum(-1, keepdim=True)
        return torch.addcmul(grads[0], y, along, value=-1).mul_(scale)


def convolved(
    x: Tensor, taps: Tensor, positions: Tensor, cache: Cache | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return silu of the convolution of x (B L W) with what the cache has of earlier tokens, and what it has then."""
    y, past = short_conv(x, taps, positions, None if cache is None else cache.state["conv"])
    return silu(y if bias is None else y + bias), past


class Attention(nn.Module):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.v_dim
        self.qkv = Linear(config.d_model, sum(config.sizes), bias=config.bias)
        self.taps = nn.Parameter(torch.randn(config.conv, sum(config.sizes)) * config.conv**-0.5)
        self.ab = Linear(config.d_model, 2 * config.n_heads, bias=False)
        self.A_log, self.dt_bias = rates(config.n_heads)
        self.g = Linear(config.d_model, width, bias=config.bias)
        self.norm = RMSNorm(config.v_dim, eps=1e-6)
        self.o = Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        mixed, past = convolved(self.qkv(x), self.taps, positions, cache)
        q, k, v = mixed.split(c.sizes, -1)
        q = unit(q.unflatten(-1, (c.key_heads, -1))) * c.head_dim**-0.5
        k = unit(k.unflatten(-1, (c.key_heads, -1)))
        v = v.unflatten(-1, (c.n_heads, -1))
        a, b = self.ab(x).to(q.dtype).unflatten(-1, (2, -1)).unbind(2)
        decay = -self.A_log.to(q.dtype).exp() * softplus(a + self.dt_bias)
        mode = "fla" if c.impl == "fla" else c.mode
        start = None if cache is None else cache.state["matrix"]
        y, matrix = recur(q, k, v, decay, b.sigmoid(), positions=positions, start=start, mode=mode, chunk=c.chunk)
        y = self.norm(y) * silu(self.g(x)).unflatten(-1, (c.n_heads, -1))
        _, cache = extend(cache, positions)
        if cache is not None:
            cache = cache.with_state(matrix=matrix, conv=past)
        return self.o(y.flatten(2)), cache
