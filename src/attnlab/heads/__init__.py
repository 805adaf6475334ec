"""Inside the heads: what each of them attends to, copies, and is good for, with null distributions and ablations."""

from .ablate import ablate
from .capture import Layer, heads_replaced, value_sizes, watch
from .emergence import emergence
from .memory import Inside, inside
from .scores import head_scores, pattern_scores, repeated
from .summary import whole

__all__ = [
    "Inside",
    "Layer",
    "ablate",
    "emergence",
    "head_scores",
    "heads_replaced",
    "inside",
    "pattern_scores",
    "repeated",
    "value_sizes",
    "watch",
    "whole",
]
