"""Tables of the commands, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formatting import about_signs, number, remembered, size, span

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ..costs.dry_run import Forecast
    from ..results import BenchRecord, EvalResult


def console(*, stderr: bool = False) -> Console:
    """Return the console that commands print to."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def columns(**kinds: str) -> Table:
    """Return an empty table; each column's kind is "left" or "right", and `_` in its title is a blank."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, kind in kinds.items():
        table.add_column(title.replace("_", " "), justify=kind, no_wrap=True)  # type: ignore[arg-type]
    return table


def mechanism_table(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return the tables of `attnlab list`: sizes, then sentences and formulas."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from ..catalogue import SHAPE, TOKENS

    left, right = "left", "right"
    numbers = {"floats/token": right, f"cache at {TOKENS}": right, "parameters": right}
    sizes = columns(mechanism=left, **numbers, kernels=left, laws=left)
    words = Table(box=None, pad_edge=False, show_header=False)
    for r in records:
        name = f"[bold]{r['name']}"
        if "error" in r:
            words.add_row(name, f"[red]{escape(r['error'])}")
            continue
        cells = (number(r[key]) for key in ("floats_per_token", "floats_at_context", "parameters"))
        kernels = " ".join(kernel for kernel in r["impls"] if kernel != "reference")
        sizes.add_row(name, *cells, kernels, f"all but {len(r['breaks'])}" if r["breaks"] else "all")
        broken = f"\n[yellow]breaks these laws: {', '.join(r['breaks'])}[/]" if r["breaks"] else ""
        words.add_row(name, f"{escape(r['summary'])}\n[dim]{escape(r['formula'])}[/]{broken}")
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    note = (
        f"Sizes of one layer at GPT-2's width ({shape}); the cache in floats of one sequence. Kernels besides the "
        "reference. Laws as declared; attnlab audit NAME puts them to the test."
    )
    return Group(sizes, "", f"[dim]{note}", "", words)


def bench_table(records: Sequence[BenchRecord]) -> RenderableType:
    """Return the table of `attnlab bench`: a row per record."""
    from rich.markup import escape

    left, right = "left", "right"
    table = columns(
        mechanism=left,
        context=right,
        ms=right,
        **{"tokens/s": right, "x mha": right},
        cache=right,
        peak=right,
        MFLOPs=right,
    )
    for r in records:
        name = f"[bold]{r.mechanism}[/]" + (f" {r.mode}" if r.mode else "")
        if r.error:
            table.add_row(name, str(r.context), f"[red]{escape(r.error)}")
            continue
        table.add_row(
            name,
            str(r.context),
            "" if r.ms is None else f"{r.ms:,.2f}",
            "" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}",
            "" if r.relative is None else f"{r.relative:.2f}",
            size(r.cache_bytes, "terminal"),
            size(r.peak_bytes, "terminal"),
            "" if r.flops is None else f"{r.flops / 1e6:,.1f}",
        )
    return table


def forecast_table(found: Forecast) -> RenderableType:
    """Return the table of `attnlab train PRESET --dry-run`."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    steps = found.tokens // found.tokens_per_step
    whose = "a matrix product here" if found.measured else "as given"
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("tokens", f"{found.tokens:,} ({steps:,} steps of {found.tokens_per_step:,})")
    table.add_row("training FLOPs", f"{found.flops_per_token:,.0f} per token, {found.flops:.2e} in all")
    full = size(found.cache_bytes, "terminal")
    table.add_row("cache", f"{found.cache_bytes_per_token:,.0f} bytes per token, {full} at full context")
    table.add_row("time, at least", f"{span(found.seconds)} at {found.rate / 1e9:,.0f} GFLOP/s ({whose})")
    return table


