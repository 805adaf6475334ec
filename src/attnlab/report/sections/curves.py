"""Loss curves: validation, training, and the difference to the baseline, against steps."""

from __future__ import annotations

from typing import Any

from ...results import RunResult
from ..figures import Series, View, bands, figure, over_seeds, plain, steps_axis
from ..findings import Findings, number
from ..html import Html
from ..style import MUTED, Look
from .common import Figures, frame, missing, plot


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    views = curve_views(found, look)
    if not views:
        return frame("curves", "Loss curves", missing(found, "compare.json", "No loss curve here"))
    drawn["curves"] = views
    return frame("curves", "Loss curves", plot(views, "curves", "Loss against training step, one line per mechanism"))


def curve_views(found: Findings, look: dict[str, Look]) -> list[View]:
    """Validation loss, its difference to the baseline, and training loss, each against steps."""
    seeds = {m: len(found.done(m)) for m in found.mechanisms if found.done(m)}
    many = max(seeds.values(), default=0) > 1
    band = (
        "the line is the mean over seeds, the band reaches from the lowest seed to the highest"
        if many
        else "one seed per mechanism, so no band: how much of a gap is luck cannot be seen"
    )
    views = []
    for name, which in (("Validation", "curve"), ("Training", "train_curve")):
        series = {m: over_seeds([getattr(c, which) for c in found.done(m)]) for m in seeds}
        series = {m: s for m, s in series.items() if s}
        if not series:
            continue
        noun = "mean loss over the held-out windows" if which == "curve" else "loss on the batches it learns from"
        caption = (
            f"{noun[0].upper()}{noun[1:]}, lower is better: {band}. "
            "The axis leaves out the first quarter of training; with a mouse, double-click to see all."
        )
        y: dict[str, Any] = {"title": {"text": f"{name.lower()} loss (nats per token)"}, "range": _range(series)}
        traces = bands(series, look, ":.4f")
        views.append(View(name, caption, figure(traces, steps_axis(series, late=True), y, hovermode="x unified")))
    base = found.done(found.baseline)
    pairs = {
        m: over_seeds([_minus(c, b) for c in found.done(m) for b in base if b.seed == c.seed])
        for m in seeds
        if m != found.baseline
    }
    pairs = {m: s for m, s in pairs.items() if s}
    if pairs:
        caption = (
            f"Validation loss minus that of {found.baseline} at the same step and seed; below zero is better than "
            f"{found.baseline}. "
            + ("Line: mean of the pairs; band: lowest to highest pair." if many else "One pair each, so no band.")
        )
        y = {"title": {"text": f"difference to {plain(found.baseline)} (nats per token)"}, "tickformat": "+.2f"}
        y |= {"range": _range(pairs), "zeroline": True, "zerolinecolor": MUTED[0], "zerolinewidth": 1}
        drawn = figure(bands(pairs, look, ":+.4f"), steps_axis(pairs), y, hovermode="x unified")
        views.insert(1, View(f"Difference to {found.baseline}", caption, drawn))
    return views


def _minus(cell: RunResult, base: RunResult) -> list[list[float]]:
    theirs = {step: value for step, value in base.curve if number(value) is not None}
    return [[s, v - theirs[s]] for s, v in cell.curve if s in theirs and number(v) is not None]


def _range(series: dict[str, Series]) -> list[float]:
    """What is left to see after the first quarter, with a margin."""
    last = max(s[-1][0] for s in series.values())
    late = [point for s in series.values() for point in s if point[0] >= last / 4]
    low, high = min(p[2] for p in late), max(p[3] for p in late)
    margin = 0.04 * (high - low) or 0.01
    return [low - margin, high + margin]
