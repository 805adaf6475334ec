"""What is running, how fast, how well, how long still: live bars on a terminal, plain lines anywhere else.

A run reports events, plain dictionaries. Any key may be missing:
`step` (steps done), `loss` (nats per token), `val_loss`, `tokens_per_s`, `say` (a line that stays on the screen).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..formatting import clock
from .tables import console

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 10.0  # seconds between two lines about one run, where there is no terminal to redraw


class Progress:
    """Bars for the runs under way and one for the whole; a finished run becomes a line that stays.

    `total` is in steps, over all runs; leave it out for a single run, which then has no second bar. It writes to
    stderr, so that what a command prints stays clean.
    """

    def __init__(self, total: int | None = None, *, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console or Console(stderr=True)
        self.live = self.console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", justify="right", style="cyan"),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            speed_estimate_period=60,
        )
        self._runs: dict[str, _Run] = {}
        self._total = None if total is None else self._bars.add_task("[bold]total", total=total, rate="", losses="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self._runs.values():
            self._bars.remove_task(run.bar)
        self._runs.clear()
        self._bars.stop()

    def begin(self, name: str, steps: int | None, unit: str = "steps") -> Callable[[Mapping[str, Any]], None]:
        """Show a run of `steps` steps, or of something else; None where nobody knows how many. Returns where its events
        go: what `train` takes as `progress`."""
        self._runs[name] = _Run(self._bars.add_task(name, total=steps, rate="", losses=""), steps, unit)
        if not self.live:
            self.say(f"{name}: starts" if steps is None else f"{name}: starts, {steps} {unit}")
        return lambda event: self.update(name, event)

    def update(self, name: str, event: Mapping[str, Any]) -> None:
        run = self._runs[name]
        now = time.monotonic()
        if "say" in event:
            self.say(f"{name}: {event['say']}")
        validated = event.get("val_loss") is not None
        run.seen |= {key: value for key, value in event.items() if value is not None}
        step = run.seen.get("step", 0)
        if self._total is not None:
            self._bars.advance(self._total, step - run.counted)
        run.counted = step
        rate = f"{_short(run.seen['tokens_per_s'])} tok/s" if "tokens_per_s" in run.seen else ""
        self._bars.update(run.bar, completed=step, rate=rate, losses=run.losses())
        if not self.live and (validated or now - run.spoken > PATIENCE):
            run.spoken = now
            self.say("  ".join(filter(None, (f"{name}: {run.place()}", run.losses(), rate, run.left(now)))))

    def end(self, name: str, text: str) -> None:
        """The run is over; `text` stays on the screen."""
        run = self._runs.pop(name)
        self._bars.remove_task(run.bar)
        self.say(f"{name}: {text}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Meter:
    """For work that may be short: silent for two seconds, then one bar, or a line every ten seconds.

    Call it with what is being done, how much of it is, and how much there is.
    """

    def __init__(self, title: str, *, console: Console | None = None, patience: float = 2.0) -> None:
        from rich.console import Console

        self.title, self.console, self.patience = title, console or Console(stderr=True), patience
        self.spoken = time.monotonic()
        self._bars: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self.spoken < self.patience:
            return
        if not self.console.is_terminal:
            self.spoken, self.patience = now, PATIENCE
            self.console.print(f"{self.title}: {what}, {done}/{of}", highlight=False, markup=False, soft_wrap=True)
            return
        if self._bars is None:
            self._bars = self._bar()
        self._bars.update(self._task, description=f"{self.title}: {what}", completed=done, total=of)

    def _bar(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.patience = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        bars = Bars(*columns, console=self.console, transient=True)
        self._task = bars.add_task(self.title, total=1)
        bars.start()
        return bars


class _Run:
    def __init__(self, bar: Any, steps: int | None, unit: str) -> None:
        self.bar, self.steps, self.unit, self.counted = bar, steps, unit, 0
        self.seen: dict[str, Any] = {}
        self.spoken = self.began = time.monotonic()
        self.first: int | None = None

    def place(self) -> str:
        if self.unit == "steps":
            return f"step {self.counted}/{self.steps}"
        return f"{self.counted:,}{'' if self.steps is None else f' of {self.steps:,}'} {self.unit}"

    def losses(self) -> str:
        shown = (("loss", "loss"), ("val_loss", "val"))
        return "  ".join(f"{word} {self.seen[key]:.3f}" for key, word in shown if key in self.seen)

    def left(self, now: float) -> str:
        """From the steps of this sitting alone: a resumed run did not do the others at this pace."""
        if self.first is None:
            self.first, self.began = self.counted, now
        done = self.counted - self.first
        if not done or self.steps is None:
            return ""
        return f"{(now - self.began) / done * (self.steps - self.counted):.0f} s left"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """A line that says what is being done, how far it is and how long still; where there is no terminal, one every ten
    seconds. Never anything on stdout."""
    screen = console(stderr=True)
    pace = Pace()
    if screen.is_terminal:
        with screen.status("starting") as status:
            yield lambda what, done, of: status.update(pace.line(what, done, of))
        return
    told = time.monotonic()

    def tell(what: str, done: int, of: int) -> None:
        nonlocal told
        line = pace.line(what, done, of)
        if time.monotonic() - told >= PATIENCE:
            told = time.monotonic()
            screen.print(line)

    yield tell


class Pace:
    """How fast the present kind of work goes."""

    def __init__(self) -> None:
        self.what, self.began, self.start = "", 0.0, 0

    def line(self, what: str, done: int, of: int) -> str:
        now = time.monotonic()
        if what != self.what:
            self.what, self.began, self.start = what, now, done
        line = f"{what} ({done:,}/{of:,})"
        if done <= self.start or now - self.began < 1:
            return line
        rate = (done - self.start) / (now - self.began)
        return f"{line}, {rate:,.3g} a second, {clock((of - done) / rate)} left"
