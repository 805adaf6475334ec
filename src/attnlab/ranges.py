"""The kinds and ranges of values that users give: each stands at its field, once, and is checked here.

A field says its range in its annotation: `steps: Count`, `lr: Annotated[float, Range(above=0)]`. `check_fields` checks
a dataclass, `check_value` one argument, and the command line shows `Range.words` in its help. Pure Python.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from .errors import UserError, choose, quoted

MANY = 2**31 - 1  # the largest size or count of anything that memory holds
HUGE = 1e300  # above it, computing with a number overflows
LARGEST = 2**63 - 1  # the largest number that files and frameworks hold
DERIVED: Any = None  # the default of a field that follows from other fields where it is left out


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that are allowed; infinity and NaN never are."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether `value` is finite and lies in the range."""
        inside = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return inside and (isinstance(value, int) or math.isfinite(value))

    @property
    def words(self) -> str:
        """Return the range in words: "at least 1", "above 0 and at most 1"; "finite" where it has no ends."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        ends = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {end}" for word, end in ends if end is not None) or "finite"

    def demand(self, value: float) -> str:
        """Return what a number outside the range must be."""
        if abs(value) > HUGE or value != value:
            return f"a finite number, {self.words}"
        if isinstance(self.most, int) and self.most > 1 and self.least is not None and value < self.least:
            return f"at least {self.least}"
        return self.words

    @property
    def short(self) -> str:
        """Return the range in words for the help: without an upper end that only machines know."""
        if self.most in (MANY, LARGEST):
            return dataclasses.replace(self, most=None).words
        return "" if self.words == "finite" else self.words


Count = Annotated[int, Range(1, MANY)]  # at least one
Size = Annotated[int, Range(0, MANY)]  # none or more
Seed = Annotated[int, Range(0, LARGEST)]
Long = Annotated[int, Range(1, LARGEST)]  # tokens, documents and steps, which no memory holds at once
Total = Annotated[int, Range(0, LARGEST)]  # none or more of what memory need not hold at once
Layers = Annotated[int, Range(1, 10_000)]  # more would take minutes to be made at all
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(0, 1)]  # from none to all
Logit = Annotated[float, Range(-100, 100)]  # of a sigmoid or softmax; beyond it they are 0 or 1
Part = Annotated[float, Range(above=0, most=1)]  # of a whole, and not nothing of it
Fraction = Annotated[float, Range(above=0, below=1)]  # some, and not all
Threads = Annotated[int, Range(1, 4096)]  # of one process
Runs = Annotated[int, Range(1, 10_000)]  # of one mechanism
Probability = Annotated[float, Range(least=0, below=1)]  # of what must not always happen


@dataclasses.dataclass(frozen=True)
class Filled:
    """The mark of a text that is not empty."""


Word = Annotated[str, Filled()]
Kind = Callable[[str, Any], Any]  # takes a name and a value, returns the value, or raises `UserError`


def check_fields(config: Any, where: str = "") -> None:
    """Check every field of a dataclass by its annotation; its `__post_init__` calls this before anything else.

    `where` comes before the fields' names in the sentence. A field whose default is None may be None. Lists become
    tuples where a tuple is due, and other libraries' numbers Python's. Raises `UserError`.
    """
    for name, kind, optional in kinds_in(type(config)):  # type: ignore[arg-type]  # a class has a hash
        value = getattr(config, name)
        if value is None and optional:
            continue
        found = kind(where + name, value)
        if found is not value:
            object.__setattr__(config, name, found)


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Return `value`, of the kind and in the range that `hint` says. Raise `UserError`, which has the name, else."""
    return kind_in(hint)(name, value)


P = ParamSpec("P")
R = TypeVar("R")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which now refuses arguments of another kind or range than its annotations say.

    For functions that are called once, not for those inside a forward pass. An argument whose default is None may be
    None. Numbers of other libraries become Python's.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Kind] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kinds:
            hints = typing.get_type_hints(function, include_extras=True)
            variable = [name for name, each in signature.parameters.items() if each.kind in VARIABLE]
            kinds.update({name: kind_in(hint) for name, hint in hints.items() if name not in ("return", *variable)})
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in kinds and not (value is None and signature.parameters[name].default is None):
                given.arguments[name] = kinds[name](name, value)
        return function(*given.args, **given.kwargs)

    return call


