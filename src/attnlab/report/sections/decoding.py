"""Decoding: time per token against tokens held."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from ...errors import need
from ...results import BenchRecord
from ..figures import View, figure, plain
from ..findings import Findings, number
from ..html import Html, tag
from ..style import MUTED, Look, veil
from .benchmarks import bench_table
from .common import Figures, frame, missing, plot


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
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
    """Time of one decoding step against the tokens held, with the contexts between which a mechanism's modes cross."""
    go = need("plotly.graph_objects", "report")
    lines = decode_lines(found)
    if not lines:
        return []
    traces, contexts, ceiling = [], set(), 0.0
    for (mechanism, label, mode), records in lines.items():
        style = look[mechanism]
        xs, ys = [r.context for r in records], [r.ms or 0.0 for r in records]
        ends = [
            (number(r.ms_spread[0]), number(r.ms_spread[1])) if len(r.ms_spread) == 2 else (r.ms, r.ms) for r in records
        ]
        up = [max(0.0, (high or y) - y) for (_, high), y in zip(ends, ys, strict=True)]
        down = [max(0.0, y - (low or y)) for (low, _), y in zip(ends, ys, strict=True)]
        contexts |= set(xs)
        ceiling = max(ceiling, *ys)
        second = mode == "expanded"
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                name=plain(label),
                legendgroup=label,
                meta=mechanism,
                mode="lines+markers",
                line={"color": style.color, "width": 2, "dash": "dot" if second else style.dash},
                marker={"symbol": style.marker + ("-open" if second else ""), "size": 8},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": up,
                    "arrayminus": down,
                    "thickness": 1,
                    "width": 3,
                },
                hovertemplate=f"<b>{plain(label)}</b><br>%{{y:.3g}} ms with %{{x:,d}} tokens held<extra></extra>",
            )
        )
    notes = crossings(found)
    bands = [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": note.between[0],
            "x1": note.between[1],
            "y0": 0,
            "y1": 1,
            "fillcolor": veil(look[note.mechanism].color, 0.07),
            "line": {"width": 0},
            "layer": "below",
            "label": {
                "text": f"{plain(note.mechanism)} crossover",
                "textposition": "top center",
                "font": {"size": 11, "color": MUTED[0]},
            },
        }
        for note in notes
        if note.between
    ]
    ticks = sorted(contexts)
    x = {
        "title": {"text": "tokens held (log scale)"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{t:,}" for t in ticks],
    }
    x |= {"range": [math.log10(min(ticks)) - 0.06, math.log10(max(ticks)) + 0.06]}
    caption = (
        "Median time to decode one token for the whole batch after a warm-up, lower is better; bars reach from the "
        "fastest repeat to the slowest."
    )
    caption += "".join(f" {note.sentence}" for note in notes)
    y = {"title": {"text": "time per step (ms)"}, "rangemode": "tozero"}
    return [View("Decode", caption, figure(traces, x, y, shapes=bands))]


def decode_lines(found: Findings) -> dict[tuple[str, str, str], list[BenchRecord]]:
    """(mechanism, label, mode) -> records by context. The label names what tells a mechanism's lines apart."""
    records = [r for r in found.bench if r.kind == "decode" and number(r.ms) is not None]
    grouped: dict[tuple[str, ...], list[BenchRecord]] = defaultdict(list)
    for record in records:
        grouped[
            record.mechanism, record.mode, record.impl, record.dtype, f"batch {record.batch}", record.device
        ].append(record)
    varied = [i for i in range(2, 6) if len({key[i] for key in grouped}) > 1]
    return {
        (key[0], " ".join([key[0], *filter(None, [key[1]]), *(key[i] for i in varied)]), key[1]): sorted(
            own, key=lambda r: r.context
        )
        for key, own in grouped.items()
    }


@dataclass(frozen=True)
class Crossing:
    """Where two forms of a mechanism cross: between two measured contexts, or nowhere (None)."""

    mechanism: str
    sentence: str
    between: tuple[int, int] | None


def crossings(found: Findings) -> list[Crossing]:
    """Every change of the faster form of a mechanism that was measured both expanded and absorbed."""
    lines, notes = decode_lines(found), []
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
