"""Samples of text that each model wrote."""

from __future__ import annotations

from ..html import Html, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, frame, missing, named


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    if not found.samples:
        return frame("samples", "Samples", missing(found, "samples.json", "No sample text here"))
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
    return frame("samples", "Samples", tag("p", note, class_="note"), tag("div", cards, class_="cards"))