@cache
def kinds_in(cls: type) -> list[tuple[str, Kind, bool]]:
    """Return the name and kind of each field of a dataclass, and whether it may be None whatever its annotation."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        try:
            hints |= typing.get_type_hints(base, include_extras=True)
        except (NameError, TypeError, AttributeError):  # another package's names, imported for its type checker alone
            continue
    fields = dataclasses.fields(cls)
    return [(f.name, kind_in(hints.get(f.name, Any)), f.default is None) for f in fields]


@cache
def kind_in(hint: Any) -> Kind:
    """Return the check of an annotation; one that is not known here lets everything pass."""
    limits = range_of(hint)
    if Filled() in getattr(hint, "__metadata__", ()):
        return _filled
    while typing.get_origin(hint) in (Annotated, typing.Required, typing.NotRequired):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _union([kind_in(part) for part in typing.get_args(hint) if part is not types.NoneType], hint)
    if typing.get_origin(hint) is Literal:
        return lambda name, value: choose(name, value, typing.get_args(hint))
    if typing.is_typeddict(hint):
        return _record(hint)
    if typing.get_origin(hint) is dict or (typing.get_origin(hint) is Mapping and typing.get_args(hint)[1] is not Any):
        return _dictionary(kind_in(typing.get_args(hint)[1]), typing.get_args(hint)[0])
    if typing.get_origin(hint) in (tuple, list):
        return _sequence(typing.get_origin(hint), typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        return _list_like(kind_in(typing.get_args(hint)[0]))
    if hint in (int, float):
        return _whole(limits) if hint is int else _real(limits)
    return _instance(hint)


def range_of(hint: Any) -> Range:
    """Return the range that stands in an annotation, or in a part of it; one without ends where there is none."""
    if isinstance(hint, Range):
        return hint
    parts = [*getattr(hint, "__metadata__", ()), *typing.get_args(hint)]
    found = [range_of(part) for part in parts if not isinstance(part, str)]
    return next((each for each in found if each != Range()), Range())


def _whole(limits: Range) -> Kind:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name} is {quoted(value)}: it must be a whole number, {limits.short}".rstrip(", "))
        number = operator.index(value)
        if not limits.holds(number):
            raise UserError(f"{name} is {quoted(number)}: it must be {limits.demand(number)}")
        return value if type(value) is int else number

    return check


def _real(limits: Range) -> Kind:
    def check(name: str, value: Any) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UserError(f"{name} is {quoted(value)}: it must be a number, {limits.words}")
        number = value if isinstance(value, int | float) else float(value)
        if not limits.holds(number) or abs(number) > HUGE:
            raise UserError(f"{name} is {quoted(value)}: it must be {limits.demand(number)}")
        return number

    return check


KINDS: dict[Any, str] = {  # class -> what a value must be
    bool: "true or false",
    str: "a text",
    Mapping: "an object with fields",
    dict: "an object with fields",
    list: "a list",
    Sequence: "a list",
    Iterable: "a list",
    Collection: "a list",
    Callable: "something that can be called",
}


def _instance(hint: Any) -> Kind:
    """The check of a class: bool, str, a mapping, or a dataclass of ours."""
    cls = typing.get_origin(hint) or hint
    if getattr(cls, "_is_protocol", False) and cls not in KINDS:
        return _protocol(cls)
    if cls not in KINDS and (not isinstance(cls, type) or cls in (object, Any)):
        return lambda name, value: value
    if cls not in KINDS and cls.__module__.startswith("jaxtyping"):  # shapes, which are checked elsewhere
        return lambda name, value: value
    words = KINDS.get(cls) or f"a {cls.__name__}"

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, cls) or (cls in LISTS and no_list(value)):
            raise UserError(f"{name} is {quoted(value)}: it must be {words}")
        if cls is str and not value.isascii():
            _encodable(name, value)
        return value

    return check


def _filled(name: str, value: Any) -> Any:
    if isinstance(value, str) and not value:
        raise UserError(f"{name} is '': it must be a text that is not empty")
    return kind_in(str)(name, value)


LISTS = (Sequence, Iterable, Collection)


def no_list(value: Any) -> bool:
    """Return whether Python counts among lists what is none: a text, or an array without dimensions."""
    return isinstance(value, str | bytes) or getattr(value, "ndim", 1) == 0


def _protocol(cls: Any) -> Kind:
    """The check of an interface: an object that has what it names."""
    wanted = sorted(name for name in {*vars(cls), *getattr(cls, "__annotations__", {})} if not name.startswith("_"))

    def check(name: str, value: Any) -> Any:
        if isinstance(value, type) or not all(hasattr(value, each) for each in wanted):
            raise UserError(f"{name} is {quoted(value)}: it must have {', '.join(wanted)}")
        return value

    return check


def _list_like(kind: Kind) -> Kind:
    """The check of a sequence whose parts are of one kind; an array of one dimension is one."""

    def check(name: str, value: Any) -> Any:
        if getattr(value, "ndim", None) == 1:
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise UserError(f"{name} is {quoted(value)}: it must be a list")
        found = [kind(name, part) for part in value]
        return value if all(a is b for a, b in zip(found, value, strict=True)) else found

    return check


def _encodable(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is {quoted(value)}: it must be a text without halves of characters") from None


def _sequence(cls: type, parts: tuple[Any, ...]) -> Kind:
    """The check of a list or a tuple: any number of one kind, or so many of these kinds."""
    several = cls is list or parts[-1] is Ellipsis
    kinds = [kind_in(part) for part in parts if part is not Ellipsis]
    amount = "a list" if several else f"a list of {len(kinds)}"

    def check(name: str, value: Any) -> Any:
        fits = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not fits or not (several or len(value) == len(kinds)):
            raise UserError(f"{name} is {quoted(value)}: it must be {amount}")
        each = kinds * len(value) if several else kinds
        found = cls(kind(name, part) for kind, part in zip(each, value, strict=True))
        return value if isinstance(value, cls) and found == value else found

    return check


def _record(cls: Any) -> Kind:
    """The check of a `TypedDict`: an object with these fields, and any others."""
    hints = typing.get_type_hints(cls, include_extras=True)
    kinds = {field: kind_in(hint) for field, hint in hints.items()}
    words = {field: typing.get_origin(hint) for field, hint in hints.items()}  # __required_keys__ knows no texts
    needed = {field for field, word in words.items() if word is typing.Required}
    if cls.__total__:
        needed = {field for field, word in words.items() if word is not typing.NotRequired}

    def check(name: str, value: Any) -> Any:
        _object(name, value)
        for field, kind in kinds.items():
            if field in value:
                kind(_joined(name, field), value[field])
            elif field in needed:
                raise UserError(f"{name} lacks {field}")
        return value

    return check


def _dictionary(kind: Kind, key: Any = Any) -> Kind:
    """The check of an object whose fields are all of one kind."""

    def check(name: str, value: Any) -> Any:
        _object(name, value)
        if key is str and not all(isinstance(field, str) for field in value):
            raise UserError(f"{name} is {quoted(value)}: the names of its fields must be texts")
        try:
            for part in value.values():
                kind(name, part)
        except UserError:
            for field, part in value.items():
                kind(_joined(name, str(field)), part)
        return value

    return check


def _object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {quoted(value)}: it must be an object with fields")


def _joined(name: str, field: str) -> str:
    return f"{name}, {field}" if "/" in name or "json" in name else f"{name}.{field}"


def _union(kinds: list[Kind], hint: Any) -> Kind:
    optional = types.NoneType in typing.get_args(hint)
    place = {str, Path} <= set(typing.get_args(hint))

    def check(name: str, value: Any) -> Any:
        if place and isinstance(value, str) and not value:
            raise UserError(f"{name} is '': it must be the name of a file or folder")
        if value is None and optional:
            return None
        if len(kinds) > 1:
            return _first(kinds, name, value)
        return kinds[0](name, value)

    return check


def _first(kinds: list[Kind], name: str, value: Any) -> Any:
    """The value as the first kind takes it that does; where none does, the sentence says what it may be."""
    said = []
    for kind in kinds:
        try:
            return kind(name, value)
        except UserError as error:
            said.append(str(error).partition(MUST)[2])
    if not all(said):
        return kinds[-1](name, value)
    raise UserError(f"{name} is {quoted(value)}{MUST}{' or '.join(dict.fromkeys(said))}")


MUST = ": it must be "
