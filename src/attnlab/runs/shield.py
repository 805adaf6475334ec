"""Protection of a run's compilers from the signals that ask the run to stop.

A terminal's Ctrl-C, Slurm and systemd signal every process of a job, compilers included. A compiler that dies of it
ends the run with an error. If it was testing instruction sets (`torch._inductor.cpu_vec_isa`), PyTorch silently assumes
that there are none, for the rest of the process: the same step then has other bits.
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
    """Protect processes that `subprocess` starts in this context from SIGINT and SIGTERM; this process still gets them.

    Each gets a session of its own, which a terminal's Ctrl-C does not reach. It starts with both signals blocked, for
    those that are sent to every process of a job (a compiler that is a shell script may unblock them). SIGKILL ends it,
    which is what `subprocess.run` does when a second Ctrl-C interrupts it.
    """
    if sys.platform == "win32":
        yield
        return
    start = subprocess.Popen.__init__

    def start_shielded(self: subprocess.Popen[Any], *args: Any, **more: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            start(self, *args, **{"start_new_session": True, **more})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    subprocess.Popen.__init__ = start_shielded  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]
