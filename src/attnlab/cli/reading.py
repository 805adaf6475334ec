"""The words of a command line as values: how they are read, shown in the help, and refused in one sentence."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

from ..errors import UserError, choose, quoted
from ..ranges import check_value, range_of
from .options import options_of_mechanisms

WIDE = 10_000  # columns of what the parser says, so that nothing in it is broken
RULE = re.compile("─+")


def named(text: str) -> Path:
    """Return the path of a text; an empty one names nothing."""
    if not text:
        raise ValueError
    return Path(text)


# type -> its reader, which raises ValueError; its name in the help; what it must be
SINGLE: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    int: (int, "INT", "a whole number"),
    float: (float, "FLOAT", "a number"),
    Path: (named, "PATH", "the name of a file or folder"),
}


def read(command: Callable[..., int], name: str, rest: Sequence[str], defaults: Mapping[str, Any]) -> Callable[[], int]:
    """Return the command with its parameters filled in from the words `rest`; where they ask for help, its help.

    Raises `UserError` for words that it does not take, and for values outside their ranges.
    """
    calls: list[functools.partial[int]] = []  # one; none where only help is shown

    def keep(*args: Any, **kwargs: Any) -> None:
        calls.append(functools.partial(command, *args, **kwargs))

    hints = typing.get_type_hints(command, include_extras=True)
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(keep, attribute, getattr(command, attribute))
    keep.__annotations__ = {each: with_range(hint) for each, hint in hints.items()}
    keep.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    parse = functools.partial(
        tyro.cli, functools.partial(keep, **defaults), prog=f"attnlab {name}", args=list(rest), registry=registry()
    )
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # the parser draws a frame for what is UTF-8
    try:
        if "--help" in rest:
            parse()
        with redirect_stdout(said), redirect_stderr(said), columns(WIDE):
            parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            return lambda: 0
        raise_own(stop)
        said.seek(0)
        refuse(name, said.read())
    (ready,) = calls
    given = inspect.signature(command).bind(*ready.args, **ready.keywords).arguments
    for parameter, value in given.items():
        if parameter != "config":  # it has checked itself
            check_value(f"--{parameter.strip('_').replace('_', '-')}", value, hints[parameter])
    return ready


def raise_own(stop: BaseException) -> None:
    """Raise the `UserError` that made the parser stop, where there is one."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, UserError):
            raise error from None
        error = error.__context__


@contextmanager
def columns(width: int) -> Iterator[None]:
    """Have what is written inside take lines of `width` columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def registry() -> ConstructorRegistry:
    """Return the rules by which words become values: numbers, paths, mappings as JSON, and dataclasses with ranges."""
    rules = ConstructorRegistry()
    rules.primitive_rule(single_rule)
    rules.primitive_rule(mapping_rule)
    rules.struct_rule(dataclass_rule)
    return rules


def single_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Return how a number or a path is read, or that or None; None for another type."""
    parts = typing.get_args(info.type) if info.type_origin in (types.UnionType, typing.Union) else (info.type,)
    kinds = [getattr(part, "__origin__", part) for part in parts if part is not types.NoneType]  # without their ranges
    if len(kinds) != 1 or kinds[0] not in SINGLE:
        return None
    kind, metavar, words = SINGLE[kinds[0]]
    optional = len(parts) > 1

    def value(given: list[str]) -> Any:
        if optional and given[0] == "None":
            return None
        try:
            return kind(given[0])
        except ValueError:
            raise ValueError(f"is {quoted(given[0])}: it must be {words}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|" + metavar if optional else metavar,
        instance_from_str=value,
        is_instance=lambda given: given is None or isinstance(given, int | float | Path),
        str_from_instance=lambda given: [str(given)],
    )


