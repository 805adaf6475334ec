"""Tensors that are given to the public functions: their shapes and types. A wrong one is refused by its name.

The checks of tensors are plain comparisons, which torch.compile traces and a GPU does not wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UserError, quoted
from .ranges import HUGE, MANY


def check_tensor(name: str, value: Any, shape: str, whole: bool = False) -> None:
    """Raise `UserError` where `value` is no tensor with as many dimensions as `shape` has letters, such as "B L D".

    `whole`: whole numbers, such as positions and ids; else floating-point numbers.
    """
    if not isinstance(value, Tensor):
        raise UserError(f"{name} is {quoted(value)}: give a tensor {shape}")
    if value.ndim != shape.count(" ") + 1:
        raise UserError(f"{name} has the shape {tuple(value.shape)}: give {shape}")
    if whole and value.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{name} is a tensor of {value.dtype}: give whole numbers, as torch.int64")
    if not whole and not value.is_floating_point():
        raise UserError(f"{name} is a tensor of {value.dtype}: give floating-point numbers, such as torch.float32")


def check_count(name: str, value: Any) -> None:
    """Raise `UserError` where `value` is no whole number of at least 1 that memory can hold so many of."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MANY:
        raise UserError(f"{name} is {quoted(value)}: it must be a whole number, at least 1")


def check_device(device: Any, name: str = "device") -> None:
    """Raise `UserError` where `device` is no torch.device, nor the name of one, nor None."""
    try:
        if not isinstance(device, torch.device | str | None):
            raise ValueError
        torch.device("cpu" if device is None else device)
    except (RuntimeError, ValueError):
        raise UserError(f"{name} is {quoted(device)}: give a torch.device, or a name such as 'cpu' or 'cuda'") from None


def check_theta(theta: Any) -> float:
    """Return a base of rotary frequencies as a float. Raise `UserError` where it is none."""
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < HUGE:
        raise UserError(f"theta is {quoted(theta)}: give a number above 0, such as 10000.0, or None for no rotation")
    return float(theta)
