"""Gated attention: a sigmoid of the token scales what each head has read.

    o[t] = W_o concat_n sigmoid((W_g x[t])[n]) * gqa[t, n]

Qiu et al. 2025 (arXiv 2505.06708), the gate after attention (G1 there): one number per head, or with `elementwise` one
per head and channel. Qwen3-Next is this: elementwise, with `qk_norm`, and `rope_dim` a quarter of head_dim.
Caches what gqa does: 2 K H floats per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, Output, extend
from ..layers import Linear
from ..spec import CAUSAL, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    elementwise: bool = False  # a gate per channel of each head; else one per head

    formula = "o[n] = sigmoid(W_g x)[n] softmax(q[n] k[n//(N/K)]^T / sqrt(H)) v[n//(N/K)]"
    source = "Qiu et al. 2025, arXiv 2505.06708"
    caches = "keys and values of K heads"
    swatch = (1, 5, 2)
    variants = {
        "elementwise": {"elementwise": True, "qk_norm": 1e-6, "n_kv_heads": 2, "rope_dim": 2},
        "biased": {"bias": True, "n_kv_heads": 1},
    }

    @property
    def default_kv_heads(self) -> int:
        return self.n_heads

    @property
    def gates(self) -> int:
        """Return the number of gates of a token."""
        return self.n_heads * self.head_dim if self.elementwise else self.n_heads

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 2 * queries * self.d_model * self.gates


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.opening = Linear(config.d_model, config.gates, bias=config.bias)  # W_g, with initial weights as all others

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, k, v = self.project(x, positions)
        seen, cache = extend(cache, positions, k=k, v=v)
        gate = self.opening(x).sigmoid().unflatten(-1, (self.config.n_heads, -1))
        share = 1.0 if self.config.elementwise else gate[..., 0]
        y = gate * self.ask(q, seen, positions, mask, share=share)
        return self.o(y.flatten(2)), cache


def weights_from(source: Any, config: Config) -> dict[str, Tensor]:
    """Return the weights of a layer that computes what the dense layer `source` does: gates of 1/2, and twice W_o."""
    tensors = source.tensors(qkv=source.qkv, o=source.out)
    tensors["o.weight"] = 2 * tensors["o.weight"]
    tensors["opening.weight"] = torch.zeros(config.gates, config.d_model, dtype=torch.float64)
    return tensors
