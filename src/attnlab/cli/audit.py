"""The command audit: put the laws to any attention class."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..terminal import tables
from ..terminal.audit import table
from .options import Json, json_object, split_commas


def audit(
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    *,
    kwargs: Annotated[str | None, arg(metavar="JSON")] = None,
    config: Annotated[str | None, arg(metavar="JSON")] = None,
    call: Annotated[str | None, arg(metavar="EXPRESSION")] = None,
    mask: Literal["additive", "keep", "drop"] = "additive",
    mask_shape: Literal["auto", "2d", "4d"] = "auto",
    d_model: Annotated[int | None, arg(metavar="INT")] = None,
    laws: Annotated[str | None, arg(metavar="LAW,...")] = None,
    json_: Json = False,
) -> int:
    """Put the laws to a mechanism, or to anyone's attention class.

    Exit code: 0 all laws hold, 1 one is broken, 2 it could not run.

    Args:
        target: A mechanism's name, FILE.py:CLASS, or PACKAGE.MODULE:CLASS.
        kwargs: The arguments of the class: '{"embed_dim": 64, "num_heads": 4}'.
        config: The attributes of the one config object that the class takes; for a mechanism, fields of its Config.
        call: How to call it, for example 'module(x, attention_mask=mask)'; found out if left out.
        mask: What the mask in --call holds: 0 and -inf to add, True where a token may be seen, True where it may not.
        mask_shape: 2d is [T T], 4d is [B 1 T T].
        d_model: The width of its input, where its arguments do not tell.
        laws: Only these.
        json_: Print one JSON object.
    """
    from ..audit import audit_target

    found = audit_target(
        target,
        kwargs=json_object("--kwargs", kwargs),
        config=json_object("--config", config),
        call=call,
        mask=mask,
        mask_shape=mask_shape,
        d_model=d_model,
        laws=None if laws is None else split_commas(laws),
    )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        tables.console().print(table(found))
    return found.exit_code
