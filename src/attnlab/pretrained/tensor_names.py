"""Table of tensor names, a family's beside ours.

A row says which of our tensors are made from which of theirs, and back. Reading, writing and checking need no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..model import Decoder
from ..runs.tensors import finite_weights
from .folders import LazyTensor


class Row(NamedTuple):
    """Tensors of ours that are made from tensors of theirs."""

    ours: Sequence[str]  # names
    theirs: Sequence[str]  # names
    read: Callable[..., Sequence[Tensor]]  # their tensors -> ours
    write: Callable[..., Sequence[Tensor]]  # our tensors -> theirs


def same(ours: str, theirs: str) -> Row:
    """Return the row of a tensor that is the same in both."""
    return Row([ours], [theirs], lambda x: [x], lambda x: [x])


def transposed(ours: str, theirs: str) -> Row:
    """Return the row of a matrix that they store transposed (GPT-2's Conv1D)."""
    return Row([ours], [theirs], lambda x: [x.T], lambda x: [x.T])


def fused(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Row:
    """Return the row of one tensor of ours that holds several of theirs, `sizes` rows of each."""
    return Row([ours], theirs, lambda *parts: [torch.cat(parts)], lambda x: x.split(list(sizes)))


def stacked(ours: str, theirs: Sequence[str], count: int) -> Row:
    """Return the row of one tensor of ours that holds `count` matrices, each made of equally many of theirs."""
    return Row(
        [ours],
        theirs,
        lambda *parts: [torch.cat(parts).unflatten(0, (count, -1))],
        lambda x: x.flatten(0, 1).chunk(len(theirs)),
    )


def permuted(ours: str, theirs: str, order: Tensor) -> Row:
    """Return the row of a tensor whose row i is row `order[i]` of theirs."""
    back = order.argsort()
    return Row([ours], [theirs], lambda x: [x[order]], lambda x: [x[back.to(x.device)]])


def split_heads(ours: Sequence[str], theirs: str, heads: int, sizes: Sequence[int]) -> Row:
    """Return the row of one tensor of theirs that holds, head by head, `sizes` rows of each of ours."""

    def read(x: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in x.unflatten(0, (heads, -1)).split(list(sizes), 1)]

    def write(*parts: Tensor) -> list[Tensor]:
        return [torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)]

    return Row(ours, [theirs], read, write)


def absent(ours: str, size: int) -> Row:
    """Return the row of a vector that they do not have: zero here. Writing another one raises `UserError`."""

    def write(x: Tensor) -> list[Tensor]:
        if not x.is_meta and bool(x.any()):
            raise UserError(f"{ours} is not zero, and this family has no place for it; write family 'attnlab' instead")
        return []

    return Row([ours], [], lambda: [torch.zeros(size)], write)


def only(hf: Mapping[str, Any], **values: Any) -> None:
    """Raise `UserError` where a field of the config has another value than the one that we compute."""
    for name, value in values.items():
        if hf.get(name, value) not in (value, None):
            raise UserError(f"config.json says {name} = {hf[name]!r}, and attnlab computes only {value!r}")


def rows(family: ModuleType, model: Decoder) -> list[Row]:
    """Return the family's table without the rows of tensors that this model does not have."""
    has = ours(model)
    found = [row for row in family.table(model) if set(row.ours) <= set(has)]
    left = set(has) - {name for row in found for name in row.ours}
    assert not left, f"the table of {family.__name__} lacks {sorted(left)}"
    return found


def ours(model: Decoder) -> dict[str, Tensor]:
    """Return the state dict; a tied head has the name of the embedding alone."""
    return {name: t for name, t in model.state_dict().items() if not (model.config.tied and name == "head.weight")}


def expected(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes that their tensors must have, from ours (on the meta device: nothing is computed)."""
    return {
        name: tensor.shape
        for row in rows
        for name, tensor in zip(row.theirs, row.write(*(state[name] for name in row.ours)), strict=True)
    }


def full_names(found: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    """Return tensors with `prefix` before their names, if none has it: a checkpoint of the model without its head."""
    if any(name.startswith(prefix) for name in found):
        return dict(found)
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def check_tensors(
    wanted: Mapping[str, torch.Size], found: Mapping[str, LazyTensor], source: str
) -> dict[str, LazyTensor]:
    """Return `found`.

    Raises `UserError` where a tensor of `wanted` (name -> shape) is missing or has another shape, and where there are
    others. `source` is the name for messages.
    """
    for what, wrong in (
        ("lacks the tensor", [n for n in wanted if n not in found]),
        ("has a tensor that its config does not explain,", [n for n in found if n not in wanted]),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise UserError(f"{source} {what} {wrong[0]}{more}; its weights do not belong to its config.json")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != tuple(shape):
            raise UserError(
                f"{source} has {name} of shape {[*found[name].shape]} where its config.json asks for {[*shape]}; "
                "its weights do not belong to it"
            )
    return dict(found)


def read_tensors(
    rows: Iterable[Row], found: Mapping[str, LazyTensor], dtypes: Mapping[str, torch.dtype], source: str = "the model"
) -> dict[str, Tensor]:
    """Return our tensors by name, in `dtypes`, or as they are stored where it does not name them.

    Raises `UserError` for one that is not finite, and for one of whole numbers where `dtypes` names what it becomes.
    `source` is the name for messages.

    They are made row by row, so that only one row is held twice. They are copies, because a tensor of a mapped file is
    not aligned, and changes with the file.
    """
    read = {}
    for row in rows:
        floating = any(name in dtypes for name in row.ours)
        theirs = [
            finite_weights(name, scaled(name, found[name].load(), source), source, floating) for name in row.theirs
        ]
        for name, tensor in zip(row.ours, row.read(*theirs), strict=True):
            read[name] = torch.empty(tensor.shape, dtype=dtypes.get(name, tensor.dtype)).copy_(tensor)
    return read


def scaled(name: str, tensor: Tensor, source: str) -> Tensor:
    """Return `tensor`. Raises `UserError` for floating-point numbers of 8 bits: they count in units of a scale."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{source} has {name} in {kind}, a quantized form whose scales are not read: bring it as float32, float16 "
            "or bfloat16"
        )
    return tensor


def write_tensors(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors by name, on the CPU."""
    return {
        name: tensor.detach().cpu().contiguous()
        for row in rows
        for name, tensor in zip(row.theirs, row.write(*(state[name] for name in row.ours)), strict=True)
    }
