"""PyTorch's FlexAttention: the mask is compiled into the kernel, and blocks of pairs that are all hidden are skipped.

On a GPU the fused kernel is compiled at the first call. On a CPU the same masks run in its unfused form, to be checked.
That has no gradients (pytorch #148752), so asking for them raises `UserError`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..errors import UserError
from .pairs import Heads, Pairs, Scoring, joined, per_head

# the argument that asks for the logarithm of the sum of exponentials too; PyTorch 2.8 has the old one alone
NEW = hasattr(library, "AuxRequest")
LOGSUMEXP: dict[str, Any] = {"return_aux": library.AuxRequest(lse=True)} if NEW else {"return_lse": True}


def attend(q: Heads, k: Heads, v: Tensor, pairs: Pairs, scoring: Scoring, dropout: float) -> Tensor:
    """Return the weighted sum of the values that each query sees: B L N V.

    Raises `UserError` for dropout, and for gradients on a CPU.
    """
    if dropout:
        raise UserError(f"impl 'flex' has no dropout and {dropout} was given: set dropout 0 or impl 'sdpa'")
    if v.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (*q, *k, v)):
        raise UserError("impl 'flex' has no gradients on a CPU: train with impl 'sdpa' or 'reference', or on a GPU")
    B, L, N, _ = q[0].shape
    mask, keep = pairs.mask, pairs.keep  # a closure over plain tensors is what torch.compile can trace
    q_pos, k_pos = pairs.q_pos, pairs.k_pos

    def allowed(b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = mask(q_pos[b, i], k_pos[b, j])
        return seen if keep is None else seen & keep[b % keep.shape[0], n % keep.shape[1], i, j]

    heads = None if keep is None or keep.shape[1] == 1 else N
    block = create_block_mask(allowed, B, heads, L, v.shape[1], device=v.device.type)
    query = joined(q, N).transpose(1, 2)
    key = joined(k, N).transpose(1, 2)
    value = per_head(v, N).transpose(1, 2)
    kernel = _kernel(v.device.type)
    changed = _changed(scoring)
    if scoring.rest is None:
        return kernel(query, key, value, changed, block, scoring.scale).transpose(1, 2)
    y, total = kernel(query, key, value, changed, block, scoring.scale, **LOGSUMEXP)
    total = getattr(total, "lse", total)
    read = (total - scoring.rest.to(total.dtype)[:, None]).sigmoid()  # B N L: what the rest leaves
    return (y * read[..., None].to(y.dtype)).transpose(1, 2)


def _changed(scoring: Scoring) -> Callable[..., Tensor] | None:
    """Return `score` as FlexAttention calls it, for one pair at a time."""
    score = scoring.score
    of_query = scoring.of_query
    of_key = scoring.of_key
    if score is None:
        return None

    def changed(z: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query = [t[b % t.shape[0], i, n % t.shape[2]] for t in of_query]
        key = [t[b % t.shape[0], j, n % t.shape[2]] for t in of_key]
        return score(z, *query, *key)

    return changed


@cache
def _kernel(device: str) -> Callable[..., Any]:
    return _unfused if device == "cpu" else torch.compile(flex_attention)


def _unfused(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return flex_attention(*args, **kwargs)
    with warnings.catch_warnings(), _untraced():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **kwargs)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Let PyTorch run the unfused form as it is: it would trace it again for every shape, and run it the same.

    The switch is the one that its warning names. PyTorch has no gradients there, and this kernel has none on a CPU.
    """
    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(library, switch, False)
    setattr(library, switch, True)
    try:
        yield
    finally:
        setattr(library, switch, before)
