"""The laws, put to a mechanism or to anyone's attention class or function, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .. import attention
from ..errors import UserError, choose
from ..laws import LAWS, check_class, check_mechanism, check_subject
from ..laws.call import MASKS, Caller, DecodeStep, given_step, one_line
from ..laws.functions import LAYOUTS, FunctionCaller
from ..laws.prepare import CONTEXTS, WIDTHS, find_number, has_interface, subject
from ..laws.state import seeded
from ..laws.subject import LENGTHS, StepCall, Subject
from ..ranges import checked
from ..results import LawResult, Tell
from ..spec import AttentionConfig
from . import find
from .build import fill_unset, make_module
from .call import find_caller, function_caller, mask_parameter, require_python
from .result import Audit


@dataclass(frozen=True)
class Instructions:
    """Instructions to build, to call and to judge a target; None: found out."""

    kwargs: Mapping[str, Any] | None = None  # the class's keyword arguments
    config: Mapping[str, Any] | None = None  # attributes of the one config object it takes
    call: str | None = None  # an expression; names: see `laws.call.Caller`
    step: str | None = None  # an expression for one step of decoding, which returns (y, cache) or y
    mask: str = "additive"  # additive, keep or drop
    mask_shape: str = "auto"  # 2d [T T], 4d [B 1 T T], or auto
    d_model: int | None = None  # width of x, where nothing else tells
    layout: str | None = None  # axes of a function's q, k, v; one of laws.functions.LAYOUTS
    laws: Sequence[str] | None = None  # the names of some; None: all
    allow: Sequence[str] = ()  # the names of laws that may be broken

    def check(self) -> None:
        """Raise `UserError` for an unknown law or layout, and for an expression that is no Python."""
        for law in (*(self.laws or ()), *self.allow):
            choose("law", law, LAWS)
        if self.laws is not None and not self.laws:
            raise UserError(f"--laws names no law: give some of {', '.join(LAWS)}")
        if self.layout is not None:
            choose("layout", self.layout, LAYOUTS)
        for option, expression in (("--call", self.call), ("--step", self.step)):
            if expression is not None:
                require_python(option, expression)

    def refuse_calls(self, target: str) -> None:
        """Raise `UserError` where it is said how to call a mechanism, whose interface is known."""
        usual = Instructions()
        for name in ("call", "step", "mask", "mask_shape", "layout"):
            if getattr(self, name) != getattr(usual, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is for modules and functions of another interface, and {target} has "
                    "attnlab's: leave it out"
                )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields for a mechanism's Config."""
        return {**(self.config or {}), **(self.kwargs or {}), **({"d_model": self.d_model} if self.d_model else {})}


@checked
def audit_target(target: str, *, tell: Tell | None = None, **instructions: Any) -> Audit:
    """Audit a mechanism by name, or a class or function at `file.py:Name` or `package.module:Name`.

    instructions: fields of `Instructions`. tell: called with (law, how many are done, how many there are). UserError
    where it could not run. The code of the target runs in this process; `apart.audit_apart` gives it one of its own.
    """
    for name in instructions:
        choose("instruction", name, [field.name for field in fields(Instructions)])
    how = Instructions(**instructions)
    how.check()
    if target in attention.names():
        how.refuse_calls(target)
        attention.config(target, **how.fields)  # refuses a misspelt field
        results = check_mechanism(target, laws=how.laws, allow=how.allow, tell=tell, **how.fields)
        return Audit(target, results, longest=LENGTHS[-1])
    if ":" not in target and not target.endswith(".py"):
        try:
            choose("mechanism", target, attention.names())
        except UserError as error:
            raise UserError(f"{error}; or give file.py:Class or package.module:Class") from None
    with _quiet(), find.found(target) as found:
        if _is_mechanism(found):
            return _audit_mechanism(target, found, how, tell)
        if found.function is not None:
            return _audit_function(target, found, how, tell)
        return _audit_class(target, found, how, tell)


def _is_mechanism(found: find.Found) -> bool:
    """Return whether the class is the `Attention` of a file that has a `Config` of attnlab's interface."""
    config = getattr(found.module, "Config", None)
    is_attention = found.cls is getattr(found.module, "Attention", None)
    return is_attention and isinstance(config, type) and issubclass(config, AttentionConfig)


def _audit_mechanism(target: str, found: find.Found, how: Instructions, tell: Tell | None) -> Audit:
    """Audit a class that follows attnlab's interface, in each of its Config's variants."""
    how.refuse_calls(target)
    config = found.module.Config
    for field in how.fields:
        choose(f"field of {config.__name__}", field, sorted(config.__dataclass_fields__))
    name = found.module.__name__.rpartition(".")[2]
    results = check_class(name, config, found.cls, laws=how.laws, allow=how.allow, tell=tell, **how.fields)
    return Audit(target, results, longest=LENGTHS[-1])


