"""Analysis of attention heads: patterns, scores with null distributions, ablations, and the contents of caches."""

from .ablation import ablate
from .capture import Layer, heads_replaced, value_sizes, watch
from .emergence import scores_over_training
from .memory import Inside, inside
from .scores import head_scores, pattern_scores, repeated
from .summary import whole

__all__ = [
    "Inside",
    "Layer",
    "ablate",
    "head_scores",
    "heads_replaced",
    "inside",
    "pattern_scores",
    "repeated",
    "scores_over_training",
    "value_sizes",
    "watch",
    "whole",
]
