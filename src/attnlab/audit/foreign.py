"""Somebody's attention class: found in a file or a package, built, and called, without a change to it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose
from ..laws.subject import one_line
from .missing import StandIn, standing_in

MASKS = ("additive", "keep", "drop")


# What a file is imported with -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """A class, and the module it was found in."""

    cls: type[nn.Module]
    module: ModuleType
    absent: tuple[str, ...]  # what it imports that is not installed


@contextmanager
def found(target: str) -> Iterator[Found]:
    """The class at `file.py:Class` or `package.module:Class`; its own modules are forgotten again afterwards."""
    place, _, name = target.rpartition(":")
    if not place:
        place, name = target, ""
    path = Path(place).expanduser()
    is_file = place.endswith(".py") or path.is_file()
    if is_file and not path.is_file():
        raise UserError(f"there is no file {place}: give an existing file.py:Class, or package.module:Class")
    before, search, arguments = dict(sys.modules), list(sys.path), sys.argv
    try:
        sys.argv = [place]
        module, absent = _import(path.resolve() if is_file else place)
        yield Found(_pick(module, name, place), module, tuple(sorted(absent)))
    finally:
        sys.path[:], sys.argv = search, arguments
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
    """(name, folder) of the packages around the file, innermost first: those with an `__init__.py`, else its folder."""
    folder, found_ = file.parent, []
    while (folder / "__init__.py").exists() and folder.name.isidentifier():
        found_.append((folder.name, folder))
        folder = folder.parent
    if found_:
        return found_
    levels = max((n.level for n in ast.walk(_parse(file)) if isinstance(n, ast.ImportFrom)), default=1)
    around = [file.parent, *file.parent.parents][: max(levels, 1)]
    return [("_audited_" + re.sub(r"\W", "_", folder.name), folder) for folder in around]


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} is not a Python file that can be read: {one_line(error)}") from None


def _import(place: Path | str) -> tuple[ModuleType, set[str]]:
    """The module, and the names of what it imports without protection that is not there."""
    absent: set[str] = set()
    whole: set[str] = set()  # packages whose __init__ must run
    while True:
        try:
            with standing_in(absent):
                return (_run_file(place, whole) if isinstance(place, Path) else _run_module(place, absent)), absent
        except ModuleNotFoundError as error:
            if not error.name or error.name in absent:
                raise UserError(f"{place} cannot be imported: {one_line(error)}") from None
            absent.add(error.name)
        except ImportError as error:
            package, known = error.name or "", re.match(r"cannot import name '(\w+)'", str(error))
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
    module = _from_file(f"{name}.{file.stem}", file)
    return module


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


def _pick(module: ModuleType, name: str, place: str) -> type[nn.Module]:
    """The class called `name`; without a name, the only one the file defines, or `Attention`."""
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
        raise cls._wanted()
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise UserError(f"{name} in {place} is not a torch.nn.Module: name one of {', '.join(own) or 'none is there'}")
    return cls


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


# How it is called -------------------------------------------------------------------------------------------------


def causal_mask(length: int, style: str, dtype: torch.dtype) -> Tensor:
    """[T T]. additive: 0 or -inf; keep: True where a token may be seen; drop: True where it may not."""
    choose("mask style", style, MASKS)
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    if style == "additive":
        return torch.zeros(length, length, dtype=dtype).masked_fill(~keep, -math.inf)
    return keep if style == "keep" else ~keep


def rotary(head_dim: int, theta: float = 10_000.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def table(x: Tensor) -> tuple[Tensor, Tensor]:
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
        angle = torch.cat([angle, angle], -1).expand(x.shape[0], -1, -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    return table


@dataclasses.dataclass(frozen=True)
class Caller:
    """How to call a module on x: an expression with the names below, and the form of the mask it is handed.

    module, x [B T D], positions [B T], mask (a causal one, [T T] or [B 1 T T], in `style`), the same mask in each style
    as `additive`, `keep` and `drop`, `rotary(head_dim)` -> (cos, sin) [B T head_dim], torch.
    """

    expression: str
    style: str = "additive"
    four: bool = False  # [B 1 T T] rather than [T T]
    sequence_first: bool = False  # the module takes [T B D]

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        B, T, _ = x.shape
        masks = {style: causal_mask(T, style, x.dtype) for style in MASKS}
        if self.four:
            masks = {style: mask.expand(B, 1, T, T) for style, mask in masks.items()}
        names = {
            "module": module,
            "x": x.transpose(0, 1) if self.sequence_first else x,
            "positions": torch.arange(T).expand(B, -1),
            "mask": masks[self.style],
            "rotary": lambda head_dim, theta=10_000.0: rotary(head_dim, theta)(x),
            "torch": torch,
            **masks,
        }
        y = eval(self.expression, names)
        return self._batch_first(y) if self.sequence_first else y

    def _batch_first(self, y: Any) -> Any:
        while not isinstance(y, Tensor):
            y = next(iter(y.values())) if isinstance(y, Mapping) else y[0]
        return y.transpose(0, 1)


def caller(module: nn.Module, expression: str | None, style: str, shape: str, x: Tensor) -> Caller:
    """The way to call this module; what was not said is found out by trying."""
    choose("mask style", style, MASKS)
    choose("mask shape", shape, ("auto", "2d", "4d"))
    expression = expression or guess(module)
    try:
        compile(expression, "--call", "eval")
    except SyntaxError as error:
        raise UserError(
            f"--call {expression!r} is not a Python expression ({error.msg}): write it as module(x)"
        ) from None
    turned = "transpose" in expression or "permute" in expression
    first = getattr(module, "batch_first", True) is False and not turned
    fours = {"2d": (False,), "4d": (True,), "auto": (False, True)}[shape]
    tries = [Caller(expression, style, four, first) for four in fours]
    for attempt in tries[:-1]:
        try:
            attempt(module, x)
            return attempt
        except NameError as error:
            known = "module, x, mask, positions, additive, keep, drop, rotary, torch"
            raise UserError(f"--call {expression!r}: {error}; the names it may use are {known}") from None
        except Exception:
            continue
    return tries[-1] if shape != "auto" or _works(tries[-1], module, x) else tries[0]


def _works(attempt: Caller, module: nn.Module, x: Tensor) -> bool:
    try:
        attempt(module, x)
    except Exception:
        return False
    return True


def guess(module: nn.Module) -> str:
    """How a module with this forward is called: x for what it must be given, masks and positions by their names."""
    words = []
    for i, (name, parameter) in enumerate(inspect.signature(module.forward).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:
            break
        if "mask" in name:
            words.append("mask")
        elif "position" in name and "embed" not in name:
            words.append("positions")
        elif i == 0 or name in ("q", "k", "v", "query", "key", "value", "queries", "keys", "values", "context"):
            words.append("x")
        else:
            raise UserError(
                f"forward also wants {name!r}: say how to call it, for example --call 'module(x, {name}=...)'"
            )
    return f"module({', '.join(words)})" if words else "module(x)"


def mask_parameter(module: nn.Module) -> str | None:
    """The name of the parameter through which forward takes a mask, if it does."""
    names = inspect.signature(module.forward).parameters
    return next((n for n in names if n in ("attn_mask", "attention_mask", "mask", "causal_mask")), None)
