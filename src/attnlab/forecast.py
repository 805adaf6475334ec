"""What a run will take, before it is begun: its model is built without memory, its text is not opened."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .config import RunConfig
from .match import cache_floats, parameters
from .measure import wait_for
from .model import attention_configs, flops_per_token
from .results import Record
from .train import find_device, find_precision

FLOAT = 4  # bytes of a cached number, in float32
TRAINING = 3  # a forward pass and a backward pass of twice its cost


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """Times in seconds, sizes in bytes, FLOPs of matrix products."""

    parameters: int
    tokens: int  # that training reads
    tokens_per_step: int
    flops_per_token: float  # of training
    flops: float  # of all of it
    cache_bytes_per_token: float  # that each further token costs while decoding, all layers, float32
    cache_bytes: int  # of one sequence at full context
    rate: float  # FLOPs per second
    measured: bool  # rate: of a matrix product here, or as given
    seconds: float  # at that rate: training reaches a part of it, so take this as the least


def forecast(config: RunConfig, rate: float | None = None) -> Forecast:
    """`rate` in FLOPs per second; None: measured on the device and in the precision of the run, in about a second.

    Raises `UserError` for a model that does not fit together and for a device that is not there.
    """
    model, train = config.model, config.train
    count = parameters(model)
    per_step = train.batch_size * train.accumulate * model.context
    per_token = TRAINING * flops_per_token(model)
    speed = matrix_rate(find_device(train.device), train.precision) if rate is None else rate
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


def matrix_rate(device: torch.device, precision: str = "auto", seconds: float = 0.5) -> float:
    """FLOPs per second of a product of two square matrices: the median of as many as fit into `seconds`."""
    dtype = torch.bfloat16 if find_precision(precision, device) == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        wait_for(device)
        started = time.perf_counter()
        a @ a
        wait_for(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(times)[len(times) // 2]
