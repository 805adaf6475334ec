"""The command audit: put the laws to any attention class."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..ranges import Count, Positive
from ..terminal import tables
from ..terminal.audit import table
from ..terminal.progress import working
from .options import Json, json_object, listed


def audit(
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    *,
    kwargs: Annotated[str | None, arg(metavar="JSON")] = None,
    config: Annotated[str | None, arg(metavar="JSON")] = None,
    call: Annotated[str | None, arg(metavar="EXPRESSION")] = None,
    step: Annotated[str | None, arg(metavar="EXPRESSION")] = None,
    mask: Literal["additive", "keep", "drop"] = "additive",
    mask_shape: Literal["auto", "2d", "4d"] = "auto",
    layout: Literal["bhtd", "bthd", "btd"] | None = None,
    d_model: Annotated[Count | None, arg(metavar="INT")] = None,
    laws: Annotated[str | None, arg(metavar="LAW,...")] = None,
    allow: Annotated[str | None, arg(metavar="LAW,...")] = None,
    timeout: Annotated[Positive, arg(metavar="SECONDS")] = 900.0,
    json_: Json = False,
) -> int:
    """Put the laws to a mechanism, or to anyone's attention class or function.

    Exit code: 0 all laws that apply hold, 1 one is broken, 2 nothing was judged.

    Args:
        target: A mechanism's name, FILE.py:NAME, or PACKAGE.MODULE:NAME of a class or a function.
        kwargs: The arguments of the class: '{"embed_dim": 64, "num_heads": 4}'.
        config: The attributes of the one config object that the class takes; for a mechanism, fields of its Config.
        call: How to call it, for example 'module(x, attention_mask=mask)'; found out if left out.
        step: How to call one step of decoding: 'module(x, past=cache, use_cache=True)'; found out where it can be.
        mask: What the mask in --call holds: 0 and -inf to add, True where a token may be seen, True where it may not.
        mask_shape: 2d is [T T], 4d is [B 1 T T].
        layout: Axes of a function's q, k and v: batch, head, token, size; found out if left out.
        d_model: The width of its input, where its arguments do not tell.
        laws: Only these.
        allow: These may be broken: "prefix" where outputs are meant to depend on the length of the call.
        timeout: After so long it is stopped.
        json_: Print one JSON object.
    """
    from ..audit.apart import audit_apart

    with working() as tell:
        found = audit_apart(
            target,
            seconds=timeout,
            tell=tell,
            kwargs=json_object("--kwargs", kwargs),
            config=json_object("--config", config),
            call=call,
            step=step,
            mask=mask,
            mask_shape=mask_shape,
            layout=layout,
            d_model=d_model,
            laws=None if laws is None else listed("--laws", laws),
            allow=listed("--allow", allow),
        )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        tables.console().print(table(found))
    return found.exit_code
