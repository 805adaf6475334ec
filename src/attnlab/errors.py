"""Errors for users, in one sentence: what was given, what is allowed, what to do. Pure Python."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """An error in what the user gave. One sentence: what was given, what is allowed, what to do."""

    shared = True  # every process of a command raises it, so the first one alone prints it


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` where it is one of `allowed`. Raise `UserError` else, with the list and the nearest of them."""
    allowed = list(allowed)
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown {what} {given!r}: expected one of {', '.join(allowed)}{hint}")


def need(module: str, extra: str) -> ModuleType:
    """Return the optional `module`, imported. Raise `UserError` where it is missing: the `extra` installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this needs {module}, which is not installed: run pip install 'attnlab[{extra}]'") from None
