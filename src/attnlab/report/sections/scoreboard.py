"""Scoreboard: every mechanism's loss, its difference to the baseline, and what it costs."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE, count, loss, signed, size, words
from ..findings import Findings, Standing
from ..html import Html, join, table, tag
from ..style import Look
from .common import VERDICTS, Figures, ending, frame, missing, named


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    if not found.cells:
        return frame("scoreboard", "Scoreboard", missing(found, "compare.json", "No training runs here"))
    base = found.baseline
    ranked = sorted(found.standings, key=lambda s: (s.val_loss is None, s.val_loss or 0.0))
    scale = standing_scale(ranked)
    rows: list[list[Any]] = []
    marked: list[int] = []
    for standing in ranked:
        m = standing.mechanism
        own = [c for c in found.cells if c.mechanism == m]
        lost = [c for c in own if c.status != "done"]
        seeds: Any = standing.n
        if lost:
            seeds = join(
                [f"{standing.n} of {len(own)}", tag("span", f"✗ {len(lost)} {lost[0].status}", class_="interval bad")]
            )
        if m == base:
            marked.append(len(rows))
        interval = f"{signed(standing.interval[0])} to {signed(standing.interval[1])}" if standing.interval else ""
        said = f"{VERDICTS.get(standing.verdict, '')} {standing.verdict}" if standing.n else "✗ no finished run"
        verdict = tag("span", said, class_="verdict " + (standing.verdict.split()[0] if standing.n else "bad"))
        rows.append(
            [
                named(m, look),
                loss(standing.val_loss),
                join([spread(standing, scale) if m != base else None, verdict]),
                join(
                    [
                        signed(standing.difference) if m != base else NONE,
                        tag("span", interval, class_="interval") if interval else None,
                    ]
                ),
                size(found.mean(m, "cache_bytes")),
                count(found.mean(m, "floats_per_token")),
                count(found.mean(m, "parameters")),
                count(found.mean(m, "flops_per_token")),
                count(found.mean(m, "tokens_per_s")),
                seeds,
            ]
        )
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
    lost_runs = [c for c in found.cells if c.status != "done"]
    notes = [
        tag("li", tag("b", f"{c.mechanism}, seed {c.seed}"), f" {ending(c)}", f": {c.error}" if c.error else ".")
        for c in lost_runs
    ]
    warning = None
    if not found.compare:
        warning = tag(
            "p",
            "The comparison is not finished, so there are no paired differences: ",
            tag("code", found.how_to_make("compare.json")),
            " completes it.",
            class_="missing",
        )
    return frame(
        "scoreboard",
        "Scoreboard",
        warning,
        table(caption, head, rows, marked=tuple(marked)),
        tag("div", tag("h3", "Runs that did not finish"), tag("ul", notes), class_="failures") if notes else None,
    )


def spread(standing: Standing, scale: float) -> Html | str:
    """The difference and its interval as a small drawing; an arrow where the interval is cut."""
    if standing.difference is None:
        return ""
    half, middle = 70.0, 75.0

    def at(value: float) -> float:
        return middle + half * max(-1.0, min(1.0, value / scale))

    parts = [tag("path", d=f"M{middle} 1V17", class_="zero")]
    if standing.interval:
        low, high = standing.interval
        parts.append(tag("path", d=f"M{at(low):.1f} 9H{at(high):.1f}", class_="reach"))
        for end, sign in ((low, -1), (high, 1)):
            x = at(end)
            cut = abs(end) > scale
            parts.append(
                tag(
                    "path",
                    d=f"M{x - 4 * sign:.1f} 5L{x:.1f} 9L{x - 4 * sign:.1f} 13" if cut else f"M{x:.1f} 6V12",
                    class_="reach",
                )
            )
    parts.append(tag("circle", cx=f"{at(standing.difference):.1f}", cy=9, r=3.4))
    words_ = f"difference {signed(standing.difference)}"
    words_ += (
        f", interval {signed(standing.interval[0])} to {signed(standing.interval[1])}" if standing.interval else ""
    )
    return tag(
        "svg",
        parts,
        class_=f"spread {standing.verdict.split()[0]}",
        viewBox="0 0 150 18",
        role="img",
        aria_label=words_,
    )


def standing_scale(standings: list[Standing]) -> float:
    """Half the width of the little interval plots: every difference fits, a wide interval may be cut."""
    differences = [abs(s.difference) for s in standings if s.difference is not None]
    ends = sorted(abs(end) for s in standings for end in s.interval or ())
    return max([0.002, *(1.3 * d for d in differences), *(ends[: max(1, 3 * len(ends) // 4)])])
