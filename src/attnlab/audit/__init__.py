"""Put every law that applies to a mechanism, or to anyone's attention class, and say what came of it."""

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
from ..laws.subject import LENGTHS, WIDTHS, find_number, one_line, seeded, speaks, subject
from ..results import LawResult
from ..spec import AttentionConfig
from . import find
from .build import build
from .call import Caller, caller, mask_parameter


@dataclass(frozen=True)
class Audit:
    """What an audit found. `results, exit_code = audit` unpacks it."""

    target: str
    results: list[LawResult]
    notes: tuple[str, ...] = ()  # how it was called, in which precision, what it imports in vain

    @property
    def exit_code(self) -> int:
        """0: all laws that apply hold; 1: one is broken. (2, could not run, is a `UserError`.)"""
        return int(any(r.status == "broken" for r in self.results))

    @property
    def verdict(self) -> str:
        return verdict(self.results)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.results, self.exit_code))

    def to_dict(self) -> dict[str, Any]:
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
    width of x, where neither tells. Raises `UserError`, one sentence, where it could not run.
    """
    for law in laws or ():
        choose("law", law, LAWS)
    if target in attention.names():
        fields = {**(config or {}), **(kwargs or {}), **({"d_model": d_model} if d_model else {})}
        attention.config(target, **fields)  # refuses a misspelt field
        return Audit(target, check_mechanism(target, laws=laws, **fields))
    if ":" not in target and not target.endswith(".py"):
        try:
            choose("mechanism", target, attention.names())
        except UserError as error:
            raise UserError(f"{error}; or give file.py:Class or package.module:Class") from None
    with _quiet(), find.found(target) as found:
        return _audit_class(target, found, kwargs, config, call, mask, mask_shape, d_model, laws)


def _audit_class(
    target: str,
    found: find.Found,
    kwargs: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    call: str | None,
    mask: str,
    mask_shape: str,
    d_model: int | None,
    laws: Sequence[str] | None,
) -> Audit:
    name = found.cls.__name__
    own = getattr(found.module, "Config", None)
    if (
        found.cls is getattr(found.module, "Attention", None)
        and isinstance(own, type)
        and issubclass(own, AttentionConfig)
    ):
        fields = {**(config or {}), **(kwargs or {}), **({"d_model": d_model} if d_model else {})}
        for field in fields:
            choose(f"field of {own.__name__}", field, sorted(own.__dataclass_fields__))
        return Audit(target, check_class(found.module.__name__.rpartition(".")[2], own, found.cls, laws=laws, **fields))

    def make() -> nn.Module:
        return build(found, kwargs, config)

    with seeded(0):
        module = make()
    if speaks(module):
        return Audit(target, check_subject(subject(module, name=name, build=make), laws))
    width = d_model or _width(module, kwargs, config)
    if width is None:
        raise UserError(f"the width of {name}'s input cannot be told from its arguments: give it with --d-model")
    way = caller(module.eval(), call, mask, mask_shape, torch.randn(2, 13, width))
    try:
        s = subject(module, name=name, d_model=width, call=way, build=make)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be copied for the audit: {one_line(error)}") from None
    results = [_with_hint(r, module, way) for r in check_subject(s, laws)]
    notes = [f"called as {way.expression}, x {'[T B D]' if way.sequence_first else '[B T D]'}, D = {width}"]
    if "mask" in way.expression:
        notes[0] += f", mask {way.style} {'[B 1 T T]' if way.four else '[T T]'}"
    if s.dtype != torch.float64:
        notes.append(f"ran in float32, because it does not run in float64: equality means within {s.tolerance:g}")
    if not set(LENGTHS) <= set(s.lengths):
        notes.append(f"accepts only some lengths; tried {', '.join(map(str, s.lengths))} tokens")
    if found.absent:
        notes.append(f"imports {', '.join(found.absent)}, not installed here, and was judged without")
    return Audit(target, results, tuple(notes))


def _width(module: nn.Module, kwargs: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> int | None:
    """From what was given, then from the module's attributes, then from its first linear layer."""
    for given in (kwargs or {}, config or {}):
        for name in WIDTHS:
            if isinstance(given.get(name), int):
                return given[name]
    linear = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), None)
    return find_number(module, WIDTHS) or linear


def _with_hint(result: LawResult, module: nn.Module, way: Caller) -> LawResult:
    """Where the future leaks and a mask was never handed over, say how to hand it over."""
    name = mask_parameter(module)
    if result.law != "causality" or result.status != "broken" or name is None or "mask" in way.expression:
        return result
    hint = f"{way.expression[:-1]}, {name}=mask)"
    return dataclasses.replace(result, detail=f"{result.detail}; forward takes a mask, to give it one: --call '{hint}'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What somebody's module prints or warns of is not this program's output."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
