"""The findings about the heads of one model, as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import Decoder
from ..ranges import Count, Seed, checked
from ..results import HeadScores, Tell
from ..runs.tensors import computing
from .ablation import ablate
from .capture import watch
from .emergence import scores_over_training
from .memory import inside
from .scores import PATTERNS, head_scores, repeated

SHOWN = 8  # sequences that `inside` and the patterns are averaged over


@checked
def whole(
    model: Decoder,
    *,
    run: str | Path | None = None,
    sequences: Count = 64,
    segments: Sequence[Count] | None = None,
    seed: Seed = 0,
    causal: bool = True,
    tell: Tell = lambda what, done, of: None,
) -> dict[str, Any]:
    """Return scores, ablations (if `causal`), contents of the caches and strongest patterns, ready for JSON.

    `run`: the folder whose checkpoints are scored too; None: none. See `head_scores` for the rest.
    """
    scores = head_scores(computing(model), sequences=sequences, segments=segments, seed=seed, tell=tell)
    longest = scores.segments[-1]
    signs = {
        name: block.attention.config.signed for name, block in zip(model.config.layers, model.blocks(), strict=True)
    }
    found: dict[str, Any] = {"mechanisms": list(model.config.mechanisms), "scores": scores.to_dict()}
    if any(signs.values()):
        found["signed"] = [name for name, signed in signs.items() if signed]
    if causal:
        found["ablation"] = ablate(model, sequences=sequences, segment=longest, seed=seed, tell=tell).to_dict()
    tokens = repeated(model.config.vocab_size, SHOWN, longest, seed).to(next(model.parameters()).device)
    found["inside"] = [layer.to_dict() for layer in inside(model, tokens)]
    found["patterns"] = strongest_patterns(model, tokens, scores)
    if run is not None:
        curve = scores_over_training(run, sequences=sequences, segments=scores.segments, seed=seed, tell=tell)
        found["emergence"] = curve.to_dict()
    return found


@torch.no_grad()
def strongest_patterns(model: Decoder, tokens: Tensor, scores: HeadScores) -> list[dict[str, Any]]:
    """Return the pattern of the strongest head for each score: weights L L, the mean over `tokens` (B L), 3 digits."""
    with watch(model) as layers:
        model(tokens)
    found = []
    for name in PATTERNS:
        places = [(value, i, j) for i, row in enumerate(scores.scores[name]) for j, value in enumerate(row)]
        _, layer, head = max(places)
        weights = layers[layer].shares()[:, head].double().mean(0).tolist()
        rounded = [[round(weight, 3) for weight in row] for row in weights]
        signed = layers[layer].config.signed
        found.append({"score": name, "layer": layer, "head": head, "weights": rounded, "signed": signed})
    return found
