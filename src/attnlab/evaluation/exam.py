"""Exams of runs on synthetic tasks: accuracy by length, with the bytes of the cache, and by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..data.tasks import Task, task_of
from ..device import find_device
from ..errors import UserError
from ..model import cache_nbytes
from ..ranges import Count, checked
from ..results import TaskResult
from ..runs.folder import RunFolder, load_model

SEQUENCES = 512  # held-out sequences of each length
DEPTHS = 8  # parts of the haystack, by depth


@checked
def examine(folder: str | Path) -> TaskResult:
    """Return what the newest checkpoint of a run folder answers to held-out sequences.

    Their lengths are a quarter, half, all, twice and four times the context of the run, as far as the task has symbols
    and the model has positions. Raises `UserError` for a run that was not trained on a task.
    """
    run = RunFolder.open(folder)
    config = run.config
    task = task_of(config.data)
    if task is None:
        raise UserError(f"{folder} was trained on {config.data.source!r}, which is no task; attnlab eval measures text")
    device = find_device(config.train.device)
    model, _ = load_model(folder, device=device)
    found = {
        length: score(lambda tokens: model(tokens.to(device))[0].cpu(), task, length, SEQUENCES)
        for length in exam_lengths(task, config.model)
    }
    size = model.embed.weight.element_size()
    trained = found[config.model.context]
    known = run.result()
    return TaskResult(
        task=task.name,
        mechanism=config.mechanism,
        seed=config.seed,
        key=config.key,
        context=config.model.context,
        parameters=model.parameter_count(),
        steps=known.steps if known else 0,
        seconds=known.seconds if known else 0.0,
        chance=task.chance,
        accuracy=trained.accuracy,
        exact=trained.exact,
        sequences=SEQUENCES,
        lengths=[
            {
                "length": length,
                "accuracy": each.accuracy,
                "exact": each.exact,
                "cache_bytes": cache_nbytes(config.model, size, length),
            }
            for length, each in found.items()
        ],
        depths=[[length, *point] for length, each in found.items() for point in by_depth(each)],
    )


def exam_lengths(task: Task, model: ModelConfig) -> list[int]:
    """Return the lengths (tokens) at which a model is examined."""
    longest = model.context if model.positions == "learned" else 4 * model.context
    asked = (model.context // 4, model.context // 2, model.context, 2 * model.context, 4 * model.context)
    return [n for n in asked if n <= min(longest, task.longest or longest)]


def by_depth(found: Score) -> Iterator[tuple[float, float]]:
    """Yield the middle of each part of the haystack, from 0 to 1, and the accuracy of the answers that lie in it."""
    if found.depth is None:
        return
    part = np.minimum((found.depth * DEPTHS).astype(int), DEPTHS - 1)
    for number in range(DEPTHS):
        if (part == number).any():
            yield (number + 0.5) / DEPTHS, float(found.right[part == number].mean())


@dataclass(frozen=True)
class Score:
    """The right answers of a model to held-out sequences of one length."""

    right: np.ndarray  # bool [sequences questions]: every sequence of one length asks equally many
    depth: np.ndarray | None  # of each answer, from 0 to 1, in the same shape; None: the task has no depth

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(self.right.mean())

    @property
    def exact(self) -> float:
        """The share of sequences without a mistake. For copying, that is what greedy decoding gets right as a whole."""
        return float(self.right.all(1).mean())


@torch.inference_mode()
@checked
def score(logits: Callable[[Tensor], Tensor], task: Task, length: Count, count: Count, batch: Count = 64) -> Score:
    """Return the answers of a model to `count` held-out sequences; `logits` takes token ids [B T] to [B T V]."""
    tokens, targets = task.held_out(count, length)
    answers = torch.cat([logits(x).argmax(-1) for x in torch.from_numpy(tokens).split(batch)]).numpy()
    right = (answers == targets)[targets >= 0].reshape(count, -1)
    return Score(right, None if task.depth is None else task.depth(tokens))
