"""A single-file GPT: one config object, a constructor that prints, a context length, a guarded optional import."""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

try:
    from flash_attn_not_here import flash_attn_func

    HAS_FLASH = True
except ImportError:
    HAS_FLASH = False


@dataclass
class GPTConfig:
    block_size: int = 64
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.1
    bias: bool = True


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.01M")
        warnings.warn("using slow attention", stacklevel=2)
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        size = config.block_size
        self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x):
        B, T, C = x.size()
        if HAS_FLASH:
            return flash_attn_func(x)
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class LeakyAttention(CausalSelfAttention):
    """Adds a summary of the sequence, all of it."""

    def forward(self, x):
        return super().forward(x) + x.mean(dim=1, keepdim=True)


class Block(nn.Module):
    """Keeps a closure over a part of itself, which a deep copy would not follow."""

    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.ModuleDict({"up": nn.Linear(config.n_embd, 8), "down": nn.Linear(8, config.n_embd)})
        mlp = self.mlp
        self.feed = lambda x: mlp.down(F.gelu(mlp.up(x)))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.feed(x)


class Plain(nn.Module):
    """Takes arguments and no config, and its width only shows in its first layer."""

    def __init__(self, size, heads=2):
        super().__init__()
        self.inner = nn.MultiheadAttention(size, heads)

    def forward(self, x, attn_mask=None):
        return self.inner(x, x, x, attn_mask=attn_mask, need_weights=False)


class NotAModule:
    pass


class WantsMore(Plain):
    def forward(self, x, gate):
        return super().forward(x) * gate


def attends(q, k, v, causal=True):
    """Takes q, k, v [B T H D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
