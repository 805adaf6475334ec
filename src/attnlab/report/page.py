"""Page of the report: its header, its sections in order, its content security policy."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib import resources
from string import Template
from typing import Any

from ..errors import need
from ..formatting import words
from .headline import headline
from .html import Html, script_json, tag
from .results_folder import Findings
from .sections import (
    attention,
    benchmarks,
    costs,
    curves,
    decoding,
    fairness,
    glossary,
    heads,
    laws,
    reproduce,
    samples,
    scoreboard,
    sizes,
    tasks,
    trade,
)
from .sections.common import Figures
from .style import GLYPHS, STROKES, dark, looks, variables

SECTIONS = (  # in the order of the page
    scoreboard,
    curves,
    trade,
    sizes,
    decoding,
    tasks,
    laws,
    heads,
    attention,
    samples,
    costs,
    benchmarks,
    fairness,
    reproduce,
    glossary,
)


def header(found: Findings) -> Html:
    """Return the head of the page: what was found, and facts about the comparison in one line."""
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
        *(tag("p", "Left out: ", sentence, ".", class_="facts") for sentence in found.damaged),
    )


def _plural(things: set[Any], noun: str) -> str:
    if not things:
        return ""
    return f"1 {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


# sets the chosen theme before the page is drawn
EARLY = 'try{document.documentElement.dataset.theme=localStorage.getItem("attnlab-theme")||""}catch{}'


def page(found: Findings, plotly: str) -> str:
    """Return the report as HTML; `plotly` is the script of the plotting library."""
    look = looks(found.mechanisms)
    drawn: Figures = {}
    body = [each.section(found, look, drawn) for each in SECTIONS]
    title = f"{headline(found)[0]} attnlab: {found.folder}"
    return document(title, header(found), body, drawn, plotly, attention.page_data(found))


def document(
    title: str,
    header: Html,
    body: list[Html],
    drawn: Figures,
    plotly: str,
    maps: dict[str, Any] | None = None,
) -> str:
    """Return a page of sections in the look of the report.

    `drawn` are the figures that the sections name with `common.plot`; `maps` is the data of the attention maps.
    """
    data = {
        "dark": dark(),
        "glyphs": GLYPHS,
        "strokes": STROKES,
        "figures": {name: [vars(view) for view in views] for name, views in drawn.items()},
        **(maps or {"attention": [], "map": None}),
    }
    light, dim = variables()
    script = _file("page.js")
    return Template(_file("page.html")).substitute(
        title=tag("title", title),
        policy=_policy(EARLY, plotly, script),
        early=EARLY,
        style=Template(_file("page.css")).substitute(light=light, dark=dim),
        header=header,
        contents=_contents(body),
        body=Html("\n".join(body)),
        data=script_json(data),
        plotly=plotly,
        script=script,
    )


def plotly_script() -> str:
    """Return the script of the plotting library. `UserError` where plotly is not installed."""
    source: str = need("plotly.offline", "report").get_plotlyjs()
    return source.replace("\r", "")


def _contents(body: list[Html]) -> Html:
    """Return links to the sections, read off their markup."""
    found = [str(part).split('<h2 id="')[1].split("</h2>")[0].split('-title">') for part in body if part]
    return tag("ol", [tag("li", tag("a", Html(title), href=f"#{anchor}")) for anchor, title in found])


def _policy(*scripts: str) -> str:
    """Return a content security policy: these scripts and no others run, and nothing is fetched."""
    digests = (b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
