"""Tensor names in two languages. A row says which of our tensors are made from which of theirs, and back; a family's
table of rows is all that reading, writing and checking need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Decoder
from ..spec import UserError
from .files import Stored


class Row(NamedTuple):
    ours: Sequence[str]
    theirs: Sequence[str]
    read: Callable[..., Sequence[Tensor]]  # their tensors -> ours
    write: Callable[..., Sequence[Tensor]]  # and back


def same(ours: str, theirs: str) -> Row:
    return Row([ours], [theirs], lambda x: [x], lambda x: [x])


def transposed(ours: str, theirs: str) -> Row:
    """A matrix that they multiply from the left (GPT-2's Conv1D)."""
    return Row([ours], [theirs], lambda x: [x.T], lambda x: [x.T])


def fused(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Row:
    """One of ours holds several of theirs, `sizes` rows of each."""
    return Row([ours], theirs, lambda *parts: [torch.cat(parts)], lambda x: x.split(list(sizes)))


def ours(model: Decoder) -> dict[str, Tensor]:
    """The state dict; a tied head is the embedding and goes under that name alone."""
    return {name: t for name, t in model.state_dict().items() if not (model.config.tied and name == "head.weight")}


def expected(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes that their tensors must have, from the shapes of ours (on the meta device: nothing is computed)."""
    return {
        name: tensor.shape
        for row in rows
        for name, tensor in zip(row.theirs, row.write(*(state[name] for name in row.ours)), strict=True)
    }


def check(
    wanted: Mapping[str, torch.Size], found: Mapping[str, Stored], family: ModuleType, source: str
) -> dict[str, Stored]:
    """`found` under full names, all of `wanted` and no more; else a `UserError` that names what is wrong."""
    if not any(name.startswith(family.PREFIX) for name in found):  # saved from the model without its head
        found = {f"{family.PREFIX}{name}": tensor for name, tensor in found.items()}
    found = {name: t for name, t in found.items() if name in wanted or not re.search(family.EXTRA, name)}
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


def read(rows: Iterable[Row], found: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our tensors, row by row, so that no more than one row is held twice."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for row in rows
        for name, tensor in zip(row.ours, row.read(*(found[name].load() for name in row.theirs)), strict=True)
    }


def write(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors."""
    return {
        name: tensor.detach().cpu().contiguous()
        for row in rows
        for name, tensor in zip(row.theirs, row.write(*(state[name] for name in row.ours)), strict=True)
    }