def evaluation(found: EvalResult) -> RenderableType:
    """Return the tables of `attnlab eval`: the loss, and the loss by position."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    error = "" if found.stderr is None else f" ± {found.stderr:.4f} (standard error over documents)"
    table.add_row("loss", f"{found.loss:.4f}{error}, nats per token")
    table.add_row("perplexity", f"{found.perplexity:,.3f}")
    if found.bits_per_byte is not None:
        table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    places = columns(**{"tokens seen before": "right", "tokens": "right", "loss": "right"})
    for first, last, tokens, loss in found.by_position:
        places.add_row(f"{first:,}" if first == last else f"{first:,} to {last:,}", f"{tokens:,}", f"{loss:.4f}")
    step = "" if found.step is None else f", step {found.step:,}"
    text = "" if found.bytes is None else f", {found.bytes:,} bytes"
    amount = f"{found.tokens:,} tokens{text}, {found.documents:,} document{'s' if found.documents > 1 else ''}"
    title = f"{found.mechanism}{step}: {found.data}, {found.split}: {amount}"
    note = f"windows of {found.context:,} tokens, stride {found.stride:,}; {found.tokens_per_s:,.0f} tokens/s"
    return Group(escape(title), "", table, "", places, "", f"[dim]{note}")


def certificates(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return the table of `attnlab convert`: a row per conversion, and what the numbers mean."""
    from rich.console import Group

    left, right = "left", "right"
    table = columns(target=left, method=left, rank=right, cache=right, loss=right, change=right, worst_layer=right)
    for each in found:
        before = each["loss_before"]
        after = each["loss_after"]
        table.add_row(
            f"[bold]{each['target']}",
            each["method"],
            "" if each["rank"] is None else str(each["rank"]),
            f"{each['cache_bytes_after'] / each['cache_bytes_before']:.1%}",
            f"{after:.4f}",
            "exact" if each["exact"] else f"{after - before:+.4f}",
            f"{max(each['layer_errors']):.2e}",
        )
    first = found[0]
    layers = ", ".join(f"{error:.1e}" for error in first["layer_errors"])
    note = (
        f"Loss in nats per token on {first['tokens']:,} held-out tokens; {first['source']} before: "
        f"{first['loss_before']:.4f}. Cache of one sequence of {first['context']:,} tokens before: "
        f"{size(first['cache_bytes_before'], 'terminal')}."
    )
    logits = f"Logits differ by at most {first['max_logit_difference']:.2e} in float64."
    errors = f"Relative error of each layer's attention output: {layers}."
    return Group(table, "", f"[dim]{note}", *([f"[dim]{logits}", f"[dim]{errors}"] if len(found) == 1 else []))


def recovery(found: Mapping[str, Any]) -> RenderableType:
    """Return the table of `attnlab heal`: validation loss by tokens."""
    original = found["original"]
    table = columns(tokens="right", loss="right", **({"above the original": "right"} if original is not None else {}))
    for tokens, loss in found["curve"]:
        table.add_row(f"{tokens:,}", f"{loss:.4f}", *([] if original is None else [f"{loss - original:+.4f}"]))
    return table


SHOWN = 3  # heads of each kind, where more are marked


def heads(found: Mapping[str, Any]) -> RenderableType:
    """Return the tables of `attnlab heads`: the strongest heads of each kind beside what they would score by chance."""
    from rich.console import Group

    scores = found["scores"]
    ablation = found.get("ablation")
    left, right = "left", "right"
    table = columns(
        score=left, head=left, value=right, not_repeated=right, untrained=right, p=right, loss_without=right
    )
    for name, layers in scores["scores"].items():
        ranked = [(value, layer, head) for layer, row in enumerate(layers) for head, value in enumerate(row)]
        for place, (_, layer, head) in enumerate(sorted(ranked, reverse=True)[:SHOWN]):
            title = "" if place else name
            table.add_row(title, f"{layer + 1}.{head + 1}", *_head(scores, ablation, name, layer, head))
    notes = _about_heads(scores, ablation)
    if found.get("signed"):
        notes.append(about_signs(found["signed"]))
    if found["untrained"]:
        notes.append("These weights are random: nothing was loaded.")
    notes.append("Heads are layer.head, both from 1, as in the report; lists in JSON follow the same order.")
    return Group(table, "", *_remembered(found["inside"]), *(f"[dim]{note}" for note in notes))


def _head(
    scores: Mapping[str, Any], ablation: Mapping[str, Any] | None, name: str, layer: int, head: int
) -> tuple[str, ...]:
    """Return the cells about one score of one head: value, both nulls, p, and the change of the loss without it."""

    def cell(kind: str, digits: str) -> str:
        return format(scores[kind][name][layer][head], digits) if name in scores[kind] else ""

    marked = name in scores["marked"] and scores["marked"][name][layer][head]
    return (
        cell("scores", ".3f") + ("*" if marked else " "),
        cell("not_repeated", ".3f"),
        cell("untrained", ".3f"),
        _tail(scores["p"][name][layer][head]) if name in scores["p"] else "",
        "" if ablation is None else f"{ablation['change'][layer][head]:+.3f}",
    )


def _about_heads(scores: Mapping[str, Any], ablation: Mapping[str, Any] | None) -> list[str]:
    marks = sum(sum(map(sum, layers)) for layers in scores["marked"].values())
    segments = ", ".join(map(str, scores["segments"]))
    notes = [
        f"{scores['sequences']} random sequences each of segments of {segments} tokens, repeated once. * above both "
        f"nulls at {scores['alpha']} after Holm's correction over all heads and scores ({marks} marks)."
    ]
    if ablation is not None:
        notes.append(
            f"Loss on the repeat {ablation['second_half']:.3f} nats per token, before it {ablation['first_half']:.3f}; "
            "loss without: how it changes when the head is replaced by its mean."
        )
    return notes


def _tail(p: float) -> str:
    return f"{p:.0e}" if p >= 1e-12 else "<1e-12"  # less is rounding


def _remembered(layers: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    titles, rows = remembered(layers)
    if not rows:
        return []
    table = columns(**{title: "left" if title == "mechanism" else "right" for title in titles})
    for row in rows:
        table.add_row(*row)
    return [table, ""]
