"""PyTorch's FlexAttention: the mask is compiled into the kernel, and blocks that nobody sees are skipped.

Without a GPU it runs unfused, and forward only: FlexAttention has no backward on CPU (pytorch #148752), so asking for
gradients there raises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..spec import UserError
from . import Pairs, per_head


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, dropout: float) -> Tensor:
    if dropout:
        raise UserError(f"impl 'flex' has no dropout and {dropout} was given: set dropout 0 or impl 'sdpa'")
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise UserError("impl 'flex' has no gradients on the CPU: train with impl 'sdpa' or 'reference', or on a GPU")
    B, L, N, _ = q.shape
    q_pos, k_pos, keep, mask = pairs.q_pos, pairs.k_pos, pairs.keep, pairs.mask

    def allowed(b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = mask(q_pos[b, i], k_pos[b, j])
        return seen if keep is None else seen & keep[b % keep.shape[0], n % keep.shape[1], i, j]

    heads = None if keep is None or keep.shape[1] == 1 else N
    block = create_block_mask(allowed, B, heads, L, k.shape[1], device=q.device.type)
    q, k, v = (t.transpose(1, 2) for t in (q, per_head(k, N), per_head(v, N)))
    return flex_attention(q, k, v, block_mask=block, scale=scale).transpose(1, 2)
