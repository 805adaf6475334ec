"""One mechanism, one file. The folder listing is the registry, and installed packages add to it through the entry
point group `attnlab.attention` (name -> a module that defines `Config` and `Attention`). Nothing is imported until
it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ..errors import UserError, choose
from ..spec import AttentionConfig


def names() -> list[str]:
    """Every mechanism, in alphabetical order."""
    return sorted({*_own(), *_others()})


def module(name: str) -> ModuleType:
    """`attention/<name>.py`, or the module an installed package registered: it defines `Config` and `Attention`."""
    choose("mechanism", name, names())
    if name in _own():
        return importlib.import_module(f".{name}", __name__)
    try:
        return _others()[name].load()
    except Exception as error:
        origin = _others()[name].value
        raise UserError(
            f"mechanism {name!r} comes from {origin}, which cannot be imported ({error}): mend it"
        ) from error


def config(name: str, **fields: Any) -> AttentionConfig:
    """`module(name).Config(**fields)`, with a `UserError` for a field it does not have."""
    cls = module(name).Config
    for field in fields:
        choose(f"option of {name}", field, sorted(cls.__dataclass_fields__))
    return cls(**fields)


def build(name: str, **fields: Any) -> Any:
    """The mechanism's `Attention` module for these `Config` fields."""
    return module(name).Attention(config(name, **fields))


@cache
def _own() -> frozenset[str]:
    return frozenset(m.name for m in pkgutil.iter_modules(__path__) if not m.name.endswith("_flax"))


@cache
def _others() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="attnlab.attention") if point.name not in _own()}
