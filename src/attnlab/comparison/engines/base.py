"""The engine: calls go in, outcomes come back as they happen, and what the machine may have spoilt is made again.

A call is a function of a module with arguments that pickle. It gets one argument more, `report`, to tell what it is
doing. A call that trains names its run folder, so that an engine on another machine can read there how far it is.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

from ...errors import UserError
from ...ranges import Count, Size, Threads, check_fields
from ...runs.signals import on_stop_signal

Outcome = Literal["note", "start", "event", "again", "done", "failed", "interrupted"]
Listener = Callable[[int, Outcome, Any], None]  # number of the call, what happened, the value, event or sentence
MACHINE = (OSError, MemoryError, RuntimeError)  # what may be the machine's fault; torch raises CUDA's as RuntimeError


class Call(NamedTuple):
    """A function to be called by an engine."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    folder: Path | None = None  # the run folder that it trains into; None: it does not train


class Failure(NamedTuple):
    """The reason why a call failed."""

    sentence: str
    again: bool  # whether it may succeed the next time


Waiting = deque[tuple[int, Call]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of the machine that runs get. None: the engine decides."""

    jobs: Count | None = None  # runs side by side
    threads: Threads | None = None  # CPU threads of each run
    gpus: Size | None = None  # GPUs of each run

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Needs(Share):
    """The work for which an engine is opened. Raises `UserError` for a share that is too small."""

    runs: Size  # number of calls that will come
    folder: Path  # where the engine keeps files of its own
    device: str = "auto"  # train.device
    say: Callable[[str], None] = lambda text: None  # shows a line about something that takes long


class Engine(ABC):
    """A maker of calls; a context that releases its processes and connections."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def describe(self, calls: Sequence[Call]) -> str:
        """Return what `run` would do, in words, for a dry run."""

    def run(self, calls: Sequence[Call], tell: Listener) -> None:
        """Make all calls, and tell `tell` of each. A call that fails is told as a sentence, and the others go on.

        A failure that may be the machine's is told as "again", and the call is made once more, after those that wait.
        Raises `KeyboardInterrupt` once an interrupt was passed on; calls that had not begun are then not told at all.
        """
        waiting: Waiting = deque(enumerate(calls))
        tried: set[int] = set()

        def hear(number: int, outcome: Outcome, value: Any) -> None:
            if not isinstance(value, Failure):
                tell(number, outcome, value)
            elif value.again and number not in tried:
                tried.add(number)
                waiting.append((number, calls[number]))
                tell(number, "again", value.sentence)
            else:
                tell(number, "failed", value.sentence)

        self._run(waiting, hear)

    @abstractmethod
    def _run(self, waiting: Waiting, tell: Listener) -> None:
        """Make the calls that wait, until none is left. Telling a `Failure` may append a call to `waiting`."""


class EngineOptions(Protocol):
    """The options of an engine."""

    def open(self, needs: Needs) -> Engine:
        """Return the engine. Raises `UserError` for needs that it cannot meet."""


def attempt(call: Call, report: Callable[[Any], None]) -> tuple[Outcome, Any]:
    """Make a call, and return how it ended: "done" and its value, "interrupted", or "failed" and a `Failure`."""
    try:
        return "done", call.function(*call.arguments, report)
    except KeyboardInterrupt:
        return "interrupted", None
    except UserError as error:
        return "failed", Failure(str(error), again=False)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        return "failed", Failure(said, again=isinstance(error, MACHINE))


@contextmanager
def interrupts(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Call `pass_on` with the number of Ctrl-C and SIGTERM so far; never outside the main thread."""
    counts = count(1)
    with on_stop_signal(lambda _: pass_on(next(counts))):
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads inside, and as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
