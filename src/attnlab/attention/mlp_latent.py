"""MLP-latent attention: queries, keys and values all from a hidden expansion of x, with a norm around the result.

    z = W_2 gelu(W_1 x)   (D -> 2D -> D)        y = LayerNorm(x + mha(z))

The memory-keyed project (arXiv 2603.20586) calls it "MLA"; it is not DeepSeek's (see `mla`), hence another name. The
residual is inside, so a block around it adds x twice. Caches 2 N H floats per token: no saving.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..cache import Cache, Output
from ..layers import Linear
from ..spec import CAUSAL, Mask
from . import mha


@dataclass(frozen=True, kw_only=True)
class Config(mha.Config):
    formula = "y = LayerNorm(x + mha(W_2 gelu(W_1 x)))"
    source = "the MKA project's baseline, after arXiv 2603.20586"
    caches = "keys and values of all N heads"
    swatch = (8, 8, 2)
    carries = ""  # its heads read the expansion, not x

    def flops(self, queries: int, keys: int) -> int:
        return super().flops(queries, keys) + 8 * queries * self.d_model**2


class Attention(mha.Attention):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.d_model
        widen = Linear(D, 2 * D, bias=config.bias)
        narrow = Linear(2 * D, D, bias=config.bias)
        self.latent = nn.Sequential(widen, nn.GELU(), narrow)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        y, cache = super().forward(self.latent(x), positions, cache, mask)
        return self.norm(x + y), cache
