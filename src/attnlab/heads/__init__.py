"""Inside the heads: what each of them attends to, copies, and is good for, with null distributions and ablations."""

from .ablate import ablate
from .emergence import emergence
from .latent import Inside, inside
from .scores import head_scores, pattern_scores, repeated
from .watch import Layer, heads_replaced, value_sizes, watch
from .whole import whole

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
