"""Latent lookup: each token reads a learned table of latents. It looks at no other token.

    w[t, n] = softmax of the k largest q[t, n] . E[n, i] / sqrt(H)      E: L learned latents per head
    o[t]    = W_o concat_n (sum_i w[t, n, i] E[n, i] + v[t, n])

Published for GPT-2 under the name "MSLA" (which here means `msla`). It is a lower bound for comparisons and the worked
example of the audit: nothing mixes tokens, and W_k is never used, so the laws of mixing and of dead parameters are
broken. L is n_latents, k is top_k. Caches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..errors import UserError
from ..layers import Linear
from ..ranges import Count
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    n_latents: Count = 256
    top_k: Count = 16

    formula = "o[n] = topk-softmax(q[n] E[n]^T / sqrt(H)) E[n] + v[n]"
    source = "the published MSLA patch for GPT-2"
    caches = "nothing"
    swatch = (8, 9, 3)
    impls = ()  # no attention is computed
    breaks = ("mixing", "no dead parameters")
    cache_width = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.n_latents:
            raise UserError(f"top_k is {self.top_k}: it must be from 1 to n_latents, {self.n_latents}")

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({})

    def flops(self, queries: int, keys: int) -> int:
        heads = self.n_heads * self.head_dim
        return 2 * queries * heads * (3 * self.d_model + self.n_latents + self.top_k)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        heads = config.n_heads * config.head_dim
        self.q = Linear(config.d_model, heads, bias=config.bias)
        self.k = Linear(config.d_model, heads, bias=config.bias)
        self.v = Linear(config.d_model, heads, bias=config.bias)
        self.o = Linear(heads, config.d_model, bias=config.bias)
        latents = torch.randn(config.n_heads, config.n_latents, config.head_dim)
        self.latents = nn.Parameter(latents * config.head_dim**-0.5)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q = self.q(x).unflatten(-1, (c.n_heads, -1))
        v = self.v(x).unflatten(-1, (c.n_heads, -1))
        scores = torch.einsum("blnh,nih->blni", q, self.latents.to(q.dtype)) * c.head_dim**-0.5
        best = scores.topk(c.top_k)
        weights = best.values.softmax(-1).to(q.dtype)
        heads = torch.arange(c.n_heads, device=x.device)[:, None]
        chosen = self.latents[heads, best.indices].to(q.dtype)  # B L N k H
        y = torch.einsum("blnk,blnkh->blnh", weights, chosen) + v
        _, cache = extend(cache, positions)
        return self.o(y.flatten(2)), cache
