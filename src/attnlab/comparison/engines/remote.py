"""Calls that another program runs, perhaps on other machines. Run folders lie on a file system that all of them share,
so how far a run is can be read from its metrics."""

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
    """It takes no more calls now, or never."""


@dataclass
class Job:
    handle: Any
    tail: Tail
    told: bool = False  # that it started


class Remote(Engine):
    """`limit` calls at a time, or all at once."""

    limit: int | None = None
    pause = 0.5  # seconds between looks

    @abstractmethod
    def begin(self, call: Call) -> tuple[Any, str]:
        """Hand a call over, or find that it was: its handle, and what there is to say of it. Raises `Refused`."""

    @abstractmethod
    def ended(self, handle: Any) -> tuple[Outcome, Any] | None:
        """How it ended; None: not yet."""

    @abstractmethod
    def interrupt(self, handles: Sequence[Any], *, hard: bool) -> None:
        """Have them end in order, or at once where `hard`. `KeyboardInterrupt`: they are left alone."""

    def forget(self, call: Call) -> None:
        """Its end was told."""

    def _run(self, waiting: Waiting, tell: Listener) -> None:
        under_way: dict[int, tuple[Call, Job]] = {}
        asked = passed = 0

        def note(count: int) -> None:
            nonlocal asked
            asked = count

        with interrupts(note):
            while waiting or under_way:
                if asked:
                    waiting.clear()
                if asked > passed:
                    passed = asked
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
                return  # it may take more once something has ended
            waiting.popleft()
            under_way[number] = call, Job(handle, tail)
            if said:
                tell(number, "note", said)

    def _look(self, number: int, job: Job, tell: Listener) -> bool:
        """Tell what is new; whether it has ended."""
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
    """What is added to the metrics of a run folder from now on; all of them where they are written anew."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.file, self.read = -1, 0  # inode, bytes
        if self.path is not None and self.path.exists():
            about = self.path.stat()
            self.file, self.read = about.st_ino, about.st_size

    def news(self) -> list[dict[str, Any]]:
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
        return [json.loads(line) for line in whole.splitlines()]
