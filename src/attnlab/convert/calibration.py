"""What a model's attention layers read, as calibration text flows through: the moments that weigh an error."""

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
    """Of one layer, in float64."""

    moment: Tensor  # (D + 1) (D + 1): E [x 1] [x 1]^T of its input x
    reach: Tensor  # T: the attention that goes 0, 1, ... tokens back; measured where positions are rotary

    @property
    def mean(self) -> Tensor:
        return self.moment[:-1, -1]

    @property
    def covariance(self) -> Tensor:
        return self.moment[:-1, :-1] - torch.outer(self.mean, self.mean)


@contextmanager
def record_inputs(model: Decoder) -> Iterator[list[Tensor]]:
    """Collect what each attention layer reads (B T D), in order."""
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
    """One per layer, from token batches (B T each)."""
    rotary = model.config.positions == "rope"
    layers, width, length = len(model.layers), model.config.d_model + 1, max(batch.shape[1] for batch in batches)
    moments = torch.zeros(layers, width, width, dtype=torch.float64)
    reaches = torch.zeros(layers, length, dtype=torch.float64)
    for done, batch in enumerate(batches):
        tell("reading calibration text", done, len(batches))
        paid: AbstractContextManager[list[Tensor]] = record_attention() if rotary else nullcontext([])
        with record_inputs(model) as seen, paid as maps:
            model.hidden(batch)
        for moment, x in zip(moments, seen, strict=True):
            x = nn.functional.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)
            moment += x.T @ x
        for reach, weights in zip(reaches, maps, strict=rotary):
            paid_to = weights.double().sum((0, 1))
            reach[: len(paid_to)] += torch.stack([paid_to.diagonal(-back).sum() for back in range(len(paid_to))])
    return [Statistics(m / m[-1, -1], r / r.sum()) for m, r in zip(moments, reaches, strict=True)]
