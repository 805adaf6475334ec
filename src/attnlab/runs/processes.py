"""The processes that train one model together: this one, or as many as a launcher started (torchrun, accelerate,
deepspeed, srun), each with a rank from 0 on. Joining them is Accelerate's work, sending PyTorch's."""

from __future__ import annotations

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

T = TypeVar("T")
PATIENCE = 300.0  # seconds until processes that were started together must have found each other
_joined = count()  # how often this process did


class Alone(UserError):
    """An error of this process, which the others do not know of."""

    shared = False


class Lost(Alone):
    """Another process of the crew is gone."""


@dataclass(frozen=True)
class Crew:
    """What is asked of all must be called by all, in the same order. `Lost` where another process is gone."""

    rank: int = 0
    size: int = 1
    host: Any = None  # the group that speaks over the network rather than between GPUs
    ours: bool = False  # whether the process group was made here, rather than by the caller

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number, summed over all processes: exact for whole numbers up to 2^53."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        _sent(lambda: dist.all_reduce(total, group=self.host))
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank; it must pickle, and only this crew's own processes send any."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        _sent(lambda: dist.all_gather_object(found, value, group=self.host))
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.sum(0)

    def add(self, tensor: Tensor) -> Tensor:
        """In place: the sum over all processes, on the device it is on."""
        if self.size > 1:
            _sent(lambda: dist.all_reduce(tensor))
        return tensor

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns, or the first error that it met in any process, in every process."""
        try:
            value, error = work(), None
        except (UserError, OSError) as caught:
            value, error = None, caught
        for other, found in enumerate(self.gather(None if error is None else str(error))):
            if found is not None:
                raise error or UserError(f"process {other} of {self.size}: {found}")
        return value  # type: ignore[return-value]


ALONE = Crew()


def join(device: torch.device, grouped: bool = False) -> Crew:
    """The crew of this process; `grouped` where a group is needed even of one. `leave` it in the end."""
    need("accelerate", "train")
    from accelerate import state

    state.AcceleratorState._reset_state(reset_partial_state=True)  # global: an earlier run's device
    ours, cpu = not dist.is_initialized(), device.type == "cpu"
    if launched() == 1:
        if not grouped:
            return ALONE
        if ours:
            dist.init_process_group("gloo" if cpu else None, store=dist.HashStore(), rank=0, world_size=1)
        return Crew(host=dist.group.WORLD, ours=ours)
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
    return Crew(known.process_index, known.num_processes, host, ours)


def _new_store() -> dist.Store:
    """A store in the first process. torchrun's own still holds what dead processes wrote, and new ones would wait for
    those (pytorch/pytorch#135712); here it only says where the new store is."""
    key, host, size = f"attnlab-{next(_joined)}", os.environ["MASTER_ADDR"], launched()
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
        except RuntimeError:  # where that of an earlier first process was
            if time.monotonic() > last:
                raise
            time.sleep(0.1)
        else:
            new.set_timeout(timedelta(seconds=PATIENCE))
            return new


def leave(crew: Crew) -> None:
    if crew.ours and dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def unreachable(error: BaseException) -> bool:
    """Whether it is what gloo, NCCL or the store raise when a peer is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))


def lost(error: BaseException) -> Lost:
    return Lost(f"another process of this run is gone ({first_line(error)}); its own last words say why")


def _sent(send: Callable[[], Any]) -> None:
    try:
        send()
    except RuntimeError as error:
        raise (lost(error) if unreachable(error) else error) from None


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second of the same kind interrupts at once (a launcher may add its SIGTERM
    to a terminal's Ctrl-C). Elsewhere than in the main thread: never."""
    asked, seen = threading.Event(), set[int]()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except Lost:
        before[signal.SIGTERM] = signal.SIG_IGN  # a launcher ends this process too: what is to be said comes first
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
