"""Stand-ins for packages that a file imports and that are not installed.

A class that never uses them can then be imported. While a file is imported, a stand-in may be subclassed, called,
indexed and used as a decorator, which leaves the decorated thing unchanged. Afterwards, using one raises a `UserError`
that names the package.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
from abc import ABCMeta
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from ..errors import UserError


class StandIn(ABCMeta):
    """The type of every stand-in: each is a class, because a class is what most files want from an import."""

    importing = False  # whether a file is being imported
    origin: str  # the dotted name it stands for

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{cls.origin}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not StandIn.importing:
            raise missing_package(cls)
        decorates = len(args) == 1 and not kwargs and (inspect.isfunction(args[0]) or inspect.isclass(args[0]))
        return args[0] if decorates else stand_in(cls.origin)

    def _inert(cls, *_: Any) -> Any:
        if not StandIn.importing:
            raise missing_package(cls)
        return stand_in(cls.origin)

    def _no(cls, *_: Any) -> bool:
        if not StandIn.importing:
            raise missing_package(cls)
        return False

    def __iter__(cls) -> Iterator[Any]:
        if not StandIn.importing:
            raise missing_package(cls)
        return iter(())

    def __len__(cls) -> int:
        return 0

    __getitem__ = __or__ = __ror__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = _inert
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _no


def missing_package(cls: StandIn) -> UserError:
    """Return the error for using a stand-in, which names the package that is not installed."""
    package = cls.origin.split(".")[0]
    user = "" if cls.__module__ == __name__ else f"{cls.__name__}, made from "
    return UserError(f"the class uses {user}{cls.origin}, but {package} is not installed: install it and run again")


def stand_in(origin: str) -> StandIn:
    """Return a stand-in for the dotted name `origin`."""
    made = StandIn(origin.rpartition(".")[2], (), {"__module__": __name__})
    made.origin = origin
    return made


class _Absent(ModuleType):
    __path__: MutableSequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        absent = any(name == n or name.startswith(f"{n}.") for n in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def standing_in(names: set[str]) -> Iterator[None]:
    """Let the modules `names` be imported although they are not there."""
    finder = _Finder(names)
    sys.meta_path.append(finder)
    StandIn.importing = True
    try:
        yield
    finally:
        StandIn.importing = False
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _Absent)]:
            del sys.modules[name]