def _audit_function(target: str, found: find.Found, how: Instructions, tell: Tell | None) -> Audit:
    """Audit a function of q, k and v between two projections."""
    assert found.function is not None
    name = getattr(found.function, "__name__", target)
    module, caller = function_caller(found.function, how.call, how.mask, how.layout)
    step = _function_step(caller, how.step)
    s = subject(module, name=name, call=caller, step=step)
    results = [_with_hint(r, found.function, caller) for r in check_subject(s, how.laws, how.allow, tell)]
    layout = " ".join(module.layout.upper())
    notes = (f"called as {caller.expression}, q, k, v [{layout}] by projections of x", *_notes(s, found))
    return Audit(target, results, notes, s.longest)


def _function_step(caller: FunctionCaller, expression: str | None) -> StepCall | None:
    """Return the step of a function: its expression gets the new q, and all k and v."""
    if expression is None:
        return None
    return FunctionCaller(dataclasses.replace(caller.caller, expression=expression)).step


def _audit_class(target: str, found: find.Found, how: Instructions, tell: Tell | None) -> Audit:
    """Audit any other class, built once and called as `how` says or as its forward suggests."""
    name = found.cls.__name__

    def make() -> nn.Module:
        module = make_module(found, how.kwargs, how.config)
        fill_unset(module)
        return module

    with seeded(0):
        module = make_module(found, how.kwargs, how.config)
    unset = fill_unset(module)
    if has_interface(module):
        s = subject(module, name=name, build=make)
        return Audit(target, check_subject(s, how.laws, how.allow, tell), longest=s.longest)
    width = how.d_model or _width(module, how.kwargs, how.config)
    if width is None:
        raise UserError(f"the width of {name}'s input cannot be told from its arguments: give it with --d-model")
    context = find_number(module, CONTEXTS)
    x = torch.randn(2, min(13, context or 13), width)
    caller = find_caller(module.eval(), how.call, how.mask, how.mask_shape, x)
    step = None if how.step is None else given_step(module, caller, how.step, x)
    try:
        s = subject(module, name=name, d_model=width, call=caller, step=step, build=make)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be copied for the audit: {one_line(error)}") from None
    results = [_with_hint(r, module, caller) for r in check_subject(s, how.laws, how.allow, tell)]
    notes = [_called(s, caller), *_notes(s, found)]
    if unset:
        notes.append(f"its constructor sets no {', '.join(unset)}: filled with noise")
    return Audit(target, results, tuple(notes), s.longest)


def _called(s: Subject, caller: Caller) -> str:
    """Return how the module was called."""
    called = f"called as {caller.expression}, x {'[T B D]' if caller.sequence_first else '[B T D]'}, D = {s.d_model}"
    words = re.findall(r"\w+", caller.expression)
    styles = {caller.style if word == "mask" else word for word in words if word in ("mask", *MASKS)}
    if styles:
        called += f", mask {' and '.join(sorted(styles))} {'[B 1 T T]' if caller.four else '[T T]'}"
    return called


def _notes(s: Subject, found: find.Found) -> tuple[str, ...]:
    """Return how it was decoded, in which precision and lengths it ran, and which of its imports are missing."""
    notes = []
    if isinstance(s.step, DecodeStep):
        notes.append(f"decoded as {s.step.expression}")
    elif s.step is None:
        notes.append("decoding was not tried: --step says how one step is called, as in 'module(x, cache=cache)'")
    if s.no_gradients:
        notes.append(f"runs without gradients only: {s.no_gradients}")
    if s.dtype != torch.float64:
        notes.append(f"ran in float32, because it does not run in float64: equality means within {s.tolerance:g}")
    if not set(LENGTHS) <= set(s.lengths):
        notes.append(f"accepts only some lengths; tried {', '.join(map(str, sorted({*s.lengths, *s.tiles})))} tokens")
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


def _with_hint(result: LawResult, target: Callable[..., Any], caller: Caller | FunctionCaller) -> LawResult:
    """Add to a leak how to give the module a mask, where it takes one and got none."""
    name = mask_parameter(target)
    if result.law != "causality" or result.status != "broken" or name is None or "mask" in caller.expression:
        return result
    hint = f"{caller.expression[:-1]}, {name}=mask)"
    return dataclasses.replace(result, detail=f"{result.detail}; it takes a mask, to give it one: --call '{hint}'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what somebody's module prints and warns of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
