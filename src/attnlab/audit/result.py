"""The result of an audit. No framework is imported here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..results import LawResult, judged, verdict


@dataclass(frozen=True)
class Audit:
    """The results of an audit. `results, exit_code = audit` unpacks it."""

    target: str
    results: list[LawResult]
    notes: tuple[str, ...] = ()  # how it was called, in which precision, which of its imports are missing
    longest: int | None = None  # tokens of the longest sequence that was tried in every variant

    @property
    def exit_code(self) -> int:
        """The exit code. 0: all laws that apply hold; 1: one is broken; 2: none applies. (Could not run: UserError.)"""
        if any(r.status == "broken" for r in self.results):
            return 1
        return 0 if judged(self.results) else 2

    @property
    def verdict(self) -> str:
        """One line about all results."""
        return verdict(self.results, self.longest)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.results, self.exit_code))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON, which `attnlab audit --json` prints."""
        return {
            "format": 1,
            "target": self.target,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "longest": self.longest,
            "notes": list(self.notes),
            "laws": [r.to_dict() for r in self.results],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Audit:
        """Return the audit that `to_dict` wrote."""
        results = [LawResult.from_dict(r) for r in data["laws"]]
        return cls(data["target"], results, tuple(data["notes"]), data["longest"])
