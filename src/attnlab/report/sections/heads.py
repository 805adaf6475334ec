"""What heads became, in figures: emergence over training, scores of every head, cause beside pattern, latent paths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from statistics import fmean
from typing import Any

from ...errors import need
from ...formatting import remembered
from ..figures import Series, View, bands, figure, over_seeds, plain, steps_axis
from ..findings import Findings
from ..html import Html, table
from ..style import DASHES, MARKERS, MUTED, Look
from .common import Figures, frame, named, plot

Heads = dict[str, Any]  # one entry of heads.json
SCORES = {
    "induction": "share of attention on the token that followed an earlier copy of this one",
    "previous token": "share of attention on the token before",
    "copying": "share of the vocabulary that a head raises less than the token it reads; 0.5 by chance",
}


def strongest(entry: Heads, score: str) -> float:
    """The score of the head that has most of it."""
    return max(value for row in entry["scores"]["scores"][score] for value in row)


def by_mechanism(found: Findings) -> dict[str, list[Heads]]:
    return {m: own for m in found.mechanisms if (own := [e for e in found.heads if e["mechanism"] == m])}


def emergence(found: Findings, look: dict[str, Look]) -> list[View]:
    """Curves over training, a band from the lowest seed to the highest."""
    curves: dict[str, tuple[str, Callable[[Heads, int], float], str]] = {
        "induction": ("induction score of the strongest head", _best("induction"), "reaches 1 where one head does it"),
        "previous token": (
            "previous-token score of the strongest head",
            _best("previous token"),
            "a head of this kind comes first, because induction reads what it wrote",
        ),
        "gain": (
            "loss before the repeat minus loss on it (nats per token)",
            lambda curve, i: curve["first_half"][i] - curve["second_half"][i],
            "above 0, the model predicts the repeat of random tokens better than the tokens themselves",
        ),
    }
    views = []
    for name, (label, value, meaning) in curves.items():
        lines = {
            m: [_line(e["emergence"], value) for e in own if "emergence" in e] for m, own in by_mechanism(found).items()
        }
        series: dict[str, Series] = {m: s for m, own in lines.items() if (s := over_seeds(own))}
        if series:
            caption = (
                f"{label[0].upper()}{label[1:]} at every checkpoint: {meaning}. "
                "Line: mean over seeds; band: lowest to highest."
            )
            drawn = figure(
                bands(series, look, ":.3f"), steps_axis(series), {"title": {"text": label}}, hovermode="x unified"
            )
            views.append(View(f"When: {name}", caption, drawn))
    return views


def _best(score: str) -> Callable[[Heads, int], float]:
    return lambda curve, i: max(value for row in curve["scores"][score][i] for value in row)


def _line(curve: Heads, value: Callable[[Heads, int], float]) -> list[list[float]]:
    return [[step, value(curve, i)] for i, step in enumerate(curve["steps"])]


def scores(found: Findings) -> list[View]:
    """Every head of every layer of each mechanism's first seed as a heat map, one view per score."""
    go = need("plotly.graph_objects", "report")
    first = {m: own[0] for m, own in by_mechanism(found).items()}
    views = []
    for score, meaning in SCORES.items():
        rows, labels, hover = [], [], []
        width = max(len(row) for entry in first.values() for row in entry["scores"]["scores"][score])
        for mechanism, entry in first.items():
            marks = entry["scores"]["marked"].get(score)
            for layer, row in enumerate(entry["scores"]["scores"][score]):
                rows.append(row + [None] * (width - len(row)))
                labels.append(plain(f"{mechanism}, layer {layer + 1}"))
                hover.append(
                    [
                        plain(f"{mechanism}, layer {layer + 1}, head {head + 1}: {value:.3f}")
                        + (" (above both nulls)" if marks and marks[layer][head] else "")
                        for head, value in enumerate(row)
                    ]
                    + [""] * (width - len(row))
                )
        trace = go.Heatmap(
            z=rows,
            x=[str(head + 1) for head in range(width)],
            y=labels,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Cividis",
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "score", "font": {"size": 11}}, "thickness": 10, "outlinewidth": 0, "len": 0.8},
        )
        y = {"title": {"text": ""}, "autorange": "reversed", "showgrid": False}
        drawn = figure(
            [trace],
            {"title": {"text": "head"}, "type": "category", "showgrid": False},
            y,
            height=max(320, 60 + 24 * len(rows)),
        )
        seed = next(iter(first.values()))["seed"]
        views.append(
            View(f"Where: {score}", f"{score.capitalize()}: {meaning}. One cell per head, of seed {seed}.", drawn)
        )
    return views


