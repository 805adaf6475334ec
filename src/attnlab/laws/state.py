"""The state of a module, kept and put back: parameters, buffers, and what it holds in attributes of its own."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FIXED: tuple[type, ...] = (
    *(str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.MethodType),
    *(types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device, torch.Generator),
)  # values that hold nothing which a call could change
NOT_STATE = ("_parameters", "_buffers", "_modules", "config")  # kept by themselves, or not the module's to change


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore afterwards what the module holds, in content: also what a call changed in place."""
    restore = _keeper(module)
    try:
        yield
    finally:
        restore()


def _keeper(module: nn.Module) -> Callable[[], None]:
    """Return a function that puts the module back into its present state."""
    seen: set[int] = set()
    restores: list[Callable[[], None]] = []
    for part in module.modules():
        for registered in (part._parameters, part._buffers):
            restores.append(_mapping(registered, seen))
        restores.append(_attributes(part, seen))

    def restore() -> None:
        for put_back in restores:
            put_back()

    return restore


def _attributes(holder: object, seen: set[int]) -> Callable[[], None]:
    """Return a function that puts an object's attributes back."""
    present = vars(holder)
    values = [value for name, value in present.items() if name not in NOT_STATE]
    restores = [_content(value, seen) for value in values]
    kept = dict(present)

    def restore() -> None:
        now = vars(holder)
        if now.keys() != kept.keys() or any(now[name] is not value for name, value in kept.items()):
            now.clear()
            now.update(kept)
        for put_back in restores:
            put_back()

    return restore


def _content(value: Any, seen: set[int]) -> Callable[[], None]:
    """Return a function that puts back what is inside of a value; what cannot change is left alone."""
    if isinstance(value, FIXED) or isinstance(value, nn.Module) or id(value) in seen:
        return _nothing
    seen.add(id(value))
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        return _mapping(value, seen)
    if isinstance(value, list):
        return _list(value, seen)
    if isinstance(value, tuple):
        return _all([_content(item, seen) for item in value])
    if isinstance(value, set):
        return _set(value)
    return _attributes(value, seen) if hasattr(value, "__dict__") else _nothing


def _nothing() -> None:
    """Do nothing."""


def _all(restores: list[Callable[[], None]]) -> Callable[[], None]:
    def restore() -> None:
        for put_back in restores:
            put_back()

    return restore


def _tensor(tensor: Tensor) -> Callable[[], None]:
    if tensor.is_meta:
        return _nothing
    kept = tensor.detach().clone()

    def restore() -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.shape != kept.shape:
                tensor.data = kept
            elif not torch.equal(tensor, kept):
                tensor.data.copy_(kept)  # through .data: a graph that saved the tensor can still run backward

    return restore


def _mapping(mapping: dict[Any, Any], seen: set[int]) -> Callable[[], None]:
    kept = dict(mapping)
    inside = _all([_content(item, seen) for item in kept.values()])

    def restore() -> None:
        mapping.clear()
        mapping.update(kept)
        inside()

    return restore


def _list(items: list[Any], seen: set[int]) -> Callable[[], None]:
    kept = list(items)
    inside = _all([_content(item, seen) for item in kept])

    def restore() -> None:
        items[:] = kept
        inside()

    return restore


def _set(items: set[Any]) -> Callable[[], None]:
    kept = set(items)

    def restore() -> None:
        items.clear()
        items.update(kept)

    return restore


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in a value, those in containers, caches and other objects among them, each once."""
    seen = set() if seen is None else seen
    if isinstance(value, FIXED) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple | set):
        items = list(value)
    else:
        items = list(vars(value).values()) if hasattr(value, "__dict__") else []
    for item in items:
        yield from tensors_in(item, seen)


def duplicate(module: nn.Module, build: Callable[[], nn.Module] | None) -> nn.Module:
    """Return another module with the same state, made by `build` or, if that is None, by a deep copy.

    A deep copy of a module that keeps a closure over its parts still runs those of the original.
    """
    if build is None:
        return copy.deepcopy(module)
    with seeded(0):
        made = build()
    made.load_state_dict(module.state_dict())
    return made


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the random numbers of `seed`, and afterwards those that would have come without this."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
