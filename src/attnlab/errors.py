"""Errors for users, in one sentence: what was given, what is allowed, what to do. Pure Python."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

WORD = 100  # characters of a value that a sentence repeats


class UserError(ValueError):
    """An error in what the user gave. One sentence: what was given, what is allowed, what to do."""

    shared = True  # every process of a command raises it, so the first one alone prints it


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` where it is one of `allowed`. Raise `UserError` else, with the list and the nearest of them."""
    allowed = list(allowed)
    if isinstance(given, str) and given in allowed:
        return given
    near = nearest(given, allowed) if isinstance(given, str) else None
    hint = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"unknown {what} {quoted(given)}: expected one of {', '.join(allowed)}{hint}")


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """Return the one of `allowed` for which `given` may be a slip of the pen, or a beginning; None: there is none."""
    if len(given) >= WORD:
        return None
    alike = [
        name
        for name in allowed
        if abs(len(name) - len(given)) <= 2
        or (given and name.startswith(given))
        or difflib.SequenceMatcher(None, given, name).ratio() >= 0.8  # a long name, a little shorter
    ]
    return next(iter(difflib.get_close_matches(given, alike, 1, cutoff=0.65)), None)


def quoted(value: object) -> str:
    """Return a value as it would stand in code, on one line and cut where it is long, for a sentence."""
    if isinstance(value, int) and value.bit_length() > 400:  # Python refuses to write the longest ones
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    try:
        text = repr(value)
    except Exception:  # whoever wrote the class
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= WORD else f"{text[:WORD]}…"


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust broke off: that is no Exception, and its class has no public home."""
    return type(error).__name__ == "PanicException"


def need(module: str, extra: str) -> ModuleType:
    """Return the optional `module`, imported. Raise `UserError` where it is missing: the `extra` installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this needs {module}, which is not installed: run pip install 'attnlab[{extra}]'") from None
