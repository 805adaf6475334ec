"""Shared rotary keys, made from those of many heads.

As complex numbers, pair p of query n and key j gives Re q[n, p] conj(k[j, p]) e^(i angle): a complex factor on the key
moves to the query. So the K keys of a pair are factored into shared components, k[j, p] = sum_i a[j, p, i] c[p, i], by
a principal component analysis over heads in which each weighs as much as its queries are long. What is kept of these
c[p, i] turns exactly as before, and query n takes q[n, p] conj(a[j, p, i]) to it; with all of them nothing is lost.

Which are kept: the largest, the 2-norm rule of MHA2MLA (arXiv 2502.14837), here over components, as TransMLA (arXiv
2502.07864) concentrates them. The others lose their rotation: e^(i angle) becomes 1. Where calibration text has shown
how far back attention goes, it becomes its mean over that distance: slow pairs stay the same, fast ones fade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import Statistics
from .dense import Dense


@dataclass(frozen=True)
class Rotary:
    """A layer's keys as r shared rotary dimensions and a rest without rotary embedding."""

    places: tuple[float, ...]  # pair i rotates by theta^-place[i] radians per token
    q: Tensor  # queries of the rotary part, N r (D + 1)
    k: Tensor  # rotary keys, shared by all heads, r (D + 1)
    rest: Tensor  # keys without rotary embedding, K H (D + 1)


def split(source: Dense, pairs: int, seen: Statistics | None = None) -> Rotary:
    """Return `source`'s keys as `pairs` shared rotary pairs and a rest. Without rotary embedding, all is rest."""
    turns = source.frequencies
    if turns is None:
        return Rotary((), source.q[:, :0], source.k[0, :0], source.k)
    q = as_complex(source.q)
    k = as_complex(source.k)
    K, P, width = k.shape
    white = torch.eye(width, dtype=torch.float64) if source.inputs is None else source.inputs
    moment = white if seen is None else seen.moment
    weight = torch.einsum("npd,de,npe->np", q, moment + 0j, q.conj()).real.unflatten(0, (K, -1)).sum(1)
    weight = weight.clamp(min=1e-12 * float(weight.max())).sqrt()
    weighted = (weight[..., None] * k).transpose(0, 1)  # P K (D + 1)
    energy, basis = torch.linalg.eigh(weighted @ (moment + 0j) @ weighted.mH)  # of each pair, by component
    component = basis.mH @ weighted
    factor = basis / weight.T[..., None]  # P K i
    still = mean_rotation(turns, seen)
    gain = energy if seen is None else energy * (1 - still.abs().square())[:, None]
    kept = torch.zeros(P * K, dtype=torch.bool)
    kept[gain.flatten().topk(min(pairs, P * K)).indices] = True
    which = kept.view(P, K)
    rest = torch.einsum("pji,pid->jpd", factor * ~which[:, None], component) * still.conj()[:, None]
    pair, number = which.nonzero(as_tuple=True)
    turned = source.per_query(factor[pair, :, number].T)  # N r/2
    return Rotary(
        tuple((-turns[pair].log() / math.log(source.config.rope_theta or 0)).tolist()),
        as_real(q[:, pair] * turned.conj()[..., None]),
        as_real(component[pair, number]),
        as_real(rest),
    )


def mean_rotation(turns: Tensor, seen: Statistics | None) -> Tensor:
    """Return the mean of e^(i angle) over the reach of attention, per pair: complex, of size 0 to 1.

    `turns`: radians per token. Without statistics it is 1.
    """
    if seen is None:
        return torch.ones(len(turns), dtype=torch.complex128)
    back = torch.arange(len(seen.reach), dtype=torch.float64)
    return torch.polar(seen.reach.expand(len(turns), -1), turns[:, None] * back).sum(1)


def as_complex(x: Tensor) -> Tensor:
    """Return the pairs (i, i + H/2) of x (... H M) as complex numbers: ... H/2 M."""
    return torch.complex(*x.chunk(2, -2))


def as_real(x: Tensor) -> Tensor:
    """Return the inverse of `as_complex`: ... H/2 M -> ... H M."""
    return torch.cat([x.real, x.imag], -2)
