"""Records of a forward pass, on request: attention maps, notes and auxiliary losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from .errors import UserError, quoted
from .ranges import HUGE, Range, checked

Collection = TypeVar("Collection")


@dataclass(frozen=True)
class Attended:
    """The companions of the attention weights W (B N L S) of one call."""

    q_pos: Tensor  # B L
    k_pos: Tensor  # B S
    values: Tensor  # B S K V: W times these, query head n with value head n // (N/K), is what the call answers
    answer: Tensor  # B L N V; with what a state from earlier tokens adds, where a recurrence began with one
    share: Tensor | float = 1.0  # B L N, or one number: the factor of the call's answer in what its layer reads
    rest: bool = False  # whether a part of the weight may go to nothing, so that rows sum to less than 1


def shared(weights: Tensor, call: Attended) -> Tensor:
    """Return the weights (B N L S) of a call times its share in its layer."""
    share = call.share
    return weights * (share.to(weights.dtype).transpose(1, 2)[..., None] if isinstance(share, Tensor) else share)


class Maps(list[Tensor]):
    """Attention weights (B N L S), one tensor for each `attend` call, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Attended] = []  # the companions of each map

    @property
    def at(self) -> list[tuple[Tensor, Tensor]]:
        """Return the positions of the queries (B L) and the keys (B S) of each map."""
        return [(call.q_pos, call.k_pos) for call in self.calls]

    def clear(self) -> None:
        """Forget all maps."""
        super().clear()
        self.calls.clear()


_maps: Maps | None = None  # the open collection of `record_attention`; None: nobody records
_losses: dict[str, list[Tensor]] | None = None  # that of `record_losses`
_notes: dict[str, list[Tensor]] | None = None  # that of `record_notes`
_scale = 1.0  # factor of auxiliary losses
_first_part = True  # whether this forward pass is the first part of a step


@contextmanager
def _collecting(name: str, found: Collection) -> Iterator[Collection]:
    """Set this module's variable `name` to `found` while the context is open, and to its old value afterwards."""
    outer = globals()[name]
    globals()[name] = found
    try:
        yield found
    finally:
        globals()[name] = outer


def record_attention() -> AbstractContextManager[Maps]:
    """Collect the attention weights (B N L S) of every `attend` call, in order. Costs nothing while it is not open."""
    return _collecting("_maps", Maps())


def record_notes() -> AbstractContextManager[dict[str, list[Tensor]]]:
    """Collect the values that modules give to `note`, by name, in order: latents, gates, the load of experts."""
    return _collecting("_notes", defaultdict(list))


def record_losses() -> AbstractContextManager[dict[str, list[Tensor]]]:
    """Collect the values of auxiliary losses by name, in order."""
    return _collecting("_losses", defaultdict(list))


def wants_maps() -> bool:
    """Return whether attention weights are being collected."""
    return _maps is not None


def add_map(weights: Tensor, call: Attended) -> None:
    """Record the weights (B N L S) of one call that attends, and what belongs to them."""
    if _maps is not None:
        _maps.append(weights.detach())
        parts: dict[str, Any] = {name: part.detach() for name, part in vars(call).items() if isinstance(part, Tensor)}
        _maps.calls.append(replace(call, **parts))


def note(name: str, value: Tensor) -> Tensor:
    """Record `value` under this name where `record_notes` is open, and return it as it is."""
    _check_record(name, "value", value)
    if _notes is not None:
        _notes[name].append(value.detach())
    return value


@checked
def scale_losses(factor: Annotated[float, Range()]) -> AbstractContextManager[float]:
    """Multiply the auxiliary losses of forward passes in this context by `factor`.

    It is the factor of the main loss: where that is one part of a batch, or is scaled for float16.
    """
    return _collecting("_scale", factor)


def part_of_step(number: int) -> AbstractContextManager[bool]:
    """Say that forward passes in this context are part `number`, from 0, of a step that adds up several gradients."""
    return _collecting("_first_part", number == 0)


def begins_step() -> bool:
    """Return whether this forward pass is the first of a step: no later part, and not computed again by activation
    checkpointing."""
    return _first_part and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)


def with_loss(y: Tensor, name: str, loss: Tensor, weight: float = 1.0) -> Tensor:
    """Return `y` unchanged. The backward pass through it adds the gradient of `weight * loss`."""
    _check_record(name, "loss", loss)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise UserError(f"y is {quoted(y)}: give the tensor of floating-point numbers that the pass goes on with")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not -HUGE < weight < HUGE:
        raise UserError(f"weight is {quoted(weight)}: give a finite number")
    if _losses is not None:
        _losses[name].append(loss.detach())
    return _Attach.apply(y, loss, weight * _scale)


def _check_record(name: Any, what: str, value: Any) -> None:
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"name is {quoted(name)}: give a text")
    if not isinstance(value, Tensor):
        raise UserError(f"{what} is {quoted(value)}: give a tensor")


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.weight, dtype=ctx.dtype, device=grads[0].device), None
