"""The forecast of a run before it begins: its model is built without memory, its text is not opened."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import RunConfig
from ..device import find_device, find_precision
from ..measure.gpus import measured_peak
from ..model import attention_configs, cache_floats, parameters
from ..results import Record
from ..training.throughput import training_flops

FLOAT = 4  # bytes of a cached number, in float32


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """The costs of a run. Times in seconds, sizes in bytes, FLOPs of matrix products."""

    parameters: int
    tokens: int  # read in training
    tokens_per_step: int
    flops_per_token: float  # of training
    flops: float  # of all training
    cache_bytes_per_token: float  # of each further token while decoding, all layers, float32
    cache_bytes: int  # of one sequence at full context
    rate: float  # FLOPs per second
    measured: bool  # whether the rate is that of a matrix product here; else it was given
    seconds: float  # of training at that rate; training reaches a part of it, so this is the least


def forecast(config: RunConfig, rate: float | None = None) -> Forecast:
    """Return the costs of a run.

    `rate` is in FLOPs per second. None: it is measured on the run's device in its precision, in about a second.
    Raises `UserError` for a model that does not fit together and for a device that is not there.
    """
    model, train = config.model, config.train
    count = parameters(model)
    per_step = train.batch_size * train.accumulate * config.length
    per_token = training_flops(model, config.length)
    if rate is None:
        device = find_device(train.device)
        speed = measured_peak(device, find_precision(train.precision, device), torch.get_num_threads()).rate
    else:
        speed = rate
    return Forecast(
        parameters=count,
        tokens=train.steps * per_step,
        tokens_per_step=per_step,
        flops_per_token=per_token,
        flops=per_token * train.steps * per_step,
        cache_bytes_per_token=FLOAT * sum(layer.cache_spec.per_token for layer in attention_configs(model)),
        cache_bytes=FLOAT * cache_floats(model),
        rate=speed,
        measured=rate is None,
        seconds=per_token * train.steps * per_step / speed,
    )
