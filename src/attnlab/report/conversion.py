"""Pages of `attnlab convert` and `attnlab heal`: quality against cache, and recovery by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import need
from ..files import write_bytes
from ..formatting import loss, signed, size
from .figures import View, bytes_ticks, figure, plain
from .html import table, tag
from .page import document, plotly_script
from .sections import common
from .style import MARKERS, MUTED, PALETTE

SLOTS = (1, 2, 3, 4, 5, 6)  # colours that stay apart for colour-blind readers; each also has a marker and a dash
DASHES = ("solid", "dash", "dot", "dashdot", "solid", "dash")


def write_grid(path: Path, certificates: Sequence[Mapping[str, Any]], command: str = "") -> Path:
    """Write a page of quality against cache, and return its path.

    `certificates` are as in certificates.json; those of one target and method are a line. `command` made them.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for each in certificates:
        lines.setdefault(f"{each['target']}, {each['method']}", []).append(each)
    first = certificates[0]
    before = first["loss_before"]
    caption = (
        f"Loss on {first['tokens']:,} held-out tokens right after conversion, nothing trained since; the "
        "line across is the original. Further left, and lower, is better."
    )
    x = {"title": {"text": f"cache of one sequence of {first['context']:,} tokens (log scale)"}, "type": "log"}
    x |= bytes_ticks([float(c["cache_bytes_after"]) for c in certificates])
    y = {"title": {"text": "held-out loss (nats per token)"}}
    series = {name: sorted(map(_place, found)) for name, found in lines.items()}
    drawn = {"grid": [View("Quality", caption, figure(_lines(series, "%{x:,d} B"), x, y, shapes=[_level(before)]))]}
    rows = [_row(name, certificate) for name, found in lines.items() for certificate in found]
    head = ["target, method", "rank", "cache", "share", "loss", "change", "worst layer", "logits differ by"]
    note = (
        f"Held-out loss in nats per token, {loss(before)} before. Worst layer: |new - old| / |old| of an attention "
        "layer's output on what the original's layer reads."
    )
    body = [
        common.frame("quality", "Quality against cache", common.plot(drawn["grid"], "grid", caption)),
        common.frame("table", "Certificates", table(note, head, rows)),
        _reproduce(command),
    ]
    return _write(path, "Quality against cache", f"{first['source']} converted", body, drawn)


def _place(certificate: Mapping[str, Any]) -> tuple[float, float]:
    return float(certificate["cache_bytes_after"]), certificate["loss_after"]


def _row(name: str, certificate: Mapping[str, Any]) -> list[str]:
    c = certificate
    return [
        name,
        "" if c["rank"] is None else str(c["rank"]),
        size(c["cache_bytes_after"]),
        f"{c['cache_bytes_after'] / c['cache_bytes_before']:.3f}",
        loss(c["loss_after"]),
        signed(c["loss_after"] - c["loss_before"]),
        f"{max(c['layer_errors']):.4f}",
        "exact" if c["exact"] else f"{c['max_logit_difference']:.2g}",
    ]


def write_recovery(path: Path, found: Mapping[str, Any]) -> Path:
    """Write a page of validation loss by tokens, and return its path.

    `found` is as in recovery.json: {"curve": [[tokens, loss], ...], "original": loss or None, "name", "command"}.
    """
    curve = found["curve"]
    original = found["original"]
    caption = "Held-out loss by tokens of healing; token 0 is the converted model before any." + (
        " The line across is the original." if original is not None else ""
    )
    traces = _lines({found["name"]: [(float(tokens), value) for tokens, value in curve]}, "%{x:,d} tokens")
    x = {"title": {"text": "tokens of healing"}, "hoverformat": ",d"}
    y = {"title": {"text": "held-out loss (nats per token)"}}
    shapes = [] if original is None else [_level(original)]
    drawn = {"recovery": [View("Recovery", caption, figure(traces, x, y, shapes=shapes))]}
    rows = [
        [f"{tokens:,}", loss(value), signed(None if original is None else value - original)] for tokens, value in curve
    ]
    note = "Held-out loss in nats per token" + (
        f"; the original has {loss(original)}." if original is not None else "."
    )
    body = [
        common.frame("recovery", "Recovery", common.plot(drawn["recovery"], "recovery", caption)),
        common.frame("table", "By tokens", table(note, ["tokens", "loss", "above the original"], rows)),
        _reproduce(found["command"]),
    ]
    return _write(path, "Recovery by tokens", found["name"], body, drawn)


def _lines(series: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> list[Any]:
    go = need("plotly.graph_objects", "report")
    return [
        go.Scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            name=plain(name),
            legendgroup=name,
            mode="lines+markers",
            line={"color": PALETTE[SLOTS[i % len(SLOTS)]][0], "dash": DASHES[i % len(DASHES)], "width": 2},
            marker={"symbol": MARKERS[i % len(MARKERS)], "size": 8},
            hovertemplate=f"<b>{plain(name)}</b><br>%{{y:.4f}} nats at {unit}<extra></extra>",
        )
        for i, (name, points) in enumerate(series.items())
    ]


def _level(value: float) -> dict[str, Any]:
    line = {"color": MUTED[0], "width": 1, "dash": "dot"}
    label = {"text": "original", "textposition": "end", "font": {"size": 11, "color": MUTED[0]}}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line, "label": label}


def _reproduce(command: str) -> Any:
    return common.frame("again", "Run it again", tag("pre", tag("code", command or "attnlab convert")))


def _write(path: Path, title: str, about: str, body: list[Any], drawn: common.Figures) -> Path:
    header = tag("header", tag("p", "attnlab report · ", about, class_="eyebrow"), tag("h1", title))
    page = document(f"{title}, attnlab", header, body, drawn, plotly_script())
    return write_bytes(path, page.encode("utf-8", "replace"))
