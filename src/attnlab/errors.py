"""What went wrong, in one sentence: what was given, what is allowed, what to do. Pure Python."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Something the user gave cannot be used. One sentence: what was given, what is allowed, what to do."""

    shared = True  # where several processes run the same command: all of them meet it, so the first one says it


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """`given` if it is one of `allowed`; else a `UserError` that lists them and names the nearest."""
    allowed = list(allowed)
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown {what} {given!r}: expected one of {', '.join(allowed)}{hint}")


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this needs {module}, which is not installed: run pip install 'attnlab[{extra}]'") from None
