"""Limits of a run, asked before anything is made or written: its memory, and what its kernels can do."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import data
from ..config import RunConfig
from ..device import check_room, find_device
from ..kernels import check_training
from ..model import attention_configs
from ..recurrence import check_fla
from ..results import RunResult
from ..runs.folder import RunFolder
from .log import Log
from .schedule import check_rates
from .step import part_sizes

FLOAT = 4  # bytes
ID = 8  # bytes of a token
SMALLER = "make train.batch_size, train.accumulate or model.context smaller"


def check_run(config: RunConfig, processes: int = 1) -> None:
    """Raise `UserError` for a run that could not make its first step: `processes` share the rows of a step."""
    model, train = config.model, config.train
    device = find_device(train.device)
    rows = train.batch_size * train.accumulate
    check_room("the tokens of a step", 2 * ID * rows * config.length // processes, SMALLER)
    part = max(train.batch_size // processes, 1)
    logits = FLOAT * part * config.length * model.vocab_size
    check_room("the logits of one part of a step", logits, SMALLER, device)
    part_sizes(train, processes)
    for layer in attention_configs(model):
        if layer.impl == "fla":
            check_fla(device)
        elif layer.impls:
            check_training(layer.impl, device, layer.dropout)


def resolve(config: RunConfig) -> tuple[RunConfig, data.Corpus]:
    """Return the config as it will be run, and its corpus. A vocabulary that is too small for the text grows to fit it.

    Raises `UserError` for a seed, a source, a context or a learning rate that cannot be used.
    """
    corpus = data.load(config.data)
    corpus.check(config.length)
    if config.model.vocab_size < corpus.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))
    check_rates(config.train)
    return config, corpus


def other_threads(folder: RunFolder, device: torch.device) -> list[str]:
    """Return a sentence where a run on a CPU began with another number of threads than this process has."""
    began = folder.about.get("threads")
    now = torch.get_num_threads()
    if device.type != "cpu" or began in (None, now) or folder.newest() is None:
        return []
    return [
        f"it began with {began} CPU threads and goes on with {now}, which adds in another order: the result is not bit "
        f"for bit that of an uninterrupted run; OMP_NUM_THREADS={began} would make it so"
    ]


def keep_failure(folder: RunFolder, log: Log, result: RunResult) -> None:
    """Write why a run failed. A run whose first number was not finite is removed: there is nothing to go on from."""
    begun = log.interval or folder.newest() is not None or folder.metrics() or (folder.path / "track").exists()
    if begun:
        folder.write_result(result)
    else:
        folder.discard()
