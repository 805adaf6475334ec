"""The specification of all kernels: softmax attention, step by step as in the formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from .pairs import Pairs, per_head


def weights(q: Tensor, k: Tensor, pairs: Pairs, scale: float) -> Tensor:
    """Return softmax(q k^T scale) over the keys that each query sees: B N L S. A query that sees none has weights 0."""
    grouped = q.unflatten(2, (k.shape[2], -1))  # B L K N/K H
    scores = torch.einsum("blkgh,bskh->bkgls", grouped, k).flatten(1, 2) * scale
    seen = pairs.dense()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1).masked_fill(~seen, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    """Return softmax(q k^T scale) v for the pairs that may see each other: B L N V."""
    dropped = drop(weights(q, k, pairs, scale), dropout)
    return torch.einsum("bnls,bsnv->blnv", dropped, per_head(v, q.shape[2]))
