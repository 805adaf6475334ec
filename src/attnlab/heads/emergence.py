"""When heads become what they are: their scores at every checkpoint that a run kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint import RunFolder, load_model
from ..results import Emergence
from ..spec import UserError
from .ablate import fits, losses
from .scores import PATTERNS, pattern_scores, repeated
from .watch import watch


@torch.no_grad()
def emergence(
    run: str | Path,
    *,
    sequences: int = 64,
    segment: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Emergence:
    """Scores of every head at every checkpoint in the run folder `run`; train.keep 0 keeps them all while training."""
    steps = RunFolder.open(run).steps()
    if len(steps) < 2:
        raise UserError(
            f"{run} has {len(steps)} checkpoint{'s' * (len(steps) != 1)}, and a curve needs at least 2: train with "
            "--train.keep 0 and a smaller --train.save-every"
        )
    scores: dict[str, list[list[list[float]]]] = {name: [] for name in PATTERNS}
    first, second = [], []
    for number, step in enumerate(steps, 1):
        model, config = load_model(run, step)
        segment = fits(config.model, segment)
        batches = repeated(config.model.vocab_size, sequences, segment, seed).split(batch_size)
        found: list[list[dict[str, torch.Tensor]]] = []
        for batch in batches:
            with watch(model) as layers:
                model(batch)
            found.append([pattern_scores(layer.pattern(), segment) for layer in layers])
        for name in PATTERNS:
            per_layer = zip(*found, strict=True)
            scores[name].append([torch.cat([part[name] for part in layer]).mean(0).tolist() for layer in per_layer])
        by_position = losses(model, batches).mean(0)
        first.append(by_position[: segment - 1].mean().item())
        second.append(by_position[segment:].mean().item())
        tell("reading checkpoints", number, len(steps))
    assert segment is not None
    return Emergence(
        steps=steps, scores=scores, first_half=first, second_half=second, sequences=sequences, segment=segment
    )
