"""Differential attention: a head has two softmax maps, and the second, scaled, is taken away from the first.

    A_i[t, n] = softmax_s(q_i[t, n] . k_i[s, n] / sqrt(H))                  i = 1, 2; n = 1 ... N/2
    o[t]      = W_o concat_n (1 - l0) norm((A_1[t, n] - l A_2[t, n]) v[n])   v[n]: 2 H floats
    l         = exp(lq_1 . lk_1) - exp(lq_2 . lk_2) + l0                     one number per layer, lq and lk learned

Ye et al. 2024 (arXiv 2410.05258), whose h is N/2 and d is H; the norm is over each head. l0 (lambda_init there) grows
with the depth: 0.8 - 0.6 exp(-0.3 layer), layers from 0, unless it is given.
With K below N, heads of both maps share keys and values in groups. Dropout falls on each map by itself.
Caches keys of K heads and values of K/2 heads twice as wide: 2 K H floats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..errors import UserError
from ..layers import RMSNorm
from ..ranges import Probability
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    lambda_init: Probability | None = None  # l0; None: by the layer's place in its model

    formula = "o[n] = norm((softmax(q1 k1^T / sqrt(H)) - l softmax(q2 k2^T / sqrt(H))) v)"
    source = "Ye et al. 2024, arXiv 2410.05258"
    caches = "keys of K heads, values of K/2 heads of twice the size"
    swatch = (4, 6, 3)
    carries = ""  # two maps are read as one
    signed = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deep": {"lambda_init": 0.8, "bias": True},
        "grouped": {"n_kv_heads": 2, "qk_norm": 1e-6},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_heads % 2 or self.n_kv_heads % 2:
            raise UserError(
                f"n_heads is {self.n_heads} and n_kv_heads {self.n_kv_heads}: differential heads come in pairs, so "
                "give even numbers"
            )

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def cache_spec(self) -> CacheSpec:
        pairs = self.n_kv_heads // 2
        return CacheSpec({"k": (2, pairs, self.head_dim), "v": (pairs, 2 * self.head_dim)})

    def flops(self, queries: int, keys: int) -> int:
        wider = 2 * queries * keys * self.n_heads * self.head_dim  # each map reads values of 2 H
        return super().flops(queries, keys) + wider

    def placed(self, before: Sequence[AttentionConfig], depth: int) -> Config:
        return self if self.lambda_init is not None else replace(self, lambda_init=by_depth(len(before)))


def by_depth(layer: int) -> float:
    """Return l0 of a layer, counted from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, config.head_dim))  # lq_1, lk_1, lq_2, lk_2
        self.norm = RMSNorm(2 * config.head_dim, eps=1e-5)
        self.l0 = by_depth(0) if config.lambda_init is None else config.lambda_init

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, k, v = self.project(x, positions)
        q = q.unflatten(2, (2, -1))
        k = k.unflatten(2, (2, -1))
        v = v.unflatten(2, (-1, 2)).flatten(3)
        seen, cache = extend(cache, positions, k=k, v=v)
        k = seen.rows["k"]
        v = seen.rows["v"]

        def read(i: int, share: Tensor | float) -> Tensor:
            half = Seen(seen.positions, {"k": k[:, :, i], "v": v})
            return self.ask(q[:, :, i], half, positions, mask, share=share)

        weight = self.weight_of_second()
        y = read(0, 1.0) - weight * read(1, -weight.expand(q[:, :, 1, :, 0].shape))
        y = self.norm(y)
        return self.o(((1 - self.l0) * y).flatten(2)), cache

    def weight_of_second(self) -> Tensor:
        """Return l, the weight with which the second map is taken away."""
        plus, minus = (self.lambdas[0::2] * self.lambdas[1::2]).sum(-1).exp()
        return plus - minus + self.l0
