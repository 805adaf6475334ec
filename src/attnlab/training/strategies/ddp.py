"""Data parallel: every process holds the whole model and reads a share of each batch; gradients are averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...config import TrainConfig
from ...model import attention_configs
from ..sharding import Sharding
from . import single
from .single import Optimizers


class Strategy(single.Strategy):
    """Every process holds everything (torch.nn.parallel.DistributedDataParallel)."""

    name = "ddp"
    sharding = Sharding("ddp", 0, buckets=True)
    grouped = True

    def prepare(self, optimizers: Callable[[TrainConfig, nn.Module], Optimizers]) -> Optimizers:
        made = super().prepare(optimizers)
        dead = any("no dead parameters" in config.breaks for config in attention_configs(self.model.config))
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before PyTorch 2.13
        options: dict[str, Any] = {sync: False, "find_unused_parameters": dead, "gradient_as_bucket_view": True}
        self.wrapped = DistributedDataParallel(self.module, **options)
        return made

    def __call__(self, x: Tensor, y: Tensor, documents: Tensor | None = None, plain: bool = False) -> Tensor:
        return (self.module if plain else self.wrapped)(x, y, documents, plain)

    def part(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()
