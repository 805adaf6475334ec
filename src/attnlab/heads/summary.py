"""Everything that can be told about the heads of one model, as one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import Decoder
from ..results import HeadScores
from .ablate import ablate
from .capture import watch
from .emergence import emergence
from .memory import inside
from .scores import PATTERNS, head_scores, repeated

SHOWN = 8  # sequences that the insides are averaged over


def whole(
    model: Decoder,
    *,
    run: str | Path | None = None,
    sequences: int = 64,
    segments: Sequence[int] | None = None,
    seed: int = 0,
    causal: bool = True,
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> dict[str, Any]:
    """Scores, ablations (unless not `causal`), what is remembered and, for a run folder `run`, emergence."""
    scores = head_scores(model, sequences=sequences, segments=segments, seed=seed, tell=tell)
    longest = scores.segments[-1]
    found: dict[str, Any] = {"mechanisms": list(model.config.mechanisms), "scores": scores.to_dict()}
    if causal:
        found["ablation"] = ablate(model, sequences=sequences, segment=longest, seed=seed, tell=tell).to_dict()
    tokens = repeated(model.config.vocab_size, SHOWN, longest, seed).to(next(model.parameters()).device)
    found["inside"] = [layer.to_dict() for layer in inside(model, tokens)]
    found["patterns"] = strongest_patterns(model, tokens, scores)
    if run is not None:
        curve = emergence(run, sequences=sequences, segments=scores.segments, seed=seed, tell=tell)
        found["emergence"] = curve.to_dict()
    return found


@torch.no_grad()
def strongest_patterns(model: Decoder, tokens: Tensor, scores: HeadScores) -> list[dict[str, Any]]:
    """What the strongest head of each kind looks at, mean over the sequences of `tokens`: weights L L, 3 digits."""
    with watch(model) as layers:
        model(tokens)
    found = []
    for name in PATTERNS:
        places = [(value, i, j) for i, row in enumerate(scores.scores[name]) for j, value in enumerate(row)]
        _, layer, head = max(places)
        weights = layers[layer].pattern()[:, head].double().mean(0).tolist()
        rounded = [[round(weight, 3) for weight in row] for row in weights]
        found.append({"score": name, "layer": layer, "head": head, "weights": rounded})
    return found
