"""Laws: which hold for which mechanism, and the counterexamples."""

from __future__ import annotations

from ...results import LawResult
from ..html import Html, join, table, tag
from ..results_folder import Findings
from ..style import Look
from .common import Figures, failures, frame, missing

SIGNS = {"holds": "✓", "broken": "✗", "n/a": "–"}


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    if not found.laws:
        return frame("laws", "Laws", missing(found, "laws.json", "No law was checked here"))
    broken = [law for law in found.laws if law.status == "broken"]
    holds = [law for law in found.laws if law.status == "holds"]
    apart = [law for law in found.laws if law.status not in ("holds", "broken")]
    caption = (
        f"✓ holds, ✗ broken, – does not apply. {len(holds)} hold, {len(broken)} broken, {len(apart)} do not "
        "apply. Point at a sign, or tap it, for the reason."
    )
    return frame(
        "laws",
        "Laws",
        tag("div", _matrix(found, caption), class_="matrix"),
        failures("Counterexamples", [_counterexample(law) for law in broken]),
        _reasons(apart),
    )


def _matrix(found: Findings, caption: str) -> Html:
    """Return the table: a row per law, a column per mechanism."""
    mechanisms = [m for m in found.mechanisms if any(law.mechanism == m for law in found.laws)]
    statements = {law.law: law.statement for law in found.laws}
    results = {(law.law, law.mechanism): law for law in found.laws}
    rows = []
    for name, statement in statements.items():
        title = join([name, tag("span", statement, class_="statement") if statement else None])
        own = [results.get((name, m)) for m in mechanisms]
        rows.append([title, *(_sign(law) if law else "" for law in own)])
    return table(caption, ["law", *mechanisms], rows)


def _sign(law: LawResult) -> Html:
    said = f"{law.mechanism}, {law.law}: {law.status}" + (f". {law.detail}" if law.detail else "")
    state = law.status if law.status in ("holds", "broken") else "na"
    sign = SIGNS.get(law.status, "–")
    return tag("button", sign, type="button", class_=f"law {state}", data_tip=said, aria_label=said)


def _counterexample(law: LawResult) -> Html:
    found = tag("span", f"Found: {law.detail}.".replace("..", "."))
    return tag("li", tag("b", f"{law.mechanism} breaks {law.law}"), ". ", law.statement, " ", found)


def _reasons(apart: list[LawResult]) -> Html | None:
    if not apart:
        return None
    lines = [tag("li", tag("b", f"{law.mechanism}, {law.law}"), f": {law.detail or 'does not apply'}") for law in apart]
    do = "does" if len(apart) == 1 else "do"
    return tag("details", tag("summary", f"Why {len(apart)} {do} not apply"), tag("ul", lines))
