"""Conversion and healing of a GPT-2-shaped model, written into docs/conversion.md. Anyone can run it:

    python benchmarks/conversion.py              about half an hour on 2 quiet cores; again, it goes on where it stopped
    python benchmarks/conversion.py --small      a minute, to see that it runs; its numbers mean nothing

Trains GPT-2's shape (learned positions, biases, tanh gelu, tied; 10.7M parameters) on tinyshakespeare by character,
writes it as a Hugging Face GPT-2, reads that back, converts it to every target at half and a quarter of its cache, and
heals each for a tenth of the steps that the original took. The original is trained on for as long too, as the control.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from speed import markdown, progress_of, provenance, say, write_section

from attnlab import data, pretrained
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.convert import convert, targets
from attnlab.files import read_json, write_bytes, write_json
from attnlab.report.style import GLYPHS, INK, MUTED, PALETTE, RULE, looks
from attnlab.training.train import train

DOCUMENT = Path(__file__).parents[1] / "docs" / "conversion.md"
SHARES = (0.5, 0.25)
MODEL = ModelConfig(
    vocab_size=65,
    context=128,
    n_layers=6,
    d_model=384,
    n_heads=8,
    positions="learned",
    bias=True,
    ff="gelu_tanh",
)
TRAIN = TrainConfig(steps=1200, batch_size=12, lr=1e-3, min_lr=1e-4, warmup=100, eval_every=250, save_every=250)
SMALL = (
    replace(MODEL, context=32, n_layers=1, d_model=64),
    replace(TRAIN, steps=20, warmup=2, eval_batches=1),
)


@dataclass(frozen=True)
class Cell:
    """One conversion."""

    target: str
    method: str
    rank: float | None

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.target, self.method, "" if self.rank is None else f"{100 * self.rank:g}")))


CONTROLS = [  # converted, not healed
    *(Cell(target, method, share) for target, method in (("gqa", "first"), ("gqa", "aligned")) for share in SHARES),
    *(Cell("mla", "svd", share) for share in (*SHARES, 0.125)),
    Cell("mla", "aware", 0.125),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conversion"), help="where runs are kept")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--small", action="store_true", help="a minute instead of half an hour")
    options = parser.parse_args()
    model, recipe = SMALL if options.small else (MODEL, TRAIN)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.document.exists():
        options.document.parent.mkdir(parents=True, exist_ok=True)
        options.document.write_text("# Conversion\n\n<!-- begin conversion -->\n<!-- end conversion -->\n", "utf-8")
    run = RunConfig(name="original", model=model, train=recipe)
    trained(run, options.out / "original")
    original = as_gpt2(options.out)
    healing = replace(
        recipe,
        steps=recipe.steps // 10,
        lr=recipe.lr / 3,
        min_lr=recipe.lr / 30,
        warmup=recipe.warmup // 10,
        eval_every=max(recipe.steps // 30, 1),
    )
    rows = []
    cells = chosen()
    for number, cell in enumerate(cells, 1):
        say(f"{cell.name}, {number} of {len(cells)}")
        row = converted(original, cell, options.out / cell.name)
        if cell not in CONTROLS:
            row["curve"] = healed(row, options.out, cell.name, run, healing)
        rows.append(row)
    again = replace(run, name="longer", train=healing, init=str(options.out / "gpt2"))
    longer = trained(again, options.out / "longer").val_loss
    write_json(options.out / "conversion.json", {"rows": rows, "longer": longer})
    picture = options.document.with_name(f"{options.document.stem}.svg")
    write_bytes(picture, drawing(rows, longer or 0.0).encode())
    text = f"{provenance()}\n\n{table(rows, run, healing, longer or 0.0)}\n\n![Loss against cache]({picture.name})"
    write_section(options.document, "conversion", text)
    say(f"written: {options.document}, {picture}")


def chosen() -> list[Cell]:
    """Every target by its best method at both shares, once where it has no width, and the controls."""
    cells = []
    for target in targets.names():
        methods = targets.module(target).METHODS
        best = next((name for name, reads in methods.items() if reads), next(iter(methods)))
        shares = SHARES if has_width(target) and "own" not in methods else (None,)
        cells += [Cell(target, best, share) for share in shares]
    return [*cells, *CONTROLS]


def has_width(target: str) -> bool:
    from attnlab.attention import module

    return module(target).Config.cache_width is not None


def trained(config: RunConfig, out: Path) -> Any:
    tell = progress_of(out.name)
    return train(
        config, out, resume=True, progress=lambda event: tell(losses(event), event["step"], config.train.steps)
    )


def losses(event: dict[str, Any]) -> str:
    return ", ".join(f"{name} {event[name]:.3f}" for name in ("loss", "val_loss") if name in event) or "training"


def as_gpt2(out: Path) -> pretrained.Loaded:
    """The trained model as a Hugging Face GPT-2, read back: the same logits, to the last bit."""
    own = pretrained.load(out / "original")
    if not (out / "gpt2").exists():
        pretrained.save(own, out / "gpt2", family="gpt2")
    found = pretrained.load(out / "gpt2")
    tokens = torch.arange(found.model.config.context)[None] % 65
    with torch.no_grad():
        assert found.family == "gpt2" and torch.equal(found.model(tokens)[0], own.model(tokens)[0])
    return found


def converted(original: pretrained.Loaded, cell: Cell, folder: Path) -> dict[str, Any]:
    """The certificate, on 64 windows of held-out text; the model goes into `folder`."""
    if (folder / "certificate.json").exists():
        return read_json(folder / "certificate.json")
    corpus, context = data.load(DataConfig()), original.model.config.context
    new, certificate = convert(
        original.model,
        cell.target,
        rank=cell.rank,
        method=cell.method,
        calibration=[corpus.batch(1, step, 8, context).x for step in range(16)],
        held_out=list(corpus.windows(64, context).x.split(8)),
        tell=progress_of(cell.name),
    )
    pretrained.save(replace(original, model=new), folder)
    write_json(folder / "certificate.json", {**certificate.to_dict(), "folder": cell.name})
    return read_json(folder / "certificate.json")


def healed(row: dict[str, Any], out: Path, name: str, run: RunConfig, healing: TrainConfig) -> list[list[float]]:
    """[step, validation loss], from before the first step."""
    model = pretrained.load(out / name).model.config
    config = replace(run, name=f"{name}-healed", model=model, train=healing, init=str(out / name))
    return trained(config, out / f"{name}-healed").curve


def table(rows: list[dict[str, Any]], run: RunConfig, healing: TrainConfig, longer: float) -> str:
    """Validation losses of the trainer where a model was healed, and the certificate's where it was only converted."""
    before = rows[0]["loss_before"]
    lines = []
    for row in rows:
        curve = row.get("curve")
        after = curve[-1][1] if curve else None
        lines.append(
            [
                f"{row['target']}, {row['method']}",
                "" if row["rank"] is None else f"{100 * row['rank']:g} %",
                f"{row['cache_bytes_after'] / row['cache_bytes_before']:.1%}",
                "exact" if row["exact"] else f"{max(row['layer_errors']):.3f}",
                f"{row['loss_before']:.4f}",
                f"{row['loss_after']:.4f}",
                "" if curve is None else f"{curve[0][1]:.4f}",
                "" if after is None else f"{after:.4f}",
                "" if after is None else f"{after - longer:+.4f}",
            ]
        )
    head = ["target, method", "asked", "cache", "worst layer", "before", "converted"]
    head += ["converted*", "healed*", "healed - control"]
    c, tokens = run.model, run.train.batch_size * run.model.context
    return (
        f"{c.n_layers} layers, {c.n_heads} heads, {c.d_model} wide, context {c.context}; trained for "
        f"{run.train.steps:,} steps of {tokens:,} tokens, healed for {healing.steps:,}. Losses in nats per token, on "
        f"64 windows of held-out text; with a star, on the {run.train.eval_batches * run.train.batch_size} windows "
        f"that the trainer validates on. Before: {before:.4f}. The control is the original trained on for as many "
        f"steps as the others are healed: {longer:.4f}*.\n\n{markdown(head, lines)}"
    )


