"""Statistics of what a model's attention layers read in calibration text; conversions weigh errors by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import gqa, mla
from ..model import Decoder
from ..recording import record_attention
from ..results import Tell


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer, in float64."""

    moment: Tensor  # E [x 1] [x 1]^T of x, the input of its linear maps (see `features`), (D + 1) (D + 1)
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


def features(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what is multiplied by matrices in a layer that reads x (B T D): x, or what it has normed, B T M.

    That is, of a layer whose heads have norms, the queries, keys and values of all heads; of latents made from such
    heads, their keys and values.
    """
    if isinstance(layer, mla.Attention) and layer.config.from_heads:
        return layer.heads(x)[1]
    if isinstance(layer, gqa.Attention) and layer.config.qk_norm:
        return torch.cat([heads.flatten(2) for heads in layer.heads(x)], -1)
    return x


@torch.no_grad()
def gather(model: Decoder, batches: Sequence[Tensor], tell: Tell) -> list[Statistics]:
    """Return the statistics of every layer, from batches of token ids (B T)."""
    rotary = model.config.positions == "rope"
    layers = len(model.layers)
    length = max(batch.shape[1] for batch in batches)
    moments = [torch.zeros(1, 1, dtype=torch.float64)] * layers
    reaches = torch.zeros(layers, length, dtype=torch.float64)
    for done, batch in enumerate(batches):
        tell("reading calibration text", done, len(batches))
        recording: AbstractContextManager[list[Tensor]] = record_attention() if rotary else nullcontext([])
        with record_inputs(model) as seen, recording as maps:
            model.hidden(batch)
        for i, (block, x) in enumerate(zip(model.blocks(), seen, strict=True)):
            read = features(block.attention, x).flatten(0, 1).double()
            read = nn.functional.pad(read, (0, 1), value=1.0)
            moments[i] = read.T @ read + (moments[i] if done else 0)
        for reach, weights in zip(reaches, maps, strict=rotary):
            total = weights.double().sum((0, 1))  # T T
            reach[: len(total)] += torch.stack([total.diagonal(-back).sum() for back in range(len(total))])
    return [Statistics(m / m[-1, -1], r / r.sum()) for m, r in zip(moments, reaches, strict=True)]
