"""The catalogue of mechanisms: for `attnlab list`, and for the table in docs/mechanisms.md.

Nothing is written by hand. Cache sizes come from `cache_spec`, parameters are counted, and the words are class
variables of each Config. Laws are only declared here; `attnlab audit NAME` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from . import attention
from .errors import UserError
from .formatting import number
from .spec import AttentionConfig, consecutive

SHAPE = {"d_model": 768, "n_heads": 12, "head_dim": 64}  # GPT-2's layer, with rotary positions
TOKENS = 1024  # GPT-2's context
LONG = 2**24  # tokens from which a count of FLOPs is asked how it grows


def per_layer(values: Iterable[float]) -> float:
    """Return the mean over layers that share rows, in which the first makes them; whole where it is."""
    given = list(values)
    found = sum(given) / len(given)
    return int(found) if found == int(found) else found


def listing(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one record per mechanism, in alphabetical order. One that cannot be built has its error in it."""
    return [_record(name) for name in (attention.names() if names is None else names)]


def _record(name: str) -> dict[str, Any]:
    try:
        module = attention.module(name)
        config: AttentionConfig = attention.config(name, **SHAPE)
        layers = consecutive(config, 2) if any(each.takes for each in consecutive(config, 2)) else [config]
        with torch.random.fork_rng([]):  # made in full: on the meta device it would import all of torch.compile
            parameters = sum(p.numel() for each in layers for p in attention.layer(name, each).parameters())
    except (Exception, SystemExit) as error:  # a broken mechanism must not hide the others
        return {"name": name, "error": str(error) if isinstance(error, UserError) else f"it cannot be built: {error!r}"}
    caches = [each.cache_spec for each in layers]
    return {
        "name": name,
        "summary": config.summary,
        "formula": config.formula,
        "source": config.source,
        "package": module.__name__.partition(".")[0],
        "caches": config.caches,
        "floats_per_token": per_layer(cache.per_token for cache in caches),
        "floats_at_context": per_layer(cache.floats(TOKENS) for cache in caches),
        "family": family(config),
        "state": per_layer(cache.floats(0) for cache in caches),
        **_growths(config),
        "parameters": per_layer([parameters / len(layers)]),
        "impls": [*config.impls],
        "modes": [*config.modes],
        "rewinds": config.rewinds,
        "breaks": [*config.breaks],
        "options": _options(config),
        "shape": {**SHAPE, "context": TOKENS},
    }


def _options(config: AttentionConfig) -> dict[str, Any]:
    """The fields that this mechanism adds, with their values at `SHAPE`."""
    common = {field.name for field in fields(AttentionConfig)}
    added = [field for field in fields(config) if field.name not in common and field.default is not MISSING]
    return {field.name: getattr(config, field.name) for field in added}


def family(config: AttentionConfig) -> str:
    """Return the kind of memory that a mechanism has, in one word, as its declarations say."""
    spec = config.cache_spec
    if not spec.floats(TOKENS):
        return "none"
    if not spec.rows:
        return "recurrent"
    if not spec.per_token:
        return "window"
    if config.selects is not None:
        return "sparse"
    if spec.beside:
        return "blocks"
    return "latent" if config.from_latent else "softmax"


def _growths(config: AttentionConfig) -> dict[str, str]:
    """How training and decoding grow with the tokens; "" where the mechanism does not count its FLOPs."""
    try:
        training = growth(config.flops(LONG, LONG), config.flops(2 * LONG, 2 * LONG))
        return {"training": training, "decoding": growth(config.flops(1, LONG), config.flops(1, 2 * LONG))}
    except NotImplementedError:
        return {"training": "", "decoding": ""}


def growth(once: int, twice: int) -> str:
    """Return how a count grows with the tokens T, from that of very many and that of twice as many."""
    factor = twice / once if once else 1.0
    powers = ("O(1)", "O(T)", "O(T²)", "O(T³)")
    return powers[min(round(math.log2(factor)), 3)]


def laws_in_words(record: dict[str, Any]) -> str:
    """Return which laws the mechanism of a record obeys, in words."""
    return "all that apply" if not record["breaks"] else f"breaks {', '.join(record['breaks'])}"


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/mechanisms.md: one row per mechanism, then one line of mathematics each."""
    head = [
        "mechanism",
        "family",
        "what it does",
        "floats/token",
        "state",
        f"cache at {TOKENS}",
        "training",
        "decoding",
        "parameters",
        "kernels",
        "rewinds",
        "laws",
    ]
    rows = [
        [
            f"**{r['name']}**",
            r["family"],
            r["summary"],
            number(r["floats_per_token"]),
            number(r["state"]),
            number(r["floats_at_context"]),
            r["training"],
            r["decoding"],
            number(r["parameters"]),
            ", ".join(r["impls"]) or "none",
            "yes" if r["rewinds"] else "no",
            laws_in_words(r),
        ]
        for r in records
    ]
    table = [head, ["---"] * 3 + ["---:"] * 3 + ["---"] * 2 + ["---:"] + ["---"] * 3, *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    formulas = [f"- **{r['name']}**: `{r['formula']}`. Caches {r['caches']}. Source: {r['source']}." for r in records]
    return "\n".join([*lines, "", *formulas]) + "\n"
