"""The engine local: calls side by side in a few lasting processes here.

PyTorch is imported once in each process, and one bad call spoils no other. An interrupt reaches every worker once: each
finishes its step and saves. The same happens where the process that started them is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
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
    """The options of the engine local: none."""

    def open(self, needs: Needs) -> Workers:
        """Return workers: by default as many as there are cores, or GPUs.

        Small models lose less time waiting for threads when several runs are made side by side.
        """
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
    """A process that makes calls, one after another."""

    process: SpawnProcess
    pipe: Connection
    call: int | None = None  # number of the call that it makes; None: it waits


@dataclass
class Workers(Engine):
    """Processes that make calls. With one job there are none: calls are made in this process."""

    jobs: int  # processes
    threads: int  # of each
    devices: int = 0  # GPUs to share out, in turns; 0: no process is bound to one
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
        """Return how many calls are made side by side, in words."""
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
                self._assign(waiting, tell)
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

    def _assign(self, waiting: Waiting, tell: Listener) -> None:
        while waiting and len(self._workers) < self.jobs:
            self._workers.append(self._start(len(self._workers)))
        for worker in self._workers:
            if waiting and worker.call is None:
                worker.call, call = waiting.popleft()
                tell(worker.call, "start", None)
                worker.pipe.send(call)

    def _start(self, number: int) -> Worker:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        device = number % self.devices if self.devices else None
        process = spawn.Process(target=_work, args=(theirs, self.threads, device), daemon=True)
        with _signals_held(), _main_unseen():
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
                tell(number, "failed", Failure(f"its process ended: {_exit_reason(worker.process.exitcode)}", True))
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


@contextmanager
def _main_unseen() -> Iterator[None]:
    """Let a process start without running the caller's script again, of which calls need nothing.

    So a script without `if __name__ == "__main__"` is as good as one with it.
    """
    main = sys.modules["__main__"]
    held = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    try:
        for name in held:
            setattr(main, name, None)
        yield
    finally:
        for name, value in held.items():
            setattr(main, name, value)


def _work(pipe: Connection, threads: int, device: int | None) -> None:
    """Make the calls that come through `pipe`, until it is closed or a call is interrupted."""
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
        return  # the parent has ended, or wants this process to end
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would break what is done at the exit


def _report(pipe: Connection, event: Any) -> None:
    """Send an event. Where nobody reads it any more, the call is about to be interrupted, and saves."""
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.send(("event", event))


def _end_with_parent() -> None:
    """Interrupt this process when its parent has ended, which can then pass no interrupt on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold interrupts back from a process that is started inside, as they would break its imports."""
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


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    return f"exit status {code}"
