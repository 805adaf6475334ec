"""Tensors on the disk, stored whole or as pieces of flattened tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError


class Piece(NamedTuple):
    """A part of a flattened tensor, or all of a tensor in its own shape."""

    data: Tensor  # of one dimension; a whole tensor has `shape`
    start: int  # first element, in the flattened tensor
    shape: tuple[int, ...]  # of the whole tensor


def whole_piece(tensor: Tensor) -> Piece:
    """Return all of a tensor as one piece."""
    return Piece(tensor.detach(), 0, tuple(tensor.shape))


class Place(NamedTuple):
    """A piece on the disk, unread."""

    file: Path
    start: int  # first element, in the flattened tensor
    length: int  # in elements


class Stored:
    """The tensors of some safetensors files, each in one piece or in several; only what is asked for is read."""

    def __init__(self, files: Iterable[Path]):
        """Raises `ValueError` when parts of a tensor are missing or do not fit each other."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}  # safetensors' names of types: F32, BF16, I64
        self._places: dict[str, list[Place]] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                pieces = json.loads((opened.metadata() or {}).get("pieces", "{}"))
                for name in opened.keys():
                    held = tuple(opened.get_slice(name).get_shape())
                    self._kinds[name] = opened.get_slice(name).get_dtype()
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
        """Return the names of the tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements `start` to `stop` of the flattened tensor. `stop` None: all of it, in its own shape."""
        places = self._places[name]
        shape = self._shapes[name]
        end = math.prod(shape) if stop is None else stop
        found = []
        for place in places:
            first = max(start, place.start)
            last = min(end, place.start + place.length)
            if first < last:
                found.append(_read(place, name, first - place.start, last - place.start))
        flat = found[0] if len(found) == 1 else torch.cat(found or [_read(places[0], name, 0, 0)])
        return flat.view(shape) if stop is None else flat

    def all(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return every tensor, by name."""
        return {name: self.read(name).to(device) for name in self.names()}

    def states(
        self, optimizers: Mapping[str, Any], parameters: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, str, str, str]]:
        """Yield each key of the optimizers' states, and its optimizer, parameter and field.

        Raises `UserError` for an optimizer or a parameter that this model lacks, for states of another type than the
        optimizers have, and where a parameter has fewer of them than others.
        """
        fields: dict[str, dict[str, set[str]]] = {}
        for key in self.names():
            label, name, field = key.split("/") if key.count("/") == 2 else ("", key, "")
            if label not in optimizers or name not in parameters:
                raise UserError(
                    f"the checkpoint's optimizer state names {name!r} of {label!r}, which this model lacks; "
                    "load it with the version and the mechanisms it was trained with"
                )
            if self._shapes[key] and not self._kinds[key].startswith(("F", "BF")):  # a count of steps has no shape
                raise UserError(
                    f"the checkpoint's optimizer state {key} is in {self._kinds[key]}, and optimizers have "
                    "floating-point numbers: it is not of this run; train again into another folder"
                )
            fields.setdefault(label, {}).setdefault(name, set()).add(field)
            yield key, label, name, field
        for by_name in fields.values():
            whole = set().union(*by_name.values())
            if short := next((name for name, held in by_name.items() if held != whole), None):
                raise UserError(
                    f"the checkpoint's optimizer state of {short} lacks {', '.join(sorted(whole - by_name[short]))}: "
                    "it is not whole; train again into another folder"
                )


def _read(place: Place, name: str, start: int, stop: int) -> Tensor:
    """Return elements `start` to `stop` of the piece at `place`, flattened. `UserError` where they are not finite."""
    return finite_weights(name, _held(place, name, start, stop), place.file, floating=False)


def _held(place: Place, name: str, start: int, stop: int) -> Tensor:
    with safe_open(place.file, "pt") as opened:
        if stop - start == place.length:
            return opened.get_tensor(name).flatten()
        held = opened.get_slice(name)
        row = math.prod(held.get_shape()[1:])  # whole rows are read, then cut at both ends
        first = start // row
        return held[first : -(-stop // row)].flatten()[start - first * row : stop - first * row]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, on the host; a tensor with two names (tied weights) has only its first name."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()), name)
    return {name: on_host(state[name]) for name in first.values()}


def finite_weights(name: str, tensor: Tensor, source: str | Path, floating: bool = True) -> Tensor:
    """Return `tensor`, whose name is `name` in `source`. `UserError` where it is not finite.

    `floating`: it must be of floating-point numbers, as weights are; counters are not.
    """
    if floating and not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{source} has {name} in {kind}, and weights are floating-point numbers: bring it as float32")
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return tensor
    whole = tensor.float() if tensor.element_size() == 1 else tensor  # few operations know numbers of 8 bits
    if not all(end.isfinite() for end in whole.aminmax()):
        raise UserError(
            f"{source} has NaN or infinity in {name}, so it computes nothing: take weights from before that"
        )
    return tensor


def computed(values: Tensor) -> Tensor:
    """Return what a model computed. `UserError` where that is not finite, as where its weights are too large."""
    if not bool(values.isfinite().all()):
        raise UserError(
            "the model computes NaN or infinity: its weights are damaged, or too large for its numbers; take other "
            "weights"
        )
    return values


Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def computing(model: Model) -> Model:
    """Return a decoder that computes finite numbers from two tokens. `UserError` where it does not."""
    computed(model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))[0])
    return model


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> None:
    """Load what `weights` returned. `UserError` when names or shapes are not this model's, or numbers are not finite;
    `source` is the name for messages."""
    expected = weights(model)
    wrong = sorted(set(expected) ^ set(tensors)) or [n for n, t in tensors.items() if t.shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"{source} does not fit the model: names or shapes differ at {', '.join(wrong[:3])}; "
            "load it with the version and the mechanisms it was trained with"
        )
    for name, tensor in tensors.items():
        finite_weights(name, tensor, source, expected[name].is_floating_point())
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_tensors(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the states of the optimizers, by "<optimizer>/<parameter>/<field>"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for label, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            for field, value in state.items():
                found[f"{label}/{names[id(parameter)]}/{field}"] = torch.as_tensor(value)
    return found


def on_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in the memory of the host, or the tensor itself when it is one."""
    return tensor.detach().cpu().contiguous()
