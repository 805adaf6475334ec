"""FLOPs of a call as a counter sees them, products with one term included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def counted_products(call: Callable[[], Any]) -> int:
    """Return the FLOPs of the matrix products of `call`, two per multiply-add.

    Whether a sum has one term or many changes nothing: `einsum` makes an elementwise product of one term, which a
    counter does not see, and `matmul` a matrix product, which it sees. A product that sums nothing is none.
    """
    with _OneTerm() as few, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() + few.flops


class _OneTerm(TorchFunctionMode):
    """A count of the products of `einsum` whose sums have one term."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and len(args) == 3:  # an equation of two operands
            left, right = args[0].replace(" ", "").split("->")
            sizes: dict[str, int] = {}
            for letters, operand in zip(left.split(","), args[1:], strict=True):
                for letter, size in zip(letters, operand.shape, strict=True):
                    sizes[letter] = max(size, sizes.get(letter, 1))
            summed = set(sizes) - set(right)
            if summed and all(sizes[letter] == 1 for letter in summed):
                self.flops += 2 * math.prod(sizes.values())
        return func(*args, **(kwargs or {}))
