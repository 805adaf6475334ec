"""What a forward pass hands out on request: attention maps, notes and auxiliary losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .layers import Linear as Linear
from .layers import linear as linear

Collection = TypeVar("Collection")


class Maps(list[Tensor]):
    """Attention weights (B N L S), one of each `attend` call, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[tuple[Tensor, Tensor]] = []  # the positions of each map's queries (B L) and keys (B S)


_maps: Maps | None = None  # what `record_attention`, `record_losses` and `record_notes` are collecting, if anything
_losses: dict[str, list[Tensor]] | None = None
_notes: dict[str, list[Tensor]] | None = None
_scale = 1.0  # of auxiliary losses
_first_part = True  # of a step


@contextmanager
def _collecting(name: str, found: Collection) -> Iterator[Collection]:
    """`found` stands as this module's `name` while it is open, and what stood there stands again afterwards."""
    outer = globals()[name]
    globals()[name] = found
    try:
        yield found
    finally:
        globals()[name] = outer


def record_attention() -> AbstractContextManager[Maps]:
    """Collect the attention weights (B N L S) of every `attend` call, in order. Costs nothing when not in use."""
    return _collecting("_maps", Maps())


def record_notes() -> AbstractContextManager[dict[str, list[Tensor]]]:
    """Collect what mechanisms tell with `note`, by name, in order: latents, gates, the load of experts."""
    return _collecting("_notes", defaultdict(list))


def record_losses() -> AbstractContextManager[dict[str, list[Tensor]]]:
    """Collect the values of auxiliary losses by name, in order."""
    return _collecting("_losses", defaultdict(list))


def wants_maps() -> bool:
    """Whether attention weights are being collected."""
    return _maps is not None


def add_map(weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> None:
    """Keep the weights (B N L S) of one `attend` call and the positions of its queries (B L) and keys (B S)."""
    if _maps is not None:
        _maps.append(weights.detach())
        _maps.at.append((q_pos, k_pos))


def note(name: str, value: Tensor) -> Tensor:
    """`value` as it is, for those who look inside. Costs nothing when nobody does."""
    if _notes is not None:
        _notes[name].append(value.detach())
    return value


def scale_losses(factor: float) -> AbstractContextManager[float]:
    """Auxiliary losses attached meanwhile weigh `factor` times as much: that of the loss that they stand beside, where
    it is one part of a batch, or scaled for float16."""
    return _collecting("_scale", factor)


def part_of_step(number: int) -> AbstractContextManager[bool]:
    """A forward pass meanwhile is part `number`, from 0, of those whose gradients make up one step."""
    return _collecting("_first_part", number == 0)


def begins_step() -> bool:
    """Whether this forward pass is the first of a step: not a later part, and not one that is computed again on the
    way back (activation checkpointing)."""
    return _first_part and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)


def with_loss(y: Tensor, name: str, loss: Tensor, weight: float = 1.0) -> Tensor:
    """`y` unchanged; in the backward pass, the gradient of `weight * loss` joins that of whatever is made from `y`."""
    if _losses is not None:
        _losses[name].append(loss.detach())
    return _Attach.apply(y, loss, weight * _scale)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.weight, dtype=ctx.dtype, device=grads[0].device), None
