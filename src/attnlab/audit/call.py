"""A call of somebody's attention module: how it takes x and a mask is given or found out."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose

MASKS = ("additive", "keep", "drop")


def causal_mask(length: int, style: str, dtype: torch.dtype) -> Tensor:
    """Return a mask [T T]. additive: 0 or -inf; keep: True where a token may be seen; drop: True where it may not."""
    choose("mask style", style, MASKS)
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    if style == "additive":
        return torch.zeros(length, length, dtype=dtype).masked_fill(~keep, -math.inf)
    return keep if style == "keep" else ~keep


def rotary_tables(x: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of rotary embedding for x [B T D], both [B T head_dim], halves repeated."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], -1).expand(x.shape[0], -1, -1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


@dataclasses.dataclass(frozen=True)
class Caller:
    """A way to call a module on x: an expression with the names below, and the form of the mask.

    module, x [B T D], positions [B T], mask (a causal one, [T T] or [B 1 T T], in `style`), the same mask in each style
    as `additive`, `keep` and `drop`, `rotary(head_dim)` -> (cos, sin) [B T head_dim], torch.
    """

    expression: str
    style: str = "additive"  # of `mask`; one of MASKS
    four: bool = False  # masks are [B 1 T T] rather than [T T]
    sequence_first: bool = False  # x is [T B D]

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        B, T, _ = x.shape
        masks = {style: causal_mask(T, style, x.dtype) for style in MASKS}
        if self.four:
            masks = {style: mask.expand(B, 1, T, T) for style, mask in masks.items()}
        names = {
            "module": module,
            "x": x.transpose(0, 1) if self.sequence_first else x,
            "positions": torch.arange(T).expand(B, -1),
            "mask": masks[self.style],
            "rotary": lambda head_dim, theta=10_000.0: rotary_tables(x, head_dim, theta),
            "torch": torch,
            **masks,
        }
        y = eval(self.expression, names)
        return self._batch_first(y) if self.sequence_first else y

    def _batch_first(self, y: Any) -> Any:
        while not isinstance(y, Tensor):
            y = next(iter(y.values())) if isinstance(y, Mapping) else y[0]
        return y.transpose(0, 1)


def find_caller(module: nn.Module, expression: str | None, style: str, shape: str, x: Tensor) -> Caller:
    """Return the way to call this module; what was not given is found out by trying.

    expression: None: from the parameters of forward. shape: of the mask: 2d, 4d or auto. UserError where the expression
    is no Python, uses an unknown name, or cannot be guessed.
    """
    choose("mask style", style, MASKS)
    choose("mask shape", shape, ("auto", "2d", "4d"))
    expression = expression or guess_call(module)
    try:
        compile(expression, "--call", "eval")
    except SyntaxError as error:
        raise UserError(
            f"--call {expression!r} is not a Python expression ({error.msg}): write it as module(x)"
        ) from None
    turned = "transpose" in expression or "permute" in expression
    first = getattr(module, "batch_first", True) is False and not turned
    fours = {"2d": (False,), "4d": (True,), "auto": (False, True)}[shape]
    tries = [Caller(expression, style, four, first) for four in fours]
    if len(tries) == 1:
        return tries[0]
    two, four = tries
    try:
        two(module, x)
        return two
    except NameError as error:
        known = "module, x, mask, positions, additive, keep, drop, rotary, torch"
        raise UserError(f"--call {expression!r}: {error}; the names it may use are {known}") from None
    except Exception:
        return four if _works(four, module, x) else two


def _works(attempt: Caller, module: nn.Module, x: Tensor) -> bool:
    try:
        attempt(module, x)
    except Exception:
        return False
    return True


def guess_call(module: nn.Module) -> str:
    """Return the call of a module with this forward: x for what it must be given, masks and positions by their names.

    UserError where forward wants something else.
    """
    words = []
    for i, (name, parameter) in enumerate(inspect.signature(module.forward).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:
            break
        if "mask" in name:
            words.append("mask")
        elif "position" in name and "embed" not in name:
            words.append("positions")
        elif i == 0 or name in ("q", "k", "v", "query", "key", "value", "queries", "keys", "values", "context"):
            words.append("x")
        else:
            raise UserError(
                f"forward also wants {name!r}: say how to call it, for example --call 'module(x, {name}=...)'"
            )
    return f"module({', '.join(words)})" if words else "module(x)"


def mask_parameter(module: nn.Module) -> str | None:
    """Return the name of the parameter through which forward takes a mask; None where it takes none."""
    names = inspect.signature(module.forward).parameters
    return next((n for n in names if n in ("attn_mask", "attention_mask", "mask", "causal_mask")), None)
