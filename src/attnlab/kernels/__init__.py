"""The kernels of softmax attention. `reference` is the specification, gradients included; tests compare the others.

A kernel is a module with `attend(q, k, v, pairs, scoring, dropout)`. q and k are tuples of parts, B L N H and B S K H
each, v is B S K V, the result B L N V. It raises `UserError` for what it cannot do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError, choose
from .pairs import Heads, Pairs, Scoring

NAMES = ("reference", "sdpa", "flex")


def get(impl: str) -> Callable[[Heads, Heads, Tensor, Pairs, Scoring, float], Tensor]:
    """Return `attend` of the kernel called `impl`. Raise `UserError` for an unknown one."""
    choose("impl", impl, NAMES)
    if impl == "flex":  # a plain import statement, because torch.compile must be able to trace this
        from . import flex as kernel
    elif impl == "sdpa":
        from . import sdpa as kernel  # type: ignore[no-redef]
    else:
        from . import reference as kernel  # type: ignore[no-redef]
    return kernel.attend


def check_training(impl: str, device: torch.device, dropout: float) -> None:
    """Raise `UserError` where a kernel cannot train on a device, or not with dropout."""
    if impl != "flex":
        return
    if dropout:
        raise UserError(f"impl 'flex' has no dropout and {dropout} was given: set dropout 0 or impl 'sdpa'")
    if device.type == "cpu":
        raise UserError("impl 'flex' has no gradients on a CPU: train with impl 'sdpa' or 'reference', or on a GPU")


__all__ = ["NAMES", "check_training", "get"]
