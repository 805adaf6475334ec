"""A bare function of q, k and v as a module, so that the laws can be put to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose
from .call import Caller, first_tensor, one_line

LAYOUTS = ("bhtd", "bthd", "btd")  # axes of q, k and v: batch, head, token, size
D_MODEL = 32
N_HEADS = 4


class OfFunction(nn.Module):
    """Attention by a function of q, k, v between a projection and another: x [B T 32] -> y [B T 32], 4 heads."""

    def __init__(self, function: Callable[..., Any], layout: str = "bhtd") -> None:
        super().__init__()
        self.function = function
        self.layout = choose("layout", layout, LAYOUTS)
        self.d_model = D_MODEL
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL)
        self.o = nn.Linear(D_MODEL, D_MODEL)

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q, k, v in the layout of the function."""
        return [self._in_layout(t) for t in self.qkv(x).chunk(3, -1)]

    def _in_layout(self, t: Tensor) -> Tensor:
        if self.layout == "btd":
            return t
        heads = t.unflatten(-1, (N_HEADS, -1))
        return heads.transpose(1, 2) if self.layout == "bhtd" else heads

    def merge(self, output: Any) -> Tensor:
        """Return y [B T D] from what the function returned in its layout."""
        y = output[0] if isinstance(output, tuple | list) else output
        if self.layout == "bhtd":
            y = y.transpose(1, 2)
        return self.o(y if self.layout == "btd" else y.flatten(2))

    @property
    def token_axis(self) -> int:
        """The axis of q, k and v that counts tokens."""
        return 2 if self.layout == "bhtd" else 1


@dataclasses.dataclass(frozen=True)
class FunctionCaller:
    """A way to call a function, as an expression of `function`, q, k, v and the names of `Caller`, such as masks."""

    caller: Caller

    @property
    def expression(self) -> str:
        """The expression."""
        return self.caller.expression

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return y [B T D] of an `OfFunction`."""
        assert isinstance(module, OfFunction)
        q, k, v = module.project(x)
        names = {"function": module.function, "q": q, "k": k, "v": v}
        return module.merge(self.caller.on(module, x, names))

    def step(self, module: nn.Module, x: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        """Return y [B T D] of tokens from `start` on, and the keys and values up to them: q is short, k and v long."""
        assert isinstance(module, OfFunction)
        q, k, v = module.project(x)
        if cache is not None:
            k, v = (torch.cat([old, new], module.token_axis) for old, new in zip(cache, (k, v), strict=True))
        names = {"function": module.function, "q": q, "k": k, "v": v, "start": start}
        return module.merge(self.caller.on(module, x, names, start)), (k, v)


def of_function(function: Callable[..., Any], caller: Caller, layout: str | None = None) -> OfFunction:
    """Return the function as a module, in the layout in which it mixes tokens. UserError where it runs in none."""
    why = ""
    fallback = None
    for attempt in [layout] if layout else LAYOUTS:
        module = OfFunction(function, attempt)
        call = FunctionCaller(caller)
        x = torch.randn(2, 13, D_MODEL)
        changed = x.clone()
        changed[0, 5] += 3
        try:
            with torch.no_grad():
                y = first_tensor(call(module, x), x)
                moved = (call(module, changed) - y).abs().amax(2)[0] > 1e-6
        except NameError as error:
            raise UserError(f"--call {caller.expression!r}: {error}") from None
        except Exception as error:
            why = why or one_line(error)
            continue
        if bool(moved[:5].any() or moved[6:].any()):
            return module
        fallback = fallback or module
    if fallback is not None:
        return fallback
    name = getattr(function, "__name__", "the function")
    raise UserError(f"{name} cannot be called as {caller.expression} with q, k, v of shape [B H T D]: {why}")