def causes(found: Findings, look: dict[str, Look]) -> list[View]:
    """Does a head that looks like an induction head also matter? One point per head, all seeds."""
    go = need("plotly.graph_objects", "report")
    traces = []
    for mechanism, own in by_mechanism(found).items():
        places = [
            (
                value,
                entry["ablation"]["change"][layer][head],
                f"layer {layer + 1}, head {head + 1}, seed {entry['seed']}",
            )
            for entry in own
            if "ablation" in entry
            for layer, row in enumerate(entry["scores"]["scores"]["induction"])
            for head, value in enumerate(row)
        ]
        if places:
            x, y, where = zip(*places, strict=True)
            style = look[mechanism]
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="markers",
                    name=plain(mechanism),
                    legendgroup=mechanism,
                    meta=mechanism,
                    customdata=where,
                    marker={"symbol": style.marker, "size": 7, "color": style.color, "opacity": 0.75},
                    hovertemplate=f"<b>{plain(mechanism)}</b>, %{{customdata}}<br>"
                    "score %{x:.3f}, change %{y:+.3f}<extra></extra>",
                )
            )
    if not traces:
        return []
    axis = {
        "title": {"text": "change of the loss on the repeat (nats per token)"},
        "zeroline": True,
        "zerolinecolor": MUTED[0],
    }
    caption = (
        "Pattern against cause: how much each head looks like an induction head, and how much worse the model predicts "
        "repeated tokens when what that head says is replaced by its mean."
    )
    return [View("Cause", caption, figure(traces, {"title": {"text": "induction score"}}, axis))]


def latents(found: Findings) -> list[View]:
    """Where the tokens of one sequence lie on the first two principal axes of each layer's latent."""
    go = need("plotly.graph_objects", "report")
    views = []
    for mechanism, own in by_mechanism(found).items():
        layers = [layer for layer in own[0].get("inside", ()) if layer["path"]]
        traces = [
            go.Scatter(
                x=[point[0] for point in layer["path"]],
                y=[point[1] if len(point) > 1 else 0.0 for point in layer["path"]],
                mode="lines+markers",
                marker={
                    "size": 7,
                    "color": list(range(len(layer["path"]))),
                    "colorscale": "Cividis",
                    "showscale": number == 0,
                    "colorbar": {"title": {"text": "position"}, "thickness": 10, "outlinewidth": 0, "len": 0.8},
                    "symbol": ("circle", "square", "diamond", "cross")[number % 4],
                },
                line={"width": 0.6, "color": MUTED[0]},
                customdata=[f"layer {layer['layer'] + 1}, token {t + 1}" for t in range(len(layer["path"]))],
                hovertemplate="%{customdata}<extra></extra>",
            )
            for number, layer in enumerate(layers)
        ]
        if traces:
            ranks = ", ".join(f"layer {x['layer'] + 1}: {x['effective_rank']:.1f} of {x['rank']}" for x in layers)
            caption = (
                f"Latents of {mechanism} while it reads a segment of random tokens and its repeat: each point a token, "
                f"a symbol per layer. Effective rank, {ranks}."
            )
            x, y = ({"title": {"text": f"principal axis {i} (units of the latent)"}} for i in (1, 2))
            views.append(View(f"Latents of {mechanism}", caption, figure(traces, x, y)))
    return views


def ranks(found: Findings, look: dict[str, Look]) -> list[View]:
    """How much of a latent a smaller one could hold."""
    traces = [
        _layer_line(mechanism, layer, list(range(len(layer["variance_left"]))), layer["variance_left"], look)
        for mechanism, own in by_mechanism(found).items()
        for layer in own[0].get("inside", ())
        if layer["variance_left"]
    ]
    caption = (
        "Reconstruction against rank: the share of a latent's variance that its first principal axes leave out, while "
        "the model reads random tokens. One line per layer, of the first seed."
    )
    y = {"title": {"text": "share of variance left out"}, "range": [0, 1]}
    return [View("Rank", caption, figure(traces, {"title": {"text": "principal axes kept"}}, y))] if traces else []


def gates(found: Findings, look: dict[str, Look]) -> list[View]:
    """How much each memory counts, by position: a view per mechanism, all layers of the first seed."""
    views = []
    for mechanism, own in by_mechanism(found).items():
        layers = [layer for layer in own[0].get("inside", ()) if layer["gate"]]
        traces = [
            _layer_line(mechanism, layer, list(range(1, len(layer["gate"]) + 1)), list(weights), look, memory)
            for layer in layers
            for memory, weights in enumerate(zip(*layer["gate"], strict=True), 1)
        ]
        if traces:
            caption = (
                f"Gate of {mechanism}: how much the answer of each memory counts, mean over sequences of random tokens."
            )
            x, y = {"title": {"text": "position (tokens)"}}, {"title": {"text": "weight"}, "range": [0, 1]}
            views.append(View(f"Gate of {mechanism}", caption, figure(traces, x, y)))
    return views


