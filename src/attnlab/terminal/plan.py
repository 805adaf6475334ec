"""Table of `attnlab plan`: the model in detail, a row for each other mechanism, and what is assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..formatting import count, gigabytes, milliseconds, span
from .tables import columns

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..costs.plan import Plan

Facts = dict[str, tuple[str, str]]  # name -> value, explanation


def table(found: Plan, others: Sequence[Plan] = ()) -> RenderableType:
    """Return the model in detail, a row for each of `others`, and what is assumed."""
    from rich.console import Group
    from rich.markup import escape

    where = f"{found.gpus:,} x {found.gpu}, {escape(found.strategy)}, {found.precision}"
    parts: list[RenderableType] = [f"[bold]{escape(found.name)}, {found.mechanism}[/]: {where}", ""]
    parts += [_facts("Training", _training(found)), ""]
    parts += [_facts("Memory of each GPU", _memory(found)), ""]
    if not found.fits:
        parts += [_remedy(found), ""]
    parts += [_facts("Decoding", _decoding(found)), ""]
    if others:
        parts += [shapes(others), ""]
    return Group(*parts, f"[dim]{_assumptions()}")


def shapes(plans: Sequence[Plan]) -> Table:
    """Return the table of other mechanisms in the same shape: a row each."""
    right = "right"
    numbers = {"peak GB": right, "time": right, "cache": right, "batch": right, "ms": right, "in batch": right}
    view = columns(mechanism="left", size=right, **numbers)
    for each in plans:
        decode = each.decode
        view.add_row(
            f"[bold]{each.mechanism}",
            count(each.parameters, "terminal"),
            f"{'' if each.fits else '[red]'}{each.memory.peak / 1e9:,.1f}",
            "" if each.seconds is None else span(each.seconds),
            gigabytes(decode.cache),
            "any" if decode.batch is None else count(decode.batch, "terminal"),
            "" if decode.batch == 0 else f"{decode.seconds * 1e3:,.3g}",
            "" if decode.seconds_batch is None else f"{decode.seconds_batch * 1e3:,.3g}",
        )
    return view


def _facts(title: str, rows: Mapping[str, tuple[str, str]]) -> Table:
    from rich.table import Table

    view = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold")
    for width, justify in ((20, "left"), (12, "right"), (0, "left")):
        view.add_column(min_width=width, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, (value, why) in rows.items():
        view.add_row(name, value, f"[dim]{why}")
    return view


def _training(found: Plan) -> Facts:
    time = ("unknown", f"the peak is that of bf16, and this trains in {found.precision}")
    if found.seconds is not None:
        time = (span(found.seconds), f"at an MFU of {found.mfu:.0%}")
    passes = "forward, layers again, backward" if found.recompute else "forward and backward"
    return {
        "parameters": (count(found.parameters, "terminal"), f"{found.parameters:,}"),
        "FLOPs per token": (f"{found.flops_per_token / 1e9:,.3g} GFLOPs", passes),
        "tokens": (count(found.tokens, "terminal"), f"{found.flops:.3g} FLOPs"),
        "time": time,
    }


def _memory(found: Plan) -> Facts:
    memory = found.memory
    verdict = "[green]fits" if found.fits else "[bold red]does not fit"
    rows = {
        "weights": (memory.weights, "float32"),
        "gradients": (memory.gradients, "float32"),
        "optimiser": (memory.optimizer, "float32"),
        "copies of weights": (memory.copies, f"{found.precision}, of all layers"),
        "gathered weights": (memory.gathered, "float32, of two layers, embedding and head"),
        "activations": (memory.activations, f"of {found.batch:,} x {found.context:,} tokens"),
        "at the worst moment": (memory.peak, f"[/]{verdict}[/] into {gigabytes(found.usable)}"),
    }
    shown = {name: (gigabytes(held), why) for name, (held, why) in rows.items()}
    return {name: row for name, row in shown.items() if row[0] != gigabytes(0)}


def _remedy(found: Plan) -> str:
    would = "Neither sharding nor more GPUs help: a whole layer and its gradients must fit on each."
    if found.remedy:
        would = f"It would fit with {found.remedy}"
    return f"[bold red]Training does not fit.[/] {would}"


def _decoding(found: Plan) -> Facts:
    decode = found.decode
    held = f"{decode.context:,} tokens"
    batch = "no limit" if decode.batch is None else f"{decode.batch:,}"
    rows = {
        "weights": (gigabytes(decode.weights), "bfloat16"),
        "cache": (gigabytes(decode.cache), f"bfloat16, of a sequence of {held}"),
        "largest batch": (batch, "the weights do not fit" if decode.batch == 0 else f"sequences of {held}"),
    }
    if decode.batch != 0:
        rows["time per token"] = (milliseconds(decode.seconds * 1e3, "terminal"), "of one sequence")
    if decode.batch and decode.seconds_batch is not None:
        speed = decode.batch / decode.seconds_batch
        time = milliseconds(decode.seconds_batch * 1e3, "terminal")
        rows["in that batch"] = (time, f"{speed:,.0f} tokens a second in all")
    return rows


def _assumptions() -> str:
    from ..costs.plan import USABLE

    return (
        f"GB are 10^9 bytes. {USABLE:.0%} of a GPU's memory is used; the rest is left to CUDA, communication and "
        "fragmentation. Memory and FLOPs are counted on the meta device, with fused attention (which computes its "
        "scores twice), a fused AdamW and evenly loaded experts. "
        "Time is FLOPs alone; whatever else takes time is in the MFU. Decoding: one model split evenly over all GPUs, "
        "nothing lost to communication; a step reads at full bandwidth or computes at full speed, whichever takes "
        "longer."
    )
