"""Heads of the trained models: when they emerge, where they are, what they cause, what their layers remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from ...errors import need
from ...formatting import about_signs, remembered
from ..figures import Series, View, bands, figure, over_seeds, plain, steps_axis
from ..html import Html, table
from ..results_folder import Findings
from ..style import DASHES, MARKERS, MUTED, Look
from .common import Figures, frame, named, plot

Heads = dict[str, Any]  # one entry of heads.json
SCORES = {
    "induction": "share of attention on the token that followed an earlier copy of this one",
    "previous token": "share of attention on the token before",
    "copying": "share of the vocabulary that a head raises less than the token it reads; 0.5 by chance",
}


PATH_SYMBOLS = ("circle", "square", "diamond", "cross")
MARKED = " (above both nulls)"
HEAD = [
    "mechanism",
    "seeds",
    "induction",
    "marked heads",
    "previous token",
    "gain on the repeat, nats",
    "worst ablation, nats",
]


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section, and add its figure to `drawn`; empty where the comparison looked into no heads."""
    if not found.heads:
        return Html("")
    drawn["inside"] = [*_emergence(found, look), *_scores(found), *_causes(found, look)]
    drawn["inside"] += [*_latents(found), *_ranks(found, look), *_gates(found, look), *_reach(found, look)]
    rows = [_row(mechanism, own, look) for mechanism, own in _by_mechanism(found).items()]
    return frame(
        "inside",
        "Inside the heads",
        plot(drawn["inside"], "inside", "What the heads do"),
        table(_note(found), HEAD, rows),
        _memories(found),
    )


def _row(mechanism: str, own: list[Heads], look: dict[str, Look]) -> list[Any]:
    marked = [sum(map(sum, e["scores"]["marked"]["induction"])) for e in own]
    ablations = [e["ablation"] for e in own if "ablation" in e]
    return [
        named(mechanism, look),
        str(len(own)),
        _mean_range([_strongest(e, "induction") for e in own]),
        _mean_range([float(m) for m in marked], ".1f"),
        _mean_range([_strongest(e, "previous token") for e in own]),
        _mean_range([ablation["first_half"] - ablation["second_half"] for ablation in ablations]),
        _mean_range([max(map(max, ablation["change"])) for ablation in ablations]),
    ]


def _note(found: Findings) -> str:
    scored = found.heads[0]["scores"]
    note = (
        f"Means over seeds, lowest to highest in brackets. {scored['sequences']} sequences of random tokens a length: "
        f"a segment of {', '.join(map(str, scored['segments']))} tokens and its repeat. A head counts as marked where "
        "its score is above that of the same places in sequences without a repeat, and above an untrained model's, at "
        f"{scored['alpha']} after Holm's correction over all heads and scores."
    )
    if signed := sorted({name for entry in found.heads for name in entry.get("signed", ())}):
        note += f" {about_signs(signed)}"
    if any("emergence" in entry for entry in found.heads):
        return note
    return note + (
        " There are no curves over training, because the runs kept no checkpoints: --train.keep 0 keeps them, and "
        "--train.save-every says how many."
    )


def _memories(found: Findings) -> Html | None:
    titles, rows = remembered([layer for _, layer in _layers(found)])
    if not rows:
        return None
    caption = (
        "What each layer remembers, first seed, while it reads random tokens. Apart: mean principal angle between the "
        "subspaces of different heads, 90° where they share nothing. Top-k found: the share of what dense attention "
        "would look at most that the indexer selects. Gate: the weight of each memory. Load: the share of the least "
        "and the most used expert."
    )
    return table(caption, titles, rows, left=2)


def _mean_range(values: list[float], digits: str = ".2f") -> str:
    if not values:
        return "–"
    return f"{fmean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def _strongest(entry: Heads, score: str) -> float:
    """Return the score of the head that has most of it."""
    return max(value for row in entry["scores"]["scores"][score] for value in row)


def _by_mechanism(found: Findings) -> dict[str, list[Heads]]:
    """Return the entries of each mechanism that has some, one per seed."""
    return {m: own for m in found.mechanisms if (own := [e for e in found.heads if e["mechanism"] == m])}


def _layers(found: Findings) -> list[tuple[str, Heads]]:
    """Return (mechanism, what the layer remembers) for each layer of the first seeds."""
    first = {mechanism: own[0] for mechanism, own in _by_mechanism(found).items()}
    return [(mechanism, layer) for mechanism, entry in first.items() for layer in entry.get("inside", ())]


