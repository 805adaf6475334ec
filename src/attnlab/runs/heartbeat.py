"""Heartbeats: each rank writes a small file, at most once a second, so that a rank that hangs can be found.

`heartbeat/rank-00003.json` in the run folder holds the time in seconds since 1970, step, rank, number of ranks, host
and pid.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, write_json
from .schemas import Beat

FOLDER = "heartbeat"


class Heartbeat:
    """The heartbeat of one rank. A file that cannot be written stops no run."""

    def __init__(self, run: str | Path, rank: int = 0, ranks: int = 1, every: float = 1.0) -> None:
        self.path = Path(run) / FOLDER / f"rank-{rank:05d}.json"
        self.about = {"rank": rank, "ranks": ranks, "host": socket.gethostname(), "pid": os.getpid()}
        self.every = every  # seconds
        self.last = -float("inf")  # when it was written, by the monotonic clock; -inf: never

    def beat(self, step: int) -> None:
        """Write the file, unless it was written less than `every` seconds ago."""
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, {"time": time.time(), "step": step, **self.about}, indent=None)
        except (OSError, UserError):
            pass


def beats(run: str | Path) -> list[dict[str, Any] | None]:
    """Return the last heartbeat of each rank; None for a rank without one.

    The number of ranks is that of the newest heartbeat, because a run may go on with fewer processes.
    """
    found = [read_json(path, Beat) for path in sorted((Path(run) / FOLDER).glob("rank-*.json"))]
    if not found:
        return []
    by_rank = {beat["rank"]: beat for beat in found}
    return [by_rank.get(rank) for rank in range(max(found, key=lambda beat: beat["time"])["ranks"])]


def stale(run: str | Path, after: float = 60.0) -> list[int]:
    """Return the ranks without a heartbeat in the last `after` seconds, by this machine's clock."""
    since = time.time() - after
    return [rank for rank, beat in enumerate(beats(run)) if beat is None or beat["time"] < since]