def mapping_rule(info: Any) -> PrimitiveConstructorSpec | None:
    """Return how a mapping is read, from JSON: --model.options '{"mla": {"kv_rank": 32}}'."""
    if getattr(info.type, "__origin__", None) is not Mapping:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: options_of_mechanisms("model.options", words[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def dataclass_rule(info: Any) -> StructConstructorSpec | None:
    """Return the options of a dataclass: their help is the comment of each field, and its range."""
    cls = info.type
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    given = info.default if isinstance(info.default, cls) else cls()
    fields = [
        StructFieldSpec(
            name=field.name,
            type=with_range(hints[field.name]),
            default=getattr(given, field.name),
            helptext=functools.partial(comment, cls, field.name),
        )
        for field in dataclasses.fields(cls)
    ]
    return StructConstructorSpec(instantiate=cls, fields=tuple(fields))


def with_range(hint: Any) -> Any:
    """Return an annotation that shows its range in the help, before the default."""
    limits = range_of(hint).short
    if not limits:
        return hint
    return Annotated[hint, tyro.conf.arg(help_behavior_hint=lambda default: f"({limits}; default: {default})")]


def comment(cls: type, field: str) -> str | None:
    """Return the comment at the end of a field's lines in its class; None where it has none."""
    return comments(cls).get(field)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """Return the comments of a class's fields, by name."""
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [lines[at] for at in range(node.lineno, (node.end_lineno or node.lineno) + 1) if at in lines]
            if own:
                found[node.target.id] = " ".join(own)
    return found


def refuse(name: str, said: str) -> NoReturn:
    """Raise `UserError` with what the parser said in its box, in one sentence."""
    title, *parts = sections(said)
    words = " ".join(" ".join(parts[0]).split()) if parts else ""
    more = f"attnlab {name} --help shows what it takes"
    if match := re.match(r"Error parsing (\S+?): (.*)", words):
        option, reason = match.groups()
        raise UserError(f"{option} {reason}" if reason.startswith("is ") else f"{option}: {reason}; {more}")
    if match := re.match(r"invalid choice (.*) for argument '(.*?)'. Expected one of (\(.*\))\.", words):
        given, option, allowed = match.groups()
        choose(option, ast.literal_eval(given), ast.literal_eval(allowed))
    if match := re.match(r"Missing value for argument '(.*?)'. Expected (\d+) values", words):
        option, count = match.groups()
        raise UserError(f"{option} needs {'a value' if count == '1' else f'{count} values'} after it; {more}")
    if title == "Unrecognized options":
        unknown(name, words.partition(": ")[2], parts[1:])
    if title == "Required options":
        missing = [line.strip() for line in parts[0][1:] if re.match(r" {5}\S", line)]
        raise UserError(f"attnlab {name} needs {' and '.join(missing)}; {more}")
    raise UserError(f"{words or 'these words cannot be read'}; {more}")


def unknown(name: str, tokens: str, parts: Sequence[Sequence[str]]) -> NoReturn:
    """Raise `UserError` for words that are no option, with the nearest option that there is."""
    first = tokens.split(", ")[0]
    known = re.findall(r"^ +(--[\w.-]+)", "\n".join(line for part in parts for line in part), re.MULTILINE)
    near = f"did you mean {known[0]}? " if known else ""
    if first.startswith("-"):
        raise UserError(f"unknown option {quoted(first)} of attnlab {name}: {near}attnlab {name} --help shows all")
    raise UserError(f"attnlab {name} was given {quoted(first)} besides what it takes: leave it out, or see --help")


def sections(said: str) -> list[Any]:
    """Return the title of the parser's box and the lines of each part of it; without the frame."""
    title = ""
    parts: list[list[str]] = [[]]
    for line in said.splitlines():
        if line.startswith("╭"):
            title = RULE.sub("", line).strip("╭╮ ")
        elif line.startswith("│"):
            inside = line[1:].rstrip("│ ")
            if RULE.fullmatch(inside.strip()):
                parts.append([])
            elif inside.strip():
                parts[-1].append(inside)
    return [title, *parts]