# The figure: an SVG of its own, in colours that stay apart for colour-blind readers, each with its marker.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 70, 190, 20, 60


def drawing(rows: list[dict[str, Any]], longer: float) -> str:
    """Loss against the share of the cache, log scale: open markers as converted, filled ones healed."""
    rows = [row for row in rows if "curve" in row]
    look = looks(dict.fromkeys(row["target"] for row in rows))
    shares = [row["cache_bytes_after"] / row["cache_bytes_before"] for row in rows]
    values = [longer, *(row["curve"][i][1] for row in rows for i in (0, -1))]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    x = scale(math.log2(min(shares)) - 0.2, math.log2(max(shares)) + 0.2, LEFT, WIDTH - RIGHT)
    y = scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, shares, low, high), level(y(longer), "original, trained on")]
    for row, share in zip(rows, shares, strict=True):
        beside = 8 * (list(look).index(row["target"]) - (len(look) - 1) / 2)  # where several have one share
        style, at = look[row["target"]], x(math.log2(share)) + beside
        begin, end = y(row["curve"][0][1]), y(row["curve"][-1][1])
        color = PALETTE[style.slot][0]
        mark = GLYPHS[style.marker]
        parts.append(f'<path d="M{at:.1f} {begin:.1f}V{end:.1f}" stroke="{color}" stroke-opacity=".45" fill="none"/>')
        for height, fill in ((begin, "#fff"), (end, color)):
            where = f'transform="translate({at:.1f} {height:.1f}) scale(1.3)"'
            parts.append(f'<path d="{mark}" {where} fill="{fill}" stroke="{color}" stroke-width="1.2"/>')
    for i, (name, style) in enumerate(look.items()):
        color, at = PALETTE[style.slot][0], TOP + 20 + 24 * i
        where = f'transform="translate({WIDTH - RIGHT + 30} {at}) scale(1.3)"'
        mark = f'<path d="{GLYPHS[style.marker]}" {where} fill="{color}"/>'
        parts.append(mark + text(WIDTH - RIGHT + 46, at + 4, name, "start"))
    at = TOP + 30 + 24 * len(look)
    parts += [
        text(WIDTH - RIGHT + 22, at + 4 + 20 * i, words, "start", MUTED[0])
        for i, words in enumerate(("open: as converted", "filled: healed"))
    ]
    title = "Validation loss against cache, as converted and healed; at one share of the cache, side by side"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img"><title>{title}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def axes(x: Callable[[float], float], y: Callable[[float], float], shares: list[float], low: float, high: float) -> str:
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if (high - low) / s < 9)
    parts = []
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        at = y(i * step)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{RULE[0]}"/>')
        parts.append(text(LEFT - 8, at + 4, f"{i * step:.3f}", "end", MUTED[0]))
    for tick in (0.0625, 0.125, 0.25, 0.5, 1.0):
        if min(shares) * 0.9 < tick < max(shares) * 1.12:
            at = x(math.log2(tick))
            parts.append(f'<path d="M{at:.1f} {HEIGHT - BOTTOM}v5" stroke="{MUTED[0]}"/>')
            parts.append(text(at, HEIGHT - BOTTOM + 20, f"{100 * tick:g} %", "middle", MUTED[0]))
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="{MUTED[0]}"/>')
    middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(middle, HEIGHT - 16, "cache, share of the original's (log scale)", "middle"))
    turned = f'<g transform="translate(18 {height}) rotate(-90)">'
    return "".join(parts) + turned + text(0, 0, "validation loss (nats per token)", "middle") + "</g>"


def level(at: float, words: str) -> str:
    line = f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="{INK[0]}" stroke-dasharray="2 3"/>'
    return line + text(LEFT + 6, at - 6, words, "start", MUTED[0])


def text(x: float, y: float, words: str, anchor: str, color: str = INK[0]) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>'


if __name__ == "__main__":
    main()
