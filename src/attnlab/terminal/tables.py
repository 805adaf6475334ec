"""What the terminal shows: tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formatting import gigabytes, short, span

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ..costs.dry_run import Forecast
    from ..costs.plan import Plan
    from ..results import BenchRecord, EvalResult


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def columns(**kinds: str) -> Table:
    """A plain table; each column's kind is "left" or "right"."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, kind in kinds.items():
        table.add_column(title.replace("_", " "), justify=kind, no_wrap=True)  # type: ignore[arg-type]
    return table


def listing(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`attnlab list`: sizes, then words and formulas."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from ..catalogue import SHAPE, TOKENS
    from ..formatting import number

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


def bench(records: Sequence[BenchRecord]) -> RenderableType:
    """`attnlab bench`: a row per record."""
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
            size(r.cache_bytes),
            size(r.peak_bytes),
            "" if r.flops is None else f"{r.flops / 1e6:,.1f}",
        )
    return table


def forecast(found: Forecast) -> RenderableType:
    """`attnlab train PRESET --dry-run`."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    steps = found.tokens // found.tokens_per_step
    whose = "a matrix product here" if found.measured else "as given"
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("tokens", f"{found.tokens:,} ({steps:,} steps of {found.tokens_per_step:,})")
    table.add_row("training FLOPs", f"{found.flops_per_token:,.0f} per token, {found.flops:.2e} in all")
    table.add_row(
        "cache", f"{found.cache_bytes_per_token:,.0f} bytes per token, {size(found.cache_bytes)} at full context"
    )
    table.add_row("time, at least", f"{span(found.seconds)} at {found.rate / 1e9:,.0f} GFLOP/s ({whose})")
    return table


def plan(found: Plan, others: Sequence[Plan] = ()) -> RenderableType:
    """`attnlab plan`: the model in detail, a row for each other mechanism, and what is assumed."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from ..costs.plan import USABLE

    def facts(title: str, rows: Mapping[str, tuple[str, str]]) -> Table:
        table = Table(
            box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold"
        )
        for width, justify in ((20, "left"), (12, "right"), (0, "left")):
            table.add_column(min_width=width, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name, (value, why) in rows.items():
            table.add_row(name, value, f"[dim]{why}")
        return table

    memory, decode = found.memory, found.decode
    time = ("unknown", f"the peak is that of bf16, and this trains in {found.precision}")
    if found.seconds is not None:
        time = (span(found.seconds), f"at an MFU of {found.mfu:.0%}")
    passes = "forward, layers again, backward" if found.recompute else "forward and backward"
    training = {
        "parameters": (short(found.parameters), f"{found.parameters:,}"),
        "FLOPs per token": (f"{found.flops_per_token / 1e9:,.3g} GFLOPs", passes),
        "tokens": (short(found.tokens), f"{found.flops:.3g} FLOPs"),
        "time": time,
    }
    parts = {
        "weights": (gigabytes(memory.weights), "float32"),
        "gradients": (gigabytes(memory.gradients), "float32"),
        "optimiser": (gigabytes(memory.optimizer), "float32"),
        "copies of weights": (gigabytes(memory.copies), f"{found.precision}, of all layers"),
        "gathered weights": (gigabytes(memory.gathered), "float32, of two layers, embedding and head"),
        "activations": (gigabytes(memory.activations), f"of {found.batch:,} x {found.context:,} tokens"),
        "at the worst moment": (
            gigabytes(memory.peak),
            f"[/]{'[green]fits' if found.fits else '[bold red]does not fit'}[/] into {gigabytes(found.usable)}",
        ),
    }
    parts = {name: row for name, row in parts.items() if row[0] != gigabytes(0)}
    held = f"{decode.context:,} tokens"
    batch = "no limit" if decode.batch is None else f"{decode.batch:,}"
    decoding = {
        "weights": (gigabytes(decode.weights), "bfloat16"),
        "cache": (gigabytes(decode.cache), f"bfloat16, of a sequence of {held}"),
        "largest batch": (batch, "the weights do not fit" if decode.batch == 0 else f"sequences of {held}"),
    }
    if decode.batch != 0:
        decoding["time per token"] = (milliseconds(decode.seconds), "of one sequence")
    if decode.batch and decode.seconds_batch is not None:
        rate = decode.batch / decode.seconds_batch
        decoding["in that batch"] = (milliseconds(decode.seconds_batch), f"{rate:,.0f} tokens a second in all")
    where = f"{found.gpus:,} x {found.gpu}, {escape(found.strategy)}, {found.precision}"
    verdict: list[RenderableType] = []
    if not found.fits:
        would = "Neither sharding nor more GPUs help: a whole layer and its gradients must fit on each."
        would = f"It would fit with {found.remedy}" if found.remedy else would
        verdict = [f"[bold red]Training does not fit.[/] {would}", ""]
    notes = (
        f"GB are 10^9 bytes. {USABLE:.0%} of a GPU's memory is used; the rest is left to CUDA, communication and "
        "fragmentation. Memory and FLOPs are counted on the meta device, with fused attention (which computes its "
        "scores twice), a fused AdamW and evenly loaded experts. "
        "Time is FLOPs alone; whatever else takes time is in the MFU. Decoding: one model split evenly over all GPUs, "
        "nothing lost to communication; a step reads at full bandwidth or computes at full speed, whichever takes "
        "longer."
    )
    title = f"[bold]{escape(found.name)}, {found.mechanism}[/]: {where}"
    table: list[RenderableType] = [shapes(others), ""] if others else []
    shown = [facts("Training", training), "", facts("Memory of each GPU", parts), "", *verdict]
    return Group(title, "", *shown, facts("Decoding", decoding), "", *table, f"[dim]{notes}")


def shapes(plans: Sequence[Plan]) -> Table:
    """What `attnlab plan` says of other mechanisms."""
    right = "right"
    numbers = {"peak GB": right, "time": right, "cache": right, "batch": right, "ms": right, "in batch": right}
    table = columns(mechanism="left", size=right, **numbers)
    for each in plans:
        decode = each.decode
        table.add_row(
            f"[bold]{each.mechanism}",
            short(each.parameters),
            f"{'' if each.fits else '[red]'}{each.memory.peak / 1e9:,.1f}",
            "" if each.seconds is None else span(each.seconds),
            gigabytes(decode.cache),
            "any" if decode.batch is None else short(decode.batch),
            "" if decode.batch == 0 else f"{decode.seconds * 1e3:,.3g}",
            "" if decode.seconds_batch is None else f"{decode.seconds_batch * 1e3:,.3g}",
        )
    return table


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def evaluation(found: EvalResult) -> RenderableType:
    """`attnlab eval`."""
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
    """`attnlab convert`: a row per conversion, and what the numbers mean."""
    from rich.console import Group

    left, right = "left", "right"
    table = columns(target=left, method=left, rank=right, cache=right, loss=right, change=right, worst_layer=right)
    for each in found:
        before, after = each["loss_before"], each["loss_after"]
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
        f"{size(first['cache_bytes_before'])}."
    )
    logits = f"Logits differ by at most {first['max_logit_difference']:.2e} in float64."
    errors = f"Relative error of each layer's attention output: {layers}."
    return Group(table, "", f"[dim]{note}", *([f"[dim]{logits}", f"[dim]{errors}"] if len(found) == 1 else []))


