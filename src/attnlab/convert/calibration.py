"""Statistics of what a model's attention layers read in calibration text; conversions weigh errors by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model import Decoder
from ..recording import record_attention
from ..results import Tell


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer, in float64."""

    moment: Tensor  # E [x 1] [x 1]^T of its input x, (D + 1) (D + 1)
    reach: Tensor  # share of attention that goes 0, 1, ... tokens back, T; nan where positions are not rotary

    @property
    def mean(self) -> Tensor:
        """The mean of x: D."""
        return self.moment[:-1, -1]

    @property
    def covariance(self) -> Tensor:
        """The covariance of x: D D."""
        return self.moment[:-1, :-1] - torch.outer(self.mean, self.mean)


@contextmanager
def record_inputs(model: Decoder) -> Iterator[list[Tensor]]:
    """Yield a list that collects what each attention layer reads (B T D), in order, while it is open."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())

    hooks = [block.attention.register_forward_pre_hook(keep) for block in model.blocks()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def gather(model: Decoder, batches: Sequence[Tensor], tell: Tell) -> list[Statistics]:
    """Return the statistics of every layer, from batches of token ids (B T)."""
    rotary = model.config.positions == "rope"
    layers = len(model.layers)
    width = model.config.d_model + 1
    length = max(batch.shape[1] for batch in batches)
    moments = torch.zeros(layers, width, width, dtype=torch.float64)
    reaches = torch.zeros(layers, length, dtype=torch.float64)
    for done, batch in enumerate(batches):
        tell("reading calibration text", done, len(batches))
        recording: AbstractContextManager[list[Tensor]] = record_attention() if rotary else nullcontext([])
        with record_inputs(model) as seen, recording as maps:
            model.hidden(batch)
        for moment, x in zip(moments, seen, strict=True):
            x = nn.functional.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)
            moment += x.T @ x
        for reach, weights in zip(reaches, maps, strict=rotary):
            total = weights.double().sum((0, 1))  # T T
            reach[: len(total)] += torch.stack([total.diagonal(-back).sum() for back in range(len(total))])
    return [Statistics(m / m[-1, -1], r / r.sum()) for m, r in zip(moments, reaches, strict=True)]
