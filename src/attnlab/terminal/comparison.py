"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..contrasts import MARGIN, sentences, verdict_in_words
from ..formatting import parameter_difference
from ..results import RunResult

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


COLORS = {"better": "green", "worse": "red", "equal": "cyan", "baseline": "dim"}  # of a verdict; yellow for the others
LOSS_SIGNS = {"better": "[green]▼", "worse": "[red]▲", "equal": "[cyan]=", "undecided": "[yellow]?", "baseline": " "}
SIGNS = LOSS_SIGNS | {"better": "[green]▲", "worse": "[red]▼"}
FEW = "·"  # the sign of too few seeds


def table(found: Mapping[str, Any]) -> RenderableType:
    """Return the tables of what compare.json holds: the runs, then sizes and tasks where there are some."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    cells = [RunResult.from_dict(cell) for cell in found["cells"]]
    view = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")  # fits 80 columns
    view.add_column("mechanism", no_wrap=True)
    for title in ("val loss", f"to {found['baseline']} ± 95 %", "", "size", "cache", "tok/s"):
        view.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for row in found["summary"]:
        view.add_row(*_row(row, cells, found["statistics"]))
    seeds = len(found["seeds"])
    context = max((cell.context for cell in cells), default=0)
    notes = [f"[dim]{seeds} paired seeds; cache of one sequence of {context} tokens."]
    notes += [f"[dim]{escape(sentence)}" for sentence in sentences(found["statistics"], found["summary"])]
    if unequal := _unequal(found, cells):
        notes.append(f"[yellow]Not of one size: {escape(unequal)}; --match params makes them equal.")
    notes += [f"[dim]{escape(label)}: {escape(change['text'])}" for label, change in found["matched"].items()]
    notes += [_lost(cell) for cell in cells if cell.status == "failed"]
    below: list[RenderableType] = []
    if found["sizes"]:
        notes.insert(0, f"[dim]The largest size, {found['size']}.")
        below += ["", *size_table(found["sizes"], found["size"])]
    if found["tasks"]:
        below += ["", *task_table(found["tasks"], found["baseline"])]
    return Group(view, "", *notes, *below)


def _row(row: Mapping[str, Any], cells: Sequence[RunResult], statistics: Mapping[str, Any]) -> tuple[str, ...]:
    from rich.markup import escape

    own = [cell for cell in cells if cell.mechanism == row["mechanism"] and cell.status == "done"]
    difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
    if row["interval"]:
        low, high = row["interval"]
        difference += f" ± {(high - low) / 2:.4f}"
    rates = [cell.tokens_per_s for cell in own if cell.tokens_per_s]
    return (
        f"[bold]{escape(row['mechanism'])}",
        "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
        difference,
        f"[{COLORS.get(row['verdict'], 'yellow')}]{verdict_in_words(row['verdict'], statistics['margin'])}",
        f"{own[0].parameters / 1e6:,.2f}M" if own else "",
        f"{own[0].cache_bytes / 1024:,.0f}K" if own else "",
        f"{fmean(rates):,.0f}" if rates else "",
    )


def _unequal(found: Mapping[str, Any], cells: Sequence[RunResult]) -> str:
    """Return how the parameters of each mechanism differ from the baseline's; "" where none does by more than 1 %."""
    sizes = {cell.mechanism: cell.parameters for cell in cells if cell.status == "done"}
    said = {name: parameter_difference(size, sizes.get(found["baseline"])) for name, size in sizes.items()}
    return ", ".join(f"{name} has {text}" for name, text in said.items() if text)


def _lost(cell: RunResult, size: str = "") -> str:
    from rich.markup import escape

    who = " ".join(filter(None, (f"{cell.mechanism} s{cell.seed}", size)))
    return f"[red]{escape(who)} failed{' twice' if cell.attempts > 1 else ''}: {escape(cell.error)}"


def _grid(
    title: str, columns: Sequence[Mapping[str, Any]], name: str, cell: Callable[[Mapping[str, Any]], str]
) -> Table:
    """Return a row for each mechanism, a column for each of several comparisons."""
    from rich.markup import escape
    from rich.table import Table

    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    view.add_column(title, no_wrap=True)
    for column in columns:
        view.add_column(column[name], justify="right", no_wrap=True)
    for rows in zip(*(column["summary"] for column in columns), strict=True):
        view.add_row(f"[bold]{escape(rows[0]['mechanism'])}", *map(cell, rows))
    return view


def _marked(row: Mapping[str, Any], name: str, form: str, signs: Mapping[str, str], scale: float = 1) -> str:
    """Return a number and the sign of its verdict."""
    return "" if row[name] is None else f"{form.format(scale * row[name])} {signs.get(row['verdict'], FEW)}"


def size_table(sizes: Sequence[Mapping[str, Any]], main: str) -> list[RenderableType]:
    """Return the table of losses, a column for each size, and its notes on failed runs of sizes other than `main`."""
    view = _grid("val loss", sizes, "size", lambda row: _marked(row, "val_loss", "{:.4f}", LOSS_SIGNS))
    notes: list[RenderableType] = [
        "[dim]▼ ▲: lower, higher at that size, 95 % interval of the paired difference; "
        f"=: equal within {sizes[-1]['statistics']['margin']:g}; ?: undecided; {FEW}: too few seeds."
    ]
    cells = [
        (each["size"], RunResult.from_dict(cell)) for each in sizes if each["size"] != main for cell in each["cells"]
    ]
    return [view, "", *notes, *(_lost(cell, size) for size, cell in cells if cell.status == "failed")]


def task_table(tasks: Sequence[Mapping[str, Any]], baseline: str) -> list[RenderableType]:
    """Return the table of accuracies, a column for each task, and its notes."""
    from rich.markup import escape

    view = _grid("accuracy, %", tasks, "task", lambda row: _marked(row, "accuracy", "{:.1f}", SIGNS, 100))
    view.add_row("[dim]chance", *(f"[dim]{100 * task['chance']:.1f}  " for task in tasks))
    contexts = " or ".join(dict.fromkeys(str(task["context"]) for task in tasks))
    notes = [
        f"[dim]Held-out questions in {contexts} tokens. ▲ ▼: better, worse than {escape(baseline)}, 95 % interval of "
        f"the paired difference; =: equal within {100 * MARGIN:g} %; ?: undecided; {FEW}: too few seeds."
    ]
    widths: dict[str, list[str]] = {}
    for task in tasks:
        for label, change in task["matched"].items():
            widths.setdefault(f"{label}: {change['text']}", []).append(task["task"])
    notes += [f"[dim]{escape(text)} ({', '.join(names)})" for text, names in widths.items()]
    for task in tasks:
        for cell in task["cells"]:
            if cell["status"] == "failed":
                who = f"{cell['mechanism']} s{cell['seed']} {task['task']}"
                notes.append(f"[red]{escape(who)} failed: {escape(cell['error'])}")
    return [view, "", *notes]
