"""The processes that train one model together: this one, or as many as a launcher started.

Launchers are torchrun, accelerate, deepspeed and srun; each process has a rank from 0 on. Accelerate joins the
processes, and PyTorch sends between them.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import UserError, need
from .launcher import lasting_store, launched, rank
from .signals import GRACE, on_stop_signal

T = TypeVar("T")
PATIENCE = 300.0  # seconds until processes that were started together must have found each other
_joined = count()  # calls of `_new_store` in this process


class LocalError(UserError):
    """An error of this process, unknown to the others."""

    shared = False


class PeerLost(LocalError):
    """Another process of this run is gone."""


@dataclass(frozen=True)
class Processes:
    """The processes of one run, as one of them sees them.

    Every process must call the methods that communicate, in the same order. They raise `PeerLost` when another process
    is gone.
    """

    rank: int = 0
    size: int = 1
    host: Any = None  # the group that communicates over the network rather than between GPUs
    ours: bool = False  # whether the process group was made here, rather than by the caller

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes and prints."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return each number, summed over all processes; exact for whole numbers up to 2^53."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        _sent(lambda: dist.all_reduce(total, group=self.host))
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank. It must pickle; only processes of this run send any."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        _sent(lambda: dist.all_gather_object(found, value, group=self.host))
        return found

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.sum(0)

    def add(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over all processes, in place and on its device; return it."""
        if self.size > 1:
            _sent(lambda: dist.all_reduce(tensor))
        return tensor

    def agree(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, unless any process failed: then all raise, their own error or the first one."""
        try:
            value, error = work(), None
        except (UserError, OSError) as caught:
            value, error = None, caught
        for other, found in enumerate(self.gather(None if error is None else str(error))):
            if found is not None:
                raise error or UserError(f"process {other} of {self.size}: {found}")
        return value  # type: ignore[return-value]


ONE_PROCESS = Processes()


def join_processes(device: torch.device, grouped: bool = False) -> Processes:
    """Return the processes that the launcher started, joined; `leave` them in the end.

    `grouped`: make a process group even of one process. Raises `UserError` when they cannot find each other.
    """
    need("accelerate", "train")
    from accelerate import state

    state.AcceleratorState._reset_state(reset_partial_state=True)  # global: an earlier run's device
    ours = not dist.is_initialized()
    cpu = device.type == "cpu"
    if launched() == 1:
        if not grouped:
            return ONE_PROCESS
        if ours:
            dist.init_process_group("gloo" if cpu else None, store=dist.HashStore(), rank=0, world_size=1)
        return Processes(host=dist.group.WORLD, ours=ours)
    try:
        if ours and lasting_store():
            dist.init_process_group("gloo" if cpu else None, store=_new_store(), rank=rank(), world_size=launched())
        known = state.PartialState(cpu=cpu)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {launched()} processes that the launcher started could not find each other ({first_line(error)}): "
            "check its address and port"
        ) from None
    host = dist.group.WORLD if cpu else dist.new_group(backend="gloo")
    return Processes(known.process_index, known.num_processes, host, ours)


def _new_store() -> dist.Store:
    """Return a store in the first process. torchrun's own still holds what dead processes wrote, and new ones would
    wait for those (pytorch/pytorch#135712); here it only tells the port of the new store."""
    key = f"attnlab-{next(_joined)}"
    host = os.environ["MASTER_ADDR"]
    size = launched()
    old = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), size, is_master=False)
    if rank() == 0:
        new = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        old.set(key, str(new.port))
        return new
    last = time.monotonic() + PATIENCE
    while True:
        port = int(old.get(key))
        try:
            new = dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=5))
        except RuntimeError:  # the port is that of an earlier first process
            if time.monotonic() > last:
                raise
            time.sleep(0.1)
        else:
            new.set_timeout(timedelta(seconds=PATIENCE))
            return new


def leave(processes: Processes) -> None:
    """Destroy the process group that `join_processes` made, if it made one."""
    if processes.ours and dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]


def unreachable(error: BaseException) -> bool:
    """Return whether gloo, NCCL or the store raise such an error when another process is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))


def peer_lost(error: BaseException) -> PeerLost:
    """Return the error for a user, made of the one that a library raised."""
    return PeerLost(f"another process of this run is gone ({first_line(error)}); its own last words say why")


def _sent(send: Callable[[], Any]) -> None:
    try:
        send()
    except RuntimeError as error:
        raise (peer_lost(error) if unreachable(error) else error) from None


class StopRequest(threading.Event):
    """An event that is set once the run is asked to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()  # numbers of the signals that came

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise KeyboardInterrupt inside GRACE seconds after the request: for what takes long and saves nothing."""
        over = threading.Event()
        watch = threading.Thread(target=self._hurry, args=(over,), daemon=True)
        if threading.current_thread() is threading.main_thread():
            watch.start()
        try:
            yield
        finally:
            over.set()
            if watch.is_alive():
                watch.join()  # whoever forks afterwards has no other thread

    def _hurry(self, over: threading.Event) -> None:
        while not self.is_set():
            if over.wait(0.2):
                return
        if not over.wait(GRACE):
            self.seen.add(signal.SIGINT)
            _thread.interrupt_main()  # as a second Ctrl-C


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; it stays unset outside the main thread.

    A second signal of the same kind raises KeyboardInterrupt: a launcher may add its SIGTERM to a terminal's Ctrl-C.
    """
    asked = StopRequest()

    def ask(number: int) -> None:
        if number in asked.seen:
            raise KeyboardInterrupt
        asked.seen.add(number)
        asked.set()

    with on_stop_signal(ask) as before:
        try:
            yield asked
        except PeerLost:
            if before:
                before[signal.SIGTERM] = signal.SIG_IGN  # the launcher ends this process too, which must report first
            raise
