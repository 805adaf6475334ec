"""Low-rank factors of a matrix, as pure functions of float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def root(moment: Tensor) -> Tensor:
    """Return L with L L^T = `moment` (n n).

    A millionth of the mean diagonal is added first, so that directions that the sample lacks have a weight too.
    """
    ridge = 1e-6 * moment.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)).to(moment))


def low_rank(
    matrix: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None, *, rank: int
) -> tuple[Tensor, Tensor]:
    """Return (up [M R], down [R D]), whose product is nearest to `matrix` W [M D] among all of rank R.

    The distance is E |A (W - up down) x|^2. `inputs` [D D] is the second moment of x; `outputs` [M M] is A^T A, the
    weight of an error in each direction of the result. Left out, they are the identity: the plain SVD.
    """
    left = None if outputs is None else root(outputs).T
    seen = matrix if left is None else left @ matrix
    basis = torch.linalg.svd(seen if inputs is None else seen @ root(inputs), full_matrices=False).U[:, :rank]
    up = basis if left is None else torch.linalg.solve_triangular(left, basis, upper=True)
    return up, basis.T @ seen


def spectrum(matrix: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Tensor:
    """Return how much error each further rank of `low_rank` removes, greatest first."""
    seen = matrix if outputs is None else root(outputs).T @ matrix
    return torch.linalg.svdvals(seen if inputs is None else seen @ root(inputs)).square()


def share(energies: list[Tensor], total: int) -> list[int]:
    """Return the rank of each layer, `total` together, at least one each.

    Each rank goes to the layer whose next one removes the largest part of that layer's own error. `energies` are the
    spectra of the layers, greatest first.
    """
    part = [e / e.sum() for e in energies]
    ranked = sorted(((float(p), i) for i, e in enumerate(part) for p in e[1:]), reverse=True)
    chosen = [i for _, i in ranked[: total - len(energies)]]
    return [1 + chosen.count(i) for i in range(len(energies))]
