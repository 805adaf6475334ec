"""The engine for calls that another program makes, perhaps on other machines.

Run folders lie on a file system that all machines share, so how far a run is can be read from its metrics.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from .base import Call, Engine, Listener, Outcome, Waiting, interrupts


class Refused(UserError):
    """The other program takes no more calls now, or never."""


@dataclass
class Job:
    """A call that was handed over."""

    handle: Any  # as the other program names it
    tail: Tail  # of the metrics of its run
    told: bool = False  # whether its start was told


class Remote(Engine):
    """An engine whose calls are made elsewhere."""

    limit: int | None = None  # calls at a time; None: all at once
    pause = 0.5  # seconds between two looks at them

    @abstractmethod
    def begin(self, call: Call) -> tuple[Any, str]:
        """Hand a call over, or find that it was. Return its handle, and a note ("": none). Raises `Refused`."""

    @abstractmethod
    def ended(self, handle: Any) -> tuple[Outcome, Any] | None:
        """Return how a call ended; None: not yet."""

    @abstractmethod
    def interrupt(self, handles: Sequence[Any], *, hard: bool) -> None:
        """Ask calls to save and end; with `hard`, end them at once. Raises `KeyboardInterrupt` to leave them alone."""

    def forget(self, call: Call) -> None:
        """Drop what is known of a call whose end was told."""

    def _run(self, waiting: Waiting, tell: Listener) -> None:
        under_way: dict[int, tuple[Call, Job]] = {}
        asked: list[int] = []  # a number for each interrupt
        passed = 0  # how many of them were passed on
        with interrupts(asked.append):
            while waiting or under_way:
                if asked:
                    waiting.clear()
                if len(asked) > passed:
                    passed = len(asked)
                    self.interrupt([job.handle for _, job in under_way.values()], hard=passed > 1)
                self._begin(waiting, under_way, tell)
                for number, (call, job) in list(under_way.items()):
                    if self._look(number, job, tell):
                        self.forget(call)
                        del under_way[number]
                time.sleep(self.pause if under_way else 0)
        if asked:
            raise KeyboardInterrupt

    def _begin(self, waiting: Waiting, under_way: dict[int, tuple[Call, Job]], tell: Listener) -> None:
        while waiting and (self.limit is None or len(under_way) < self.limit):
            number, call = waiting[0]
            tail = Tail(call.folder)
            try:
                handle, said = self.begin(call)
            except Refused:
                if not under_way:
                    raise
                return  # it may take more once a call has ended
            waiting.popleft()
            under_way[number] = call, Job(handle, tail)
            if said:
                tell(number, "note", said)

    def _look(self, number: int, job: Job, tell: Listener) -> bool:
        """Tell what is new of a call, and return whether it has ended."""
        ended = self.ended(job.handle)  # before its last records are read
        news = job.tail.news()
        if not job.told and (news or ended):
            job.told = True
            tell(number, "start", None)
        for event in news:
            tell(number, "event", event)
        if ended:
            tell(number, *ended)
        return ended is not None


class Tail:
    """The records that are added to the metrics of a run from now on; all of them where the file is written anew."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.file = -1  # inode
        self.read = 0  # bytes
        if self.path is not None and self.path.exists():
            about = self.path.stat()
            self.file, self.read = about.st_ino, about.st_size

    def news(self) -> list[dict[str, Any]]:
        """Return the whole records that were added since the last call."""
        if self.path is None:
            return []
        try:
            with open(self.path, "rb") as file:
                about = self.path.stat()
                if about.st_ino != self.file or about.st_size < self.read:
                    self.file, self.read = about.st_ino, 0
                file.seek(self.read)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self.read += len(whole)
        return [record for line in whole.splitlines() if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None where a file system shows a line before it has all of it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
