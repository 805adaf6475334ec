"""Layers that share rows, as one module: what takes rows of an earlier layer can be judged only behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache, Output
from ..spec import CAUSAL, AttentionConfig, CacheSpec, Mask, consecutive

DEPTH = 2  # layers of a stack: one that gives, and one that takes


class Stack(nn.Module):
    """The layers of a Config that `stack_config` made, each added to what goes on to the next."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(config.layer_of_stack(each) for each in consecutive(config.one_of_stack, DEPTH))

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None = None, mask: Mask = CAUSAL) -> Output:
        kept = {}
        y = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            mask = mask.handed()
            x = x + y
            y, after = layer(x, positions, None if cache is None else cache.beside[str(i)], mask)
            kept[str(i)] = after
        if cache is None:
            return y, None
        return y, dataclasses.replace(cache, tokens=cache.tokens + x.shape[1], beside=kept)


def judged_layer(layer: Callable[[Any], nn.Module], config: AttentionConfig) -> nn.Module:
    """Return the layer of a Config; where a second layer of the same mechanism takes rows of the first, both."""
    takes = any(each.takes for each in consecutive(config, DEPTH))
    return Stack(stack_config(layer, config)) if takes else layer(config)


def stack_config(layer: Callable[[Any], nn.Module], config: AttentionConfig) -> AttentionConfig:
    """Return the Config of a `Stack`: the fields are those of `config`, and what they cost is summed over layers."""
    base: Any = type(config)

    def one(self: Any) -> AttentionConfig:
        made: AttentionConfig = base(**{each.name: getattr(self, each.name) for each in dataclasses.fields(base)})
        return made

    def cache_spec(self: Any) -> CacheSpec:
        return CacheSpec(
            {}, beside={str(i): each.cache_spec for i, each in enumerate(consecutive(self.one_of_stack, DEPTH))}
        )

    def flops(self: Any, queries: int, keys: int) -> int:
        return sum(each.flops(queries, keys) for each in consecutive(self.one_of_stack, DEPTH))

    members = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "summary": base.summary,
        "layer_of_stack": staticmethod(layer),
        "one_of_stack": property(one),
        "cache_spec": property(cache_spec),
        "flops": flops,
    }
    whole: Any = dataclasses.dataclass(frozen=True, kw_only=True)(type("Config", (base,), members))
    made: AttentionConfig = whole(**{each.name: getattr(config, each.name) for each in dataclasses.fields(base)})
    return made
