"""A dense layer as a value, which conversions read and write.

Everything is float64, head by head, and affine: the last column of a weight is its bias (0 where there is none).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attention import gqa, sliding
from ..errors import UserError
from ..ops import frequencies

DENSE = (gqa.Attention, sliding.Attention)  # mha and mqa are gqa's class


@dataclass(frozen=True)
class Dense:
    """One attention layer: query head n reads key/value head n // (N/K)."""

    q: Tensor  # N H (D + 1)
    k: Tensor  # K H (D + 1)
    v: Tensor  # K H (D + 1)
    o: Tensor  # D N H
    o_bias: Tensor  # D
    norms: dict[str, Tensor]  # "q_norm.weight" and "k_norm.weight", H each; {}: heads have no norms
    config: gqa.Config
    inputs: Tensor | None = None  # E [x 1] [x 1]^T where no text shows it, (D + 1) (D + 1); None: the identity

    @classmethod
    def of(cls, layer: nn.Module) -> Dense:
        """Return `layer` as a value. Raises `UserError` for one that is not queries, keys, values and one softmax."""
        if type(layer) not in DENSE:
            name = type(layer).__module__.rpartition(".")[2]
            raise UserError(
                f"a layer of {name} cannot be converted: the source must be a model whose layers are mha, gqa, mqa or "
                "sliding"
            )
        assert isinstance(layer, gqa.Attention)
        c: gqa.Config = layer.config
        if c.rope_dim is not None:
            raise UserError(
                f"the source turns {c.rope_dim} of {c.head_dim} dimensions of a head, and cannot be converted: give a "
                "model that turns all"
            )
        parts = affine(layer.qkv).unflatten(0, (-1, c.head_dim)).split([c.n_heads, c.n_kv_heads, c.n_kv_heads])
        out = affine(layer.o)
        q, k, v = parts
        o, o_bias = out[:, :-1].unflatten(1, (c.n_heads, -1)), out[:, -1]
        norms = {name: value.double() for name, value in layer.state_dict().items() if "_norm." in name}
        return cls(q, k, v, o, o_bias, norms, c)

    def after_norms(self) -> Dense:
        """Return the layer as one that reads its own queries, keys and values, the first two normed.

        So what is left of it are linear maps: each head takes its part of that input, (N + 2K) H. Without text, its
        moment is that which a white input has, and each norm divides by the root mean square that this gives a head.
        """
        N, H, _ = self.q.shape
        K = self.kv_heads
        picks = torch.eye((N + 2 * K) * H + 1, dtype=self.q.dtype)
        q, k, v = picks[:-1].unflatten(0, (-1, H)).split([N, K, K])
        normed = [
            heads / heads.square().sum(-1).mean(-1).sqrt()[:, None, None] * self.norms[f"{name}_norm.weight"][:, None]
            for name, heads in (("q", self.q), ("k", self.k))
        ]
        maps = torch.cat([*normed, self.v]).flatten(0, 1)
        maps = torch.cat([maps, torch.eye(maps.shape[1], dtype=maps.dtype)[-1:]])
        return replace(self, q=q, k=k, v=v, inputs=maps @ maps.T)

    @property
    def frequencies(self) -> Tensor | None:
        """The radians per token of each rotary pair; None: no rotary embedding."""
        c = self.config
        return None if c.rope_theta is None else frequencies(c.head_dim // 2, c.rope_theta, c.rope_scaling)

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads: K."""
        return len(self.k)

    def per_query(self, x: Tensor) -> Tensor:
        """Return x of each key/value head (K ...), repeated for each query head that reads it (N ...)."""
        return x.repeat_interleave(len(self.q) // len(x), 0)

    @property
    def biased(self) -> bool:
        """Whether any of the maps adds a constant."""
        return any(bool(bias.any()) for bias in (self.q[..., -1], self.k[..., -1], self.v[..., -1], self.o_bias))

    @property
    def kv(self) -> Tensor:
        """Keys, then values: 2K H (D + 1)."""
        return torch.cat([self.k, self.v])

    @property
    def qkv(self) -> Tensor:
        """Queries, then keys, then values: N + 2K H (D + 1)."""
        return torch.cat([self.q, self.kv])

    @property
    def out(self) -> Tensor:
        """The output matrix with its bias: D (N H + 1)."""
        return torch.cat([self.o.flatten(1), self.o_bias[:, None]], 1)

    def tensors(self, **maps: Tensor) -> dict[str, Tensor]:
        """Return the tensors of linear layers by name, from affine maps (... (D + 1)), and those of the norms."""
        return state(**maps) | self.norms


def affine(linear: nn.Linear) -> Tensor:
    """Return the weight of `linear` with its bias as a last column: M (D + 1)."""
    weight = linear.weight.detach().double()
    bias = torch.zeros(len(weight)).to(weight) if linear.bias is None else linear.bias.detach().double()
    return torch.cat([weight, bias[:, None]], 1)


def state(**maps: Tensor) -> dict[str, Tensor]:
    """Return the tensors of linear layers by name, from affine maps (... (D + 1))."""
    found: dict[str, Tensor] = {}
    for name, value in maps.items():
        value = value.flatten(0, -2)
        found |= {f"{name}.weight": value[:, :-1], f"{name}.bias": value[:, -1]}
    return found
