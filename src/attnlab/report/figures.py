"""The figures, made with plotly in light colours; the page turns them dark. Pure functions of the findings."""

from __future__ import annotations

import html
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from ..errors import need
from ..formatting import size, words
from ..results import BenchRecord, RunResult
from .folder import Findings, Standing, number
from .look import GROUND, INK, MUTED, RULE, Look, veil

FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True)
class View:
    """One way to look at a figure: its button's name, how to read it, and the plotly figure as JSON."""

    name: str
    caption: str
    figure: dict[str, Any]


def figure(
    traces: list[Any], x: dict[str, Any], y: dict[str, Any], hovermode: str = "closest", **layout: Any
) -> dict[str, Any]:
    """Traces on two titled axes, with what all figures share."""
    go = need("plotly.graph_objects", "report")
    axis = {
        "gridcolor": RULE[0],
        "linecolor": RULE[0],
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": RULE[0],
        "ticklen": 4,
        "automargin": True,
        "title_standoff": 8,
        "title_font_size": 12,
        "tickfont_size": 11,
    }
    made = go.Figure(
        traces,
        go.Layout(
            template="none",
            showlegend=False,
            margin={"l": 56, "r": 14, "t": 10, "b": 44},
            paper_bgcolor=GROUND[0],
            plot_bgcolor="rgba(0,0,0,0)",
            font={"family": FONT, "size": 12, "color": MUTED[0]},
            hoverlabel={
                "bgcolor": GROUND[0],
                "bordercolor": RULE[0],
                "font": {"family": FONT, "color": INK[0], "size": 12},
                "align": "left",
            },
            xaxis=axis | x,
            yaxis=axis | y,
            hovermode=hovermode,
            **layout,
        ),
    )
    found: dict[str, Any] = json.loads(made.to_json())
    return found


def plain(text: str) -> str:
    """Text that plotly shows as it is: it would read tags."""
    return html.escape(text, quote=False)


# Loss curves


