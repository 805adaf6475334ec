"""Pooling of key/value heads: each group of query heads gets one, made from those that the group read before.

mean: their mean (Ainslie et al. 2023, arXiv 2305.13245). aligned: similar heads are brought together and rotated
towards each other before the mean is taken; neither changes the output of the unpooled model. first: the group's first
head, the control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .dense import Dense

ROUNDS = 8  # of rotating every head towards the mean of its group
TARGET = "gqa"  # the mechanism of pooled heads, with nothing else changed


def mean(source: Dense, heads: int) -> Dense:
    """Return `source` with so many key/value heads, each the mean of its group."""
    k, v = (source.per_query(x).unflatten(0, (heads, -1)).mean(1) for x in (source.k, source.v))
    return replace(source, k=k, v=v)


def first(source: Dense, heads: int) -> Dense:
    """Return `source` with so many key/value heads, each the first of its group."""
    k, v = (source.per_query(x).unflatten(0, (heads, -1))[:, 0] for x in (source.k, source.v))
    return replace(source, k=k, v=v)


def aligned(source: Dense, heads: int) -> Dense:
    """Return `source` with so many key/value heads, each the mean of its group after alignment.

    The same rotation of keys and queries leaves their products as they are; so does one of values and W_o. A rotation
    that commutes with rotary embedding is one phase per pair; else it is any orthogonal matrix. Raises `UserError` for
    heads with norms.
    """
    if source.norms:
        raise UserError("heads whose queries and keys are normed one by one cannot be turned: pool by mean or first")
    k = source.per_query(source.k)
    v = source.per_query(source.v)
    turn_keys = nearest_turn if source.frequencies is None else nearest_phases
    order = torch.cat(cluster(distances(k, turn_keys) + distances(v, nearest_turn), len(k) // heads))
    k, turned_k = towards_mean(k[order].unflatten(0, (heads, -1)), turn_keys)
    v, turned_v = towards_mean(v[order].unflatten(0, (heads, -1)), nearest_turn)
    q = turned_k @ source.q[order]
    o = torch.einsum("dnh,ngh->dng", source.o[:, order], turned_v)
    return replace(source, q=q, k=k, v=v, o=o)


METHODS: dict[str, Callable[[Dense, int], Dense]] = {
    "mean": mean,
    "aligned": aligned,
    "first": first,
}


def nearest_turn(a: Tensor, b: Tensor) -> Tensor:
    """Return the orthogonal U (... H H) that brings U a nearest to b (both ... H M): Procrustes."""
    u, _, v = torch.linalg.svd(b @ a.mT)
    return u @ v


def nearest_phases(a: Tensor, b: Tensor) -> Tensor:
    """Return the same among rotations of the pairs (i, i + H/2)."""
    half = a.shape[-2] // 2
    product = (b[..., :half, :] + 1j * b[..., half:, :]) * (a[..., :half, :] - 1j * a[..., half:, :])
    phase = product.sum(-1).angle()
    cos = phase.cos().diag_embed()
    sin = phase.sin().diag_embed()
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


def distances(x: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the squared difference of each pair of heads (N H M) after alignment, by their mean size: N N."""
    turned = turn(x[:, None], x[None]) @ x[:, None]
    return (turned - x[None]).square().sum((-1, -2)) / x.square().sum((-1, -2)).mean()


def cluster(distance: Tensor, size: int) -> list[Tensor]:
    """Return groups of `size` heads: the first that has no group yet, with those nearest to it."""
    free = list(range(len(distance)))
    groups = []
    while free:
        near = sorted(free, key=lambda n: (n != free[0], float(distance[free[0], n])))[:size]
        groups.append(torch.tensor(sorted(near)))
        free = [n for n in free if n not in groups[-1]]
    return groups


def towards_mean(x: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the means of groups of heads (K G H M) after alignment [K H M], and the rotations [K*G H H]."""
    centre = x[:, :1]
    for _ in range(ROUNDS):
        turns = turn(x, centre.expand_as(x))
        centre = (turns @ x).mean(1, keepdim=True)
    return centre[:, 0], turns.flatten(0, 1)
