"""Scoreboard: every mechanism's loss, its difference to the baseline, and what it costs."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE, count, loss, signed, size, words
from ..html import Html, join, table, tag
from ..results_folder import Findings, Standing
from ..style import Look
from .common import Figures, frame, judged, missing, named, unfinished

# The small drawing of a difference and its interval, in the units of its view box.
SPREAD_MIDDLE = 75.0  # where the difference is 0
SPREAD_HALF = 70.0  # from the middle to either end


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    if not found.cells:
        return frame("scoreboard", "Scoreboard", missing(found, "compare.json", "No training runs here"))
    base = found.baseline
    ranked = sorted(found.standings, key=lambda s: (s.val_loss is None, s.val_loss or 0.0))
    scale = standing_scale(ranked)
    rows = [_row(found, look, standing, scale) for standing in ranked]
    marked = tuple(number for number, standing in enumerate(ranked) if standing.mechanism == base)
    head = [
        "mechanism",
        "val loss",
        tag("span", f"better ← {base} → worse", class_="verdict"),
        f"difference to {base}, 95 % interval",
        "cache",
        "floats / token",
        "parameters",
        "FLOPs / token",
        "tokens / s",
        "seeds",
    ]
    contexts = words(f"{n:,}" for n in sorted({c.context for c in found.cells if c.context}))
    caption = (
        "Mean over seeds, best loss first. Loss in nats per token; difference and interval from runs paired by seed; "
        f"cache of one sequence of {contexts} tokens; floats per token and FLOPs per token over all layers; tokens per "
        "second in training."
    )
    return frame(
        "scoreboard",
        "Scoreboard",
        _warning(found),
        table(caption, head, rows, marked=marked),
        unfinished(("", cell) for cell in found.cells),
    )


def _warning(found: Findings) -> Html | None:
    if found.compare:
        return None
    return tag(
        "p",
        "The comparison is not finished, so there are no paired differences: ",
        tag("code", found.how_to_make("compare.json")),
        " completes it.",
        class_="missing",
    )


def _row(found: Findings, look: dict[str, Look], standing: Standing, scale: float) -> list[Any]:
    m = standing.mechanism
    compared = m != found.baseline
    return [
        named(m, look),
        loss(standing.val_loss),
        join([_spread(standing, scale) if compared else None, _verdict(found, standing)]),
        join([signed(standing.difference) if compared else NONE, _interval(standing), _apart(found, standing)]),
        size(found.mean(m, "cache_bytes")),
        count(found.mean(m, "floats_per_token")),
        count(found.mean(m, "parameters")),
        count(found.mean(m, "flops_per_token")),
        count(found.mean(m, "tokens_per_s")),
        _seeds(found, standing),
    ]


def _verdict(found: Findings, standing: Standing) -> Html:
    if not standing.n:
        return tag("span", "✗ no finished run", class_="verdict bad")
    return tag("span", judged(standing.verdict, found.margin), class_=f"verdict {standing.verdict.split()[0]}")


def _interval(standing: Standing) -> Html | None:
    if not standing.interval:
        return None
    low, high = standing.interval
    return tag("span", f"{signed(low)} to {signed(high)}", class_="interval")


def _apart(found: Findings, standing: Standing) -> Html | None:
    """Return the note at an interval that rests on its own pairs where the others are pooled."""
    if standing.by != "pairwise" or found.statistics.get("by") != "pooled":
        return None
    return tag("span", "from its own pairs alone", class_="interval")


def _seeds(found: Findings, standing: Standing) -> Any:
    own = [c for c in found.cells if c.mechanism == standing.mechanism]
    lost = [c for c in own if c.status != "done"]
    if not lost:
        return standing.n
    sign = tag("span", f"✗ {len(lost)} {lost[0].status}", class_="interval bad")
    return join([f"{standing.n} of {len(own)}", sign])


def _spread(standing: Standing, scale: float) -> Html | str:
    """Return the difference and its interval as a small drawing; an arrow where the interval is cut at `scale`."""
    if standing.difference is None:
        return ""
    parts = [tag("path", d=f"M{SPREAD_MIDDLE} 1V17", class_="zero")]
    said = f"difference {signed(standing.difference)}"
    if standing.interval:
        low, high = standing.interval
        parts.append(tag("path", d=f"M{_across(low, scale):.1f} 9H{_across(high, scale):.1f}", class_="reach"))
        for end, sign in ((low, -1), (high, 1)):
            x = _across(end, scale)
            arrow = f"M{x - 4 * sign:.1f} 5L{x:.1f} 9L{x - 4 * sign:.1f} 13"
            parts.append(tag("path", d=arrow if abs(end) > scale else f"M{x:.1f} 6V12", class_="reach"))
        said += f", interval {signed(low)} to {signed(high)}"
    parts.append(tag("circle", cx=f"{_across(standing.difference, scale):.1f}", cy=9, r=3.4))
    return tag(
        "svg",
        parts,
        class_=f"spread {standing.verdict.split()[0]}",
        viewBox="0 0 150 18",
        role="img",
        aria_label=said,
    )


def _across(value: float, scale: float) -> float:
    return SPREAD_MIDDLE + SPREAD_HALF * max(-1.0, min(1.0, value / scale))


def standing_scale(standings: list[Standing]) -> float:
    """Return half the width of the small drawings, in nats: every difference fits, a wide interval may be cut."""
    differences = [abs(s.difference) for s in standings if s.difference is not None]
    ends = sorted(abs(end) for s in standings for end in s.interval or ())
    return max([0.002, *(1.3 * d for d in differences), *(ends[: max(1, 3 * len(ends) // 4)])])
