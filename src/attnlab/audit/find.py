"""Somebody's attention class or function, found in a file or a package, without a change to it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import UserError, choose
from ..files import expanded
from ..laws.call import one_line
from .stand_ins import StandIn, missing_package, standing_in


@dataclasses.dataclass(frozen=True)
class Found:
    """A class or a function, and the module it was found in."""

    cls: type[nn.Module]
    module: ModuleType
    absent: tuple[str, ...]  # names of the packages and modules that it imports and that are not installed
    function: Callable[..., Any] | None = None  # of q, k and v; then `cls` says nothing


@contextmanager
def found(target: str) -> Iterator[Found]:
    """Import the class at `file.py:Class` or `package.module:Class`, and forget its modules again afterwards.

    UserError where there is no such class, or its file cannot be imported.
    """
    place, _, name = target.rpartition(":")
    if not place:
        place = target
        name = ""
    path = expanded(Path(place))
    is_file = place.endswith(".py") or path.is_file()
    if is_file and not path.is_file():
        raise UserError(f"there is no file {place}: give an existing file.py:Class, or package.module:Class")
    before = dict(sys.modules)
    search = list(sys.path)
    arguments = sys.argv
    try:
        sys.argv = [place]
        module, absent = _import(path.resolve() if is_file else place)
        function = _function(module, name)
        cls = nn.Module if function else _pick(module, name, place)
        yield Found(cls, module, tuple(sorted(absent)), function)
    finally:
        sys.path[:] = search
        sys.argv = arguments
        if is_file:
            _forget(before, path.resolve())


def _forget(before: Mapping[str, ModuleType], file: Path) -> None:
    """Drop modules that came from the file's own tree, so that another file's `utils` is not taken for this one's."""
    root = _packages(file)[-1][1].parent
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        near = origin is not None and Path(origin).resolve().is_relative_to(root)
        if module is not before.get(name) and (near or hasattr(module, "__audited__")):
            del sys.modules[name]
    for name, module in before.items():
        sys.modules.setdefault(name, module)


def _packages(file: Path) -> list[tuple[str, Path]]:
    """Return (name, folder) of the packages around the file, innermost first.

    They are the folders with an `__init__.py`, or else as many folders as its relative imports reach.
    """
    folder = file.parent
    packages = []
    while (folder / "__init__.py").exists() and folder.name.isidentifier():
        packages.append((folder.name, folder))
        folder = folder.parent
    if packages:
        return packages
    levels = max((n.level for n in ast.walk(_parse(file)) if isinstance(n, ast.ImportFrom)), default=1)
    around = [file.parent, *file.parent.parents][: max(levels, 1)]
    return [("_audited_" + re.sub(r"\W", "_", folder.name), folder) for folder in around]


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not a Python file that can be read: {one_line(error)}") from None


def _import(place: Path | str) -> tuple[ModuleType, set[str]]:
    """Return the module, and the names of what it imports without protection that is not there."""
    absent: set[str] = set()
    whole: set[str] = set()  # packages whose __init__ must run
    while True:
        try:
            with standing_in(absent):
                module = _run_file(place, whole) if isinstance(place, Path) else _run_module(place, absent)
                return module, absent
        except ModuleNotFoundError as error:
            if not error.name or error.name in absent:
                raise UserError(f"{place} cannot be imported: {one_line(error)}") from None
            absent.add(error.name)
        except ImportError as error:
            package = error.name or ""
            known = re.match(r"cannot import name '(\w+)'", str(error))
            if known and package not in whole and isinstance(place, Path):
                whole.add(package)
            elif known and f"{package}.{known[1]}" not in absent:
                absent.add(f"{package}.{known[1]}")
            else:
                raise UserError(f"{place} cannot be imported: {one_line(error)}") from None
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{place} cannot be imported: {one_line(error)}") from None


def _run_module(name: str, absent: set[str]) -> ModuleType:
    if name.split(".")[0] in absent:
        raise UserError(
            f"there is no package {name.split('.')[0]}: give file.py:Class, or an installed package.module:Class"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _run_file(file: Path, whole: set[str]) -> ModuleType:
    """Import the file as a member of its package, running no `__init__` but those that it turns out to need."""
    packages = _packages(file)
    _parse(file)
    for folder in (file.parent, packages[-1][1].parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    root = sys.modules.get(packages[-1][0])
    name = ".".join([package for package, _ in reversed(packages)])
    if root is not None and str(packages[-1][1]) in getattr(root, "__path__", ()) and not hasattr(root, "__audited__"):
        return importlib.import_module(f"{name}.{file.stem}")  # a package that is already here, such as this one
    for loaded in [m for m in sys.modules if m.split(".")[0] == packages[-1][0]]:
        del sys.modules[loaded]
    full = ""
    for package, folder in reversed(packages):
        full = f"{full}.{package}" if full else package
        _package(full, folder, full in whole)
    return _from_file(f"{name}.{file.stem}", file)


def _package(name: str, folder: Path, run: bool) -> None:
    if run and (folder / "__init__.py").exists():
        _from_file(name, folder / "__init__.py", folder)
        return
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    module.__audited__ = True  # type: ignore[attr-defined]
    sys.modules[name] = module


def _from_file(name: str, file: Path, folder: Path | None = None) -> ModuleType:
    places = [str(folder)] if folder else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any] | None:
    """Return the function called `name`; None where it is something else."""
    found = getattr(module, name, None) if name else None
    return found if inspect.isroutine(found) or isinstance(found, functools.partial) else None


def _pick(module: ModuleType, name: str, place: str) -> type[nn.Module]:
    """Return the class called `name`; without a name, the only one the file defines, or `Attention`."""
    own = [
        n
        for n, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, nn.Module) and (c.__module__ == module.__name__ or n == name)
    ]
    if not name and (len(own) == 1 or "Attention" in own):
        name = "Attention" if "Attention" in own else own[0]
    if not name:
        raise UserError(
            f"{place} defines {', '.join(own) or 'no torch.nn.Module'}: name the class, as in {place}:Class"
        )
    cls = getattr(module, name, None)
    if cls is None:
        choose(f"class in {place}", name, own)
    if isinstance(cls, StandIn):
        raise missing_package(cls)
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise UserError(f"{name} in {place} is not a torch.nn.Module: name one of {', '.join(own) or 'none is there'}")
    return cls
