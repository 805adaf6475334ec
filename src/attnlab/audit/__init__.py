"""An audit: the laws, put to a mechanism or to anyone's attention class."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import attention
from ..errors import UserError, choose
from ..laws import LAWS, check_class, check_mechanism, check_subject, verdict
from ..laws.subject import LENGTHS, WIDTHS, Subject, find_number, has_interface, one_line, seeded, subject
from ..results import LawResult
from ..spec import AttentionConfig
from . import find
from .build import make_module
from .call import Caller, find_caller, mask_parameter


@dataclass(frozen=True)
class Audit:
    """The results of an audit. `results, exit_code = audit` unpacks it."""

    target: str
    results: list[LawResult]
    notes: tuple[str, ...] = ()  # how it was called, in which precision, which of its imports are missing

    @property
    def exit_code(self) -> int:
        """The exit code. 0: all laws that apply hold; 1: one is broken. (2, it could not run, is a `UserError`.)"""
        return 1 if any(r.status == "broken" for r in self.results) else 0

    @property
    def verdict(self) -> str:
        """One line about all results."""
        return verdict(self.results)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.results, self.exit_code))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON, which `attnlab audit --json` prints."""
        return {
            "format": 1,
            "target": self.target,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "notes": list(self.notes),
            "laws": [r.to_dict() for r in self.results],
        }


def audit_target(
    target: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    call: str | None = None,
    mask: str = "additive",
    mask_shape: str = "auto",
    d_model: int | None = None,
    laws: Sequence[str] | None = None,
) -> Audit:
    """Audit a mechanism by name, or a class at `file.py:Class` or `package.module:Class`.

    kwargs: the class's keyword arguments. config: attributes of the one config object it takes. call: an expression
    (names: see `call.Caller`). mask: additive, keep or drop. mask_shape: 2d [T T], 4d [B 1 T T], or auto. d_model:
    width of x, where neither tells. laws: the names of some; None: all. UserError where it could not run.
    """
    for law in laws or ():
        choose("law", law, LAWS)
    fields = {**(config or {}), **(kwargs or {}), **({"d_model": d_model} if d_model else {})}
    if target in attention.names():
        attention.config(target, **fields)  # refuses a misspelt field
        return Audit(target, check_mechanism(target, laws=laws, **fields))
    if ":" not in target and not target.endswith(".py"):
        try:
            choose("mechanism", target, attention.names())
        except UserError as error:
            raise UserError(f"{error}; or give file.py:Class or package.module:Class") from None
    with _quiet(), find.found(target) as found:
        if _is_mechanism(found):
            return _audit_mechanism(target, found, fields, laws)
        how = _Instructions(kwargs, config, call, mask, mask_shape, d_model)
        return _audit_class(target, found, how, laws)


@dataclass(frozen=True)
class _Instructions:
    """Instructions to build and to call a class; for the fields see `audit_target`."""

    kwargs: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    call: str | None
    mask: str
    mask_shape: str
    d_model: int | None


def _is_mechanism(found: find.Found) -> bool:
    """Return whether the class is the `Attention` of a file that has a `Config` of attnlab's interface."""
    config = getattr(found.module, "Config", None)
    is_attention = found.cls is getattr(found.module, "Attention", None)
    return is_attention and isinstance(config, type) and issubclass(config, AttentionConfig)


def _audit_mechanism(target: str, found: find.Found, fields: Mapping[str, Any], laws: Sequence[str] | None) -> Audit:
    """Audit a class that follows attnlab's interface, in each of its Config's variants."""
    config = found.module.Config
    for field in fields:
        choose(f"field of {config.__name__}", field, sorted(config.__dataclass_fields__))
    name = found.module.__name__.rpartition(".")[2]
    return Audit(target, check_class(name, config, found.cls, laws=laws, **fields))


def _audit_class(target: str, found: find.Found, how: _Instructions, laws: Sequence[str] | None) -> Audit:
    """Audit any other class, built once and called as `how` says or as its forward suggests."""
    name = found.cls.__name__

    def make() -> nn.Module:
        return make_module(found, how.kwargs, how.config)

    with seeded(0):
        module = make()
    if has_interface(module):
        return Audit(target, check_subject(subject(module, name=name, build=make), laws))
    width = how.d_model or _width(module, how.kwargs, how.config)
    if width is None:
        raise UserError(f"the width of {name}'s input cannot be told from its arguments: give it with --d-model")
    caller = find_caller(module.eval(), how.call, how.mask, how.mask_shape, torch.randn(2, 13, width))
    try:
        s = subject(module, name=name, d_model=width, call=caller, build=make)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be copied for the audit: {one_line(error)}") from None
    results = [_with_hint(result, module, caller) for result in check_subject(s, laws)]
    return Audit(target, results, _notes(s, caller, found))


def _notes(s: Subject, caller: Caller, found: find.Found) -> tuple[str, ...]:
    """Return how the module was called, in which precision and lengths, and which of its imports are missing."""
    called = f"called as {caller.expression}, x {'[T B D]' if caller.sequence_first else '[B T D]'}, D = {s.d_model}"
    if "mask" in caller.expression:
        called += f", mask {caller.style} {'[B 1 T T]' if caller.four else '[T T]'}"
    notes = [called]
    if s.dtype != torch.float64:
        notes.append(f"ran in float32, because it does not run in float64: equality means within {s.tolerance:g}")
    if not set(LENGTHS) <= set(s.lengths):
        notes.append(f"accepts only some lengths; tried {', '.join(map(str, s.lengths))} tokens")
    if found.absent:
        notes.append(f"imports {', '.join(found.absent)}, not installed here, and was judged without")
    return tuple(notes)


def _width(module: nn.Module, kwargs: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> int | None:
    """Return the width that was given, or else that of the module's attributes, or of its first linear layer."""
    for given in (kwargs or {}, config or {}):
        for name in WIDTHS:
            if isinstance(given.get(name), int):
                return given[name]
    linear = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), None)
    return find_number(module, WIDTHS) or linear


def _with_hint(result: LawResult, module: nn.Module, caller: Caller) -> LawResult:
    """Add to a leak how to give the module a mask, where it takes one and got none."""
    name = mask_parameter(module)
    if result.law != "causality" or result.status != "broken" or name is None or "mask" in caller.expression:
        return result
    hint = f"{caller.expression[:-1]}, {name}=mask)"
    return dataclasses.replace(result, detail=f"{result.detail}; forward takes a mask, to give it one: --call '{hint}'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what somebody's module prints and warns of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
