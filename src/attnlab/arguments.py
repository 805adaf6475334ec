"""Arguments of the public functions: their kinds, and the shapes of tensors. A wrong one is refused by its name.

The checks of tensors are plain comparisons, which torch.compile traces and a GPU does not wait for.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import UserError, quoted
from .ranges import kind_in

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which now refuses arguments of another kind or range than its annotations say.

    For functions that are called once, not for those inside a forward pass. An argument whose default is None may be
    None.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kinds:
            hints = typing.get_type_hints(function, include_extras=True)
            kinds.update({name: kind_in(hint) for name, hint in hints.items() if name != "return"})
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            optional = value is None and signature.parameters[name].default is None
            if name in kinds and not optional and signature.parameters[name].kind not in VARIABLE:
                kinds[name](name, value)
        return function(*args, **kwargs)

    return call


VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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


def check_theta(theta: Any) -> None:
    """Raise `UserError` where `theta` is no base of rotary frequencies."""
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise UserError(f"theta is {quoted(theta)}: give a number above 0, such as 10000.0, or None for no rotation")
