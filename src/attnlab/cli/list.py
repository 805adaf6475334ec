"""The command list: show every mechanism."""

from __future__ import annotations

import json

from ..terminal import tables
from .options import Flag, Json


def list_(
    *,
    json_: Json = False,
    markdown: Flag = False,
) -> int:
    """Show every mechanism: formula, floats per token, parameters, laws, kernels.

    Args:
        json_: Print a JSON list.
        markdown: Print the table of docs/mechanisms.md.
    """
    from .. import catalogue

    records = catalogue.listing()
    if json_:
        print(json.dumps(records, indent=1))
    elif markdown:
        print(catalogue.markdown([r for r in records if r.get("package") == "attnlab"]), end="")
    else:
        tables.console().print(tables.mechanism_table(records))
    return 0
