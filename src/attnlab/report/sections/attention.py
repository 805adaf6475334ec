"""Attention maps of one text, which the page's script draws."""

from __future__ import annotations

import math
from typing import Any

from ...errors import need
from ..figures import figure
from ..html import Html, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, frame, missing


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; the page's script draws the maps from `page_data`."""
    if not found.attention:
        return frame("attention", "Attention maps", missing(found, "attention.json", "No attention map here"))
    pickers = [
        tag("label", name, tag("select", id=f"pick-{name}", aria_label=f"{name} of the attention map"))
        for name in ("mechanism", "layer", "head", "show")
    ]
    return frame(
        "attention",
        "Attention maps",
        tag("div", pickers, class_="pickers"),
        tag(
            "figure",
            tag(
                "div",
                tag(
                    "div",
                    class_="plot square",
                    id="plot-attention",
                    role="img",
                    aria_label="Attention weights: queries down, keys across",
                ),
                tag(
                    "div",
                    class_="heads",
                    id="heads",
                    role="group",
                    aria_label="All heads of this mechanism, layers down",
                ),
                class_="beside",
            ),
            tag("p", id="reading", class_="reading", aria_live="off"),
            tag(
                "figcaption",
                "Each row is a token that looks, each column a token it looks at; a row sums to 1, and colour follows "
                "the square root of the weight. Times value: each weight times the length of what that token's value "
                "adds to the residual stream, rows scaled to 1 again; not for mechanisms whose keys are more than one "
                "token's. Point at a row, or tap it, to see below how that token reads the text. "
                "The small maps are all "
                "heads, one row per layer: choose one.",
            ),
        ),
    )


def page_data(found: Findings) -> dict[str, Any]:
    """Return what the page's script draws: "attention", every map, and "map", the figure that it fills in or None."""
    return {
        "attention": [vars(maps) for maps in found.attention],
        "map": map_figure() if found.attention else None,
    }


def map_figure() -> dict[str, Any]:
    """Return a heat map without data. Colour follows the square root of the weight, so that faint weights show."""
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
