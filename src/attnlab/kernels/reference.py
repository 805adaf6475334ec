"""The specification of all kernels: softmax attention, step by step as in the formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from .pairs import Heads, Pairs, Scoring, per_head


def weights(q: Heads, k: Heads, pairs: Pairs, scoring: Scoring) -> Tensor:
    """Return the weights that each query gives to the keys it sees: B N L S. A query that sees none has weights 0."""
    scores = sum_of_products(q, k) * scoring.scale
    return scoring.weights(scores, pairs.dense())


def sum_of_products(q: Heads, k: Heads) -> Tensor:
    """Return the products of queries and keys, added up over the parts: B N L S."""
    total: Tensor | None = None
    for queries, keys in zip(q, k, strict=True):
        grouped = queries.unflatten(2, (keys.shape[2], -1))  # B L K N/K H
        scores = torch.einsum("blkgh,bskh->bkgls", grouped, keys).flatten(1, 2)
        total = scores if total is None else total + scores
    assert total is not None
    return total


def attend(q: Heads, k: Heads, v: Tensor, pairs: Pairs, scoring: Scoring, dropout: float) -> Tensor:
    """Return the weighted sum of the values that each query sees: B L N V."""
    dropped = drop(weights(q, k, pairs, scoring), dropout)
    return torch.einsum("bnls,bsnv->blnv", dropped, per_head(v, q[0].shape[2]))
