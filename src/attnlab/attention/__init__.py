"""The registry of mechanisms: one file each, and the listing of this folder is the list of them.

Installed packages add to it through the entry point group `attnlab.attention`: name -> a module that defines `Config`
and `Attention`. A mechanism is imported only when it is asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, choose, quoted
from ..plugins import blamed, plugin, plugins
from ..spec import AttentionConfig, CacheSpec


def names() -> list[str]:
    """Return the names of all mechanisms, in alphabetical order."""
    return sorted({*_own(), *_others()})


def module(name: str) -> ModuleType:
    """Return the module of a mechanism, which defines `Config` and `Attention`: ours, or an installed package's.

    Raises `UserError` for an unknown name, and where the package's module cannot be imported.
    """
    choose("mechanism", name, names())
    if name in _own():
        return importlib.import_module(f".{name}", __name__)
    return plugin(name)


def usable(tell: Callable[[str], None]) -> list[str]:
    """Return `names`, but for those of packages that cannot be used; `tell` is called with a sentence about each."""
    found = []
    for name in names():
        try:
            module(name)
            found.append(name)
        except UserError as error:
            tell(f"{error}; {name} is left out")
    return found


def config(name: str, **fields: Any) -> AttentionConfig:
    """Return `module(name).Config(**fields)`. Raise `UserError` for a field that it does not have."""
    cls = module(name).Config
    if name not in _own():
        return _stranger(name, cls, fields)
    known = sorted(field.name for field in dataclasses.fields(cls))  # class variables are no options
    for field in fields:
        choose(f"option of {name}", field, known)
    return cls(**fields)


def build(name: str, **fields: Any) -> Any:
    """Return the mechanism's `Attention`, a module of PyTorch, for these `Config` fields."""
    return layer(name, config(name, **fields))


def layer(name: str, config: AttentionConfig) -> Any:
    """Return the mechanism's `Attention` for its `Config`. `UserError` where another package's cannot be built."""
    made = module(name).Attention
    with nullcontext() if name in _own() else blamed(name):
        return made(config)


def _stranger(name: str, cls: type[AttentionConfig], fields: Mapping[str, Any]) -> AttentionConfig:
    """The Config of another package's mechanism, which must declare its cache."""
    with blamed(name):
        for field in fields:
            choose(f"option of {name}", field, sorted(field.name for field in dataclasses.fields(cls)))
        made = cls(**fields)
        spec = made.cache_spec
    if not isinstance(spec, CacheSpec):
        raise UserError(f"mechanism {name!r} declares the cache {quoted(spec)}: its Config must give a CacheSpec")
    return made


@cache
def declared(name: str, variable: str) -> Any:
    """Return the value of a class variable of a mechanism's Config, read from its file, which is not imported.

    None where `class Config` itself does not assign it (inherited values are not found), where the value is no literal,
    and where there is no such file.
    """
    try:
        file = _file(name)
        tree = ast.Module([], []) if file is None else ast.parse(file.read_bytes())
        value = _assigned(tree, variable)
        return None if value is None else ast.literal_eval(value)
    except (OSError, SyntaxError, ValueError, TypeError, ImportError, AttributeError):  # no file, no Python, no literal
        return None


@cache
def defines(name: str, function: str) -> bool:
    """Return whether a mechanism's module defines this function, as its file says, which is not imported."""
    try:
        file = _file(name)
        body = [] if file is None else ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError, ImportError, AttributeError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in body)


def _assigned(tree: ast.Module, variable: str) -> ast.expr | None:
    """The value that `class Config` gives to `variable`."""
    for node in tree.body:
        for part in node.body if isinstance(node, ast.ClassDef) and node.name == "Config" else ():
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
                return getattr(part, "value", None)
    return None


def _file(name: str) -> Path | None:
    """The source file of a mechanism. Packages around it are not imported either, as they may import a framework."""
    if name in _own():
        return Path(__path__[0]) / f"{name}.py"
    if name not in _others():
        return None
    first, *rest = _others()[name].module.split(".")
    spec = importlib.util.find_spec(first)
    path = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


@cache
def _own() -> frozenset[str]:
    return frozenset(m.name for m in pkgutil.iter_modules(__path__) if not m.name.endswith("_flax"))


@cache
def _others() -> dict[str, Any]:
    return {name: point for name, point in plugins().items() if name not in _own()}
