"""Decoding time per token, against tokens held."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...errors import need
from ...results import BenchRecord
from ..figures import View, error_bars, figure, plain
from ..html import Html, tag
from ..results_folder import Findings, finite_number
from ..style import MUTED, Look, veil
from .benchmarks import bench_table
from .common import Figures, frame, missing, plot


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figure to `drawn`."""
    views = decoding_views(found, look)
    if not views:
        return frame("decoding", "Decoding", missing(found, "bench.json", "No decoding time was measured here"))
    drawn["decoding"] = views
    records = [r for r in found.bench if r.kind == "decode"]
    return frame(
        "decoding",
        "Decoding",
        plot(views, "decoding", "Time per decoding step against tokens held, one line per mechanism and form"),
        tag(
            "details",
            tag("summary", "All decoding measurements"),
            bench_table(
                records,
                look,
                "One token for each sequence of the batch: the median of interleaved repeats after a warm-up.",
            ),
        ),
    )


def decoding_views(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return the time of one decoding step against the tokens held, with the contexts between which forms cross."""
    lines = decode_lines(found)
    if not lines:
        return []
    traces = [_trace(line, records, look[line[0]]) for line, records in lines.items()]
    notes = crossings(found)
    caption = (
        "Median time to decode one token for the whole batch after a warm-up, lower is better; bars reach from the "
        "fastest repeat to the slowest."
    )
    caption += "".join(f" {note.sentence}" for note in notes)
    shaded = [_shaded(note.mechanism, note.between, look) for note in notes if note.between]
    x = _axis(sorted({r.context for records in lines.values() for r in records}))
    y = {"title": {"text": "time per step (ms)"}, "rangemode": "tozero"}
    return [View("Decode", caption, figure(traces, x, y, shapes=shaded))]


def _trace(line: tuple[str, str, str], records: list[BenchRecord], style: Look) -> Any:
    go = need("plotly.graph_objects", "report")
    mechanism, label, mode = line
    second = mode == "expanded"
    ms = [r.ms or 0.0 for r in records]
    ends = [_ends(r) for r in records]
    return go.Scatter(
        x=[r.context for r in records],
        y=ms,
        name=plain(label),
        legendgroup=label,
        meta=mechanism,
        mode="lines+markers",
        line={"color": style.color, "width": 2, "dash": "dot" if second else style.dash},
        marker={"symbol": style.marker + ("-open" if second else ""), "size": 8},
        error_y=error_bars(
            [max(0.0, high - y) for (_, high), y in zip(ends, ms, strict=True)],
            [max(0.0, y - low) for (low, _), y in zip(ends, ms, strict=True)],
        ),
        hovertemplate=f"<b>{plain(label)}</b><br>%{{y:.3g}} ms with %{{x:,d}} tokens held<extra></extra>",
    )


def _ends(record: BenchRecord) -> tuple[float, float]:
    """Return the fastest and the slowest repeat in ms; the median where one is missing."""
    median = record.ms or 0.0
    if len(record.ms_spread) != 2:
        return median, median
    fastest, slowest = record.ms_spread
    return finite_number(fastest) or median, finite_number(slowest) or median


def _shaded(mechanism: str, between: tuple[int, int], look: dict[str, Look]) -> dict[str, Any]:
    label = {
        "text": f"{plain(mechanism)} crossover",
        "textposition": "top center",
        "font": {"size": 11, "color": MUTED[0]},
    }
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": between[0],
        "x1": between[1],
        "y0": 0,
        "y1": 1,
        "fillcolor": veil(look[mechanism].color, 0.07),
        "line": {"width": 0},
        "layer": "below",
        "label": label,
    }


def _axis(contexts: list[int]) -> dict[str, Any]:
    return {
        "title": {"text": "tokens held (log scale)"},
        "type": "log",
        "tickvals": contexts,
        "ticktext": [f"{t:,}" for t in contexts],
        "range": [math.log10(min(contexts)) - 0.06, math.log10(max(contexts)) + 0.06],
    }


def decode_lines(found: Findings) -> dict[tuple[str, str, str], list[BenchRecord]]:
    """Return (mechanism, label, mode) -> records by context. The label names what tells a mechanism's lines apart."""
    records = [r for r in found.bench if r.kind == "decode" and finite_number(r.ms) is not None]
    grouped: dict[tuple[str, str, tuple[str, ...]], list[BenchRecord]] = defaultdict(list)
    for r in records:
        grouped[r.mechanism, r.mode, (r.impl, r.dtype, f"batch {r.batch}", r.device)].append(r)
    columns = list(zip(*(settings for _, _, settings in grouped), strict=True))
    varied = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    lines = {}
    for (mechanism, mode, settings), own in grouped.items():
        label = " ".join([mechanism, *filter(None, [mode]), *(settings[i] for i in varied)])
        lines[mechanism, label, mode] = sorted(own, key=lambda r: r.context)
    return lines


@dataclass(frozen=True)
class Crossing:
    """A change of the faster form of a mechanism."""

    mechanism: str
    sentence: str
    between: tuple[int, int] | None  # two measured contexts; None: one form is faster at all of them


def crossings(found: Findings) -> list[Crossing]:
    """Return every change of the faster form of a mechanism that was measured both expanded and absorbed."""
    lines = decode_lines(found)
    notes = []
    for (mechanism, label, mode), records in lines.items():
        if mode != "expanded":
            continue
        other = (mechanism, label.replace(" expanded", " absorbed", 1), "absorbed")
        absorbed = {r.context: r.ms or 0.0 for r in lines.get(other, [])}
        gaps = [(r.context, (r.ms or 0.0) - absorbed[r.context]) for r in records if r.context in absorbed]
        changes = [(a, b, gap > 0) for (a, before), (b, gap) in pairwise(gaps) if (before > 0) != (gap > 0)]
        for low, high, wins in changes:
            faster = "absorbed" if wins else "expanded"
            sentence = f"{mechanism}: {faster} becomes the faster form between {low:,} and {high:,} tokens (shaded)."
            notes.append(Crossing(mechanism, sentence, (low, high)))
        if gaps and not changes:
            faster = "absorbed" if gaps[0][1] > 0 else "expanded"
            notes.append(
                Crossing(mechanism, f"{mechanism}: the {faster} form is faster at every context measured.", None)
            )
    return notes
