"""Calls side by side in a few lasting processes: torch is imported once in each, and one bad call spoils no other.

A call is a function of a module with arguments that pickle; it gets one argument more, `report`, to tell what it is
doing. Outcomes come back as they happen. An interrupt reaches every worker once; each finishes its step and saves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from .spec import UserError

Outcome = Literal["start", "event", "done", "failed", "interrupted"]
Call = tuple[Callable[..., Any], tuple[Any, ...]]
Listener = Callable[[int, Outcome, Any], None]  # number of the call, what happened, the value, event or sentence


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Worker:
    process: SpawnProcess
    pipe: Connection
    call: int | None = None  # what it works on


@dataclass
class Workers:
    """`jobs` processes of `threads` threads each. One job needs no process: it runs here."""

    jobs: int
    threads: int
    devices: int = 0  # accelerators to share out, in turns
    _workers: list[Worker] = field(default_factory=list)
    _interrupts: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if kind is not None:
                worker.process.terminate()
            worker.pipe.close()  # an idle worker reads the end of its pipe and leaves
            worker.process.join()
        self._workers.clear()

    def run(self, calls: Sequence[Call], tell: Listener) -> None:
        """Make all calls; `tell` hears of each. A call that fails is told as a sentence and the rest go on.

        `KeyboardInterrupt` once every call under way has ended; calls not begun are then not told at all.
        """
        if self.jobs == 1:
            with _threads(self.threads):
                for number, call in enumerate(calls):
                    self._here(number, call, tell)
            return
        waiting = list(enumerate(calls))[::-1]
        with self._interruptible():
            while waiting or any(worker.call is not None for worker in self._workers):
                if self._interrupts:
                    waiting.clear()
                self._hand_out(waiting, tell)
                for ready in wait([worker.pipe for worker in self._workers], timeout=0.5):
                    worker = next(worker for worker in self._workers if worker.pipe is ready)
                    self._hear(worker, tell)
        if self._interrupts:
            raise KeyboardInterrupt

    def _here(self, number: int, call: Call, tell: Listener) -> None:
        tell(number, "start", None)
        outcome, value = _attempt(call, lambda event: tell(number, "event", event))
        tell(number, outcome, value)
        if outcome == "interrupted":
            raise KeyboardInterrupt

    def _hand_out(self, waiting: list[tuple[int, Call]], tell: Listener) -> None:
        while waiting and len(self._workers) < self.jobs:
            self._workers.append(self._hire(len(self._workers)))
        for worker in self._workers:
            if waiting and worker.call is None:
                worker.call, call = waiting.pop()
                tell(worker.call, "start", None)
                worker.pipe.send(call)

    def _hire(self, number: int) -> Worker:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        device = number % self.devices if self.devices else None
        process = spawn.Process(target=_serve, args=(theirs, self.threads, device), daemon=True)
        with _signals_held():
            process.start()
        theirs.close()
        return Worker(process, ours)

    def _hear(self, worker: Worker, tell: Listener) -> None:
        try:
            outcome, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self._workers.remove(worker)
            number, worker.call = worker.call, None
            if number is not None and self._interrupts:
                tell(number, "interrupted", None)
            elif number is not None:
                tell(number, "failed", f"its process ended: {_last_words(worker.process.exitcode)}")
            return
        assert worker.call is not None
        number = worker.call
        if outcome != "event":
            worker.call = None
        tell(number, outcome, value)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first interrupt is passed on, once, and asks for an orderly end; the second ends everything."""
        self._interrupts = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: object) -> None:
            self._interrupts += 1
            for worker in self._workers:
                if self._interrupts > 1:
                    worker.process.kill()
                elif worker.call is not None and worker.process.pid is not None:
                    os.kill(worker.process.pid, signal.SIGINT)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _serve(pipe: Connection, threads: int, device: int | None) -> None:
    """A worker's life."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C goes to the parent, who passes it on
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(device)
    try:
        with _threads(threads):
            _release_signals()
            while True:
                outcome, value = _attempt(pipe.recv(), lambda event: pipe.send(("event", event)))
                pipe.send((outcome, value))
                if outcome == "interrupted":
                    return
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has gone, or wants us to go


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process begun here has interrupts wait until it is ready for them, or they would break its imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _release_signals() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _visible(device: int) -> str:
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",")[device] if allowed else str(device)


def _attempt(call: Call, report: Callable[[Any], None]) -> tuple[Outcome, Any]:
    function, arguments = call
    try:
        return "done", function(*arguments, report)
    except KeyboardInterrupt:
        return "interrupted", None
    except UserError as error:
        return "failed", str(error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _last_words(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    return f"exit status {code}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