def _emergence(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return curves over training, with a band from the lowest seed to the highest."""
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
    trained = {m: [e["emergence"] for e in own if "emergence" in e] for m, own in _by_mechanism(found).items()}
    views = []
    for name, (label, value, meaning) in curves.items():
        lines = {m: over_seeds([_line(curve, value) for curve in own]) for m, own in trained.items()}
        series: dict[str, Series] = {m: line for m, line in lines.items() if line}
        if series:
            caption = (
                f"{label[0].upper()}{label[1:]} at every checkpoint: {meaning}. "
                "Line: mean over seeds; band: lowest to highest."
            )
            y = {"title": {"text": label}}
            drawn = figure(bands(series, look, ":.3f"), steps_axis(series), y, hovermode="x unified")
            views.append(View(f"When: {name}", caption, drawn))
    return views


def _best(score: str) -> Callable[[Heads, int], float]:
    return lambda curve, i: max(value for row in curve["scores"][score][i] for value in row)


def _line(curve: Heads, value: Callable[[Heads, int], float]) -> list[list[float]]:
    return [[step, value(curve, i)] for i, step in enumerate(curve["steps"])]


def _scores(found: Findings) -> list[View]:
    """Return heat maps, one view per score: every head of every layer of each mechanism's first seed."""
    first = {m: own[0] for m, own in _by_mechanism(found).items()}
    seed = next(iter(first.values()))["seed"]
    views = []
    for score, meaning in SCORES.items():
        trace, rows = _score_map(score, first)
        x = {"title": {"text": "head"}, "type": "category", "showgrid": False}
        y = {"title": {"text": ""}, "autorange": "reversed", "showgrid": False}
        drawn = figure([trace], x, y, height=max(320, 60 + 24 * rows))
        caption = f"{score.capitalize()}: {meaning}. One cell per head, of seed {seed}."
        views.append(View(f"Where: {score}", caption, drawn))
    return views


def _score_map(score: str, first: dict[str, Heads]) -> tuple[Any, int]:
    """Return the heat map of one score, and its number of rows: a row per mechanism and layer, a column per head."""
    go = need("plotly.graph_objects", "report")
    rows = []
    labels = []
    hover = []
    width = max(len(row) for entry in first.values() for row in entry["scores"]["scores"][score])
    for mechanism, entry in first.items():
        marks = entry["scores"]["marked"].get(score)
        for layer, row in enumerate(entry["scores"]["scores"][score]):
            where = f"{mechanism}, layer {layer + 1}"
            said = [plain(f"{where}, head {head + 1}: {value:.3f}") for head, value in enumerate(row)]
            if marks:
                said = [text + (MARKED if mark else "") for text, mark in zip(said, marks[layer], strict=False)]
            missing = width - len(row)
            rows.append(row + [None] * missing)
            labels.append(plain(where))
            hover.append(said + [""] * missing)
    below = any(value is not None and value < 0 for row in rows for value in row)
    trace = go.Heatmap(
        z=rows,
        x=[str(head + 1) for head in range(width)],
        y=labels,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale="PuOr_r" if below else "Cividis",  # white in the middle where scores have signs
        zmin=-1 if below else 0,
        zmax=1,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "score", "font": {"size": 11}}, "thickness": 10, "outlinewidth": 0, "len": 0.8},
    )
    return trace, len(rows)


