"""Rotary keys of many heads as few shared ones.

As complex numbers, pair p of query n and key j gives Re q[n, p] conj(k[j, p]) e^(i angle): a complex factor on the key
moves to the query. So the K keys of a pair are factored into shared components, k[j, p] = sum_i a[j, p, i] c[p, i], by
a principal component analysis over heads in which each weighs as much as its queries are long. What is kept of these
c[p, i] turns exactly as before, and query n takes q[n, p] conj(a[j, p, i]) to it; with all of them nothing is lost.

Which are kept: the largest, the 2-norm rule of MHA2MLA (arXiv 2502.14837), here over components, as TransMLA (arXiv
2502.07864) concentrates them. The others lose their turn: e^(i angle) becomes 1, or, where calibration text has shown
how far back attention goes, its mean over that reach, so that slow pairs stay what they are and fast ones fade.
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
    places: tuple[float, ...]  # pair i turns by theta^-place[i]
    q: Tensor  # N r (D + 1)
    k: Tensor  # r (D + 1), shared by all heads
    rest: Tensor  # K H (D + 1): keys that do not turn


def split(source: Dense, pairs: int, seen: Statistics | None = None) -> Rotary:
    """`source`'s keys as `pairs` shared rotary ones and a rest. Without rotary embedding, all is rest."""
    turns = source.frequencies
    if turns is None:
        return Rotary((), source.q[:, :0], source.k[0, :0], source.k)
    q, k = as_complex(source.q), as_complex(source.k)
    K, P, width = k.shape
    moment = torch.eye(width, dtype=torch.float64) if seen is None else seen.moment
    weight = torch.einsum("npd,de,npe->np", q, moment + 0j, q.conj()).real.unflatten(0, (K, -1)).sum(1)
    weight = weight.clamp(min=1e-12 * float(weight.max())).sqrt()
    weighted = (weight[..., None] * k).transpose(0, 1)  # P K (D + 1)
    energy, basis = torch.linalg.eigh(weighted @ (moment + 0j) @ weighted.mH)  # of each pair, by component
    component = basis.mH @ weighted
    factor = basis / weight.T[..., None]  # P K i
    still = stillness(turns, seen)
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


def stillness(turns: Tensor, seen: Statistics | None) -> Tensor:
    """What stands for e^(i angle) of each pair that no longer turns: complex, of size 0 to 1."""
    if seen is None:
        return torch.ones(len(turns), dtype=torch.complex128)
    back = torch.arange(len(seen.reach), dtype=torch.float64)
    return torch.polar(seen.reach.expand(len(turns), -1), turns[:, None] * back).sum(1)


def as_complex(x: Tensor) -> Tensor:
    """... H M -> ... H/2 M: the pairs (i, i + H/2) as complex numbers."""
    return torch.complex(*x.chunk(2, -2))


def as_real(x: Tensor) -> Tensor:
    return torch.cat([x.real, x.imag], -2)
