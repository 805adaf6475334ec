"""Pairs of queries and keys that may see each other: an argument of all kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..spec import Mask


@dataclass(frozen=True)
class Pairs:
    """The pairs of a query and a key that may see each other, as data: a kernel uses the cheapest form that is true."""

    mask: Mask
    q_pos: Tensor  # B L
    k_pos: Tensor  # B S
    keep: Tensor | None = None  # B|1 N|1 L S, True where a selection lets the pair through

    @property
    def causal(self) -> bool:
        """Return whether positions are indices and nothing else restricts: then a kernel's causal form is right."""
        return self._plain and self.q_pos.shape[1] == self.k_pos.shape[1]

    @property
    def full(self) -> bool:
        """Return whether there is one query, behind all stored keys: it sees them all."""
        return self._plain and self.q_pos.shape[1] == 1

    @property
    def _plain(self) -> bool:
        window = self.mask.window
        return self.mask.plain and self.keep is None and (window is None or self.k_pos.shape[1] <= window)

    def dense(self) -> Tensor:
        """Return the mask as a tensor: B|1 N|1 L S, True where the query sees the key."""
        query = one_row(self.q_pos)[:, :, None]
        key = one_row(self.k_pos)[:, None, :]
        seen = self.mask(query, key)[:, None]
        return seen if self.keep is None else seen & self.keep


def one_row(positions: Tensor) -> Tensor:
    """Return positions B L as 1 L where all rows are one row expanded: all that follows is then computed once."""
    return positions[:1] if positions.stride(0) == 0 else positions


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """Return the key/value head that each query head reads: B S K H -> B S N H, a copy only where heads are shared."""
    B, S, K, H = x.shape
    if n_heads == K:
        return x
    return x[:, :, :, None].expand(B, S, K, n_heads // K, H).reshape(B, S, n_heads, H)
