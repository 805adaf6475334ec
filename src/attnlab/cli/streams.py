"""stdout and stderr while a command runs: what cannot be written is dropped, and the work goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

NARROWEST = 20  # columns; a terminal that says less is not asked again


class Patient:
    """A stream that drops what cannot be written: its reader has ended, its disk is full, or it is closed."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.broken = False  # whether something was dropped

    def write(self, text: str) -> int:
        """Write `text`, or drop it. Return its length."""
        if not self.broken:
            try:
                self.stream.write(text)
            except (OSError, ValueError):
                self.drop()
        return len(text)

    def flush(self) -> None:
        """Write what is held back, or drop it."""
        if not self.broken:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.drop()

    def drop(self) -> None:
        """Drop all that is written from now on, also what Python holds back until it ends."""
        self.broken = True
        silence(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def silence(stream: TextIO | None) -> None:
    """Point the file of a stream to nowhere, so that nothing fails when Python ends and writes what it holds back."""
    try:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, stream.fileno() if stream is not None else handle)
        os.close(handle)
    except (OSError, ValueError, AttributeError):  # no file of its own, such as a test's
        pass


@contextmanager
def streams(lasting: bool) -> Iterator[Patient]:
    """Have stdout and stderr take everything inside, and yield the stream that stdout is.

    stderr is progress and sentences, which are dropped where nobody reads them. stdout is dropped only for a `lasting`
    command, whose result is in files; of any other it is the result, and an error of it ends the command. Characters
    that an encoding lacks are escaped. A width of no columns is not believed.
    """
    before = sys.stdout, sys.stderr
    width = os.environ.get("COLUMNS")
    occupy()
    out = Patient(escaping(sys.stdout))
    try:
        sys.stdout = out if lasting else out.stream
        sys.stderr = Patient(escaping(sys.stderr))
        if width is not None and not (width.isdecimal() and int(width[:9]) >= NARROWEST):
            del os.environ["COLUMNS"]
        yield out
    finally:
        sys.stdout, sys.stderr = before
        if width is not None:
            os.environ["COLUMNS"] = width


def occupy() -> None:
    """Open what was closed before Python began, so that no file of the work gets the number of a standard stream."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free


def escaping(stream: TextIO | None) -> TextIO:
    """Return the stream, which now escapes characters that it cannot write; one to nowhere where there is none."""
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure") and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
    return stream
