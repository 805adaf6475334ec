"""One step of training, in one process or many.

It is a pure function of weights, optimizer state, config and the number of the step: it has no iterator and no random
state of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..config import Execution, RunConfig, TrainConfig
from ..device import check_compiler, find_device, find_precision
from ..errors import UserError
from ..model import Decoder
from ..recording import part_of_step, scale_losses
from ..runs.processes import ONE_PROCESS, Processes
from ..runs.tensors import load_weights
from . import strategies
from .gradient_scale import Scale
from .objective import distilled, freeze, start_from
from .optimizers import make_optimizers
from .schedule import learning_rate
from .strategies import Strategy
from .throughput import document_lengths

HOW = Execution()


@dataclass
class Trainer:
    """All that a step needs."""

    config: RunConfig
    corpus: data.Corpus
    strategy: Strategy  # holds the model and its optimizers
    processes: Processes
    precision: str  # fp32, bf16 or fp16
    device: torch.device
    scale: Scale  # of float16 gradients

    @classmethod
    def of(
        cls,
        config: RunConfig,
        corpus: data.Corpus,
        how: Execution = HOW,
        processes: Processes = ONE_PROCESS,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Trainer:
        """Return a trainer with these weights, or with initial ones that depend on the seed alone.

        It changes torch's global random state. Raises `UserError` for a device, precision, strategy or teacher that
        cannot be used.
        """
        device = _device(config.train.device, processes)
        kind, settings = strategies.find(how.strategy)
        precision = find_precision(config.train.precision, device)
        if not kind.careful and (config.train.guard == "skip" or precision == "fp16"):
            raise UserError(
                f"the strategy {how.strategy} applies a step before anyone has seen its gradient, so train.guard skip "
                "and train.precision fp16 cannot be: give guard stop or rewind, and fp32 or bf16"
            )
        torch.manual_seed(config.seed)
        model, objective = processes.agree(lambda: cls._model(config, device, weights))
        model.recompute = how.recompute
        parts = len(part_sizes(config.train, processes.size))
        strategy = kind(model, objective, make_optimizers, config.train, processes, device, parts, settings)
        return cls(config, corpus, strategy, processes, precision, device, Scale(precision == "fp16"))

    @staticmethod
    def _model(
        config: RunConfig, device: torch.device, weights: Mapping[str, Tensor] | None
    ) -> tuple[Decoder, Callable[..., Tensor] | None]:
        """Return the model on the host, and the objective with its teacher (None: it has no teacher)."""
        if config.train.compile:
            check_compiler("train.compile", device)
        model = Decoder(config.model)
        if weights is not None:
            load_weights(model, weights)
        elif config.init:
            start_from(model, config.init)
        freeze(model, config.train.train)
        taught = distilled(model, config.teacher, config.train.distill, device) if config.teacher else None
        return model, taught

    @property
    def model(self) -> Decoder:
        """The model, as the strategy holds it."""
        return self.strategy.model

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products read rounded weights; the weights themselves stay float32.

        With `recompute` the rounded weights are not kept between a layer's two forward passes.
        """
        if self.precision == "fp32":
            return nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, cache_enabled=not self.model.recompute)

    def batch(self, step: int) -> list[data.Batch]:
        """Return the parts of step `step` that this process reads one by one, on the host."""
        train, processes = self.config.train, self.processes
        size = train.batch_size * train.accumulate
        whole = self.corpus.batch(self.config.seed, step, size, self.config.length, processes.rank, processes.size)
        ends = list(accumulate(part_sizes(train, processes.size)))
        return [whole.rows(start, end) for start, end in pairwise([0, *ends])]


def _device(given: str, processes: Processes) -> torch.device:
    """Return the device of this process; of several GPUs, the one that the launcher gave it."""
    device = find_device(given)
    if device.index is None and device.type == "cuda" and processes.size > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def part_sizes(train: TrainConfig, processes: int) -> list[int]:
    """Return the rows of each part of a step that one process reads.

    Processes share whole parts if their number allows it, else the rows of each part. Raises `UserError` when the rows
    of a step cannot be divided among the processes.
    """
    rows, rest = divmod(train.batch_size * train.accumulate, processes)
    if rest:
        raise UserError(
            f"{train.batch_size * train.accumulate} sequences a step (train.batch_size {train.batch_size} times "
            f"train.accumulate {train.accumulate}) cannot be shared out among {processes} processes: make one of them "
            f"a multiple of {processes}"
        )
    parts = -(-rows // train.batch_size)
    return [rows * (i + 1) // parts - rows * i // parts for i in range(parts)]


class Step(NamedTuple):
    """The numbers of one step."""

    loss: Tensor  # summed over all processes, the mean over all targets that counted
    norm: Tensor  # of the gradient, before clipping
    tokens: int  # targets that counted, of all processes
    applied: bool = True  # whether the optimizer made the step
    own: int = 0  # targets that counted, of this process
    lengths: tuple[int, ...] = ()  # tokens of each document that this process read; empty unless rows hold whole ones
    waited: float = 0.0  # for data, in seconds
    working: float = 0.0  # on data and forward passes, in seconds; there a process waits for others under fsdp only


def train_step(trainer: Trainer, step: int, place: int | None = None, limit: float = math.inf) -> Step:
    """Make one optimizer step, number `step` from 0, on the data of step `place` (None: `step`).

    With `train.guard` skip it is not applied if its loss is above `limit`, or its gradient is not finite.
    """
    config = trainer.config.train
    strategy = trainer.strategy
    processes = trainer.processes
    place = step if place is None else place
    seed_dropout(trainer.config.seed, place, trainer.device, processes.rank)
    began = time.perf_counter()
    parts = trainer.batch(place)
    waited = time.perf_counter() - began
    counts = [part.counted() for part in parts]
    everyone = int(processes.sum(sum(counts))[0])
    total = torch.zeros((), device=trainer.device)
    working = waited
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        share = count / everyone  # each part counts by its number of targets, whichever process reads it
        weight = share * processes.size * trainer.scale.now
        with strategy.part(number + 1 == len(parts)), part_of_step(number), scale_losses(weight):
            began = time.perf_counter()
            with trainer.autocast():
                loss = strategy(*part.to(trainer.device))
            working += time.perf_counter() - began
            strategy.backward(loss * weight)
        total += loss.detach() * share
    skips = config.guard == "skip"
    fine = not skips or processes.sum(total.item())[0] <= limit
    rate = learning_rate(config, step)
    norm, applied = strategy.step(rate, config.clip, trainer.scale.now, skips or trainer.scale.used, fine)
    for experts in trainer.model.experts():
        experts.move_bias(applied)
    if trainer.scale.used and fine:
        trainer.scale.learn(applied)
    lengths = tuple(n for part in parts if part.documents is not None for n in document_lengths(part.documents))
    return Step(total, norm, everyone, applied, sum(counts), lengths, waited, working)


def seed_dropout(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Seed the random numbers of a step: they depend on (seed, step), and on the rank of a process after the first."""
    number = int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0])
    torch.default_generator.manual_seed(number)  # torch.manual_seed would also record a stack trace per kind of GPU
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
