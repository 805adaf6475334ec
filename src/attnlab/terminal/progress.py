"""Progress of what is running: live bars on a terminal, plain lines anywhere else.

A run reports events, plain dictionaries. Any key may be missing:
`step` (steps done), `loss` (nats per token), `val_loss`, `tokens_per_s`, `say` (a line that stays on the screen).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..formatting import clock, rate
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
        """Show a run, and return the function that takes its events: what `train` takes as `progress`.

        `steps`: of the whole run, in `unit`; None where nobody knows how many.
        """
        self._runs[name] = _Run(self._bars.add_task(name, total=steps, rate="", losses=""), steps, unit)
        if not self.live:
            self.say(f"{name}: starts" if steps is None else f"{name}: starts, {steps} {unit}")
        return lambda event: self.update(name, event)

    def update(self, name: str, event: Mapping[str, Any]) -> None:
        """Show an event of the run `name`."""
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
        speed = rate(run.seen["tokens_per_s"]) if "tokens_per_s" in run.seen else ""
        self._bars.update(run.bar, completed=step, rate=speed, losses=run.losses())
        if not self.live and (validated or now - run.spoken > PATIENCE):
            run.spoken = now
            self.say("  ".join(filter(None, (f"{name}: {run.place()}", run.losses(), speed, run.left(now)))))

    def end(self, name: str, text: str) -> None:
        """Take the run off the screen; `text` stays."""
        run = self._runs.pop(name)
        self._bars.remove_task(run.bar)
        self.say(f"{name}: {text}")

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Run:
    """One run under way: the events so far, and when it began."""

    def __init__(self, bar: Any, steps: int | None, unit: str) -> None:
        self.bar = bar
        self.steps = steps  # None: nobody knows how many
        self.unit = unit
        self.counted = 0  # steps done
        self.seen: dict[str, Any] = {}  # the newest value of each key of its events
        self.began = time.monotonic()
        self.spoken = self.began  # when its last line was printed
        self.first: int | None = None  # steps that were done when `left` was first asked

    def place(self) -> str:
        """Return how far it is."""
        if self.unit == "steps":
            return f"step {self.counted}/{self.steps}"
        return f"{self.counted:,}{'' if self.steps is None else f' of {self.steps:,}'} {self.unit}"

    def losses(self) -> str:
        """Return its newest losses."""
        shown = (("loss", "loss"), ("val_loss", "val"))
        return "  ".join(f"{word} {self.seen[key]:.3f}" for key, word in shown if key in self.seen)

    def left(self, now: float) -> str:
        """Return the time that is left, or nothing; steps from before a resume were not done at this pace."""
        if self.first is None:
            self.first = self.counted
            self.began = now
        done = self.counted - self.first
        if not done or self.steps is None:
            return ""
        return f"{(now - self.began) / done * (self.steps - self.counted):.0f} s left"


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function to call with what is being done, how much of it is done, and how much there is.

    It shows one line, with the time that is left; where there is no terminal, one every ten seconds. It writes to
    stderr, never to stdout.
    """
    screen = console(stderr=True)
    if screen.is_terminal:
        pace = Pace()
        with screen.status("starting") as status:
            yield lambda what, done, of: status.update(pace.line(what, done, of))
    else:
        yield _Lines(screen)


class _Lines:
    """The lines of `working` where there is no terminal to redraw."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.pace = Pace()
        self.spoken = time.monotonic()

    def __call__(self, what: str, done: int, of: int) -> None:
        line = self.pace.line(what, done, of)
        now = time.monotonic()
        if now - self.spoken >= PATIENCE:
            self.spoken = now
            self.screen.print(line)


class Pace:
    """The speed of the present kind of work."""

    def __init__(self) -> None:
        self.what = ""
        self.began = 0.0  # when this kind of work was first reported
        self.start = 0  # how much was done then

    def line(self, what: str, done: int, of: int) -> str:
        """Return how far the work is; after a second of it, also its speed and the time that is left."""
        now = time.monotonic()
        if what != self.what:
            self.what = what
            self.began = now
            self.start = done
        line = f"{what} ({done:,}/{of:,})"
        seconds = now - self.began
        if done <= self.start or seconds < 1:
            return line
        speed = (done - self.start) / seconds
        return f"{line}, {speed:,.3g} a second, {clock((of - done) / speed)} left"
