"""Calls side by side in a few lasting processes here: torch is imported once in each, and one bad call spoils no other.

An interrupt reaches every worker once; each finishes its step and saves. So it does where the driver dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from ...errors import UserError
from .base import Call, Engine, Failure, Listener, Needs, Waiting, attempt, cores, interrupts, torch_threads


@dataclass(frozen=True)
class Local:
    def open(self, needs: Needs) -> Workers:
        """By default a run per core or per GPU: side by side, small models lose less time waiting for each other's
        threads."""
        import torch

        from ...device import find_device

        if needs.gpus is not None:
            raise UserError("the engine local gives runs the GPUs in turns: leave --gpus to the engines ray and slurm")
        device = find_device(needs.device)
        devices = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
        jobs = needs.jobs or (cores() if device.type == "cpu" else max(1, devices))
        jobs = max(1, min(jobs, needs.runs))
        return Workers(jobs, needs.threads or max(1, min(cores(), torch.get_num_threads()) // jobs), devices)


@dataclass
class Worker:
    process: SpawnProcess
    pipe: Connection
    call: int | None = None  # what it works on


@dataclass
class Workers(Engine):
    """`jobs` processes of `threads` threads each. One job needs no process: it runs here."""

    jobs: int
    threads: int
    devices: int = 0  # accelerators to share out, in turns
    _workers: list[Worker] = field(default_factory=list)
    _interrupts: int = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if kind is not None:
                worker.process.terminate()
            worker.pipe.close()  # an idle worker reads the end of its pipe and leaves
            worker.process.join()
        self._workers.clear()

    def describe(self, calls: Sequence[Call]) -> str:
        return f"here, {self.jobs} side by side, {self.threads} threads each"

    def _run(self, waiting: Waiting, tell: Listener) -> None:
        if self.jobs == 1:
            with torch_threads(self.threads):
                while waiting:
                    self._here(*waiting.popleft(), tell)
            return
        self._interrupts = 0
        with interrupts(self._pass_on):
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
        outcome, value = attempt(call, lambda event: tell(number, "event", event))
        tell(number, outcome, value)
        if outcome == "interrupted":
            raise KeyboardInterrupt

    def _hand_out(self, waiting: Waiting, tell: Listener) -> None:
        while waiting and len(self._workers) < self.jobs:
            self._workers.append(self._hire(len(self._workers)))
        for worker in self._workers:
            if waiting and worker.call is None:
                worker.call, call = waiting.popleft()
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
                tell(number, "failed", Failure(f"its process ended: {_last_words(worker.process.exitcode)}", True))
            return
        assert worker.call is not None
        number = worker.call
        if outcome != "event":
            worker.call = None
        tell(number, outcome, value)

    def _pass_on(self, count: int) -> None:
        """The first interrupt asks for an orderly end; the second ends everything."""
        self._interrupts = count
        for worker in self._workers:
            if count > 1:
                worker.process.kill()
            elif worker.call is not None and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGINT)


def _serve(pipe: Connection, threads: int, device: int | None) -> None:
    """A worker's life."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C goes to the parent, who passes it on
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(device)
    try:
        with torch_threads(threads):
            _release_signals()
            threading.Thread(target=_end_with_parent, daemon=True).start()
            while True:
                outcome, value = attempt(pipe.recv(), lambda event: _report(pipe, event))
                pipe.send((outcome, value))
                if outcome == "interrupted":
                    return
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent has gone, or wants us to go
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would break what is done at the exit


def _report(pipe: Connection, event: Any) -> None:
    """Where nobody listens any more, the call is about to be interrupted, and saves."""
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.send(("event", event))


def _end_with_parent() -> None:
    """Nobody could pass an interrupt on any more, so this does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)


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


def _last_words(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    return f"exit status {code}"
