"""Forgetting attention: each token says how much every later query forgets of all that came before it.

    o[t] = softmax over s <= t of (q[t] . k[s] / sqrt(H) + F[t] - F[s]) v[s]    F[t] = sum_u<=t log sigmoid(w x[u] + b)

Lin et al. 2025 (arXiv 2503.02130), without their Pro block; no rotary embedding. A softmax does not see F[t], which is
the same for all keys, so it is left out. F is a sum over all tokens before: it is added up and used in float32. Caches
keys, values, and the logarithms of the gates: 2 N H + N floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cache import Cache, Output, extend
from ..layers import Linear
from ..ranges import Logit
from ..spec import CAUSAL, CacheSpec, Mask
from . import gqa, mha


@dataclass(frozen=True, kw_only=True)
class Config(mha.Config):
    forget_bias: Logit = 5.0  # b at the start of training: at 5 a token halves what came 103 tokens before it

    formula = "o[n] = softmax(q[t] k[s]^T / sqrt(H) + F[t] - F[s]) v[s],  F = cumsum log sigmoid(w x + b)"
    source = "Lin et al. 2025, arXiv 2503.02130"
    caches = "keys and values of N heads, and the logarithms of their forget gates"
    swatch = (6, 6, 0)
    carries = "vo"  # its queries and keys are not turned
    variants = {"strong": {"forget_bias": -1.0, "n_kv_heads": 2, "qk_norm": 1e-6}}

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({**super().cache_spec.rows, "gate": (self.n_heads,)})

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 2 * queries * self.d_model * self.n_heads


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.forget = Linear(config.d_model, config.n_heads, bias=True)
        nn.init.constant_(self.forget.bias, config.forget_bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, k, v = self.heads(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        seen, cache = extend(cache, positions, k=k, v=v, gate=F.logsigmoid(self.forget(x).to(exact)))
        total = seen.rows["gate"].to(exact).cumsum(1)  # B S N
        y = self.ask(q, seen, positions, mask, score=torch.sub, of_key=(total,))
        return self.o(y.flatten(2)), cache
