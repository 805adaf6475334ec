"""A mechanism of someone else's, on attnlab's interface: a gate per channel on grouped-query attention."""

from dataclasses import dataclass

from torch import nn

from attnlab import CAUSAL
from attnlab.attention import gqa


@dataclass(frozen=True, kw_only=True)
class Config(gqa.Config):
    sharp: bool = False

    def flops(self, queries, keys):
        return super().flops(queries, keys) + 2 * queries * self.d_model**2


class Attention(gqa.Attention):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, positions, cache=None, mask=CAUSAL):
        y, cache = super().forward(x, positions, cache, mask)
        return y * self.gate(x).sigmoid(), cache
