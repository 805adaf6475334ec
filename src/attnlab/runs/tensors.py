"""Tensors on the disk: whole ones, or stretches of flattened ones, put together again for whoever reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError


class Piece(NamedTuple):
    """A stretch of a tensor; all of it, in its own shape, where `start` is 0 and nothing is left out."""

    data: Tensor  # one dimension, or `shape`
    start: int  # in the flattened tensor
    shape: tuple[int, ...]  # of the whole tensor


def whole(tensor: Tensor) -> Piece:
    return Piece(tensor.detach(), 0, tuple(tensor.shape))


class Place(NamedTuple):
    """Where a piece lies."""

    file: Path
    start: int
    length: int


class Stored:
    """The tensors of some safetensors files, each in one piece or in several. Nothing is read but what is asked for."""

    def __init__(self, files: Iterable[Path]):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[Place]] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                pieces = json.loads((opened.metadata() or {}).get("pieces", "{}"))
                for name in opened.keys():
                    held = tuple(opened.get_slice(name).get_shape())
                    start, shape = pieces.get(name, (0, held))
                    if self._shapes.setdefault(name, tuple(shape)) != tuple(shape):
                        raise ValueError(f"parts of {name} are missing: its pieces are of tensors of several shapes")
                    self._places.setdefault(name, []).append(Place(file, start, math.prod(held)))
        for name, places in self._places.items():
            places.sort(key=lambda place: (place.start, place.length))  # an empty piece comes first
            ends = [0, *(place.start + place.length for place in places)]
            if [place.start for place in places] != ends[:-1] or ends[-1] != math.prod(self._shapes[name]):
                raise ValueError(f"parts of {name} are missing")

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """All of a tensor, in its shape; or elements `start` to `stop` of it flattened."""
        places, shape = self._places[name], self._shapes[name]
        end = math.prod(shape) if stop is None else stop
        found = []
        for place in places:
            first, last = max(start, place.start), min(end, place.start + place.length)
            if first < last:
                found.append(_read(place, name, first - place.start, last - place.start))
        flat = found[0] if len(found) == 1 else torch.cat(found or [_read(places[0], name, 0, 0)])
        return flat.view(shape) if stop is None else flat

    def all(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        return {name: self.read(name).to(device) for name in self.names()}

    def states(
        self, optimizers: Mapping[str, Any], parameters: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, str, str, str]]:
        """Every key of optimizers' memories, and its (optimizer, parameter, field). UserError for one of another
        model."""
        for key in self.names():
            label, name, field = key.split("/")
            if label not in optimizers or name not in parameters:
                raise UserError(
                    f"the checkpoint's optimizer state names {name!r} of {label!r}, which this model lacks; "
                    "load it with the version and the mechanisms it was trained with"
                )
            yield key, label, name, field


def _read(place: Place, name: str, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of what `place` holds, flattened."""
    with safe_open(place.file, "pt") as opened:
        if stop - start == place.length:
            return opened.get_tensor(name).flatten()
        held = opened.get_slice(name)
        row = math.prod(held.get_shape()[1:])  # whole rows are read, and what is too much at the ends is cut off
        first = start // row
        return held[first : -(-stop // row)].flatten()[start - first * row : stop - first * row]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, a tensor that has two names (tied weights) under its first name only."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()), name)
    return {name: on_host(state[name]) for name in first.values()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `weights`. UserError where names or shapes are not this model's."""
    expected = weights(model)
    wrong = sorted(set(expected) ^ set(tensors)) or [n for n, t in tensors.items() if t.shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"the checkpoint does not fit the model: names or shapes differ at {', '.join(wrong[:3])}; "
            "load it with the version and the mechanisms it was trained with"
        )
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_tensors(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, flat and by the names of the parameters: "adamw/blocks.0.attention.q/exp_avg"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{label}/{names[id(parameter)]}/{field}": torch.as_tensor(value)
        for label, optimizer in optimizers.items()
        for parameter, memory in optimizer.state.items()
        for field, value in memory.items()
    }


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
