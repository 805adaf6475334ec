"""The log of a run: the part of its checkpoints that is neither weights nor optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class Log:
    """The progress of a run. Its records are in the folder's metrics."""

    step: int = 0  # steps that are done
    seconds: float = 0.0  # of training so far
    tokens: int = 0  # targets that counted; padding does not
    interval: list[float] = field(default_factory=list)  # losses since the last record
    usual: list[float] = field(default_factory=list)  # the last 50 losses; empty unless spikes are looked for
    shift: int = 0  # steps whose data was left out
    skipped: int = 0  # steps that were not applied
    rewinds: int = 0
    scale: tuple[float, int] = (2.0**16, 0)  # of float16 gradients, and its good steps
    # not kept in checkpoints:
    norm: float = 0.0  # of the last gradient, before clipping
    working: float = 0.0  # seconds of work since the last record, in which this process did not wait for another one
    warm: bool = False  # whether a whole interval has passed
    saved: int | None = None  # step of the last checkpoint; None: there is none

    KEPT: ClassVar = ("seconds", "tokens", "interval", "usual", "shift", "skipped", "rewinds", "scale")

    @classmethod
    def of(cls, step: int, state: Mapping[str, Any]) -> Log:
        """Return the log of a checkpoint of `step`, by its state."""
        return cls(step, saved=step, **{name: state[name] for name in cls.KEPT if name in state})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: getattr(self, name) for name in self.KEPT}
