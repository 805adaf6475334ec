"""In the manner of a large library: relative imports over three levels, decorators and bases of a framework that is not
installed, an annotated config, rotary tables handed in, a mask [B 1 T T], a tuple out."""

from __future__ import annotations

import torch
from a_framework_not_here import auto_docstring, kernels
from a_framework_not_here.modeling import PreTrainedModel, is_available
from a_framework_not_here.utils import logging
from torch import nn

from ...activations import ACTIVATIONS
from ..missing_sibling import Cache
from . import SCALE
from .configuration_small import OwnConfig

logger = logging.get_logger(__name__)
if is_available("flash"):
    from a_framework_not_here.flash import flash_attention


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


@kernels.use("RMSNorm")
class SmallNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@auto_docstring
class SmallAttention(nn.Module):
    def __init__(self, config: OwnConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_heads
        self.groups = config.num_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, config.hidden_size)
        self.norm = SmallNorm(config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_value: Cache | None = None,
        **kwargs,
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        hidden_states = self.norm(ACTIVATIONS["silu"](hidden_states))
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if isinstance(past_key_value, Cache):
            k, v = past_key_value.update(k, v, self.layer_idx)
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        weights = q @ k.transpose(2, 3) * (self.head_dim**-0.5) * SCALE
        if attention_mask is not None:
            assert attention_mask.shape[:2] == (hidden_states.shape[0], 1)
            weights = weights + attention_mask[:, :, :, : k.shape[-2]]
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return self.o_proj(y), weights


class FlashAttention(SmallAttention):
    """Uses what is not installed."""

    def forward(self, hidden_states):
        return flash_attention(hidden_states)


class NeedsLogger(nn.Module):
    def __init__(self, size):
        super().__init__()
        logger.warning("built")
        self.inner = nn.Linear(size, size)


class SmallModel(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)


class ModuleAndMixin(nn.Module, PreTrainedModel):
    def forward(self, x):
        return x
