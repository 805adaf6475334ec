"""The mathematics of narrower layers: pure functions of float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def root(moment: Tensor) -> Tensor:
    """L with L L^T = `moment` (n n), which is first moved a millionth towards the identity, so that directions that the
    sample lacks do not count for nothing."""
    ridge = 1e-6 * moment.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)).to(moment))


def low_rank(
    matrix: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None, *, rank: int
) -> tuple[Tensor, Tensor]:
    """(up [M R], down [R D]): of all products of rank R, the one nearest to `matrix` [M D].

    Nearest in E |A (W - up down) x|^2, where `inputs` is the second moment of x, and `outputs` is A^T A: how much an
    error in each direction of the result weighs. Left out, they are the identity: the plain SVD.
    """
    left = None if outputs is None else root(outputs).T
    seen = matrix if left is None else left @ matrix
    basis = torch.linalg.svd(seen if inputs is None else seen @ root(inputs), full_matrices=False).U[:, :rank]
    up = basis if left is None else torch.linalg.solve_triangular(left, basis, upper=True)
    return up, basis.T @ seen


def spectrum(matrix: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Tensor:
    """What each further rank of `low_rank` takes away of the error, greatest first."""
    seen = matrix if outputs is None else root(outputs).T @ matrix
    return torch.linalg.svdvals(seen if inputs is None else seen @ root(inputs)).square()


def share(energies: list[Tensor], total: int) -> list[int]:
    """Ranks, `total` together, each to the layer whose next one takes away the largest part of that layer's own error;
    every layer gets one at least."""
    part = [e / e.sum() for e in energies]
    ranked = sorted(((float(p), i) for i, e in enumerate(part) for p in e[1:]), reverse=True)
    chosen = [i for _, i in ranked[: total - len(energies)]]
    return [1 + chosen.count(i) for i in range(len(energies))]
