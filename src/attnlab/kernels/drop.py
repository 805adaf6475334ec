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


def survivors(like: Tensor, p: float) -> tuple[Tensor, float]:
    """1 where an element stays and 0 where it goes, shaped and typed as `like`, and the scale that keeps the mean."""
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    gone = round(p * 2**16)
    kept = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.ge(draws[: like.numel()].view(like.shape), gone - 2**15, out=kept)
    return kept, 2**16 / (2**16 - gone)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.scale = survivors(x, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(ctx.scale), None
