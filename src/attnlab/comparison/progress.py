"""The progress of a comparison, as the functions that make its runs see it: how it is shown is up to the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self


class ComparisonProgress(Protocol):
    """A display of the runs under way, open from `__enter__` to `__exit__`. `terminal.progress.Progress` is one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, name: str, steps: int) -> object:
        """Show a run of `steps` optimizer steps."""

    def update(self, name: str, event: Mapping[str, Any]) -> None:
        """Show an event of a run: any of `step`, `loss`, `val_loss`, `tokens_per_s` and `say`."""

    def end(self, name: str, text: str) -> None:
        """Show `text` in place of a run that is over."""

    def say(self, text: str) -> None:
        """Show a line, also before `__enter__`."""


Show = Callable[[int], ComparisonProgress]  # makes a display, given the optimizer steps of all runs together


class Silent:
    """A display that shows nothing."""

    def __init__(self, total: int = 0) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, name: str, steps: int) -> None:
        """Show nothing."""

    def update(self, name: str, event: Mapping[str, Any]) -> None:
        """Show nothing."""

    def end(self, name: str, text: str) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""