def reach(found: Findings, look: dict[str, Look]) -> list[View]:
    """How far back what an indexer selects, or a memory recalls, lies."""
    views = []
    for kind, unit, what in (
        ("selection_distance", "tokens", "the indexer selects tokens"),
        ("recalled_distance", "chunks", "recalled chunks lie, counted by their weight"),
    ):
        traces = [
            _layer_line(mechanism, layer, *_within(layer[kind]), look)
            for mechanism, own in by_mechanism(found).items()
            for layer in own[0].get("inside", ())
            if layer[kind]
        ]
        if traces:
            caption = f"How far back {what}: the share of those that are no further away."
            x = {"title": {"text": f"distance ({unit})"}}
            views.append(
                View(
                    f"Reach, {unit}",
                    caption,
                    figure(traces, x, {"title": {"text": "share within"}, "range": [0, 1.02]}),
                )
            )
    return views


def _within(bins: list[list[float]]) -> tuple[list[float], list[float]]:
    """From [[nearest distance, share], ...], where bins double from 16 on: the share within each bin's far end."""
    far = [nearest if nearest < 16 else 2 * nearest - 1 for nearest, _ in bins]
    return far, list(accumulate(share for _, share in bins))


def _layer_line(
    mechanism: str,
    layer: Heads,
    x: list[float],
    y: list[float],
    look: dict[str, Look],
    memory: int | None = None,
) -> Any:
    go = need("plotly.graph_objects", "report")
    number, style = layer["layer"], look[mechanism]
    name = f"{mechanism}, layer {number + 1}" + ("" if memory is None else f", memory {memory}")
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        name=plain(name),
        legendgroup=name,
        meta=mechanism,
        line={"color": style.color, "width": 1.2, "dash": DASHES[((memory or 1) - 1) % len(DASHES)]},
        marker={"symbol": MARKERS[number % len(MARKERS)], "size": 4, "color": style.color},
        hovertemplate=f"{plain(name)}: %{{x}}, %{{y:.3f}}<extra></extra>",
    )


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    if not found.heads:  # only a comparison that was asked for it has it
        return Html("")
    drawn["inside"] = [*emergence(found, look), *scores(found), *causes(found, look)]
    drawn["inside"] += [*latents(found), *ranks(found, look), *gates(found, look), *reach(found, look)]
    rows = []
    for mechanism, own in by_mechanism(found).items():
        marked = [sum(m for row in e["scores"]["marked"]["induction"] for m in row) for e in own]
        gain = [e["ablation"]["first_half"] - e["ablation"]["second_half"] for e in own if "ablation" in e]
        effect = [max(c for row in e["ablation"]["change"] for c in row) for e in own if "ablation" in e]
        rows.append(
            [
                named(mechanism, look),
                str(len(own)),
                _mean_range([strongest(e, "induction") for e in own]),
                _mean_range([float(m) for m in marked], ".1f"),
                _mean_range([strongest(e, "previous token") for e in own]),
                _mean_range(gain),
                _mean_range(effect),
            ]
        )
    scored = found.heads[0]["scores"]
    note = (
        f"Means over seeds, lowest to highest in brackets. {scored['sequences']} sequences of random tokens a length: "
        f"a segment of {', '.join(map(str, scored['segments']))} tokens and its repeat. A head counts as marked where "
        "its score is above that of the same places in sequences without a repeat, and above an untrained model's, at "
        f"{scored['alpha']} after Holm's correction over all heads and scores."
    )
    if not any("emergence" in entry for entry in found.heads):
        note += (
            " There are no curves over training, because the runs kept no checkpoints: --train.keep 0 keeps them, and "
            "--train.save-every says how many."
        )
    head = [
        "mechanism",
        "seeds",
        "induction",
        "marked heads",
        "previous token",
        "gain on the repeat, nats",
        "worst ablation, nats",
    ]
    titles, own_rows = remembered([layer for own in by_mechanism(found).values() for layer in own[0].get("inside", ())])
    told = (
        "What each layer remembers, first seed, while it reads random tokens. Apart: mean principal angle between the "
        "subspaces of different heads, 90° where they share nothing. Top-k found: the share of what dense attention "
        "would look at most that the indexer selects. Gate: the weight of each memory. Load: the share of the least "
        "and the most used expert."
    )
    kept = table(told, titles, own_rows, left=2) if own_rows else None
    return frame(
        "inside",
        "Inside the heads",
        plot(drawn["inside"], "inside", "What the heads do"),
        table(note, head, rows),
        kept,
    )


def _mean_range(values: list[float], digits: str = ".2f") -> str:
    if not values:
        return "–"
    return f"{fmean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
