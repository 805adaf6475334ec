"""Compilers that do not hear the signal that asks a run to stop.

A terminal's Ctrl-C, Slurm and systemd send a signal to the compilers that a run has started too. One that dies of it
takes the run along; and if it was looking for the instruction set (`torch._inductor.cpu_vec_isa`), the answer is "none"
for the whole process, without a word: the same step then has other bits.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shielded() -> Iterator[None]:
    """What `subprocess` starts meanwhile, with all that it starts, hears no SIGINT and no SIGTERM; this process does.

    It gets a session of its own, which a terminal's Ctrl-C does not reach, and is born with both signals blocked, for
    those that are sent to every process of a job (a compiler that is a shell script may unblock them). SIGKILL ends it,
    which is what `subprocess.run` does when a second Ctrl-C interrupts it.
    """
    if sys.platform == "win32":
        yield
        return
    start = subprocess.Popen.__init__

    def deaf(self: subprocess.Popen[Any], *args: Any, **more: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            start(self, *args, **{"start_new_session": True, **more})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    subprocess.Popen.__init__ = deaf  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]
