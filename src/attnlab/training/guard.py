"""The guard of a run: the faults of its loss, and the errors that they raise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..config import TrainConfig
from ..errors import UserError

USUAL = 50  # number of last losses whose median a spike is measured from
REWINDS = 10  # most rewinds of a run; the next fault ends it


class Diverged(UserError):
    """The loss or its gradient is no longer a finite number, or far from what it was."""


class Rewind(Exception):
    """A fault from which the run goes back to the newest checkpoint, without the batches since then."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step  # at which the fault was, from 1


def spike_limit(spike: float, usual: Sequence[float]) -> float:
    """Return the loss above which a step is a spike, by the last losses; infinite for `spike` 0 or too few losses."""
    if not spike or len(usual) < USUAL // 5:
        return math.inf
    return statistics.median(usual) + spike


def diverged(reason: str, rewinds: int, newest: int | None, train: TrainConfig) -> Diverged:
    """Return the error that ends a run, for a user. `newest`: the step of its newest checkpoint; None: it has none."""
    kept = "no checkpoint was written yet" if newest is None else f"the checkpoint of step {newest} is kept"
    again = f"after {rewinds} rewinds" if rewinds else ""
    return Diverged(
        f"{' '.join(filter(None, (reason, again)))}, and {kept}; train again into another folder with a lower "
        f"train.lr (it is {train.lr}), a longer train.warmup ({train.warmup}) or a smaller train.clip "
        f"({train.clip})"
    )
