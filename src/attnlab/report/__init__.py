"""`attnlab report DIR`: a folder of results as one HTML file that needs nothing else.

The page asks the network for nothing: style, script and the plotting library are inside it, and its own policy forbids
the rest. Imports neither torch nor jax.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..errors import need
from ..files import write_bytes
from . import figures, inside, sections, sizes, tasks
from .folder import Findings, read
from .headline import headline
from .html import Html, script_json, tag
from .look import GLYPHS, STROKES, dark, looks, variables

__all__ = ["render", "write_report"]

EARLY = 'try{document.documentElement.dataset.theme=localStorage.getItem("attnlab-theme")||""}catch{}'


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html, whole or not at all, and return its path. `UserError`: there is nothing to report."""
    return write_bytes(Path(folder) / "report.html", render(folder).encode("utf-8", "replace"))


def render(folder: str | Path) -> str:
    """The report as one HTML document."""
    found = read(Path(folder))
    return page(found, plotly_script()).encode("utf-8", "replace").decode()


def page(found: Findings, plotly: str) -> str:
    look = looks(found.mechanisms)
    drawn: sections.Figures = {}
    body = [
        sections.scoreboard(found, look),
        sections.curves(found, look, drawn),
        sections.trade(found, look, drawn),
        sizes.sizes(found, look, drawn),
        sections.decoding(found, look, drawn),
        tasks.tasks(found, look, drawn),
        sections.laws(found, look),
        inside.heads(found, look, drawn),
        sections.attention(found),
        sections.samples(found, look),
        sections.costs(found, look),
        sections.benchmarks(found, look),
        sections.fairness(found, look),
        sections.reproduce(found),
        sections.glossary(),
    ]
    title = f"{headline(found)[0]} attnlab: {found.folder}"
    maps = {
        "attention": [vars(maps) for maps in found.attention],
        "map": figures.attention() if found.attention else None,
    }
    return document(title, sections.header(found), body, drawn, plotly, maps)


def document(
    title: str,
    header: Html,
    body: list[Html],
    drawn: sections.Figures,
    plotly: str,
    maps: dict[str, Any] | None = None,
) -> str:
    """A page of sections in the look of the report; `drawn` are the figures that their `sections.plot` name."""
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
    source: str = need("plotly.offline", "report").get_plotlyjs()
    return source.replace("\r", "")


def _contents(body: list[Html]) -> Html:
    """Links to the sections, read off their markup."""
    found = [str(part).split('<h2 id="')[1].split("</h2>")[0].split('-title">') for part in body if part]
    return tag("ol", [tag("li", tag("a", Html(title), href=f"#{anchor}")) for anchor, title in found])


def _policy(*scripts: str) -> str:
    """A content security policy: these scripts and no others run, and nothing is fetched."""
    digests = (b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
