"""Linear attention: softmax is replaced by a product of positive features, so that all of the past fits into a matrix.

    S[t] = S[t-1] + f(k[t]) v[t]^T     z[t] = z[t-1] + f(k[t])     f(x) = elu(x) + 1
    o[t] = W_o concat_n S[t, n]^T f(q[t, n]) / (z[t, n] . f(q[t, n]))

Katharopoulos et al. 2020 (arXiv 2006.16236), with its feature map and its normaliser; phi there is f. Nothing is
forgotten, and no position takes part. Caches no rows: one H x (V + 1) matrix per head, S and z side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import elu

from ..cache import Cache, Output, extend
from ..layers import Linear
from ..ranges import Count
from ..recurrence import check_chunk, recur, recur_flops
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    chunk: Count = 32  # tokens, rounded down to a power of two
    mode: Literal["auto", "chunked", "recurrent"] = "auto"

    formula = "S[t] = S[t-1] + f(k[t]) [v[t], 1]^T,  o[t] = S[t]^T f(q[t]), divided by its last entry"
    source = "Katharopoulos et al. 2020, arXiv 2006.16236"
    caches = "one matrix per head, and the sum of its keys"
    swatch = (8, 0, 3)
    modes = {"chunked": {"mode": "chunked"}, "recurrent": {"mode": "recurrent"}}
    variants = {"chunks of 4": {"chunk": 4}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chunk(self.chunk)

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({}, state={"matrix": (self.n_heads, self.head_dim, self.head_dim + 1)})

    def flops(self, queries: int, keys: int) -> int:
        projections = 8 * queries * self.d_model * self.n_heads * self.head_dim
        shape = (self.n_heads, self.head_dim, self.head_dim + 1)
        return projections + recur_flops(queries, *shape, mode=self.mode, chunk=self.chunk)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_heads * config.head_dim
        self.qkv = Linear(config.d_model, 3 * width, bias=config.bias)
        self.o = Linear(width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        c = self.config
        q, k, v = self.qkv(x).unflatten(-1, (3, c.n_heads, c.head_dim)).unbind(2)
        y, state = recur(
            elu(q) + 1,
            elu(k) + 1,
            v,
            positions=positions,
            start=None if cache is None else cache.state["matrix"],
            mode=c.mode,
            chunk=c.chunk,
            normalised=True,
        )
        _, cache = extend(cache, positions)
        if cache is not None:
            cache = cache.with_state(matrix=state)
        return self.o(y.flatten(2)), cache
