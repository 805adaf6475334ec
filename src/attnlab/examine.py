"""What a run on a synthetic task has learnt: accuracy by length, against the bytes of its cache, and by depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .checkpoint import RunFolder, load_model
from .config import ModelConfig
from .device import find_device
from .errors import UserError
from .match import cache_floats
from .results import TaskResult
from .tasks import Score, Task, score, task_of

SEQUENCES = 512  # held out, of each length
DEPTHS = 8  # parts of the haystack


def examine(folder: str | Path) -> TaskResult:
    """Put held-out sequences to the newest checkpoint of a run folder: of a quarter, half, all, twice and four times
    the context it was trained with, as far as the task has symbols and the model has positions."""
    run = RunFolder.open(folder)
    config, task = run.config, task_of(run.config.data)
    if task is None:
        raise UserError(f"{folder} was trained on {config.data.source!r}, which is no task; attnlab eval measures text")
    device = find_device(config.train.device)
    model, _ = load_model(folder, device=device)
    found = {
        length: score(lambda tokens: model(tokens.to(device))[0].cpu(), task, length, SEQUENCES)
        for length in lengths(task, config.model)
    }
    size = model.embed.weight.element_size()
    trained, known = found[config.model.context], run.result()
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
                "cache_bytes": size * cache_floats(config.model, length),
            }
            for length, each in found.items()
        ],
        depths=[[length, *point] for length, each in found.items() for point in by_depth(each)],
    )


def lengths(task: Task, model: ModelConfig) -> list[int]:
    longest = model.context if model.positions == "learned" else 4 * model.context
    asked = (model.context // 4, model.context // 2, model.context, 2 * model.context, 4 * model.context)
    return [n for n in asked if n <= min(longest, task.longest or longest)]


def by_depth(found: Score) -> Iterator[tuple[float, float]]:
    """The middle of each part of the haystack, and the accuracy of the answers that lie in it."""
    if found.depth is None:
        return
    part = np.minimum((found.depth * DEPTHS).astype(int), DEPTHS - 1)
    for number in range(DEPTHS):
        if (part == number).any():
            yield (number + 0.5) / DEPTHS, float(found.right[part == number].mean())
