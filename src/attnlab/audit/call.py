"""Somebody's attention module, called: how it takes x and a mask is found out or given."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose

MASKS = ("additive", "keep", "drop")


# How it is called -------------------------------------------------------------------------------------------------


def causal_mask(length: int, style: str, dtype: torch.dtype) -> Tensor:
    """[T T]. additive: 0 or -inf; keep: True where a token may be seen; drop: True where it may not."""
    choose("mask style", style, MASKS)
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    if style == "additive":
        return torch.zeros(length, length, dtype=dtype).masked_fill(~keep, -math.inf)
    return keep if style == "keep" else ~keep


def rotary(head_dim: int, theta: float = 10_000.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def table(x: Tensor) -> tuple[Tensor, Tensor]:
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
        angle = torch.cat([angle, angle], -1).expand(x.shape[0], -1, -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    return table


@dataclasses.dataclass(frozen=True)
class Caller:
    """How to call a module on x: an expression with the names below, and the form of the mask it is handed.

    module, x [B T D], positions [B T], mask (a causal one, [T T] or [B 1 T T], in `style`), the same mask in each style
    as `additive`, `keep` and `drop`, `rotary(head_dim)` -> (cos, sin) [B T head_dim], torch.
    """

    expression: str
    style: str = "additive"
    four: bool = False  # [B 1 T T] rather than [T T]
    sequence_first: bool = False  # the module takes [T B D]

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
            "rotary": lambda head_dim, theta=10_000.0: rotary(head_dim, theta)(x),
            "torch": torch,
            **masks,
        }
        y = eval(self.expression, names)
        return self._batch_first(y) if self.sequence_first else y

    def _batch_first(self, y: Any) -> Any:
        while not isinstance(y, Tensor):
            y = next(iter(y.values())) if isinstance(y, Mapping) else y[0]
        return y.transpose(0, 1)


def caller(module: nn.Module, expression: str | None, style: str, shape: str, x: Tensor) -> Caller:
    """The way to call this module; what was not said is found out by trying."""
    choose("mask style", style, MASKS)
    choose("mask shape", shape, ("auto", "2d", "4d"))
    expression = expression or guess(module)
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
    for attempt in tries[:-1]:
        try:
            attempt(module, x)
            return attempt
        except NameError as error:
            known = "module, x, mask, positions, additive, keep, drop, rotary, torch"
            raise UserError(f"--call {expression!r}: {error}; the names it may use are {known}") from None
        except Exception:
            continue
    return tries[-1] if shape != "auto" or _works(tries[-1], module, x) else tries[0]


def _works(attempt: Caller, module: nn.Module, x: Tensor) -> bool:
    try:
        attempt(module, x)
    except Exception:
        return False
    return True


def guess(module: nn.Module) -> str:
    """How a module with this forward is called: x for what it must be given, masks and positions by their names."""
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
    """The name of the parameter through which forward takes a mask, if it does."""
    names = inspect.signature(module.forward).parameters
    return next((n for n in names if n in ("attn_mask", "attention_mask", "mask", "causal_mask")), None)
