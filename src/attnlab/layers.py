"""PyTorch's layers, faster on a CPU: linear, dropout and norms.

Linear: x W^T + b. Decoding is limited by reading weights, and PyTorch reads them slowly on some processors. On two
cores of an AMD EPYC, which read memory at 37 GB/s, one row times a float32 matrix ran at 13 to 19 GB/s in MKL. oneDNN,
which comes with PyTorch too, reached 21 to 32 GB/s with the same layout, so it is used where no gradients are needed.
In bfloat16 oneDNN reaches 13 to 18 GB/s, unless the weights are stored a second time in its own order. A plain loop
over the matrix, which is what `torch.compile` makes of one row, reached 19 to 31. benchmarks/decode.py measures it.

Dropout: on a CPU, PyTorch draws one Bernoulli number at a time. In a small model that takes longer than all matrix
products together. Here one 64-bit draw decides for four elements. On other devices it is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .errors import UserError, quoted
from .ranges import checked

ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b. x: ... I, weight: O I, bias: O -> ... O."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        one_row = x.shape[:-1].numel() == 1
        return _one_row(x, weight, bias) if one_row else F.linear(x, weight, bias)
    if ONEDNN and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(exact) * x.to(exact).flatten()).sum(-1)
    y = y if bias is None else y + bias.to(exact)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear`, as fast as the weights can be read."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """Return x, each element zero with probability `p` (to 2^-16), the others scaled by 1 / (1 - p).

    The default generator draws.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"x is {quoted(x)}: give a tensor")
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise UserError(f"p is {quoted(p)}: it must be a probability, at least 0 and below 1")
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


def survivors(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Return 1 for elements that stay and 0 for others, as a tensor like `like`, and the scale that keeps the mean."""
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


@checked
def make_norm(config: ModelConfig) -> nn.Module:
    """Return a norm over d_model, as the model's config says."""
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.resolved_norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.resolved_norm_eps, bias=config.bias)


@contextmanager
def default_weights() -> Iterator[Callable[[Tensor | None], bool]]:
    """Yield a function that tells whether a parameter still has the values that PyTorch gave it in this context.

    It knows the weights and biases of linear layers and embeddings that are made while the context is open.
    """
    given: dict[int, float] = {}
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    resets = [kind.reset_parameters for kind in kinds]

    def watched(reset: Callable[[Any], None]) -> Callable[[Any], None]:
        def reset_parameters(layer: Any) -> None:
            reset(layer)
            given.update({id(p): _sum(p) for p in layer.parameters(recurse=False)})

        return reset_parameters

    def untouched(parameter: Tensor | None) -> bool:
        return parameter is not None and given.get(id(parameter)) == _sum(parameter)

    for kind, reset in zip(kinds, resets, strict=True):
        kind.reset_parameters = watched(reset)
    try:
        yield untouched
    finally:
        for kind, reset in zip(kinds, resets, strict=True):
            kind.reset_parameters = reset


def _sum(parameter: Tensor) -> float:
    """Return a number that changes with the values of a parameter; 0 where it has none, on the meta device."""
    return 0.0 if parameter.is_meta else float(parameter.detach().sum(dtype=torch.float64))


class Dropout(nn.Dropout):
    """`nn.Dropout`, with the faster draws of `dropout` on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight: under autocast x may be narrower, and PyTorch warns of the mix."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
