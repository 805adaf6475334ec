"""The page's sections: findings in, markup out. A section whose file is missing says which command makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..formatting import NONE, count, loss, milliseconds, signed, size, times, words
from ..results import RunResult
from . import figures
from .folder import Findings, Standing, number
from .headline import headline
from .html import Html, join, table, tag
from .look import Look, swatch

Figures = dict[str, list[figures.View]]


def section(anchor: str, title: str, *content: Any) -> Html:
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), *content, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def missing(found: Findings, file: str, what: str) -> Html:
    return tag("p", f"{what}: ", tag("code", found.how_to_make(file)), " makes it.", class_="missing")


def plot(views: list[figures.View], name: str, label: str) -> Html:
    """A place for a figure; the script draws it, its buttons and its legend."""
    return tag(
        "figure",
        tag("div", class_="views", role="group", aria_label="What to show") if len(views) > 1 else None,
        tag("div", class_="plot", id=f"plot-{name}", data_figure=name, role="img", aria_label=label),
        tag("div", class_="legend", role="group", aria_label="Show or hide"),
        tag("figcaption", views[0].caption),
    )


def named(mechanism: str, look: dict[str, Look]) -> Html:
    return tag("span", swatch(look[mechanism]), mechanism, class_="name")


def header(found: Findings) -> Html:
    title, details = headline(found)
    facts = [
        str(found.compare.get("preset") or ""),
        str(found.compare.get("size") or ""),
        _plural({c.mechanism for c in found.cells} or set(found.mechanisms), "mechanism"),
        _plural({c.seed for c in found.cells}, "seed"),
        words(f"{steps:,} steps" for steps in sorted({c.steps for c in found.cells if c.status == "done"})),
        words((f"{n} tokens of context" for n in sorted({c.context for c in found.cells})), "or"),
        words(sorted({c.device for c in found.cells if c.device})),
    ]
    return tag(
        "header",
        tag("p", "attnlab report · ", found.folder, class_="eyebrow"),
        tag("h1", title),
        tag("div", [tag("p", sentence) for sentence in details], class_="lede"),
        tag("p", " · ".join(filter(None, facts)), class_="facts"),
    )


def _plural(things: set[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}" if things else ""


# Scoreboard

VERDICTS = {"better": "▼", "worse": "▲", "not distinguishable": "≈", "baseline": "◆", "too few seeds": "?"}


def scoreboard(found: Findings, look: dict[str, Look]) -> Html:
    if not found.cells:
        return section("scoreboard", "Scoreboard", missing(found, "compare.json", "No training runs here"))
    base = found.baseline
    ranked = sorted(found.standings, key=lambda s: (s.val_loss is None, s.val_loss or 0.0))
    scale = figures.standing_scale(ranked)
    rows: list[list[Any]] = []
    marked: list[int] = []
    for standing in ranked:
        m = standing.mechanism
        own = [c for c in found.cells if c.mechanism == m]
        lost = [c for c in own if c.status != "done"]
        seeds: Any = standing.n
        if lost:
            seeds = join(
                [f"{standing.n} of {len(own)}", tag("span", f"✗ {len(lost)} {lost[0].status}", class_="interval bad")]
            )
        if m == base:
            marked.append(len(rows))
        interval = f"{signed(standing.interval[0])} to {signed(standing.interval[1])}" if standing.interval else ""
        said = f"{VERDICTS.get(standing.verdict, '')} {standing.verdict}" if standing.n else "✗ no finished run"
        verdict = tag("span", said, class_="verdict " + (standing.verdict.split()[0] if standing.n else "bad"))
        rows.append(
            [
                named(m, look),
                loss(standing.val_loss),
                join([spread(standing, scale) if m != base else None, verdict]),
                join(
                    [
                        signed(standing.difference) if m != base else NONE,
                        tag("span", interval, class_="interval") if interval else None,
                    ]
                ),
                size(found.mean(m, "cache_bytes")),
                count(found.mean(m, "floats_per_token")),
                count(found.mean(m, "parameters")),
                count(found.mean(m, "flops_per_token")),
                count(found.mean(m, "tokens_per_s")),
                seeds,
            ]
        )
    head = [
        "mechanism",
        "val loss",
        tag("span", f"better ← {base} → worse", class_="verdict"),
        f"difference to {base}, 95 % interval",
        "cache",
        "floats / token",
        "parameters",
        "FLOPs / token",
        "tokens / s",
        "seeds",
    ]
    contexts = words(f"{n:,}" for n in sorted({c.context for c in found.cells if c.context}))
    caption = (
        "Mean over seeds, best loss first. Loss in nats per token; difference and interval from runs paired by seed; "
        f"cache of one sequence of {contexts} tokens; floats per token and FLOPs per token over all layers; tokens per "
        "second in training."
    )
    lost_runs = [c for c in found.cells if c.status != "done"]
    notes = [
        tag("li", tag("b", f"{c.mechanism}, seed {c.seed}"), f" {ending(c)}", f": {c.error}" if c.error else ".")
        for c in lost_runs
    ]
    warning = None
    if not found.compare:
        warning = tag(
            "p",
            "The comparison is not finished, so there are no paired differences: ",
            tag("code", found.how_to_make("compare.json")),
            " completes it.",
            class_="missing",
        )
    return section(
        "scoreboard",
        "Scoreboard",
        warning,
        table(caption, head, rows, marked=tuple(marked)),
        tag("div", tag("h3", "Runs that did not finish"), tag("ul", notes), class_="failures") if notes else None,
    )


def ending(cell: RunResult) -> str:
    return f"{cell.status} after {cell.attempts} attempts" if cell.attempts > 1 else cell.status


def spread(standing: Standing, scale: float) -> Html | str:
    """The difference and its interval as a small drawing; an arrow where the interval is cut."""
    if standing.difference is None:
        return ""
    half, middle = 70.0, 75.0

    def at(value: float) -> float:
        return middle + half * max(-1.0, min(1.0, value / scale))

    parts = [tag("path", d=f"M{middle} 1V17", class_="zero")]
    if standing.interval:
        low, high = standing.interval
        parts.append(tag("path", d=f"M{at(low):.1f} 9H{at(high):.1f}", class_="reach"))
        for end, sign in ((low, -1), (high, 1)):
            x = at(end)
            cut = abs(end) > scale
            parts.append(
                tag(
                    "path",
                    d=f"M{x - 4 * sign:.1f} 5L{x:.1f} 9L{x - 4 * sign:.1f} 13" if cut else f"M{x:.1f} 6V12",
                    class_="reach",
                )
            )
    parts.append(tag("circle", cx=f"{at(standing.difference):.1f}", cy=9, r=3.4))
    words_ = f"difference {signed(standing.difference)}"
    words_ += (
        f", interval {signed(standing.interval[0])} to {signed(standing.interval[1])}" if standing.interval else ""
    )
    return tag(
        "svg",
        parts,
        class_=f"spread {standing.verdict.split()[0]}",
        viewBox="0 0 150 18",
        role="img",
        aria_label=words_,
    )


# Figures


def curves(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    views = figures.curves(found, look)
    if not views:
        return section("curves", "Loss curves", missing(found, "compare.json", "No loss curve here"))
    drawn["curves"] = views
    return section("curves", "Loss curves", plot(views, "curves", "Loss against training step, one line per mechanism"))


def trade(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    views = figures.trade(found, look)
    if not views:
        return section("trade", "Quality against cost", missing(found, "compare.json", "No finished run here"))
    drawn["trade"] = views
    label = "Validation loss against cache size or speed, one point per mechanism, with the Pareto front"
    return section("trade", "Quality against cost", plot(views, "trade", label))


def decoding(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    views = figures.decoding(found, look)
    if not views:
        return section("decoding", "Decoding", missing(found, "bench.json", "No decoding time was measured here"))
    drawn["decoding"] = views
    records = [r for r in found.bench if r.kind == "decode"]
    return section(
        "decoding",
        "Decoding",
        plot(views, "decoding", "Time per decoding step against tokens held, one line per mechanism and form"),
        tag(
            "details",
            tag("summary", "All decoding measurements"),
            _bench_table(
                records,
                look,
                "One token for each sequence of the batch: the median of interleaved repeats after a warm-up.",
            ),
        ),
    )


def benchmarks(found: Findings, look: dict[str, Look]) -> Html:
    kinds = {kind: [r for r in found.bench if r.kind == kind] for kind in ("train", "prefill")}
    said = (
        "the median of interleaved repeats after a warm-up; relative time is against the baseline at the same context."
    )
    names = {
        "train": ("Training step", f"One forward pass, backward pass and update: {said}"),
        "prefill": ("Prefill", f"Reading a whole prompt into the cache: {said}"),
    }
    content = [
        [tag("h3", names[k][0]), _bench_table(records, look, names[k][1])] for k, records in kinds.items() if records
    ]
    return section(
        "benchmarks",
        "Training and prefill speed",
        content or missing(found, "bench.json", "No training or prefill benchmark here"),
    )


def _bench_table(records: list[Any], look: dict[str, Look], caption: str) -> Html:
    head = [
        "mechanism",
        "form",
        "context",
        "batch",
        "ms",
        "fastest – slowest",
        "tokens / s",
        "relative time",
        "peak memory",
        "live cache",
        "FLOPs",
        "repeats",
    ]
    rows = []
    for r in records:
        form = " ".join(filter(None, [r.mode, r.impl, r.dtype]))
        if r.error:
            rows.append(
                [named(r.mechanism, look), form, f"{r.context:,}", r.batch, tag("span", f"✗ {r.error}", class_="bad")]
                + [""] * 7
            )
            continue
        ends = [number(x) for x in r.ms_spread]
        between = f"{milliseconds(ends[0])} – {milliseconds(ends[1])}" if len(ends) == 2 else NONE
        rows.append(
            [
                named(r.mechanism, look),
                form,
                f"{r.context:,}",
                r.batch,
                milliseconds(number(r.ms)),
                between,
                count(number(r.tokens_per_s)),
                times(number(r.relative)),
                size(number(r.peak_bytes)),
                size(number(r.cache_bytes)),
                count(number(r.flops)),
                r.repeats,
            ]
        )
    return table(caption, head, rows, left=2)


def costs(found: Findings, look: dict[str, Look]) -> Html:
    measures: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("parameters", "parameters", count),
        ("cache_bytes", "cache", size),
        ("floats_per_token", "floats / token", count),
        ("flops_per_token", "FLOPs / token", count),
    ]
    mechanisms = [m for m in found.mechanisms if found.done(m)]
    if not mechanisms:
        return section("costs", "What each mechanism costs", missing(found, "compare.json", "No finished run here"))
    means = {name: {m: found.mean(m, name) for m in mechanisms} for name, *_ in measures}
    rows = []
    for m in mechanisms:
        row: list[Any] = [named(m, look)]
        for name, _, shown in measures:
            most = max((x or 0.0 for x in means[name].values()), default=0.0)
            share = 100 * (means[name][m] or 0.0) / most if most else 0.0
            row.append(
                tag("span", shown(means[name][m]), class_="bar", style=f"--w:{share:.1f}%;--c:var(--c{look[m].slot})")
            )
        rows.append(row)
    caption = (
        "Parameters of the whole model; cache of one sequence at full context; floats that each further token adds to "
        "the cache (0 for a ring that is full or a fixed state); FLOPs of one token's forward pass. Bars are shares of "
        "the largest."
    )
    return section(
        "costs",
        "What each mechanism costs",
        table(caption, ["mechanism", *(title for _, title, _ in measures)], rows, left=5),
    )


# Laws

SIGNS = {"holds": "✓", "broken": "✗", "n/a": "–"}


def laws(found: Findings, look: dict[str, Look]) -> Html:
    if not found.laws:
        return section("laws", "Laws", missing(found, "laws.json", "No law was checked here"))
    mechanisms = [m for m in found.mechanisms if any(law.mechanism == m for law in found.laws)]
    statements = {law.law: law.statement for law in found.laws}
    results = {(law.law, law.mechanism): law for law in found.laws}
    rows = []
    for name, statement in statements.items():
        row: list[Any] = [join([name, tag("span", statement, class_="statement") if statement else None])]
        for m in mechanisms:
            law = results.get((name, m))
            if law is None:
                row.append("")
                continue
            said = f"{m}, {name}: {law.status}" + (f". {law.detail}" if law.detail else "")
            state = {"holds": "holds", "broken": "broken"}.get(law.status, "na")
            row.append(
                tag(
                    "button",
                    SIGNS.get(law.status, "–"),
                    type="button",
                    class_=f"law {state}",
                    data_tip=said,
                    aria_label=said,
                )
            )
        rows.append(row)
    apart = [
        tag("li", tag("b", f"{law.mechanism}, {law.law}"), f": {law.detail or 'does not apply'}")
        for law in found.laws
        if law.status not in ("holds", "broken")
    ]
    broken = [law for law in found.laws if law.status == "broken"]
    holds = sum(law.status == "holds" for law in found.laws)
    caption = (
        f"✓ holds, ✗ broken, – does not apply. {holds} hold, {len(broken)} broken, {len(apart)} do not "
        "apply. Point at a sign, or tap it, for the reason."
    )
    counter = [
        tag(
            "li",
            tag("b", f"{law.mechanism} breaks {law.law}"),
            ". ",
            law.statement,
            " ",
            tag("span", f"Found: {law.detail}.".replace("..", ".")),
        )
        for law in broken
    ]
    return section(
        "laws",
        "Laws",
        tag("div", table(caption, ["law", *mechanisms], rows), class_="matrix"),
        tag("div", tag("h3", "Counterexamples"), tag("ul", counter), class_="failures") if counter else None,
        tag("details", tag("summary", f"Why {len(apart)} do{'es' * (len(apart) == 1)} not apply"), tag("ul", apart))
        if apart
        else None,
    )


# Attention, samples


def attention(found: Findings) -> Html:
    if not found.attention:
        return section("attention", "Attention maps", missing(found, "attention.json", "No attention map here"))
    pickers = [
        tag("label", name, tag("select", id=f"pick-{name}", aria_label=f"{name} of the attention map"))
        for name in ("mechanism", "layer", "head", "show")
    ]
    return section(
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


def samples(found: Findings, look: dict[str, Look]) -> Html:
    if not found.samples:
        return section("samples", "Samples", missing(found, "samples.json", "No sample text here"))
    cards = []
    for sample in found.samples:
        prompt, text = str(sample.get("prompt") or ""), sample["text"]
        m = str(sample.get("mechanism"))
        text = text[len(prompt) :] if prompt and text.startswith(prompt) else text
        title = tag("h3", named(m, look), tag("small", f"seed {sample['seed']}") if "seed" in sample else None)
        cards.append(tag("article", title, tag("pre", tag("b", prompt) if prompt else None, text, tabindex=0)))
    note = (
        "The prompt is bold; the rest is what each model writes. "
        "A few lines say little about quality: the losses above say more."
    )
    return section("samples", "Samples", tag("p", note, class_="note"), tag("div", cards, class_="cards"))


# Fairness, reproduction, glossary


def fairness(found: Findings, look: dict[str, Look]) -> Html:
    title = "What was kept equal"
    if not found.compare:
        return section("fairness", title, missing(found, "compare.json", "No finished comparison here"))
    match = str(found.compare.get("match") or "none")
    said: list[Any] = [
        "Data, data order, batch size, steps and schedule are the same for all; runs with one seed form a pair. "
    ]
    flag = tag("code", f"--match {match}", class_="flag")
    if match not in ("params", "cache"):
        said += [
            "Widths are each mechanism's defaults (",
            flag,
            "), so parameters and caches differ: see the scoreboard.",
        ]
        return section("fairness", title, tag("p", said))
    noun, key, shown = {"params": ("parameters", "parameters", count), "cache": ("caches", "cache_bytes", size)}[match]
    said += [f"Widths were solved so that {noun} agree with {found.baseline}'s within 1 % (", flag, ")."]
    rows: list[list[Any]] = []
    unequal = []
    for m, change in (found.compare.get("matched") or {}).items():
        before, after, off = change.get("from"), change.get("to"), number(change.get("off"))
        if change.get("equal") is False:
            unequal.append(str(m))
        field = str(change.get("field") or "nothing to change") if before != after else "nothing"
        name = named(m, look) if m in look else m
        share = NONE if off is None else f"{signed(100 * off, 1)} %"
        rows.append([name, field, _plainly(before), _plainly(after), shown(number(change.get(key))), share])
    if unequal:
        said.append(f" It could not be done for {words(unequal)}: no width comes nearer than the table says.")
    head = ["mechanism", "changed", "from", "to", noun, f"against {found.baseline}"]
    caption = f"The width that gave way, and how far {noun} are from {found.baseline}'s."
    return section("fairness", title, tag("p", said), table(caption, head, rows, left=2) if rows else None)


def _plainly(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plainly(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plainly, value))
    return (
        NONE
        if value is None
        else f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )


def reproduce(found: Findings) -> Html:
    first = found.compare.get("command")
    commands = list(dict.fromkeys(c.command for c in found.cells if c.command))
    content: list[Any] = []
    if first:
        content += [
            tag("p", "The command that made this comparison:"),
            tag("pre", str(first), class_="command", tabindex=0),
        ]
    if commands:
        inside = tag("pre", "\n".join(commands), class_="command", tabindex=0)
        content.append(
            tag("details", tag("summary", f"The {len(commands)} run{'s' * (len(commands) != 1)} one by one"), inside)
        )
    environment = dict(found.compare.get("environment") or {})
    packages = environment.pop("packages", None)
    rows: list[list[Any]] = [[k, _plainly(v)] for k, v in environment.items()]
    rows += [[k, _plainly(v)] for k, v in (packages.items() if isinstance(packages, dict) else ())]
    for name, title in (
        ("precision", "precision"),
        ("impl", "attention kernel"),
        ("threads", "threads"),
        ("device", "device"),
    ):
        values = sorted({str(getattr(c, name)) for c in found.cells if getattr(c, name)})
        rows += [[title, ", ".join(values)]] if values else []
    if rows:
        content.append(
            table("The machine and the versions that these numbers come from.", ["what", "value"], rows, left=2)
        )
    return section("reproduce", "Reproduce", content or missing(found, "compare.json", "No record of a command here"))


GLOSSARY = {
    "val loss": "Mean cross entropy on held-out text, nats per token: lower is better; its exponential is perplexity.",
    "difference": "Mean over seeds of a mechanism's loss minus the baseline's with the same seed, in nats per token.",
    "95 % interval": "Where the true mean difference lies with 95 % confidence, by Student's t over the paired seeds.",
    "not distinguishable": "The interval holds 0. It is not a proof of equality: more seeds narrow it.",
    "seed": "Fixes initial weights and the order of the data; one seed means the same data for every mechanism.",
    "cache": "Bytes remembered while decoding one sequence, over all layers (KiB = 1024 bytes).",
    "floats / token": "Numbers that each further token adds to the cache, over all layers, in the long run.",
    "parameters": "Trained numbers in the whole model, embeddings included.",
    "FLOPs / token": "Matrix-product operations in one token's forward pass at full context, two per multiply-add.",
    "tokens / s": "Tokens processed per second of wall time, on the machine below; compare within this page only.",
    "ms": "Milliseconds of wall time, median over repeats that alternate between mechanisms, after a warm-up.",
    "expanded, absorbed": "Two ways to compute the same mla: rebuild keys and values, or attend to the latents.",
    "law": "A property that correct attention must have, checked in float64 on random inputs.",
    "Pareto front": "The mechanisms that no other beats in both directions at once.",
}


def glossary() -> Html:
    return section(
        "glossary", "What the numbers mean", tag("dl", [[tag("dt", k), tag("dd", v)] for k, v in GLOSSARY.items()])
    )
