"""Everything that can be told about the heads of one model, as one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..model import Decoder
from .ablate import ablate
from .emergence import emergence
from .latent import inside
from .scores import head_scores, repeated

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
    segment = max(segments) if segments else None
    found: dict[str, Any] = {"mechanisms": list(model.config.mechanisms), "scores": scores.to_dict()}
    if causal:
        found["ablation"] = ablate(model, sequences=sequences, segment=segment, seed=seed, tell=tell).to_dict()
    tokens = repeated(model.config.vocab_size, SHOWN, scores.segments[-1], seed).to(next(model.parameters()).device)
    found["inside"] = [layer.to_dict() for layer in inside(model, tokens)]
    if run is not None:
        found["emergence"] = emergence(run, sequences=sequences, segment=segment, seed=seed, tell=tell).to_dict()
    return found
