"""Laws: which hold for which mechanism, and the counterexamples."""

from __future__ import annotations

from typing import Any

from ..findings import Findings
from ..html import Html, join, table, tag
from ..style import Look
from .common import Figures, frame, missing

SIGNS = {"holds": "✓", "broken": "✗", "n/a": "–"}


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    if not found.laws:
        return frame("laws", "Laws", missing(found, "laws.json", "No law was checked here"))
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
    return frame(
        "laws",
        "Laws",
        tag("div", table(caption, ["law", *mechanisms], rows), class_="matrix"),
        tag("div", tag("h3", "Counterexamples"), tag("ul", counter), class_="failures") if counter else None,
        tag("details", tag("summary", f"Why {len(apart)} do{'es' * (len(apart) == 1)} not apply"), tag("ul", apart))
        if apart
        else None,
    )
