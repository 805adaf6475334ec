"""A call of somebody's attention module, written as an expression: on a whole sequence, or on a chunk with a cache."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose
from .state import tensors_in, unchanged

MASKS = ("additive", "keep", "drop")
NAMES = "module, x, mask, positions, additive, keep, drop, rotary, torch"  # which an expression may use
STEP_NAMES = f"{NAMES}, cache, start"
CACHES = (
    *("past_key_values", "past_key_value", "layer_past", "past_kv", "past_state", "past", "kv_cache", "cache"),
    *("cache_params", "state", "prev_state", "hx"),
)  # parameters of forward through which modules take the cache that an earlier call returned
FLAGS = ("use_cache", "return_cache", "return_kv", "return_kv_cache", "return_state", "output_cache", "cache_output")


def causal_mask(length: int, style: str, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return a mask [length, start + length] for tokens from `start` on, which see themselves and all before them.

    additive: 0 or -inf; keep: True where a token may be seen; drop: True where it may not.
    """
    choose("mask style", style, MASKS)
    keep = torch.ones(length, start + length, dtype=torch.bool).tril(start)
    if style == "additive":
        return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -math.inf)
    return keep if style == "keep" else ~keep


def rotary_tables(x: Tensor, head_dim: int, theta: float = 10_000.0, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return the cosine and the sine of rotary embedding for x [B T D], both [B T head_dim], halves repeated."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = (start + torch.arange(x.shape[1], dtype=torch.float64))[:, None] * frequency
    angle = torch.cat([angle, angle], -1).expand(x.shape[0], -1, -1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def first_tensor(output: Any, x: Tensor) -> Tensor:
    """Return y [B T D]: the output, or its first element, or a mapping's first value.

    UserError where that is no tensor, or has another batch or length than x [B T D].
    """
    y = output
    while not isinstance(y, Tensor):
        if isinstance(y, Mapping) and y:
            y = next(iter(y.values()))
        elif isinstance(y, Sequence) and not isinstance(y, str) and len(y):
            y = y[0]
        else:
            raise UserError(
                f"the module returned {type(output).__name__}: the laws need a tensor [B T D], or a tuple that "
                "begins with one"
            )
    if y.ndim != 3 or y.shape[:2] != x.shape[:2]:
        raise UserError(
            f"for x of shape {list(x.shape)} the module returned {list(y.shape)}: the laws need [B T D] with the "
            "same B and T"
        )
    return y


@contextlib.contextmanager
def no_exit() -> Iterator[None]:
    """Turn an attempt of somebody's code to end the process into an ordinary error."""
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError(f"SystemExit: {stop.code}").with_traceback(stop.__traceback__) from None


@dataclasses.dataclass(frozen=True)
class Caller:
    """A way to call a module on x: an expression with the names below, and the form of the mask.

    module, x [B T D], positions [B T], mask (a causal one, [T T] or [B 1 T T], in `style`), the same mask in each style
    as `additive`, `keep` and `drop`, `rotary(head_dim)` -> (cos, sin) [B T head_dim], torch. In a step also cache (None
    at first) and start, the number of tokens before x; masks are then [T, start + T].
    """

    expression: str = "module(x)"
    style: str = "additive"  # of `mask`; one of MASKS
    four: bool = False  # masks are [B 1 T T] rather than [T T]
    sequence_first: bool = False  # x is [T B D]

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        """Return the output for x [B T D]; of a module that takes [T B D], the output is turned back."""
        return self.on(module, x, {})

    def on(self, module: nn.Module, x: Tensor, more: Mapping[str, Any], start: int = 0) -> Any:
        """Return the output for x [B T D] that begins at `start`, with further names for the expression."""
        B, T, _ = x.shape
        masks = {style: causal_mask(T, style, x.dtype, start) for style in MASKS}
        if self.four:
            masks = {style: mask.expand(B, 1, T, start + T) for style, mask in masks.items()}
        names = {
            "module": module,
            "x": x.transpose(0, 1).contiguous() if self.sequence_first else x,
            "positions": (start + torch.arange(T)).expand(B, -1),
            "mask": masks[self.style],
            "rotary": lambda head_dim, theta=10_000.0: rotary_tables(x, head_dim, theta, start=start),
            "torch": torch,
            **masks,
            **more,
        }
        with no_exit():
            output = eval(self.expression, names)
        if not self.sequence_first:
            return output
        return first_tensor(output, names["x"]).transpose(0, 1), output


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One call of decoding, `(module, x [B T D], cache, start) -> (output, cache)`. The first cache is None.

    The expression may return (y, cache), or y alone; then the cache is `cache` if the module was given one to write to,
    and else the module itself, of which every sequence gets a copy.
    """

    caller: Caller
    place: int | str | None = 1  # where in the output the cache is; None: not in the output
    cache: str | None = None  # the kind of transformers' cache that it is given and writes to: plain or of_config

    @property
    def expression(self) -> str:
        """The expression."""
        return self.caller.expression

    def __call__(self, module: nn.Module, x: Tensor, cache: Any, start: int) -> tuple[Any, Any]:
        """Return the output for x [B T D], tokens from `start` on, and the cache with them."""
        if self.cache is not None:
            cache = _dynamic_cache(module, self.cache) if cache is None else cache
            return self.caller.on(module, x, {"cache": cache, "start": start}, start), cache
        if self.place is None:
            holder = copy.deepcopy(module) if cache is None else cache
            return self.caller.on(holder, x, {"cache": None, "start": start}, start), holder
        output = self.caller.on(module, x, {"cache": cache, "start": start}, start)
        raw = output[1] if self.caller.sequence_first else output
        return output, raw[self.place]


def given_step(module: nn.Module, caller: Caller, expression: str, x: Tensor) -> DecodeStep:
    """Return the step that `expression` describes. UserError where it does not run twice in a row."""
    step = dataclasses.replace(caller, expression=expression)
    why: Exception | None = None
    for attempt in _forms(module, step, x, "cache" in expression):
        try:
            _twice(attempt, module, x)
            return attempt
        except NameError as error:
            raise UserError(f"--step {expression!r}: {error}; the names it may use are {STEP_NAMES}") from None
        except Exception as error:
            why = why or error
    raise UserError(
        f"--step {expression!r} does not run for {type(module).__name__}: {one_line(why) if why else 'it returns no y'}"
    )


def found_step(module: nn.Module, caller: Caller, x: Tensor) -> DecodeStep | None:
    """Return how one step of decoding is called, as far as forward's parameters tell; None where they do not."""
    if not caller.expression.startswith("module(") or not caller.expression.endswith(")"):
        return None
    parameters = inspect.signature(module.forward).parameters
    flags = [f"{name}=True" for name in FLAGS if name in parameters and f"{name}=" not in caller.expression]
    for name in CACHES:
        if name not in parameters or f"{name}=" in caller.expression:
            continue
        words = ", ".join([f"{name}=cache", *flags])
        step = dataclasses.replace(caller, expression=f"{caller.expression[:-1]}, {words})")
        for attempt in _forms(module, step, x, takes=True):
            try:
                _twice(attempt, module, x)
                return attempt
            except Exception:
                continue
    return None


def _forms(module: nn.Module, caller: Caller, x: Tensor, takes: bool) -> list[DecodeStep]:
    """Return the steps that this call could be: it writes to a cache, returns one, or keeps it in the module."""
    if not takes:
        return [DecodeStep(caller, None)]
    forms = []
    if hasattr(module, "layer_idx") and "transformers" in sys.modules:
        forms = [DecodeStep(caller, None, cache=kind) for kind in ("plain", "of_config")]
    try:
        with torch.no_grad():
            output = caller.on(copy.deepcopy(module), x, {"cache": None, "start": 0})
    except NameError:
        raise
    except Exception:
        return forms
    raw = output[1] if caller.sequence_first else output
    if isinstance(raw, Mapping):
        places: list[int | str] = [key for key in raw if key in CACHES]
    else:
        places = list(range(1, len(raw))) if isinstance(raw, tuple | list) else []
    found = sorted((p for p in places if raw[p] is not None), key=lambda p: isinstance(raw[p], Tensor))
    return forms + [DecodeStep(caller, place) for place in found]


def _twice(step: DecodeStep, module: nn.Module, x: Tensor) -> None:
    """Decode two chunks. ValueError where what the first one returned is no cache: the module takes no notice of it."""
    with torch.no_grad():
        fresh = copy.deepcopy(module)
        first = x[:, :3].contiguous()
        second = x[:, 3:4].contiguous()
        output, cache = step(fresh, first, None, 0)
        first_tensor(output, first)
        if step.cache is not None and next(tensors_in(cache), None) is None:
            raise ValueError("nothing is written to the cache it is given")
        output, _ = step(fresh, second, cache, 3)
        y = first_tensor(output, second)
        if isinstance(cache, Tensor):  # a state, or attention weights
            alone, _ = step(fresh, second, None, 3)
            if torch.equal(y, first_tensor(alone, second)):
                raise ValueError("it takes no notice of what it returned")


def _dynamic_cache(module: nn.Module, kind: str) -> Any:
    """Return an empty cache of transformers, for keys and values or with the layers that the module's config names."""
    library = sys.modules["transformers"]
    return library.DynamicCache(config=module.config) if kind == "of_config" else library.DynamicCache()


def is_sequence_first(call: Caller, module: nn.Module, x: Tensor) -> bool | None:
    """Return whether a module that is called on x [B T D] takes the first axis for the sequence; None: cannot tell.

    Batch and length of x differ. A change of one token moves other tokens of its sequence, and no other sequence.
    """
    changed = x.clone()
    changed[0, 2] += 3
    with torch.no_grad(), unchanged(module):
        y = first_tensor(call(module, x), x)
        moved = (first_tensor(call(module, changed), x) - y).abs().amax(2) > 1e-6 * float(y.abs().max())
    if bool(moved[0, :2].any() or moved[0, 3:].any()):
        return False
    return True if bool(moved[1:].any()) else None


def one_line(error: BaseException) -> str:
    """Return the exception's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def in_full(error: BaseException) -> str:
    """Return the exception's name, its whole message in one line, and the place in the file that raised it."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
