"""ALiBi: scores fall in a straight line with the distance between query and key, and there is no other position.

    o[t, n] = softmax over s <= t of (q[t, n] . k[s, n] / sqrt(H) - m[n] (t - s)) v[s, n]     m[n] = 2^(-8 (n + 1) / N)

Press et al. 2022 (arXiv 2108.12409), with their slopes for N that is no power of two. The distance is exact for any
length: it is computed in float32 beside the scores, and is no part of the keys. Caches what mha does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import Cache, Output, extend
from ..spec import CAUSAL, Mask
from . import gqa, mha


@dataclass(frozen=True, kw_only=True)
class Config(mha.Config):
    formula = "o[t, n] = softmax(q[t, n] k[s, n]^T / sqrt(H) - m[n] (t - s)) v[s, n]"
    source = "Press et al. 2022, arXiv 2108.12409"
    swatch = (5, 4, 0)
    carries = "vo"  # its queries and keys are not turned
    variants = {"three heads": {"n_heads": 3, "n_kv_heads": 1, "cap": 3.0}}


def slopes(heads: int) -> list[float]:
    """Return the slope m of each head, per token.

    Where their number is no power of two, those of the power below come first, then every other one of the next power.
    """
    power = 2 ** math.floor(math.log2(heads))
    own = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    return own + [2 ** (-4 * (2 * n + 1) / power) for n in range(heads - power)]


def lowered(z: Tensor, query: Tensor, slope: Tensor, key: Tensor) -> Tensor:
    """Return scores lowered by the slope times the distance."""
    return z - slope * (query - key)


class Attention(gqa.Attention):
    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        q, k, v = self.heads(x)
        seen, cache = extend(cache, positions, k=k, v=v)
        exact = torch.promote_types(x.dtype, torch.float32)
        slope = torch.tensor(slopes(self.config.n_heads), dtype=exact, device=x.device)
        of_query = positions[..., None].to(exact), slope.expand(1, x.shape[1], -1)
        of_key = (seen.positions[..., None].to(exact),)
        y = self.ask(q, seen, positions, mask, score=lowered, of_query=of_query, of_key=of_key)
        return self.o(y.flatten(2)), cache
