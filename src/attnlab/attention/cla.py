"""Cross-layer attention: a layer makes keys and values, and the next `share` - 1 layers read them too.

    o[t] = W_o concat_n sum_{s <= t} softmax_s(RoPE(W_q x[t])[n] . k[s, j] / sqrt(H)) v[s, j]        j = n // (N/K)

k and v are those of `gqa` in a layer that makes its own, and the same rows in the layers that take them, which have
neither W_k nor W_v. Brandon et al. 2024 (arXiv 2405.12981), whose CLA2 is `share` 2. With no limit to `share`, behind
layers that read a window, it is a decoder-decoder like YOCO (Sun et al. 2024, arXiv 2405.05254), which makes the rows
outside of any attention. A layer of another mechanism between them changes nothing, and one whose rows have another
shape makes its own.
Caches 2 K H floats per token in a layer that makes them, nothing in the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..cache import Cache, Output, Seen, extend
from ..layers import Linear
from ..ranges import Count
from ..spec import CAUSAL, NOTHING, AttentionConfig, CacheSpec, Mask
from . import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    share: Count | None = 2  # layers that read the same rows, the one that makes them among them; None: all later ones
    own: bool | None = None  # whether the layer makes rows; None: by its place, and outside of a model it does

    formula = "o[n] = softmax(q[n] k'[n//(N/K)]^T / sqrt(H)) v'[n//(N/K)], k' and v' of this layer or an earlier one"
    source = "Brandon et al. 2024, arXiv 2405.12981"
    caches = "keys and values of K heads, in one of `share` layers"
    swatch = (5, 2, 3)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"normed": {"qk_norm": 1e-5, "bias": True, "rope_dim": 4}}

    @property
    def rows(self) -> Mapping[str, tuple[int, ...]]:
        """Return what a layer that makes rows gives: keys, values, and the positions that they are at."""
        row = (self.n_kv_heads, self.head_dim)
        return {"k": row, "v": row, "at": ()}

    @property
    def takes(self) -> Mapping[str, tuple[int, ...]]:
        return self.rows if self.own is False else NOTHING

    @property
    def gives(self) -> Mapping[str, tuple[int, ...]]:
        return NOTHING if self.own is False else self.rows

    def placed(self, before: Sequence[AttentionConfig], depth: int) -> Config:
        if self.own is not None:
            return self
        sharing = [each for each in before if isinstance(each, Config)]
        readers = next((n for n in range(1, len(sharing) + 1) if sharing[-n].own), 0)  # of the rows made last
        full = readers == self.share
        return replace(self, own=not readers or full or sharing[-readers].rows != self.rows)

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec({}) if self.takes else super().cache_spec

    def flops(self, queries: int, keys: int) -> int:
        unmade = 4 * queries * self.d_model * self.n_kv_heads * self.head_dim if self.takes else 0
        return super().flops(queries, keys) - unmade


class Attention(gqa.Attention):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = bool(config.takes)
        if self.takes:
            del self.qkv
            self.q = Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
            self.k_norm = nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        if not self.takes:
            q, k, v = self.project(x, positions)
            seen, cache = extend(cache, positions, k=k, v=v)
            mask.give(**seen.rows, at=seen.positions)
        else:
            q = self.turn(self.q_norm(self.q(x).unflatten(-1, (-1, self.config.head_dim))), positions)
            _, cache = extend(cache, positions)
            seen = Seen(mask.given["at"], {name: mask.given[name] for name in ("k", "v")})
        return self.o(self.ask(q, seen, positions, mask).flatten(2)), cache


def weights_from(source: Any, config: Config) -> dict[str, Tensor]:
    """Return the weights of a layer like the dense layer `source`, without its keys and values where it takes them."""
    made = {"q": source.q} if config.takes else {"qkv": source.qkv}
    tensors: dict[str, Tensor] = source.tensors(**made, o=source.out)
    return {name: tensor for name, tensor in tensors.items() if not (config.takes and name.startswith("k_norm"))}
