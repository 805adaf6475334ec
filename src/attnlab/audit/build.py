"""Somebody's attention class, built from the arguments or the config it asks for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError
from ..laws.subject import one_line
from .find import Found
from .stand_ins import StandIn

# How it is built --------------------------------------------------------------------------------------------------


class MissingSetting(AttributeError, KeyError):
    """The class reads something of its config that was not given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.setting = name

    def __str__(self) -> str:
        return f"the class reads {self.setting!r} of its config, which was not given: add it to the config"


class Settings(dict):
    """A config given as JSON, read as attributes or as keys."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: Settings(v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __missing__(self, name: str) -> Any:
        raise MissingSetting(name)


def build(found: Found, kwargs: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> nn.Module:
    """`Class(config, **kwargs)`; a `UserError` says in one sentence why it cannot be."""
    cls, name = found.cls, found.cls.__name__
    args = () if config is None else (settings(found, config),)
    given = ", ".join([*(["config"] if args else []), *(kwargs or {})]) or "nothing"
    try:
        module = cls(*args, **(kwargs or {}))
    except MissingSetting as error:
        raise UserError(f"{name} cannot be built: {error}") from None
    except UserError:
        raise
    except Exception as error:
        wanted = f"; its arguments are {inspect.signature(cls)}" if isinstance(error, TypeError) else ""
        raise UserError(f"{name} cannot be built from {given}: {one_line(error)}{wanted}") from None
    return module


def settings(found: Found, config: Mapping[str, Any]) -> Any:
    """The config as the class wants it: an object of the annotated class, or of the file's only dataclass that has
    all these fields (it knows the defaults), or else an object with just these attributes."""
    kind = _annotated(found)
    if kind is None:
        kinds = [c for c in vars(found.module).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]
        kinds = [c for c in kinds if set(config) <= {f.name for f in dataclasses.fields(c)}]
        kind = kinds[0] if len(kinds) == 1 else None
    if kind is None:
        return Settings(config)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(config)
    try:
        made = kind(**{k: v for k, v in config.items() if k in fields})
    except TypeError as error:
        if dataclasses.is_dataclass(kind):
            raise UserError(f"the config, a {kind.__name__}, cannot be made: {one_line(error)}") from None
        return Settings(config)
    for name in set(config) - fields:
        object.__setattr__(made, name, config[name])
    return made


def _annotated(found: Found) -> type | None:
    """The class that annotates the constructor's first parameter, if it is one that can be made."""
    parameters = list(inspect.signature(found.cls.__init__).parameters.values())[1:]
    note = parameters[0].annotation if parameters else None
    if isinstance(note, str):
        try:
            note = eval(note, dict(vars(found.module)))
        except Exception:
            return None
    if not inspect.isclass(note) or note is inspect.Parameter.empty or isinstance(note, StandIn):
        return None
    return None if note.__module__ == "builtins" or issubclass(note, nn.Module) else note
