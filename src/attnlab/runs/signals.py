"""Requests to stop: SIGINT, which Ctrl-C sends, and SIGTERM. Importing this is light.

A program is `interruptible`: Ctrl-C raises KeyboardInterrupt in its main thread. If that has not ended it within GRACE
seconds, because native code is deaf or an import swallowed it, it ends all the same. Whoever has more to do on Ctrl-C,
such as to finish a step and save, handles it with `on_stop_signal`, and has all the time it needs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

GRACE = 1.0  # seconds between Ctrl-C and the end of the program


@contextmanager
def on_stop_signal(handle: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Call `handle` with the number of each SIGINT and SIGTERM. Yields the handlers that come back at the end.

    Python receives signals in the main thread only: in another one, `handle` is never called and nothing is yielded.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, lambda number, frame: handle(number))
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Program:
    """The end of this program, as far as it is known."""

    asked = False  # whether Ctrl-C was heard
    told = False  # whether the user was told that it stopped
    code = 130  # the exit code


def interruptible() -> None:
    """Make this process a program that Ctrl-C ends within GRACE seconds. One that began with it ignored still does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets a byte even while the main thread is deaf
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_the_pipe)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    Program.asked = True
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()  # an exception might be swallowed by what is imported, or leave half of it
        frame = frame.f_back
    raise KeyboardInterrupt


def _forget_the_pipe() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _watch(reader: int) -> None:
    """End the program when Ctrl-C has not ended it, unless something else handles Ctrl-C."""
    while received := os.read(reader, 64):
        if signal.SIGINT in received and signal.getsignal(signal.SIGINT) is _interrupt:
            time.sleep(GRACE)
            _end()


def _end() -> NoReturn:
    unfinished = sys.modules.get(f"{__package__.partition('.')[0]}.unfinished")
    if unfinished is not None:  # else nothing is being written
        unfinished.abandon()
    if not Program.told:
        os.write(2, b"\nattnlab: stopped\n")
    os._exit(Program.code)
