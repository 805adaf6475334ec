"""Fast memory-keyed attention: keys and values are made from a gated mix of the token and a running summary.

    m[t]   = a m[t-1] + (1 - a) x[t]                      a: one learned decay per channel
    x~[t]  = lambda[t, 1] x[t] + lambda[t, 2] m[t]        lambda[t] = softmax(MLP(W_q x[t])), the *key's* gate
    o[t]   = W_o Attn(W_q x[t], W_k x~, W_v x~)           one causal attention

After arXiv 2603.20586, made causal: the published summary was a mean over the whole sequence, and decoding dropped it.
A third source, recalled chunks, would need every x again, so it is mka's alone. Caches 2 K H floats per token, as gqa
does, and the running summary (D): it does not shrink the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, extend
from ..layers import Linear
from ..ops import attend, ema
from ..recording import note
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa
from .gqa import capped, head_norms, turned
from .mka import make_gate


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    formula = "k, v = W (lambda_1 x + lambda_2 ema(x));  o = softmax(q k^T / sqrt(H)) v"
    source = "arXiv 2603.20586, made causal"
    caches = "keys and values of K heads, and one moving average"
    swatch = (5, 6, 1)

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def cache_spec(self) -> CacheSpec:
        return replace(super().cache_spec, state={"ema": (self.d_model,)})

    @property
    def gate_width(self) -> int:
        """Return the hidden size of the gate's MLP."""
        return max(self.d_model // 8, 4)

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 2 * queries * self.gate_width * (self.n_heads * self.head_dim + 2)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.kv = Linear(config.d_model, 2 * config.n_kv_heads * config.head_dim, bias=config.bias)
        self.q_norm, self.k_norm = head_norms(config)
        self.o = Linear(config.n_heads * config.head_dim, config.d_model, bias=bool(config.o_bias))
        self.gate = make_gate(config, config.gate_width, 2)
        half_lives = torch.logspace(1, 7, config.d_model, base=2)  # 2 to 128 tokens
        self.decay = nn.Parameter(torch.logit(0.5 ** (1 / half_lives)))

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q = self.q(x)
        before = None if cache is None else cache.state["ema"]
        summary = ema(x, self.decay.sigmoid(), positions, before)
        weight = note("gate", self.gate(q).softmax(-1).to(x.dtype))
        mixed = weight[..., :1] * x + weight[..., 1:] * summary.to(x.dtype)
        k, v = self.kv(mixed).unflatten(-1, (-1, c.head_dim)).chunk(2, 2)
        q = turned(self.q_norm(q.unflatten(-1, (-1, c.head_dim))), positions, c)
        k = turned(self.k_norm(k), positions, c)
        seen, cache = extend(cache, positions, k=k, v=v)
        if cache is not None:
            cache = cache.with_state(ema=summary[:, -1])
        dropout = c.dropout if self.training else 0.0
        rows = seen.rows["k"], seen.rows["v"]
        rule = capped(c.cap)
        y = attend(q, *rows, positions, seen.positions, mask, impl=c.impl, dropout=dropout, score=rule)
        return self.o(y.flatten(2)), cache
