"""The way to call somebody's attention module: given, or found out from forward's parameters and by trying."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose, quoted
from ..laws.call import MASKS, NAMES, Caller, first_tensor, is_sequence_first
from ..laws.functions import FunctionCaller, OfFunction, of_function
from ..laws.state import unchanged

ROTARY = "position_embeddings"  # the parameter through which classes of transformers take rotary tables
ROTARY_SIZES = ("head_dim", "attention_head_size", "qk_rope_head_dim")  # attributes that tell the width of its tables


def find_caller(module: nn.Module, expression: str | None, style: str, shape: str, x: Tensor) -> Caller:
    """Return the way to call this module; what was not given is found out by trying.

    expression: None: from the parameters of forward. shape: of the mask: 2d, 4d or auto. x [B T D], whose axes are told
    apart by their lengths. UserError where the expression is no Python, uses an unknown name, or cannot be guessed.
    """
    choose("mask style", style, MASKS)
    fours = {"2d": (False,), "4d": (True,), "auto": (False, True)}[choose("mask shape", shape, ("2d", "4d", "auto"))]
    expressions = [require_python("--call", expression)] if expression else guess_calls(module)
    hint = any(getattr(part, "batch_first", True) is False for part in module.modules())
    tries: list[Caller] = []
    for words in expressions:
        turned = "transpose" in words or "permute" in words
        orders = (False,) if turned else (hint, not hint)
        tries += [Caller(words, style, four, order) for order in orders for four in fours]
    running = [attempt for attempt in tries if _works(attempt, module, x)]
    right = (attempt for attempt in running if _is_right_way_round(attempt, module, x))
    return next(right, (running or tries)[0])


def _is_right_way_round(attempt: Caller, module: nn.Module, x: Tensor) -> bool:
    """Return whether a change of one token moves others of its sequence when x is given in this order."""
    try:
        return is_sequence_first(attempt, module, x) is False
    except Exception:
        return False


def require_python(option: str, expression: str) -> str:
    """Return the expression. UserError where it is no Python expression, or does not use the module."""
    try:
        tree = ast.parse(expression, option, "eval")
    except SyntaxError as error:
        raise UserError(
            f"{option} {expression!r} is not a Python expression ({error.msg}): write it as module(x)"
        ) from None
    if not any(isinstance(node, ast.Name) and node.id in ("module", "function") for node in ast.walk(tree)):
        raise UserError(f"{option} {quoted(expression)} calls nothing that could be judged: write module(x)")
    return expression


def _works(attempt: Caller, module: nn.Module, x: Tensor) -> bool:
    """Return whether the call runs and gives numbers. UserError where it uses a name that there is not."""
    try:
        with unchanged(module), torch.no_grad():
            y = first_tensor(attempt(module, x), x)
    except NameError as error:
        raise UserError(f"--call {attempt.expression!r}: {error}; the names it may use are {NAMES}") from None
    except Exception:
        return False
    return bool(y.isfinite().all())


def guess_calls(module: nn.Module) -> list[str]:
    """Return calls of a module with this forward, the likeliest first.

    x for what it must be given, masks and positions by their names. An attention class of transformers is given its
    mask and its rotary tables also where forward has defaults for them, because its model gives them always; what else
    it calls a mask may be one of pads, and then the call without it is right. UserError where forward wants something
    else.
    """
    if not type(module).__module__.startswith("transformers."):
        return [_guess(module, ())]
    masks: tuple[tuple[str, ...], ...] = (("attention_mask",), ())
    positions: tuple[tuple[str, ...], ...] = ((), ("position_ids",))
    calls = [_guess(module, (ROTARY, *mask, *ids)) for mask in masks for ids in positions]
    return list(dict.fromkeys(calls))


def _guess(module: nn.Module, optional: Sequence[str]) -> str:
    """Return the call that gives what must be given, and of `optional` what forward takes."""
    words: list[str] = []
    for i, (name, parameter) in enumerate(inspect.signature(module.forward).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        has_default = parameter.default is not parameter.empty
        if has_default and name not in optional:
            continue
        given = _argument(module, name, i)
        if given is None:
            raise UserError(
                f"forward also wants {name!r}: say how to call it, for example --call 'module(x, {name}=...)'"
            )
        words.append(f"{name}={given}" if has_default or len(words) != i else given)
    return f"module({', '.join(words)})" if words else "module(x)"


def _argument(module: nn.Module, name: str, place: int) -> str | None:
    """Return what to give to forward's parameter of this name; None where it is not known."""
    if "mask" in name:
        return "mask"
    if name == ROTARY:
        config = getattr(module, "config", None)
        sizes = (getattr(holder, size, None) for holder in (module, config) for size in ROTARY_SIZES)
        size = next((size for size in sizes if isinstance(size, int)), None)
        return f"rotary({size})" if size else None
    if "position" in name:
        return "positions"
    named = ("q", "k", "v", "query", "key", "value", "queries", "keys", "values", "context")
    return "x" if place == 0 or name in named else None


def function_caller(
    function: Callable[..., Any], expression: str | None, style: str, layout: str | None
) -> tuple[OfFunction, FunctionCaller]:
    """Return a function of q, k, v as a module, and the way to call it."""
    caller = Caller(require_python("--call", expression or "function(q, k, v)"), choose("mask style", style, MASKS))
    return of_function(function, caller, layout), FunctionCaller(caller)


def mask_parameter(target: nn.Module | Callable[..., Any]) -> str | None:
    """Return the name of the parameter through which it takes a mask, or a flag for one; None where it takes none."""
    try:
        names = inspect.signature(target.forward if isinstance(target, nn.Module) else target).parameters
    except ValueError:  # a function without a signature, such as one written in C++
        return None
    return next((n for n in names if n in ("attn_mask", "attention_mask", "mask", "causal_mask")), None)
