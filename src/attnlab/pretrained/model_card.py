"""Model card: the mechanisms, their caches, and the results that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model import Decoder, flops_per_token

FRONT = ("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [attnlab]", "---", "")


def card(model: Decoder, family: str, source: str, results: Mapping[str, Any] | None) -> str:
    """Return README.md of an exported folder; `source` and `family` are names, `results` numbers by name."""
    config = model.config
    mixers = dict(zip(config.mechanisms, (block.attention.config for block in model.blocks()), strict=False))
    floats = sum(block.attention.config.cache_spec.per_token for block in model.blocks())
    size = model.embed.weight.element_size()
    lines = [
        *FRONT,
        f"# {'+'.join(mixers)} decoder, {model.parameter_count():,} parameters",
        "",
        f"Made from {source} by attnlab, in the form of the family `{family}`.",
        "",
        "| mechanism | formula | remembers | source |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | `{cell(c.formula)}` | {c.caches} | {c.source} |" for name, c in mixers.items()),
        "",
        "| | |",
        "| --- | --- |",
        f"| layers, width, query heads | {config.n_layers}, {config.d_model}, {config.n_heads} |",
        f"| cache per further token, all layers | {floats:,.0f} floats, {floats * size:,.0f} bytes as stored |",
        f"| forward FLOPs per token at {config.context:,} tokens | {flops_per_token(config):,.0f} |",
        *(f"| {name} | {value:,.4f} |" for name, value in (results or {}).items() if isinstance(value, (int, float))),
        "",
    ]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return `text` for a cell of a Markdown table."""
    return text.replace("|", r"\|")
