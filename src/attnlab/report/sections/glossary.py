"""Glossary of the numbers."""

from __future__ import annotations

from ..html import Html, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, frame

GLOSSARY = {
    "val loss": "Mean cross entropy on held-out text, nats per token: lower is better; its exponential is perplexity.",
    "difference": "Mean over seeds of a mechanism's loss minus the baseline's with the same seed, in nats per token.",
    "95 % interval": "Where the true mean difference lies; all intervals of a comparison hold together with 95 % "
    "confidence. Pooled ones rest on the spread of all runs, pair-wise ones on a mechanism's own pairs.",
    "better, worse": "The interval does not hold 0, and is not within the margin.",
    "equal within": "The whole interval is nearer to 0 than the margin: a difference, if any, does not matter.",
    "undecided": "The interval holds 0, and reaches beyond the margin: more seeds narrow it.",
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


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    return frame(
        "glossary", "What the numbers mean", tag("dl", [[tag("dt", k), tag("dd", v)] for k, v in GLOSSARY.items()])
    )
