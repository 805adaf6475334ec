"""The arguments of all kernels: which pairs of a query and a key see each other, and what their scores become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Mask

Heads = tuple[Tensor, ...]  # queries (B L N H each) or keys (B S K H each): parts whose scores are added up


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


@dataclass(frozen=True)
class Scoring:
    """The way from scores to weights: scaled, changed one by one by `score`, a softmax with or without a rest."""

    scale: float
    score: Callable[..., Tensor] | None = None  # (z, data of the query..., data of the key...) -> z, element by element
    of_query: tuple[Tensor, ...] = ()  # B|1 L N|1 each
    of_key: tuple[Tensor, ...] = ()  # B|1 S N|1 each
    rest: Tensor | None = None  # N: the logit of reading nothing

    @property
    def plain(self) -> bool:
        """Return whether weights are softmax(scale q k^T) and nothing else."""
        return self.score is None and self.rest is None

    @property
    def data(self) -> list[Tensor]:
        """Return what `score` reads beside the scores, in its order, each as it broadcasts to B N L S."""
        of_query = [t.transpose(1, 2)[..., None] for t in self.of_query]
        return of_query + [t.transpose(1, 2)[:, :, None] for t in self.of_key]

    def weights(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        """Return the weights for scaled scores B N L S, in their dtype; `seen` (B|1 N|1 L S; None: all) as in `Pairs`.

        A query that sees no key has weights 0. All but a plain softmax is computed in float32 at least.
        """
        z = scores
        if not self.plain:
            z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.score is not None:
            z = self.score(z, *self.data)
        if seen is not None:
            z = z.masked_fill(~seen, torch.finfo(z.dtype).min)
        if self.rest is not None:
            rest = self.rest.to(z.dtype)[:, None, None].expand(*z.shape[:3], 1)
            weights = torch.softmax(torch.cat([z, rest], -1), -1)[..., :-1]
        else:
            weights = torch.softmax(z, -1)
        weights = weights if seen is None else weights.masked_fill(~seen, 0)
        return weights.to(scores.dtype)


def joined(parts: Heads, heads: int) -> Tensor:
    """Return heads in parts as one tensor, B S heads H: a copy where there are several parts or heads are shared."""
    if len(parts) == 1:
        return per_head(parts[0], heads)
    return torch.cat([per_head(part, heads) for part in parts], -1)


def one_row(positions: Tensor) -> Tensor:
    """Return positions B L as 1 L where all rows are one row expanded: all that follows is then computed once."""
    return positions[:1] if positions.stride(0) == 0 else positions


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """Return the key/value head that each query head reads: B S K H -> B S N H, a copy only where heads are shared."""
    B, S, K, H = x.shape
    if n_heads == K:
        return x
    return x[:, :, :, None].expand(B, S, K, n_heads // K, H).reshape(B, S, n_heads, H)
