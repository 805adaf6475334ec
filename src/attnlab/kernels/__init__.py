"""Softmax attention, by several hands. `reference` is the specification, gradients included; the others are proven
against it. A kernel is a module with `attend(q, k, v, pairs, scale, dropout)`; one that cannot run raises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import choose
from .pairs import Pairs

NAMES = ("reference", "sdpa", "flex")


def get(impl: str) -> Callable[[Tensor, Tensor, Tensor, Pairs, float, float], Tensor]:
    """The kernel called `impl`; raises `UserError` for an unknown one."""
    choose("impl", impl, NAMES)
    if impl == "flex":  # a plain import statement, because torch.compile must be able to trace this
        from . import flex as kernel
    elif impl == "sdpa":
        from . import sdpa as kernel  # type: ignore[no-redef]
    else:
        from . import reference as kernel  # type: ignore[no-redef]
    return kernel.attend


__all__ = ["NAMES", "get"]
