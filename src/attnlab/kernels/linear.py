"""x W^T + b. Decoding is reading weights, and PyTorch's own way reads them slowly on some processors: on two cores of
an AMD EPYC, which read memory at 37 GB/s, one row times a float32 matrix ran at 13 to 19 GB/s in MKL. oneDNN, which
comes with PyTorch too, reached 21 to 32 with the same layout, so without gradients it is used instead. In bfloat16 it
reaches 13 to 18, unless the weights are stored again in an order of its own; a plain loop over the matrix, which is
what one row becomes under `torch.compile`, reached 19 to 31. benchmarks/decode.py measures what comes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: ... I, weight: O I, bias: O -> ... O."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias) if x.shape[:-1].numel() != 1 else _one_row(x, weight, bias)
    if ONEDNN and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(exact) * x.to(exact).flatten()).sum(-1)
    y = y if bias is None else y + bias.to(exact)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`nn.Linear`, at the speed of memory."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
