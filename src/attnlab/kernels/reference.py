"""The specification: attention as the formula says, in as many steps as it takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from .pairs import Pairs, per_head


def weights(q: Tensor, k: Tensor, pairs: Pairs, scale: float) -> Tensor:
    """softmax(q k^T scale) over the keys that each query sees: B N L S. A query that sees nothing has weights 0."""
    scores = torch.einsum("blkgh,bskh->bkgls", q.unflatten(2, (k.shape[2], -1)), k).flatten(1, 2) * scale
    seen = pairs.dense()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1).masked_fill(~seen, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    return torch.einsum("bnls,bsnv->blnv", drop(weights(q, k, pairs, scale), dropout), per_head(v, q.shape[2]))
