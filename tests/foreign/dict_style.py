"""Reads its config as a dictionary, and imports a neighbour as scripts do."""

import torch
from neighbour import keep_heads
from torch import nn


class MultiHeadAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg["n_heads"]
        self.qkv = nn.Linear(cfg["emb_dim"], 3 * cfg["emb_dim"], bias=cfg["qkv_bias"])
        self.out_proj = nn.Linear(cfg["emb_dim"], cfg["emb_dim"])
        size = cfg["context_length"]
        self.register_buffer("mask", torch.triu(torch.ones(size, size), diagonal=1).bool(), persistent=False)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = keep_heads(self.qkv(x), self.n_heads)
        scores = q @ k.transpose(2, 3) / (d // self.n_heads) ** 0.5
        scores.masked_fill_(self.mask[:t, :t], -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class FixedLength(MultiHeadAttention):
    """Never cuts its mask to the sequence, so only full-length input runs."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.context_length = cfg["context_length"]

    def forward(self, x):
        if x.shape[1] != self.context_length:
            raise ValueError(f"expected {self.context_length} tokens")
        return super().forward(x)
