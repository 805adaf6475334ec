"""Head scores over training: at every checkpoint that a run kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..ranges import Count, Seed, checked
from ..results import Emergence, Tell
from ..runs.folder import RunFolder, load_model
from .ablation import losses
from .scores import PATTERNS, mean_scores, repeated, segment_lengths


@torch.no_grad()
@checked
def scores_over_training(
    run: str | Path,
    *,
    sequences: Count = 64,
    segments: Sequence[Count] | None = None,
    seed: Seed = 0,
    batch_size: Count = 16,
    tell: Tell = lambda what, done, of: None,
) -> Emergence:
    """Return the scores of every head at every checkpoint in the run folder `run`, and the losses there.

    The sequences are those of `head_scores`; losses, in nats per token, are those of the longest. Training with
    train.keep 0 keeps all checkpoints. Raises `UserError` for fewer than 2 checkpoints.
    """
    folder = RunFolder.open(run)
    steps = folder.steps()
    if len(steps) < 2:
        raise UserError(
            f"{run} has {len(steps)} checkpoint{'s' * (len(steps) != 1)}, and a curve needs at least 2: train with "
            "--train.keep 0 and a smaller --train.save-every"
        )
    shape = folder.config.model
    segments = segment_lengths(shape, segments)
    batches = repeated(shape.vocab_size, sequences, segments[-1], seed).split(batch_size)
    scores: dict[str, list[list[list[float]]]] = {name: [] for name in PATTERNS}
    first = []
    second = []
    for number, step in enumerate(steps, 1):
        model, _ = load_model(run, step)
        found = mean_scores(model, sequences=sequences, segments=segments, seed=seed, batch_size=batch_size)
        for name in PATTERNS:
            scores[name].append(found[name])
        by_position = losses(model, batches).mean(0)
        first.append(by_position[: segments[-1] - 1].mean().item())
        second.append(by_position[segments[-1] :].mean().item())
        tell("reading checkpoints", number, len(steps))
    return Emergence(
        steps=steps, scores=scores, first_half=first, second_half=second, sequences=sequences, segments=segments
    )
