"""The engine ray: calls as tasks of Ray, which is started here for the time being, or of a cluster that runs."""

from __future__ import annotations

import _thread
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...errors import UserError, need
from ...ranges import check_fields
from .base import Call, Failure, Needs, Outcome, attempt, cores, torch_threads
from .remote import Remote


@dataclass(frozen=True)
class Ray:
    """The options of the engine ray."""

    address: str = "local"  # auto: the cluster that this machine belongs to; HOST:PORT: that one

    def __post_init__(self) -> None:
        check_fields(self)

    def open(self, needs: Needs) -> OnRay:
        """Return an engine that has not connected yet. Raises `UserError` where Ray is not installed."""
        return OnRay(self.address, needs)


class OnRay(Remote):
    """Tasks on Ray. A task takes its threads as CPUs, and a GPU unless it trains on a CPU. Ray places them."""

    def __init__(self, address: str, needs: Needs) -> None:
        self.ray = need("ray", "scale")
        self.address, self.limit = address, needs.jobs
        self.threads, self.runs = needs.threads or 1, needs.runs
        self.say = needs.say
        self.gpus, self.cpu = needs.gpus, needs.device == "cpu"
        self.stop = (
            needs.folder / f".stop-{secrets.token_hex(4)}"
        ).absolute()  # a file that is there once tasks are to end
        self.mine = False  # whether this object has started or joined Ray
        self.task: Any = None  # the remote function that makes a call; None: not connected

    def __enter__(self) -> Self:
        if self.runs:
            try:
                self._connect()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.unlink(missing_ok=True)
        if self.mine:
            self.ray.shutdown()
            self.mine, self.task = False, None

    def describe(self, calls: Sequence[Call]) -> str:
        """Return where calls are made and what each takes, in words."""
        side = "as many side by side as fit" if self.limit is None else f"{self.limit} side by side"
        gpus = "no GPU" if self.cpu else "a GPU where there is one"
        if self.gpus is not None:
            gpus = f"{self.gpus} GPUs"
        return f"on Ray ({self.address}), {side}, {self.threads} CPUs and {gpus} each"

    def begin(self, call: Call) -> tuple[Any, str]:
        """Submit a call as a task."""
        self._connect()
        return self.task.remote(call, self.threads, os.getcwd(), self.stop), ""

    def _connect(self) -> None:
        if self.task is not None:
            return
        here = self.address == "local"
        own = {"num_cpus": max(self.threads * (self.limit or 1), cores()), "include_dashboard": False} if here else {}
        if not self.ray.is_initialized():
            self.say("starting Ray here" if here else f"joining Ray at {self.address}")
            try:
                _reach(self.address)
                self.ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **own)
            except (OSError, ValueError, RuntimeError) as error:
                said = str(error).partition("\n")[0].rstrip(".")
                raise UserError(
                    f"Ray cannot be reached at {self.address!r} ({said}): give --ray-address local, auto or HOST:PORT"
                ) from None
            self.mine = True
        held = self.ray.cluster_resources()
        gpus = self.gpus
        if gpus is None:
            gpus = 0 if self.cpu else min(1, int(held.get("GPU", 0)))
        for name, wanted in (("CPU", self.threads), ("GPU", gpus)):
            if here and wanted > held.get(name, 0):
                raise UserError(f"a run asks for {wanted} {name}s and this machine has {int(held.get(name, 0))}")
        variables = {k: v for k in ("PYTHONPATH",) if (v := os.environ.get(k))}
        self.task = self.ray.remote(
            num_cpus=self.threads,
            num_gpus=gpus,
            max_retries=0,  # `Engine.run` makes a call again, and tells so
            runtime_env={"env_vars": variables | {"OMP_NUM_THREADS": str(self.threads)}},
        )(_task)

    def ended(self, handle: Any) -> tuple[Outcome, Any] | None:
        """Return how a task ended; None: not yet."""
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        try:
            found: tuple[Outcome, Any] = self.ray.get(handle)
            return found
        except self.ray.exceptions.TaskCancelledError:
            return "interrupted", None
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            told = lines[-1] if isinstance(error, self.ray.exceptions.RayTaskError) else lines[0]
            return "failed", Failure(f"Ray lost it: {told}", again=True)

    def interrupt(self, handles: Sequence[Any], *, hard: bool) -> None:
        """Ask all tasks to save and end; with `hard`, end them at once."""
        self.stop.touch()
        for handle in handles if hard else ():
            self.ray.cancel(handle, force=True)


def _reach(address: str) -> None:
    """Raise `OSError` where nothing listens at HOST:PORT: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _task(call: Call, threads: int, folder: str, stop: Path) -> tuple[Outcome, Any]:
    """Make a call on a node, in the folder of the driver, so that relative paths mean the same."""
    if stop.exists():  # it waited until now
        return "interrupted", None
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a driver in the background passes on that it is ignored
    ended = threading.Event()
    threading.Thread(target=_interrupt, args=(stop, ended), daemon=True).start()
    try:
        with torch_threads(threads):
            return attempt(call, lambda event: None)
    finally:
        ended.set()


def _interrupt(stop: Path, ended: threading.Event) -> None:
    """Interrupt the main thread once, when `stop` is there, as Ray does to a task that it cancels."""
    while not ended.wait(0.5):
        if stop.exists():
            _thread.interrupt_main()
            return
