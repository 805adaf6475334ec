"""The scale of float16 gradients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Scale:
    """The factor of float16 gradients, so that small ones are not lost (Micikevicius et al. 2018, arXiv 1710.03740).

    It is halved when they overflow, and doubled after 2000 steps without an overflow.
    """

    used: bool  # whether gradients are float16
    factor: float = 2.0**16
    good: int = 0  # steps in a row without an overflow

    @property
    def now(self) -> float:
        """The factor of this step; 1 unless gradients are float16."""
        return self.factor if self.used else 1.0

    def learn(self, applied: bool) -> None:
        """Adapt the factor to a step, which was `applied` unless it overflowed."""
        self.good = self.good + 1 if applied else 0
        if not applied:
            self.factor /= 2
        elif self.good % 2000 == 0:
            self.factor *= 2