def recovery(found: Mapping[str, Any]) -> RenderableType:
    """`attnlab heal`: validation loss by tokens."""
    original = found["original"]
    table = columns(tokens="right", loss="right", **({"above the original": "right"} if original is not None else {}))
    for tokens, loss in found["curve"]:
        table.add_row(f"{tokens:,}", f"{loss:.4f}", *([] if original is None else [f"{loss - original:+.4f}"]))
    return table


def size(count: int | None) -> str:
    """Bytes, in words."""
    if count is None:
        return ""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


SHOWN = 3  # heads of each kind, where more are marked


def heads(found: Mapping[str, Any]) -> RenderableType:
    """`attnlab heads`: the strongest heads of each kind beside what they would score by chance."""
    from rich.console import Group

    scores, ablation = found["scores"], found.get("ablation")
    left, right = "left", "right"
    table = columns(
        score=left, head=left, value=right, not_repeated=right, untrained=right, p=right, loss_without=right
    )
    for name, layers in scores["scores"].items():
        ranked = sorted(
            ((value, layer, head) for layer, row in enumerate(layers) for head, value in enumerate(row)), reverse=True
        )
        for place, (value, layer, head) in enumerate(ranked[:SHOWN]):

            def cell(kind: str, digits: str, name: str = name, layer: int = layer, head: int = head) -> str:
                return format(scores[kind][name][layer][head], digits) if name in scores[kind] else ""

            mark = "*" if name in scores["marked"] and scores["marked"][name][layer][head] else ""
            change = "" if ablation is None else f"{ablation['change'][layer][head]:+.3f}"
            table.add_row(
                name if not place else "",
                f"{layer + 1}.{head + 1}",
                f"{value:.3f}{mark or ' '}",
                cell("not_repeated", ".3f"),
                cell("untrained", ".3f"),
                _tail(scores["p"][name][layer][head]) if name in scores["p"] else "",
                change,
            )
    marks = sum(mark for layers in scores["marked"].values() for row in layers for mark in row)
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
    if found["untrained"]:
        notes.append("These weights are random: nothing was loaded.")
    notes.append("Heads are layer.head, both from 1, as in the report; lists in JSON follow the same order.")
    remembered = _remembered(found["inside"])
    return Group(table, "", *remembered, *(f"[dim]{note}" for note in notes))


def _tail(p: float) -> str:
    return f"{p:.0e}" if p >= 1e-12 else "<1e-12"  # less is rounding


def _remembered(layers: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    from ..formatting import remembered

    titles, rows = remembered(layers)
    if not rows:
        return []
    table = columns(**{title: "left" if title == "mechanism" else "right" for title in titles})
    for row in rows:
        table.add_row(*row)
    return [table, ""]
