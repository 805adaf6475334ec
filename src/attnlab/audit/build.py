"""An instance of somebody's attention class, made from the arguments or the config it asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..laws.call import one_line
from .find import Found
from .stand_ins import StandIn


class MissingSetting(AttributeError, KeyError):
    """An error where the class reads something of its config that was not given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.setting = name

    def __str__(self) -> str:
        return f"the class reads {self.setting!r} of its config, which was not given: add it to the config"


class Settings(dict):
    """A config from JSON, read as attributes or as keys."""

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


def make_module(found: Found, kwargs: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> nn.Module:
    """Return `Class(config, **kwargs)`. UserError where it cannot be made."""
    cls = found.cls
    name = cls.__name__
    args = () if config is None else (make_config(found, config),)
    given = ", ".join([*(["config"] if args else []), *(kwargs or {})]) or "nothing"
    try:
        with _unset_is_nan():
            return cls(*args, **(kwargs or {}))
    except MissingSetting as error:
        raise UserError(f"{name} cannot be built: {error}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        wanted = f"; its arguments are {inspect.signature(cls)}" if isinstance(error, TypeError) else ""
        raise UserError(f"{name} cannot be built from {given}: {one_line(error)}{wanted}") from None


@contextlib.contextmanager
def _unset_is_nan() -> Iterator[None]:
    """Let memory that nobody sets be not-a-number, so that it is seen."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def fill_unset(module: nn.Module) -> list[str]:
    """Fill with noise the parameters that the constructor left unset, and return their names.

    In large libraries the model sets them, not the layer.
    """
    generator = torch.Generator().manual_seed(0)
    unset = [(name, p) for name, p in module.named_parameters() if p.is_floating_point() and p.isnan().any()]
    with torch.no_grad():
        for _, parameter in unset:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return [name for name, _ in unset]


def make_config(found: Found, config: Mapping[str, Any]) -> Any:
    """Return the config as the class wants it.

    That is an object of the class that annotates it, or of the file's only dataclass that has all these fields, which
    knows the defaults. Where there is no such class, it is an object with just these attributes. UserError where the
    dataclass cannot be made.
    """
    cls = _annotated(found)
    if cls is None:
        cls = _only_dataclass(found, set(config))
    if cls is None:
        return Settings(config)
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(config)
    try:
        made = cls(**{name: value for name, value in config.items() if name in fields})
    except TypeError as error:
        if dataclasses.is_dataclass(cls):
            raise UserError(f"the config, a {cls.__name__}, cannot be made: {one_line(error)}") from None
        return Settings(config)
    for name in set(config) - fields:
        object.__setattr__(made, name, config[name])
    return made


def _only_dataclass(found: Found, fields: set[str]) -> type | None:
    """Return the only dataclass of the file that has all these fields; None where there is none or several."""
    classes = [c for c in vars(found.module).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]
    fitting = [c for c in classes if fields <= {f.name for f in dataclasses.fields(c)}]
    return fitting[0] if len(fitting) == 1 else None


def _annotated(found: Found) -> type | None:
    """Return the class that annotates the constructor's first parameter, if it is one that can be made."""
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
