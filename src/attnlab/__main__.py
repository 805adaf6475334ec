"""`python -m attnlab` is `attnlab`. Ctrl-C is heard before anything that takes long to import."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def program() -> NoReturn:
    """Run `attnlab` as a program, and exit."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    from .cli.main import run

    run()


def _stop(number: int, frame: Any) -> NoReturn:
    """End the program while it is imported: an exception might be swallowed, or end as a traceback."""
    os.write(2, b"\nattnlab: stopped\n")
    os._exit(130)


if __name__ == "__main__":
    program()