def curves(found: Findings, look: dict[str, Look]) -> list[View]:
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
        series = {m: _over_seeds([getattr(c, which) for c in found.done(m)]) for m in seeds}
        series = {m: s for m, s in series.items() if s}
        if not series:
            continue
        noun = "mean loss over the held-out windows" if which == "curve" else "loss on the batches it learns from"
        caption = (
            f"{noun[0].upper()}{noun[1:]}, lower is better: {band}. "
            "The axis leaves out the first quarter of training; with a mouse, double-click to see all."
        )
        y: dict[str, Any] = {"title": {"text": f"{name.lower()} loss (nats per token)"}, "range": _range(series)}
        traces = _bands(series, look, ":.4f")
        views.append(View(name, caption, figure(traces, _steps(series, late=True), y, hovermode="x unified")))
    base = found.done(found.baseline)
    pairs = {
        m: _over_seeds([_minus(c, b) for c in found.done(m) for b in base if b.seed == c.seed])
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
        drawn = figure(_bands(pairs, look, ":+.4f"), _steps(pairs), y, hovermode="x unified")
        views.insert(1, View(f"Difference to {found.baseline}", caption, drawn))
    return views


Series = list[tuple[float, float, float, float]]  # step, mean, lowest, highest


def _steps(series: dict[str, Series], *, late: bool = False) -> dict[str, Any]:
    """The axis of steps; `late` leaves out the first quarter, whose height would flatten the rest."""
    last = max(s[-1][0] for s in series.values())
    bounds = [last * (0.235 if late else -0.015), last * 1.015] if last else None
    return {"title": {"text": "training step"}, "showgrid": False, "hoverformat": ",d", "range": bounds}


def _over_seeds(lines: list[list[list[float]]]) -> Series:
    """Mean and range at the steps that every seed has."""
    if not lines:
        return []
    tables = [{step: y for step, value in line if (y := number(value)) is not None} for line in lines]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    columns = [(step, [t[step] for t in tables]) for step in steps]
    return [(step, fmean(values), min(values), max(values)) for step, values in columns]


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


def _bands(series: dict[str, Series], look: dict[str, Look], digits: str) -> list[Any]:
    go = need("plotly.graph_objects", "report")
    traces: list[Any] = []
    for mechanism, points in series.items():
        steps, means, lows, highs = (list(column) for column in zip(*points, strict=True))
        style = look[mechanism]
        shared = {"legendgroup": mechanism, "meta": mechanism}
        if lows != highs:
            traces.append(
                go.Scatter(
                    x=steps + steps[::-1],
                    y=highs + lows[::-1],
                    fill="toself",
                    fillcolor=style.band,
                    mode="lines",
                    line={"width": 0, "color": style.color},
                    hoverinfo="skip",
                    **shared,
                )
            )
        spread = f" (%{{customdata[0]{digits}}} to %{{customdata[1]{digits}}})" if lows != highs else ""
        traces.append(
            go.Scatter(
                x=steps,
                y=means,
                name=plain(mechanism),
                mode="lines+markers",
                customdata=list(zip(lows, highs, strict=True)),
                line={"color": style.color, "dash": style.dash, "width": 2},
                marker={"symbol": style.marker, "size": 6, "maxdisplayed": 6},
                hovertemplate=f"%{{y{digits}}}{spread}",
                **shared,
            )
        )
    return sorted(traces, key=lambda trace: trace.fill is None)


# Quality against cost


@dataclass(frozen=True)
class Point:
    mechanism: str
    x: float
    loss: float
    low: float
    high: float


def points(found: Findings, cost: dict[str, float | None]) -> list[Point]:
    """Where each mechanism stands: its cost, and its loss with the range over seeds."""
    placed = []
    for mechanism, x in cost.items():
        losses = [y for c in found.done(mechanism) if (y := number(c.val_loss)) is not None]
        if losses and x is not None:
            placed.append(Point(mechanism, x, fmean(losses), min(losses), max(losses)))
    return placed


def front(placed: list[Point], *, smaller: bool) -> list[Point]:
    """The points that no other beats on both axes, by rising x. `smaller`: less x is better; else more is."""
    best = math.inf
    kept: list[Point] = []
    for point in sorted(placed, key=lambda p: (p.x if smaller else -p.x, p.loss)):
        if point.loss < best:
            best, kept = point.loss, [*kept, point]
    return sorted(kept, key=lambda p: p.x)


def trade(found: Findings, look: dict[str, Look]) -> list[View]:
    """Loss against cache bytes, training speed, and decoding speed where it was measured."""
    views = []
    context = max((c.context for c in found.cells), default=0)
    caches = {m: found.mean(m, "cache_bytes") for m in found.mechanisms}
    none = [m for m, x in caches.items() if x == 0 and found.done(m)]
    held = points(found, {m: x for m, x in caches.items() if x})
    if held:
        note = (
            f" {words(none)} {'keeps' if len(none) == 1 else 'keep'} no cache, which this axis cannot show."
            if none
            else ""
        )
        views.append(
            _against(
                held,
                look,
                "Cache size",
                f"cache per sequence of {context:,} tokens (log scale)",
                True,
                note,
                {"type": "log", **_bytes_ticks([p.x for p in held])},
                ",.0f",
            )
        )
    speeds = points(found, {m: found.mean(m, "tokens_per_s") for m in found.mechanisms})
    if speeds:
        views.append(
            _against(speeds, look, "Training speed", "training speed (tokens per second)", False, "", {}, ",.0f")
        )
    decode = [r for r in found.bench if r.kind == "decode" and number(r.tokens_per_s) and found.done(r.mechanism)]
    if decode:
        longest = max(r.context for r in decode)
        fastest: dict[str, float | None] = {}
        for record in decode:
            if record.context == longest:
                fastest[record.mechanism] = max(fastest.get(record.mechanism) or 0.0, record.tokens_per_s or 0.0)
        note = " Where a mechanism has several ways to decode, the fastest one is shown."
        title = f"decoding speed with {longest:,} tokens held (tokens per second)"
        views.append(_against(points(found, fastest), look, "Decoding speed", title, False, note, {}, ",.0f"))
    return views


def _against(
    placed: list[Point],
    look: dict[str, Look],
    name: str,
    title: str,
    smaller: bool,
    note: str,
    axis: dict[str, Any],
    digits: str,
) -> View:
    go = need("plotly.graph_objects", "report")
    line = front(placed, smaller=smaller)
    best = f"{'left' if smaller else 'right'}, and lower"
    caption = (
        f"Further {best}, is better. Bars reach from the lowest seed to the highest. The stepped line is the Pareto "
        f"front: {words(p.mechanism for p in line)} {'is' if len(line) == 1 else 'are'} not beaten on both axes by any "
        f"other mean; where bars overlap, the order may be luck.{note}"
    )
    shape = "hv" if smaller else "vh"
    traces = [
        go.Scatter(
            x=[p.x for p in line],
            y=[p.loss for p in line],
            mode="lines",
            hoverinfo="skip",
            name="Pareto front",
            line={"color": MUTED[0], "width": 1, "shape": shape, "dash": "dot"},
        )
    ]
    for point, place in zip(placed, _places(placed, bool(axis)), strict=True):
        style = look[point.mechanism]
        shown = size(point.x) if smaller else f"{point.x:,.0f} tokens/s"
        error = {
            "array": [point.high - point.loss],
            "arrayminus": [point.loss - point.low],
            "thickness": 1.2,
            "width": 3,
        }
        traces.append(
            go.Scatter(
                x=[point.x],
                y=[point.loss],
                mode="markers+text",
                name=plain(point.mechanism),
                text=[plain(point.mechanism)],
                textposition=place,
                textfont={"color": INK[0], "size": 12},
                cliponaxis=False,
                marker={"symbol": style.marker, "size": 11, "color": style.color},
                error_y={"type": "data", "symmetric": False, "color": style.color} | error
                if point.high > point.low
                else None,
                hovertemplate=f"<b>{plain(point.mechanism)}</b><br>loss {point.loss:.4f} "
                f"({point.low:.4f} to {point.high:.4f})<br>{shown}<extra></extra>",
                legendgroup=point.mechanism,
                meta=point.mechanism,
            )
        )
    x = {"title": {"text": title}} | axis
    if not axis:
        low, high = min(p.x for p in placed), max(p.x for p in placed)
        room = 0.12 * (high - low) or 0.1 * high
        x |= {"range": [max(0.0, low - room), high + room], "tickformat": "~s", "nticks": 7}
    return View(name, caption, figure(traces, x, {"title": {"text": "validation loss (nats per token)"}}))


def _places(placed: list[Point], log: bool) -> list[str]:
    """Where each label goes: to the right, or to another side of its point where a neighbour's would lie."""
    across = [math.log(p.x) if log else p.x for p in placed]
    width = (max(across) - min(across)) or 1.0
    height = (max(p.high for p in placed) - min(p.low for p in placed)) or 1.0
    chosen: list[str] = []
    sides = {
        "top right": (0.07, 0.06),
        "bottom right": (0.07, -0.06),
        "middle left": (-0.09, 0.0),
        "middle right": (0.09, 0.0),
    }
    spots: list[tuple[float, float]] = [(x / width, p.loss / height) for x, p in zip(across, placed, strict=True)]
    labels: list[tuple[float, float]] = []
    for index, (x, y) in enumerate(spots):
        others = [*labels, *(spot for i, spot in enumerate(spots) if i != index)]

        def crowd(side: str, x: float = x, y: float = y, others: list[tuple[float, float]] = others) -> float:
            dx, dy = sides[side]
            room = x - min(across) / width if dx < 0 else max(across) / width - x
            near = sum(max(0.0, 1 - abs(x + dx - a) / 0.14) * max(0.0, 1 - abs(y + dy - b) / 0.07) for a, b in others)
            return near + (0.2 if room < 0.06 else 0.0)

        side = min(sides, key=crowd)
        labels.append((x + sides[side][0], y + sides[side][1]))
        chosen.append(side)
    return chosen


def _bytes_ticks(values: list[float]) -> dict[str, Any]:
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    ticks = [2**i for i in range(low, high + 1, max(1, (high - low) // 6))]
    pad = 0.25 * math.log10(2)
    bounds = [math.log10(min(values)) - pad, math.log10(max(values)) + 3 * pad]
    return {"tickvals": ticks, "ticktext": [size(tick) for tick in ticks], "range": bounds}


# Decoding


def decoding(found: Findings, look: dict[str, Look]) -> list[View]:
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


# Attention maps: the page fills this in


def attention() -> dict[str, Any]:
    """A heat map without data. Colour follows the square root of the weight, so that faint attention can be seen."""
    go = need("plotly.graph_objects", "report")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    trace = go.Heatmap(
        z=[[0]],
        zmin=0,
        zmax=1,
        xgap=0,
        ygap=0,
        hoverongaps=False,
        hovertemplate="%{customdata}<extra></extra>",
        colorbar={
            "title": {"text": "weight", "font": {"size": 11}},
            "tickvals": [math.sqrt(t) for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
            "thickness": 10,
            "outlinewidth": 0,
            "len": 0.8,
            "tickfont": {"size": 10},
        },
    )
    plain_axis = {"showgrid": False, "ticks": "", "tickfont_size": 10, "linecolor": "rgba(0,0,0,0)"}
    x = plain_axis | {"title": {"text": "token looked at (key)"}, "side": "bottom", "constrain": "domain"}
    y = plain_axis | {"title": {"text": "token that looks (query)"}, "autorange": "reversed", "scaleanchor": "x"}
    return figure([trace], x, y | {"constrain": "domain"})


def standing_scale(standings: list[Standing]) -> float:
    """Half the width of the little interval plots: every difference fits, a wide interval may be cut."""
    differences = [abs(s.difference) for s in standings if s.difference is not None]
    ends = sorted(abs(end) for s in standings for end in s.interval or ())
    return max([0.002, *(1.3 * d for d in differences), *(ends[: max(1, 3 * len(ends) // 4)])])
