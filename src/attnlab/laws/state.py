"""The state of a module, kept and put back: parameters, buffers, and what it holds in attributes of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FIXED: tuple[type, ...] = (
    *(str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.MethodType),
    *(types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device, torch.Generator),
)  # values that hold nothing which a call could change
PLAIN = frozenset({str, int, float, bool, type(None)})  # the most frequent of these, found faster
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
    return _all(restores)


def _attributes(holder: object, seen: set[int]) -> Callable[[], None]:
    """Return a function that puts an object's attributes back."""
    present = vars(holder)
    values = [v for name, v in present.items() if type(v) not in PLAIN and name not in NOT_STATE]
    inside = _all([_content(value, seen) for value in values])
    kept = dict(present)

    def restore() -> None:
        now = vars(holder)
        if not _same(now, kept):
            now.clear()
            now.update(kept)
        inside()

    return restore


def _content(value: Any, seen: set[int]) -> Callable[[], None]:
    """Return a function that puts back what is inside of a value; what cannot change is left alone."""
    if type(value) in PLAIN:
        return _nothing
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


def _same(now: dict[Any, Any], kept: dict[Any, Any]) -> bool:
    """Return whether two mappings hold the very same objects in the same order."""
    return [*now] == [*kept] and all(map(operator.is_, now.values(), kept.values()))


def _all(restores: list[Callable[[], None]]) -> Callable[[], None]:
    restores = [put_back for put_back in restores if put_back is not _nothing]

    def restore() -> None:
        for put_back in restores:
            put_back()

    return restore if restores else _nothing


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
        if kept or mapping:
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
    before = torch.get_rng_state()
    # where there is no accelerator, torch.manual_seed only notes down, at length, what to do should one appear
    seed_all = torch.manual_seed if _has_accelerator() else torch.default_generator.manual_seed
    try:
        seed_all(seed)
        yield
    finally:
        torch.set_rng_state(before)


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
