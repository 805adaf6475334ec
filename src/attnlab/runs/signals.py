"""Requests to stop: SIGINT, which Ctrl-C sends, and SIGTERM. Importing this is light."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
