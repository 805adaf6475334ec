"""A folder that one process at a time works in. The lock is the operating system's: a crash releases it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .spec import UserError

PATIENCE = 60.0  # seconds; a run whose driver died finishes its step and saves


@contextmanager
def alone(folder: Path, doing: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder, which is made. `UserError` where another process still holds it after `patience` seconds.

    Where the file system has no locks, that is said and the folder is used; Windows has none of this kind.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"another process {doing} {folder}: wait until it has ended, or stop it, and give the same "
                        "command again"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                print(f"{folder} cannot be locked ({error.strerror}): let no second process in", file=sys.stderr)
                break
        yield
    finally:
        os.close(handle)
