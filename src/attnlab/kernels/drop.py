"""Dropout. On a CPU, PyTorch draws one Bernoulli number at a time, which takes longer than all matrix products of a
small model together; here one 64-bit draw decides for four elements. Elsewhere it is PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability `p` (to 2^-16) and scale the others by 1 / (1 - p). Draws from the default
    generator."""
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        least = round(p * 2**16) - 2**15
        kept = (draws[: x.numel()] >= least).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - round(p * 2**16) / 2**16)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(ctx.scale), None
