"""The validation loss of a run in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .step import Trainer


@torch.no_grad()
def validate(trainer: Trainer, stopped: Callable[[], bool] = lambda: False) -> float | None:
    """Return the mean loss in nats over the targets of the fixed held-out rows; None when it was `stopped`."""
    size = trainer.config.train.batch_size
    processes = trainer.processes
    whole = trainer.corpus.windows(trainer.config.train.eval_batches * size, trainer.config.length)
    losses: list[Tensor] = []
    counts: list[int] = []
    trainer.model.eval()
    try:
        for at in range(0, len(whole.x), size):
            if stopped():
                return None
            first, last = (at + size * part // processes.size for part in (processes.rank, processes.rank + 1))
            part = whole.rows(first, max(last, first + 1))  # every process reads a row, even if it does not count
            with trainer.autocast():
                losses.append(trainer.strategy(*part.to(trainer.device), plain=True).float())
            counts.append(part.counted() if last > first else 0)
    finally:
        trainer.model.train()
    total = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True) if count)
    return processes.sum(total)[0] / whole.counted()
