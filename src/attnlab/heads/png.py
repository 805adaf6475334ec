"""PNG figures of `attnlab heads`, for papers.

The colours are cividis and those of Okabe and Ito, which differ for colour-blind readers and in grey too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import need
from ..files import whole_folder

BLUE = "#0072b2"
VERMILLION = "#d55e00"
GREEN = "#009e73"
GREY = "#8a8781"
DPI = 200  # dots per inch


def write_pngs(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write the findings of `attnlab heads` as PNG files into `folder`, all of them or none. Return their paths.

    Raises `UserError` where matplotlib is missing, and where anything but an empty folder is at `folder`.
    """
    need("matplotlib", "figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder = Path(folder)
    figures = {"scores": _scores(found["scores"])}
    if ablation := found.get("ablation"):
        figures["ablation"] = _ablation(found["scores"], ablation)
        figures["loss-by-position"] = _positions(ablation)
    if any(layer["variance_left"] for layer in found.get("inside", ())):
        figures["latents"] = _latents(found["inside"])
        figures["latent-paths"] = _paths(found["inside"])
    figures["patterns"] = _patterns(found["patterns"])
    if curve := found.get("emergence"):
        figures["emergence"] = _emergence(curve)
    with whole_folder(folder) as half:
        for name, figure in figures.items():
            FigureCanvasAgg(figure).print_png(half / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _scores(scores: Mapping[str, Any]) -> Any:
    """Draw one heat map per score, layers x heads; a dot marks a head above both nulls."""
    names = list(scores["scores"])
    columns = min(4, len(names))
    figure, axes = _figure(-(-len(names) // columns), columns, 2.9, 2.4)
    for axis, name in zip(axes, names, strict=False):
        values = scores["scores"][name]
        share = name not in ("entropy", "distance")
        below = min(min(row) for row in values) < 0
        image = axis.imshow(values, vmax=1 if share else None, aspect="auto", **_scale(below))
        unit = {"entropy": " (nats)", "distance": " (tokens)"}.get(name, "")
        axis.set_title(name + unit, fontsize=9)
        for layer, row in enumerate(scores["marked"].get(name, ())):
            for head, marked in enumerate(row):
                if marked:
                    axis.plot(head, layer, "o", color="white", markeredgecolor="black", markersize=5)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        for set_ticks, count in ((axis.set_xticks, len(values[0])), (axis.set_yticks, len(values))):
            ticks = range(0, count, max(1, count // 8))
            set_ticks(ticks, [str(tick + 1) for tick in ticks])
        figure.colorbar(image, ax=axis)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(f"Head scores; o: above both nulls at {scores['alpha']}, corrected for all heads", fontsize=10)
    return figure


def _scale(signed: bool) -> dict[str, Any]:
    """Return the colours of shares: from 0, or from -1 to 1 with white in the middle where they have signs."""
    return {"cmap": "PuOr_r", "vmin": -1} if signed else {"cmap": "cividis", "vmin": 0}


def _ablation(scores: Mapping[str, Any], ablation: Mapping[str, Any]) -> Any:
    """Draw each head's scores against the change in loss without it."""
    figure, (axis,) = _figure(1, 1, 5.2, 4)
    for name, colour, marker in (
        ("induction", VERMILLION, "o"),
        ("previous token", BLUE, "s"),
        ("duplicate token", GREEN, "^"),
    ):
        x = [value for row in scores["scores"][name] for value in row]
        y = [value for row in ablation["change"] for value in row]
        axis.scatter(x, y, c=colour, marker=marker, label=name, alpha=0.8)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("score (share of attention)")
    axis.set_ylabel("loss on the repeat without the head,\nchange in nats per token")
    axis.legend(frameon=False)
    return figure


def _positions(ablation: Mapping[str, Any]) -> Any:
    """Draw the loss at each position of the repeated sequences."""
    figure, (axis,) = _figure(1, 1, 5.2, 3.4)
    loss = ablation["loss_by_position"]
    axis.plot(range(1, len(loss) + 1), loss, color=BLUE)
    axis.axvline(ablation["segment"], color=VERMILLION, linestyle="--", label="the repeat begins")
    axis.set_xlabel("position (tokens)")
    axis.set_ylabel("loss (nats per token)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def _latents(inside: list[Mapping[str, Any]]) -> Any:
    """Draw the share of the latent's variance that its first axes leave out, by layer."""
    figure, (axis,) = _figure(1, 1, 5.2, 3.6)
    layers = [layer for layer in inside if layer["variance_left"]]
    from matplotlib import colormaps

    for number, layer in enumerate(layers):
        left = layer["variance_left"]
        label = f"layer {layer['layer'] + 1} (effective rank {layer['effective_rank']:.1f} of {layer['rank']})"
        axis.plot(left, color=colormaps["cividis"](number / max(1, len(layers) - 1) * 0.85), label=label)
    axis.set_xlabel("principal axes kept")
    axis.set_ylabel("share of variance left out")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=7)
    return figure


def _paths(inside: list[Mapping[str, Any]]) -> Any:
    """Draw the tokens of one sequence on the first two principal axes of each layer's latent, in their order."""
    layers = [layer for layer in inside if layer["path"]]
    columns = min(4, len(layers))
    figure, axes = _figure(-(-len(layers) // columns), columns, 3.0, 2.8)
    for axis, layer in zip(axes, layers, strict=False):
        x, y = zip(*([*point, 0.0][:2] for point in layer["path"]), strict=True)
        axis.plot(x, y, color=GREY, linewidth=0.5, zorder=1)
        dots = axis.scatter(x, y, c=range(len(x)), cmap="cividis", s=14, zorder=2)
        axis.set_title(f"layer {layer['layer'] + 1}", fontsize=9)
        axis.set_xlabel("principal axis 1")
        axis.set_ylabel("principal axis 2")
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.colorbar(dots, ax=list(axes), label="position (tokens)")
    return figure


def _patterns(patterns: list[Mapping[str, Any]]) -> Any:
    """Draw the pattern of the strongest head for each score: queries down, keys across."""
    figure, axes = _figure(1, len(patterns), 3.0, 3.2)
    for axis, pattern in zip(axes, patterns, strict=True):
        signed = pattern.get("signed", False)
        image = axis.imshow(pattern["weights"], vmax=1, **_scale(signed))
        where = f"layer {pattern['layer'] + 1}, head {pattern['head'] + 1}{', signed' if signed else ''}"
        axis.set_title(f"{pattern['score']}\n{where}", fontsize=9)
        axis.set_xlabel("token that is looked at")
    axes[0].set_ylabel("token that looks")
    figure.colorbar(image, ax=list(axes), label="attention", shrink=0.7)
    return figure


def _emergence(curve: Mapping[str, Any]) -> Any:
    """Draw the strongest head's score at every checkpoint, and the losses before and on the repeat."""
    figure, (heads, losses) = _figure(1, 2, 4.6, 3.6)
    styles = ((BLUE, "-"), (GREEN, "--"), (VERMILLION, "-."), (GREY, ":"))
    for (name, by_step), (colour, dash) in zip(curve["scores"].items(), styles, strict=False):
        best = [max(value for row in layers for value in row) for layers in by_step]
        heads.plot(curve["steps"], best, color=colour, linestyle=dash, marker="o", markersize=3, label=name)
    heads.set_ylabel("score of the strongest head")
    heads.set_ylim(0, 1)
    losses.plot(curve["steps"], curve["first_half"], color=GREY, label="before the repeat")
    losses.plot(curve["steps"], curve["second_half"], color=VERMILLION, linestyle="--", label="on the repeat")
    losses.set_ylabel("loss (nats per token)")
    losses.set_ylim(bottom=0)
    for axis in (heads, losses):
        axis.set_xlabel("training step")
        axis.legend(frameon=False, fontsize=8)
    return figure
