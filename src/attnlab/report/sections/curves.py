"""Loss curves against steps: validation loss, training loss, the difference to the baseline."""

from __future__ import annotations

from typing import Any

from ...results import RunResult
from ..figures import Series, View, bands, figure, over_seeds, plain, steps_axis
from ..html import Html
from ..results_folder import Findings
from ..style import MUTED, Look
from .common import Figures, frame, missing, plot

CURVES = {  # name of the view -> the field of a run, and what it is
    "Validation": ("curve", "Mean loss over the held-out windows"),
    "Training": ("train_curve", "Loss on the batches it learns from"),
}


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figure to `drawn`."""
    views = curve_views(found, look)
    if not views:
        return frame("curves", "Loss curves", missing(found, "compare.json", "No loss curve here"))
    drawn["curves"] = views
    return frame("curves", "Loss curves", plot(views, "curves", "Loss against training step, one line per mechanism"))


def curve_views(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return validation loss, its difference to the baseline, and training loss, each against steps."""
    runs = {m: own for m in found.mechanisms if (own := found.done(m))}
    many = any(len(own) > 1 for own in runs.values())
    views = []
    for name, (attribute, what) in CURVES.items():
        series = _present({m: over_seeds([getattr(c, attribute) for c in own]) for m, own in runs.items()})
        if series:
            views.append(_loss_view(name, what, series, look, many))
    pairs = {m: over_seeds(_differences(own, found)) for m, own in runs.items() if m != found.baseline}
    if _present(pairs):
        views.insert(1, _difference_view(found.baseline, _present(pairs), look, many))
    return views


def _present(series: dict[str, Series]) -> dict[str, Series]:
    return {mechanism: points for mechanism, points in series.items() if points}


def _loss_view(name: str, what: str, series: dict[str, Series], look: dict[str, Look], many: bool) -> View:
    band = "one seed per mechanism, so no band: how much of a gap is luck cannot be seen"
    if many:
        band = "the line is the mean over seeds, the band reaches from the lowest seed to the highest"
    caption = (
        f"{what}, lower is better: {band}. "
        "The axis leaves out the first quarter of training; with a mouse, double-click to see all."
    )
    y = {"title": {"text": f"{name.lower()} loss (nats per token)"}, "range": _range(series)}
    x = steps_axis(series, late=True)
    return View(name, caption, figure(bands(series, look, ":.4f"), x, y, hovermode="x unified"))


def _difference_view(base: str, series: dict[str, Series], look: dict[str, Look], many: bool) -> View:
    caption = f"Validation loss minus that of {base} at the same step and seed; below zero is better than {base}. "
    caption += "Line: mean of the pairs; band: lowest to highest pair." if many else "One pair each, so no band."
    y: dict[str, Any] = {"title": {"text": f"difference to {plain(base)} (nats per token)"}, "tickformat": "+.2f"}
    y |= {"range": _range(series), "zeroline": True, "zerolinecolor": MUTED[0], "zerolinewidth": 1}
    drawn = figure(bands(series, look, ":+.4f"), steps_axis(series), y, hovermode="x unified")
    return View(f"Difference to {base}", caption, drawn)


def _differences(own: list[RunResult], found: Findings) -> list[list[list[float]]]:
    """Return each run's curve minus that of the baseline with its seed."""
    return [_minus(c, b) for c in own for b in found.done(found.baseline) if b.seed == c.seed]


def _minus(cell: RunResult, base: RunResult) -> list[list[float]]:
    mine = _known(cell.curve)
    theirs = _known(base.curve)
    return [[step, mine[step] - theirs[step]] for step in mine if step in theirs]


def _known(curve: list[list[float | None]]) -> dict[float, float]:
    """Return the losses that are numbers, by step."""
    return {step: value for step, value in curve if step is not None and value is not None}


def _range(series: dict[str, Series]) -> list[float]:
    """Return the lowest and highest loss after the first quarter of training, with a margin."""
    last = max(s[-1][0] for s in series.values())
    late = [point for s in series.values() for point in s if point[0] >= last / 4]
    low = min(p[2] for p in late)
    high = max(p[3] for p in late)
    margin = 0.04 * (high - low) or 0.01
    return [low - margin, high + margin]
