"""Errors that end a command, in one sentence each: what went wrong, and what to do."""

from __future__ import annotations

import errno
import re

from ..errors import UserError, quoted
from ..files import DISK_FULL

# What libraries say when memory runs out: PyTorch on a CPU and on a GPU, NumPy, Rust.
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Unable to allocate|failed to allocate|Storage size calculation overflowed"
    r"|Maximum allowed size exceeded|array is too big|[Ii]nvalid buffer size|Cannot allocate memory"
)
DEBUG = "--debug shows where"


def explained(error: BaseException) -> tuple[str, int]:
    """Return an error in one sentence, and the exit code: 2 where the input is to blame, 1 where nobody knows."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        amount = re.search(r"([\d.]+ ?[KMGTPE]i?B|\d+ bytes)", str(error))
        much = f" ({amount[0]} more were asked for)" if amount else ""
        return f"there is not enough memory for this{much}: choose smaller sizes, or a larger machine", 2
    if isinstance(error, RecursionError):
        return "something that was given is nested too deeply: make it flatter, as no file of attnlab's is like that", 2
    if isinstance(error, OSError):
        return of_system(error), 2
    if isinstance(error, SystemExit):
        return f"code that is not attnlab's ended the command, with exit code {quoted(error.code)}; {DEBUG}", 1
    cause = f"{type(error).__name__}: {quoted(str(error)).strip(chr(34) + chr(39))}"
    return f"this ended in an error that attnlab does not know, {cause}; {DEBUG}, please report it", 1


def of_system(error: OSError) -> str:
    """Return an error of the operating system in one sentence."""
    if error.errno in DISK_FULL:
        return "the disk is full: free space and run the same command again; nothing half-written was kept"
    if error.errno == errno.ENAMETOOLONG:
        return f"the name {str(error.filename)[:60]!r}... is too long for a file: give a shorter one"
    what = error.strerror or str(error)
    if error.filename is None:
        return f"the system refused something ({what}); {DEBUG}"
    remedy = {
        FileNotFoundError: "check the name",
        FileExistsError: "choose another name",
        NotADirectoryError: "a part of this path is a file; choose another",
        IsADirectoryError: "this is a folder; name a file",
        PermissionError: "give yourself the permission, or choose another place",
    }.get(type(error), "choose another path, or mend this one")
    return f"cannot use {quoted(error.filename)} ({what.lower()}): {remedy}"
