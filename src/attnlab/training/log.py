"""How far a run is: what goes into its checkpoints besides weights and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class Log:
    """How far a run is. Its records are the folder's metrics; what is here goes into the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # learnt from: padding does not count
    interval: list[float] = field(default_factory=list)  # losses since the last record
    usual: list[float] = field(default_factory=list)  # the last 50 losses, where a spike is looked for
    shift: int = 0  # steps whose data was left out
    skipped: int = 0  # steps that were not taken
    rewinds: int = 0
    scale: tuple[float, int] = (2.0**16, 0)  # of float16 gradients, and its good steps
    # of this sitting only:
    norm: float = 0.0
    alone: float = 0.0  # seconds since the last record in which this process waited for no other
    warm: bool = False  # whether a whole interval has passed
    saved: int | None = None

    KEPT: ClassVar = ("seconds", "tokens", "interval", "usual", "shift", "skipped", "rewinds", "scale")

    @classmethod
    def of(cls, step: int, state: Mapping[str, Any]) -> Log:
        return cls(step, saved=step, **{name: state[name] for name in cls.KEPT if name in state})

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}
