"""The verdicts that a report shows: those of compare.json, or new ones by the report's own choices."""

from __future__ import annotations

from typing import Any

from ..contrasts import MARGIN, Intervals, Judged, Judging, of_losses, of_tasks, verdict_on
from ..results import RunResult, TaskResult

ALONE = "An earlier version made these intervals: each rests on its own pairs, and stands alone (Student's t)."


class Judge:
    """The verdicts of a compare.json: those that it holds, or new ones by the choices of the report.

    Verdicts of an earlier version are made anew from its intervals.
    """

    def __init__(self, data: dict[str, Any], intervals: Intervals | None, margin: float | None) -> None:
        stated = data.get("statistics") or {}
        self.labels = list(map(str, data.get("mechanisms") or []))
        self.baseline = str(data.get("baseline"))
        self.anew = intervals is not None or margin is not None
        self.judging = Judging(intervals or stated.get("intervals", "auto"), margin or stated.get("margin", MARGIN))

    def losses(self, rows: list[dict[str, Any]], about: dict[str, Any], cells: list[RunResult]) -> Judged:
        """Return the rows of runs, and how they were judged."""
        if self.anew and self.baseline in self.labels:
            return of_losses(cells, self.labels, self.baseline, self.judging)
        return self._held(rows, about, 1)

    def tasks(self, rows: list[dict[str, Any]], about: dict[str, Any], cells: list[TaskResult]) -> Judged:
        """Return the rows of answers to a task, and how they were judged."""
        if self.anew and self.baseline in self.labels:
            return of_tasks(cells, self.labels, self.baseline, self.judging)
        return self._held(rows, about, -1)

    def _held(self, rows: list[dict[str, Any]], about: dict[str, Any], worse: int) -> Judged:
        """Return what the file holds. `worse`: the sign of a difference for the worse."""
        if about.get("statistics") is not None:
            return rows, dict(about["statistics"])
        made = []
        for row in rows:
            if row.get("interval"):
                ends = sorted(worse * float(end) for end in row["interval"])
                row = row | {"verdict": verdict_on(ends, MARGIN), "by": "pairwise"}
            made.append(row)
        return made, {"margin": MARGIN, "by": "pairwise", "why": ALONE}
