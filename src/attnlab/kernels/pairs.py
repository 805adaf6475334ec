"""Which query may see which key, and which head reads which: what all kernels are given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..spec import Mask


@dataclass(frozen=True)
class Pairs:
    """Which query may see which key, as data, so that a kernel can use the cheapest form that is true."""

    mask: Mask
    q_pos: Tensor  # B L
    k_pos: Tensor  # B S
    keep: Tensor | None = None  # B|1 N|1 L S, True where a selection lets the pair through

    @property
    def causal(self) -> bool:
        """Position is index and nothing else restricts: the kernels' own causal form, without a mask tensor."""
        return self._plain and self.q_pos.shape[1] == self.k_pos.shape[1]

    @property
    def full(self) -> bool:
        """One query, after which nothing is stored: it sees everything."""
        return self._plain and self.q_pos.shape[1] == 1

    @property
    def _plain(self) -> bool:
        window = self.mask.window
        return self.mask.plain and self.keep is None and (window is None or self.k_pos.shape[1] <= window)

    def dense(self) -> Tensor:
        """B|1 N|1 L S, True where the query sees the key."""
        seen = self.mask(one_row(self.q_pos)[:, :, None], one_row(self.k_pos)[:, None, :])[:, None]
        return seen if self.keep is None else seen & self.keep


def one_row(positions: Tensor) -> Tensor:
    """B L -> 1 L where all rows are one row expanded, so that what follows from it is computed once."""
    return positions[:1] if positions.stride(0) == 0 else positions


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """B S K H -> B S N H: the key/value head that each query head reads; a copy only where heads are shared."""
    B, S, K, H = x.shape
    return x if n_heads == K else x[:, :, :, None].expand(B, S, K, n_heads // K, H).reshape(B, S, n_heads, H)