def _causes(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return the change of the loss without a head against its induction score: one point per head, all seeds."""
    lines = {m: [p for e in own if "ablation" in e for p in _heads(e)] for m, own in _by_mechanism(found).items()}
    traces = [_cause_points(mechanism, points, look[mechanism]) for mechanism, points in lines.items() if points]
    if not traces:
        return []
    y = {
        "title": {"text": "change of the loss on the repeat (nats per token)"},
        "zeroline": True,
        "zerolinecolor": MUTED[0],
    }
    caption = (
        "Pattern against cause: how much each head looks like an induction head, and how much worse the model predicts "
        "repeated tokens when what that head says is replaced by its mean."
    )
    return [View("Cause", caption, figure(traces, {"title": {"text": "induction score"}}, y))]


def _heads(entry: Heads) -> list[tuple[float, float, str]]:
    """Return (induction score, change of the loss without it, its name) for every head of an entry."""
    points = []
    for layer, row in enumerate(entry["scores"]["scores"]["induction"]):
        for head, value in enumerate(row):
            name = f"layer {layer + 1}, head {head + 1}, seed {entry['seed']}"
            points.append((value, entry["ablation"]["change"][layer][head], name))
    return points


def _cause_points(mechanism: str, points: list[tuple[float, float, str]], style: Look) -> Any:
    go = need("plotly.graph_objects", "report")
    return go.Scatter(
        x=[score for score, _, _ in points],
        y=[change for _, change, _ in points],
        mode="markers",
        name=plain(mechanism),
        legendgroup=mechanism,
        meta=mechanism,
        customdata=[name for _, _, name in points],
        marker={"symbol": style.marker, "size": 7, "color": style.color, "opacity": 0.75},
        hovertemplate=f"<b>{plain(mechanism)}</b>, %{{customdata}}<br>"
        "score %{x:.3f}, change %{y:+.3f}<extra></extra>",
    )


def _latents(found: Findings) -> list[View]:
    """Return the tokens of one sequence on the first two principal axes of each layer's latent, a view a mechanism."""
    views = []
    for mechanism, own in _by_mechanism(found).items():
        layers = [layer for layer in own[0].get("inside", ()) if layer["path"]]
        if not layers:
            continue
        traces = [_path(number, layer) for number, layer in enumerate(layers)]
        ranks = ", ".join(f"layer {x['layer'] + 1}: {x['effective_rank']:.1f} of {x['rank']}" for x in layers)
        caption = (
            f"Latents of {mechanism} while it reads a segment of random tokens and its repeat: each point a token, "
            f"a symbol per layer. Effective rank, {ranks}."
        )
        x, y = ({"title": {"text": f"principal axis {i} (units of the latent)"}} for i in (1, 2))
        views.append(View(f"Latents of {mechanism}", caption, figure(traces, x, y)))
    return views


def _path(number: int, layer: Heads) -> Any:
    """Return the line through the tokens of one layer. Layer `number` 0 of the figure brings the colour scale."""
    go = need("plotly.graph_objects", "report")
    path = layer["path"]
    return go.Scatter(
        x=[point[0] for point in path],
        y=[point[1] if len(point) > 1 else 0.0 for point in path],
        mode="lines+markers",
        marker={
            "size": 7,
            "color": list(range(len(path))),
            "colorscale": "Cividis",
            "showscale": number == 0,
            "colorbar": {"title": {"text": "position"}, "thickness": 10, "outlinewidth": 0, "len": 0.8},
            "symbol": PATH_SYMBOLS[number % len(PATH_SYMBOLS)],
        },
        line={"width": 0.6, "color": MUTED[0]},
        customdata=[f"layer {layer['layer'] + 1}, token {t + 1}" for t in range(len(path))],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _ranks(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return the share of a latent's variance that a smaller one would lose."""
    traces = []
    for mechanism, layer in _layers(found):
        left = layer["variance_left"]
        if left:
            traces.append(_layer_line(mechanism, layer, list(range(len(left))), left, look))
    if not traces:
        return []
    caption = (
        "Reconstruction against rank: the share of a latent's variance that its first principal axes leave out, while "
        "the model reads random tokens. One line per layer, of the first seed."
    )
    x = {"title": {"text": "principal axes kept"}}
    y = {"title": {"text": "share of variance left out"}, "range": [0, 1]}
    return [View("Rank", caption, figure(traces, x, y))]


def _gates(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return the weight of each memory by position: a view per mechanism, all layers of the first seed."""
    traces: dict[str, list[Any]] = {}
    for mechanism, layer in _layers(found):
        positions = list(range(1, len(layer["gate"]) + 1))
        for memory, weights in enumerate(zip(*layer["gate"], strict=True), 1):
            line = _layer_line(mechanism, layer, positions, list(weights), look, memory)
            traces.setdefault(mechanism, []).append(line)
    views = []
    for mechanism, own in traces.items():
        caption = (
            f"Gate of {mechanism}: how much the answer of each memory counts, mean over sequences of random tokens."
        )
        x = {"title": {"text": "position (tokens)"}}
        y = {"title": {"text": "weight"}, "range": [0, 1]}
        views.append(View(f"Gate of {mechanism}", caption, figure(own, x, y)))
    return views


def _reach(found: Findings, look: dict[str, Look]) -> list[View]:
    """Return the share of what an indexer selects, or a memory recalls, within each distance."""
    views = []
    for kind, unit, what in (
        ("selection_distance", "tokens", "the indexer selects tokens"),
        ("recalled_distance", "chunks", "recalled chunks lie, counted by their weight"),
    ):
        traces = [
            _layer_line(mechanism, layer, *shares_within(layer[kind]), look)
            for mechanism, layer in _layers(found)
            if layer[kind]
        ]
        if traces:
            caption = f"How far back {what}: the share of those that are no further away."
            x = {"title": {"text": f"distance ({unit})"}}
            y = {"title": {"text": "share within"}, "range": [0, 1.02]}
            views.append(View(f"Reach, {unit}", caption, figure(traces, x, y)))
    return views


def shares_within(bins: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return each bin's far end, and the share within it, from [[nearest distance, share], ...].

    Bins hold one distance below 16, and double from there on.
    """
    far = [nearest if nearest < 16 else 2 * nearest - 1 for nearest, _ in bins]
    return far, list(accumulate(share for _, share in bins))


def _layer_line(
    mechanism: str,
    layer: Heads,
    x: Sequence[float],
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
