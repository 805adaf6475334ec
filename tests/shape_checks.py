"""Checks of the shapes in annotations. It has a module of its own because torch.compile finds it by name, and there are
several modules named conftest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from beartype import beartype
from jaxtyping import jaxtyped


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations enforced; torch.compile sees the plain one, as it does outside the tests.

    This is why jaxtyping's own import hook is not used: tracing cannot pass through it.
    """
    strict = jaxtyped(function, typechecker=beartype)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else strict(*args, **kwargs)

    return either
